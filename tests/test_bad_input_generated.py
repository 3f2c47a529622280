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
from longmem_kernels import Ring, chunk_topk, memory_attention, memory_fused_attention, ring_write

B, H, G, T, S, D, R, M, C, K = 2, 4, 2, 3, 5, 8, 2, 6, 4, 3
FLOAT8 = torch.float8_e4m3fn
IMPLEMENTATIONS = ("reference", "cpp")
LOCAL = {"query": randn(B, H, T, D), "key": randn(B, G, S, D), "value": randn(B, G, S, D)}
ROWS = torch.tensor([1, 0], dtype=torch.int32)
OPTIONS = {
    "memory_query": randn(B, H, T, D), "ring_index": ROWS, "gate": zeros(H), "fusion": "gated", "scale": 0.3,
    "alibi_slopes": ones(H), "causal": True, "window": 2, "key_mask": ones(B, S).bool(), "dropout_p": 0.1,
    "dropout_seed": torch.tensor([3]), "return_lse": True, "return_memory_share": False,
}  # fmt: skip
PACKED = ("chunk_ids", "ring_index", "gate", "alibi_slopes", "key_mask", "memory_scale", "count", "mask")
FREE = {"ring_index": ()}


def ring_of(dtype: torch.dtype = torch.float32) -> Ring:
    return random_ring(7, rings=R, kv_heads=G, chunks=M, chunk_size=C, head_dim=D, dtype=dtype)


def subjects() -> list[Subject]:
    ring, quantised = ring_of(), ring_of(FLOAT8)
    ids = torch.randint(-1, M, (B, H, T, K), dtype=torch.int32)
    found: list[Subject] = []
    for impl in IMPLEMENTATIONS:
        found += [
            Subject(
                "Ring.new", Ring.new,
                {"rings": R, "kv_heads": G, "chunks": M, "chunk_size": C, "head_dim": D, "dtype": torch.float32,
                 "device": "cpu"},
            ),
            Subject(
                "ring_write", ring_write,
                {"ring": ring, "key": randn(B, G, T, D), "value": randn(B, G, T, D), "ring_index": ROWS,
                 "mask": ones(B, T).bool(), "impl": impl},
                packed=PACKED, frozen=("ring.store", "ring.centroid", "ring.tail"),
                any_value=("ring.cursor",),  # see test_hostile_values.py
            ),
            Subject(
                "chunk_topk", chunk_topk,
                {"query": randn(B, H, T, D), "centroid": randn(R, G, M, D), "k": K,
                 "count": torch.tensor([M, 1], dtype=torch.int32), "ring_index": ROWS, "impl": impl},
                packed=PACKED, free={"query": (2,), "centroid": (2,)},
            ),
            Subject(
                "memory_attention", memory_attention,
                {**LOCAL, "memory_key": quantised.key, "memory_value": quantised.value, "chunk_ids": ids,
                 "memory_scale": quantised.scale, **OPTIONS, "impl": impl},
                packed=PACKED, any_value=("dropout_seed",), free={"chunk_ids": (3,)},
                frozen=("memory_scale", "alibi_slopes"),
            ),
            Subject(
                "memory_fused_attention", memory_fused_attention,
                {**LOCAL, "ring": ring, "k": K, **OPTIONS, "impl": impl},
                also=("chunk_topk", "memory_attention"), packed=PACKED, any_value=("dropout_seed", "ring.cursor"),
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


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: f"{s.name}-{s.good.get('impl', '')}")
def test_the_good_call_is_good(subject: Subject) -> None:
    call = {name: value for name, value in subject.good.items() if name != "ring"}
    if "ring" in subject.good:
        call["ring"] = ring_of()
    subject.function(**call)


def test_every_public_function_is_tried() -> None:
    names = {subject.function for subject in SUBJECTS}
    public: dict[str, Any] = {name: getattr(longmem_kernels, name) for name in longmem_kernels.__all__}
    functions = {value for name, value in public.items() if inspect.isfunction(value) and name != "debug_checks"}
    assert functions <= names, functions - names
