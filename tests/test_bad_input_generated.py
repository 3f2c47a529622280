"""Every argument of the public functions in every way to be wrong: refused in words, and nothing changes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from bad_inputs import Subject
from factories import random_ring
from torch import ones, randn, zeros

import longmem_kernels
from longmem import LongMemConfig
from longmem.training.config import TrainConfig
from longmem_kernels import Ring, chunk_topk, memory_attention, memory_fused_attention, ring_write

FLOAT8 = torch.float8_e4m3fn
IMPLEMENTATIONS = ("reference", "cpp")
# Read through a copy when they are not laid out as kernels read them: small ones.
PACKED = ("chunk_ids", "ring_index", "gate", "alibi_slopes", "key_mask", "memory_scale", "count", "mask")


def subjects(
    B: int = 2, H: int = 4, G: int = 2, T: int = 3, S: int = 5, D: int = 8,
    R: int = 2, M: int = 6, C: int = 4, K: int = 3,
) -> list[Subject]:  # fmt: skip
    """A good call of every public function."""
    sizes: Any = {"rings": R, "kv_heads": G, "chunks": M, "chunk_size": C, "head_dim": D, "dtype": FLOAT8}
    ring = random_ring(M * C + C - 1, **sizes)
    rows = torch.arange(B, dtype=torch.int32).flip(0)
    local = {"query": randn(B, H, T, D), "key": randn(B, G, S, D), "value": randn(B, G, S, D)}
    options = {
        "memory_query": randn(B, H, T, D), "ring_index": rows, "gate": zeros(H), "fusion": "gated", "scale": 0.3,
        "alibi_slopes": ones(H), "causal": True, "window": 2, "key_mask": ones(B, S).bool(), "dropout_p": 0.1,
        "dropout_seed": torch.tensor([3]), "return_lse": True, "return_memory_share": False,
    }  # fmt: skip
    found = [Subject("Ring.new", Ring.new, {**sizes, "device": "cpu"})]
    found += [Subject("Ring.reset", ring.reset, {"rings": zeros(R).bool()}, packed=("rings",))]
    for impl in IMPLEMENTATIONS:
        found += [
            Subject(
                "ring_write", ring_write,
                {"ring": ring, "key": randn(B, G, T, D), "value": randn(B, G, T, D), "ring_index": rows,
                 "mask": ones(B, T).bool(), "impl": impl},
                packed=PACKED, frozen=("ring.centroid", "ring.tail", "ring.scale"),
                any_value=("ring.cursor",),
            ),
            Subject(
                "chunk_topk", chunk_topk,
                {"query": randn(B, H, T, D), "centroid": randn(R, G, M, D), "k": K,
                 "count": torch.full((R,), M, dtype=torch.int32), "ring_index": rows, "impl": impl},
                packed=PACKED, free={"query": (2,), "centroid": (2,)},
            ),
            Subject(
                "memory_attention", memory_attention,
                {**local, "memory_key": ring.key, "memory_value": ring.value,
                 "chunk_ids": torch.randint(-1, M, (B, H, T, K), dtype=torch.int32), "memory_scale": ring.scale,
                 **options, "impl": impl},
                packed=PACKED, any_value=("dropout_seed",), free={"chunk_ids": (3,)},
                frozen=("memory_scale", "alibi_slopes"),
            ),
            Subject(
                "memory_fused_attention", memory_fused_attention,
                {**local, "ring": ring, "k": K, **options, "impl": impl},
                also=("chunk_topk", "memory_attention"), passes_to=memory_attention, packed=PACKED,
                any_value=("dropout_seed", "ring.cursor"), frozen=("alibi_slopes",),
                called={"query": ("query", "memory_query")},
            ),
        ]  # fmt: skip
    return found


SUBJECTS = subjects()


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: f"{s.name}-{s.good.get('impl', '')}")
def test_every_wrong_argument_is_refused_in_words(subject: Subject) -> None:
    assert not subject.missing(), f"{subject.name}: no good value of {subject.missing()}: add one"
    tried = {name.split(".")[0] for _, name, _ in subject.wrong()}
    assert tried == set(subject.good) - set(subject.untried)
    failed = [f"{what}: {why}" for what, name, changes in subject.wrong() if (why := subject.refuses(name, changes))]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("subject", subjects(), ids=lambda s: f"{s.name}-{s.good.get('impl', '')}")
def test_the_good_call_is_good(subject: Subject) -> None:
    subject.function(**subject.good)


def test_every_wrong_value_of_a_configuration_is_refused_in_words() -> None:
    """Types, and the ranges of TrainConfig; those of LongMemConfig depend on the backbone (`LongMemConfig.check`)."""
    train, model = vars(TrainConfig()), vars(LongMemConfig(memory_layers=(0,)))
    failed = []
    for subject in (
        Subject("TrainConfig", TrainConfig, train, any_value=("warmup", "weight_decay", "usage_weight", "seed")),
        Subject("LongMemConfig", LongMemConfig, model, any_value=tuple(model), untried=("memory_layers",)),
    ):
        assert not subject.missing()
        ranges = ("is another text",) if subject.function is LongMemConfig else ()
        failed += [
            f"{what}: {why}"
            for what, name, changes in subject.wrong()
            if not (ranges and what.endswith(ranges)) and (why := subject.refuses(name, changes))
        ]
    assert not failed, "\n".join(failed)


def test_every_public_function_is_tried() -> None:
    names = {subject.function for subject in SUBJECTS}
    public: dict[str, Any] = {name: getattr(longmem_kernels, name) for name in longmem_kernels.__all__}
    functions = {value for name, value in public.items() if inspect.isfunction(value) and name != "debug_checks"}
    assert functions <= names, functions - names
