"""Backbones in every format, under autocast or not: as transformers computes, trained, evaluated, generated with."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, VOCABULARY, learnable_longmem, tiny_backbone, tiny_huggingface, tiny_longmem

from longmem import LongMem, LongMemConfig, MemoryBank, huggingface_backbone
from longmem.data.stream import SegmentStream
from longmem.evaluate.perplexity import perplexity
from longmem.evaluate.probe import ProbePlan, probe_layers
from longmem.precision import autocast, memory_dtype, resolve_precision
from longmem.states import StateCache, encode_now
from longmem.training.config import TrainConfig
from longmem.training.step import loss_scale
from longmem.training.trainer import Trainer

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF, torch.float64]
# Autocast of one half beside weights of the other is left out where transformers itself cannot (LayerNorm on a CPU).
CROSSED = ["llama", "qwen3", "gemma3"]
SIDENETS: list[dict[str, Any]] = [
    {"sidenet": "none", "fusion": "gated"},
    {"sidenet": "exact", "fusion": "joint"},
    {"sidenet": "exact", "trainable": "all", "fusion": "gated"},
    {"sidenet": "paper", "trainable": "all", "fusion": "joint", "memory_layers": (3,)},
]


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length))


def under(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def walk(model: LongMem, dtype: torch.dtype | None) -> None:
    """Two optimiser steps, then what else is done with a memory."""
    memory = model.new_memory(2)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-5)
    before = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
    for _ in range(2):
        ids = tokens(2, 13)
        with under(dtype):
            loss = model(ids[:, :-1], memory, targets=ids[:, 1:]).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable().values())
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.trainable().items():
        assert parameter.dtype in (torch.float32, torch.float64)
        assert (parameter != before[name]).any(), "a rate that would vanish in half precision"
    with under(dtype):
        assert len(list(model.generate(tokens(2, 17), memory, max_new_tokens=10))) == 10
        model.remember(tokens(2, 30), memory)
        logits = model(tokens(2, 12), memory, mask=torch.arange(12) >= torch.tensor([[3], [0]])).logits
    assert logits.isfinite().all() and memory.ring.store.dtype == model.backbone.dtype


@pytest.mark.parametrize("cast", [None, *HALF], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_path_runs_in_every_format(dtype: torch.dtype, cast: torch.dtype | None) -> None:
    for place, family in enumerate(["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "bloom", "paper"]):
        if cast is None or dtype not in (set(HALF) - {cast}) or family in CROSSED:
            options = SIDENETS[(place + DTYPES.index(dtype)) % len(SIDENETS)]
            defaults = {"memory_layers": (2,), "segment": 12, "memory_tokens": 64, "chunks_per_query": 3}
            walk(LongMem(tiny_backbone(family).to(dtype), LongMemConfig(**(defaults | options))), cast)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_an_empty_memory_the_logits_are_those_of_transformers(family: str, dtype: torch.dtype) -> None:
    theirs, ids = tiny_huggingface(family), tokens(2, 12)
    with torch.no_grad():
        exact = theirs(ids).logits
        wanted = theirs.to(dtype)(ids).logits
    own_error = (wanted - exact).square().mean().sqrt()
    for options in ({}, {"sidenet": "exact"}, {"sidenet": "exact", "trainable": "all"}):
        config = LongMemConfig(memory_layers=(2,), segment=12, memory_tokens=64, **options)  # type: ignore[arg-type]
        model = LongMem(huggingface_backbone(theirs), config)
        with torch.no_grad():
            logits = model(ids, model.new_memory(2)).logits
        assert logits.dtype == dtype
        # A SideNet adds differences of the backbone's states: a few roundings more.
        assert (logits - exact).square().mean().sqrt() < (1.5 if not options else 4) * own_error, options


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_without_a_sidenet_an_untrained_model_is_its_backbone_to_the_bit(dtype: torch.dtype) -> None:
    model, ids = tiny_longmem(), tokens(2, 12)
    model = LongMem(model.backbone.to(dtype), model.config)
    depth = len(model.backbone.layers)
    with torch.no_grad():
        wanted = model.backbone.logits(model.backbone.encode(ids, (2,), {depth}).hidden[depth])
        assert torch.equal(model(ids).logits, wanted), "trained copies of half-precision weights start equal to them"


def test_a_run_trained_in_one_format_generates_and_evaluates_in_every_other(tmp_path: Path) -> None:
    original = learnable_longmem()  # its weights are float32: no two of its roundings are equal
    documents = [torch.randint(0, VOCABULARY, (40,)) for _ in range(2)]
    loaded = {dtype: LongMem(copy.deepcopy(original.backbone).to(dtype), original.config) for dtype in DTYPES}
    ids = tokens(1, 6)
    for trained in DTYPES:
        stream = SegmentStream(documents, rows=2, segment=6, repeat=True)
        config = TrainConfig(steps=2, rows=2)
        folder = tmp_path / str(trained)
        Trainer(loaded[trained], stream, encode_now(loaded[trained]), config, folder).run()
        memory = loaded[trained].new_memory(1)
        loaded[trained].remember(tokens(1, 30), memory)
        memory.save(folder / "memory")
        outputs = []
        for dtype in DTYPES:
            again = LongMem.from_pretrained(folder, loaded[dtype].backbone)
            report = perplexity(again, encode_now(again), documents)
            assert all(scores.isfinite().all() for scores in report.nll.values())
            theirs = MemoryBank.load(folder / "memory", again.fingerprint)
            outputs.append(again(ids, theirs, write=False).logits.double())
            assert len(list(again.generate(ids, theirs, max_new_tokens=7))) == 7
        other = loaded[torch.float16 if trained == torch.float32 else torch.float32]
        with pytest.raises(ValueError, match="backbone: the same, in another format"):
            Trainer(other, stream, encode_now(other), config, folder)
        for output in outputs:
            torch.testing.assert_close(output, outputs[-1], atol=0.05, rtol=0.05)


def test_other_weights_are_refused_in_every_format(tmp_path: Path) -> None:
    original = learnable_longmem()
    original.save_pretrained(tmp_path)
    other = learnable_longmem().backbone
    for dtype in DTYPES:
        with pytest.raises(ValueError, match="weights of its backbone differ"):
            LongMem.from_pretrained(tmp_path, copy.deepcopy(other).to(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_are_those_of_float32_to_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also where those of single logits are smaller than float16 holds."""
    exact = learnable_longmem()
    half = LongMem(copy.deepcopy(exact.backbone).to(dtype), exact.config)
    memories = [model.new_memory(64) for model in (exact, half)]
    ids = tokens(64, 13)
    found = []
    for model, memory in zip((exact, half), memories, strict=True):
        model(ids[:, :6], memory)
        scale = loss_scale(model)
        (model(ids[:, 6:12], memory, targets=ids[:, 7:]).loss * scale).backward()
        found.append({name: parameter.grad / scale for name, parameter in model.trainable().items()})
    for name, wanted in found[0].items():
        error = (found[1][name] - wanted).norm() / wanted.norm()
        assert error < {torch.bfloat16: 0.06, torch.float16: 0.02}[dtype], name


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_memory_is_kept_in_any_format(dtype: torch.dtype, kept: torch.dtype) -> None:
    model = tiny_longmem()
    model = LongMem(model.backbone.to(dtype), model.config)
    memory, own = model.new_memory(1, dtype=kept), model.new_memory(1)
    ids = tokens(1, 36)
    for bank in (memory, own):
        model.remember(ids, bank)
    assert memory.ring.store.dtype == kept and own.ring.store.dtype == dtype
    out, wanted = (model(ids[:, :12], bank, write=False).logits.float() for bank in (memory, own))
    assert (out - wanted).norm() < 0.3 * wanted.norm()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_states_on_disk_and_the_probe(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = learnable_longmem()
    half = LongMem(copy.deepcopy(whole.backbone).to(dtype), whole.config)
    documents = [torch.randint(0, VOCABULARY, (30,)) for _ in range(3)]
    batch = next(iter(SegmentStream(documents, rows=2, segment=6)))
    caches = [StateCache(model, documents, tmp_path) for model in (whole, half)]
    assert caches[0].path(0) != caches[1].path(0), "states in another format are other states"
    states, now = caches[1](batch), encode_now(half)(batch)
    assert states.key.dtype == dtype and torch.equal(states.hidden[1], now.hidden[1])
    plan = ProbePlan(whole.config, TrainConfig(steps=1, rows=1), 6, tmp_path / "probe")
    assert set(probe_layers(half.backbone, [0, 1], documents[:1], documents[1:], plan).reports) == {0, 1}


def test_norms_kept_in_float32_beside_half_precision_weights() -> None:
    theirs, ids = tiny_huggingface("gpt_neox").to(torch.bfloat16), tokens(1, 12)
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    model = LongMem(huggingface_backbone(theirs), LongMemConfig(memory_layers=(2,), segment=12, memory_tokens=64))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, model.new_memory(1)).logits, theirs(ids).logits, atol=0.1, rtol=0.05)
    model(ids, model.new_memory(1), targets=ids).loss.backward()


def test_the_format_of_products() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("float32", cpu) == "float32" == resolve_precision("float32", cpu, torch.float32)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float64, "float64")):
        assert resolve_precision("auto", cpu, dtype) == resolve_precision("float32", cpu, dtype) == name
        with autocast("auto", cpu, dtype):
            assert not torch.is_autocast_enabled("cpu")
        assert memory_dtype("auto", torch.device("cuda"), dtype) == (dtype if dtype in HALF else torch.float32)
    assert resolve_precision("bfloat16", cpu, torch.float16) == "bfloat16"
    with pytest.raises(ValueError, match="must be one of auto, float32, bfloat16, got 'half'"):
        resolve_precision("half", cpu)
