"""The published model: recorded numbers, and a composition of ordinary operations on configurations nobody recorded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from official_models import (
    DATA,
    composition_of,
    random_model,
    recorded,
    recorded_text,
    small_config,
)
from torch import Tensor

from longmem.official import OfficialConfig, OfficialLongMem, load_official
from longmem.official.loading import official_parameters
from longmem.official.loss import head_loss

GOLDEN = os.environ.get("LONGMEM_GOLDEN")
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
ROUNDING = 1e-5  # two float32 scores that are closer than this may swap places


def assert_reproduces(model: OfficialLongMem, data: dict[str, Tensor], segments: int, every: int) -> None:
    """Walk the recorded segments; `every`: which of a gradient's elements were kept."""
    for s in range(segments):
        segment = {name.split("/", 1)[1]: t for name, t in data.items() if name.startswith(f"seg{s}/")}
        model.zero_grad()
        assert model.memory.dstore_idx == segment["mem_counts"][0]
        logits = model(segment["src_tokens"])
        loss = F.cross_entropy(logits.flatten(0, 1), segment["target"].flatten(), ignore_index=1)
        loss.backward()
        assert abs(loss.item() - segment["loss"].item()) < 1e-5
        if "logits" in segment:
            torch.testing.assert_close(logits, segment["logits"], **CLOSE)
        assert model.memory.dstore_idx == segment["mem_counts"][2]
        assert all(index.ntotal == segment["mem_counts"][3] for index in model.memory.index_list)
        if "knn_index" in segment:
            assert segment["knn_min_margin"] > ROUNDING  # so the sets must agree exactly
            assert model.knn_index is not None and torch.equal(model.knn_index, segment["knn_index"])
        if "memory_bias_grad_is_none" in segment:
            assert (model.memory_bias.grad is None) == bool(segment["memory_bias_grad_is_none"])
    parameters = official_parameters(model)
    recorded_gradients = {name.removeprefix("grad/"): t for name, t in data.items() if name.startswith("grad/")}
    trained = {name for name, parameter in parameters.items() if parameter.grad is not None}
    assert trained == recorded_gradients.keys()
    for name, wanted in recorded_gradients.items():
        gradient = parameters[name].grad
        assert gradient is not None
        torch.testing.assert_close(gradient.flatten()[::every], wanted.flatten(), **CLOSE)
    if "readonly/logits" in data:
        before = model.memory.dstore_idx
        torch.testing.assert_close(
            model(data["readonly/src_tokens"], memory_write=False), data["readonly/logits"], **CLOSE
        )
        assert model.knn_index is not None and torch.equal(model.knn_index, data["readonly/knn_index"])
        assert model.memory.dstore_idx == before


def test_reproduces_the_published_numbers() -> None:
    data, config = recorded(DATA / "official_case_b.npz"), recorded_text(DATA / "official_case_b.npz", "config")
    backbone = {name.removeprefix("param/"): t for name, t in data.items() if name.startswith("param/")}
    # The SideNet of this recording is the published start, which the recording therefore tests too.
    start = OfficialLongMem(OfficialConfig.from_dict(config))
    for name, parameter in official_parameters(start).items():
        if name in backbone:
            parameter.data.copy_(backbone[name])
    start.initialise_from_backbone()
    state = {name: p.detach().clone() for name, p in official_parameters(start).items()}
    assert_reproduces(load_official(state, config), data, config["segments"], every=8)


@pytest.mark.skipif(GOLDEN is None, reason="LONGMEM_GOLDEN does not name the folder with the full recordings")
@pytest.mark.parametrize("case", ["case_a", "case_b"])
def test_reproduces_the_full_recordings(case: str) -> None:
    assert GOLDEN is not None
    data, about = recorded(Path(GOLDEN) / f"{case}.npz"), json.loads((Path(GOLDEN) / f"{case}.json").read_text())
    state = {name.removeprefix("param/"): t for name, t in data.items() if name.startswith("param/")}
    model = load_official(state, about["config"])
    assert_reproduces(model, data, about["config"]["segments"], every=1)
    torch.testing.assert_close(torch.stack(model.memory.keys), data["final_memory_keys"], **CLOSE)
    torch.testing.assert_close(torch.stack(model.memory.vals), data["final_memory_vals"], **CLOSE)


# Rows and tokens of the segments of a walk.
EVEN = [(2, 12)] * 7
RAGGED = [(2, 12), (1, 7), (3, 5), (2, 9), (2, 12), (1, 3), (2, 11), (2, 12), (1, 12)]
VARIANTS: dict[str, dict[str, Any]] = {
    "3 heads": {},
    "6 heads": {"heads": 6},
    "5 heads": {"heads": 5, "embed": 40},
    "chunks of 1": {"chunk": 1, "k": 5},
    "chunks of 3": {"chunk": 3, "k": 12, "memory_size": 100},
    "chunks of 8": {"chunk": 8, "k": 16},
    "more chunks asked for than stored": {"k": 64},
    "factor 1": {"layer_reduction_factor": 1},
    "factor 3 of 7 layers": {"layers": 7, "layer_reduction_factor": 3, "retrieval_layer_index": 3},
    "keys of an even layer": {"retrieval_layer_index": 2},
    "memory of the first layer": {"retrieval_layer_index": 0},
    "keys above the last SideNet layer used": {"layers": 5, "retrieval_layer_index": 1},
    "fewer SideNet layers": {"layers": 6, "sidenet_layers": 2, "retrieval_layer_index": 1},
    "half the memory an eviction": {"memory_size": 56},
}


def tokens_of(walk: list[tuple[int, int]], vocab: int) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for rows, steps in walk:
        text = torch.randint(4, vocab, (rows, steps + 1))
        pairs.append((text[:, :-1], text[:, 1:]))
    return pairs


def walk_side_by_side(
    model: OfficialLongMem,
    segments: list[tuple[Tensor, Tensor]],
    *,
    storage: torch.dtype = torch.float32,
    read_only: tuple[int, ...] = (),
    learning_rate: float = 2e-4,
) -> None:
    """Train both with the published optimiser; logits, sets, counts, gradients and parameters agree at every step."""
    theirs = composition_of(model, storage=storage)
    parameters = official_parameters(model)
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    optimisers = [
        torch.optim.AdamW([tensors[name] for name in trained], learning_rate, (0.9, 0.98), 1e-6, 0.01)
        for tensors in (parameters, theirs.parameters)
    ]
    for s, (tokens, targets) in enumerate(segments):
        write = s not in read_only
        logits, wanted = model(tokens, memory_write=write), theirs(tokens, memory_write=write)
        torch.testing.assert_close(logits, wanted, **CLOSE)
        assert model.memory.dstore_idx == theirs.memory.stored
        assert (model.knn_index is None) == (s == 0)
        if model.knn_index is not None and theirs.chunk_numbers is not None:
            assert torch.equal(model.knn_index, theirs.chunk_numbers)  # random scores lie far apart
        for optimiser, output in zip(optimisers, (logits, wanted), strict=True):
            optimiser.zero_grad()
            F.cross_entropy(output.flatten(0, 1), targets.flatten(), ignore_index=1).backward()
        for name in trained:
            mine, other = parameters[name].grad, theirs.parameters[name].grad
            assert (mine is None) == (other is None), name
            if mine is not None and other is not None:
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))
        for optimiser in optimisers:
            optimiser.step()
    for name in trained:
        torch.testing.assert_close(parameters[name], theirs.parameters[name], **CLOSE)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_agrees_with_the_composition(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    walk_side_by_side(random_model(config), tokens_of(EVEN, config.vocab))


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_agrees_on_batches_of_changing_size(chunk: int) -> None:
    """Tokens that fill no chunk are dropped, and a chunk may mix two rows."""
    config = small_config(chunk=chunk, k=12)
    walk_side_by_side(random_model(config), tokens_of(RAGGED, config.vocab))


def test_agrees_with_half_precision_storage() -> None:
    model = random_model(small_config(), storage=torch.float16)
    walk_side_by_side(model, tokens_of(EVEN, 61), storage=torch.float16)
    assert model.memory.keys[0].dtype == torch.float16


def test_agrees_where_segments_are_read_only() -> None:
    walk_side_by_side(random_model(small_config()), tokens_of(EVEN, 61), read_only=(2, 3, 6))


@pytest.mark.parametrize("place", ["end", "middle"])
def test_agrees_with_padding(place: str) -> None:
    """Padding is ignored by ordinary layers, seen by the memory layer, and stored. (It needs a memory: the published
    code stops at padding before that.)"""
    segments = tokens_of(EVEN, 61)
    for s in (2, 3, 5):
        tokens, targets = (x.clone() for x in segments[s])
        hidden = slice(8, 12) if place == "end" else slice(4, 7)
        tokens[1, hidden], targets[1, hidden] = 1, 1
        segments[s] = tokens, targets
    walk_side_by_side(random_model(small_config()), segments)


def test_padding_may_come_before_anything_is_stored() -> None:
    """Where the published code stops, a padded row computes what it computes alone."""
    model = random_model(small_config())
    tokens = torch.randint(4, 61, (2, 12))
    tokens[1, 9:] = 1
    logits = model(tokens, memory_write=False)
    torch.testing.assert_close(logits[1:, :9], model(tokens[1:, :9], memory_write=False), **CLOSE)


def test_long_tokens_are_walked_and_may_be_differentiated_through() -> None:
    """Eight segments at once, evictions among them: gradients of all of them are as in the composition."""
    model = random_model(small_config(memory_size=56))
    theirs = composition_of(model)
    tokens = torch.randint(4, 61, (1, 12 * 8 - 5))
    logits = model(tokens)
    wanted = torch.cat([theirs(part) for part in tokens.split(12, 1)], 1)
    torch.testing.assert_close(logits, wanted, **CLOSE)
    assert model.memory.dstore_idx == theirs.memory.stored == 10  # of 31
    cotangent = torch.randn_like(logits)
    for output in (logits, wanted):
        (output * cotangent).sum().backward()
    assert model.memory_bias.grad is not None
    for name, parameter in official_parameters(model).items():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs.parameters[name].grad, rtol=1e-4, atol=1e-4)


def test_reset_starts_afresh() -> None:
    model = random_model(small_config())
    first, second = (tokens for tokens, _ in tokens_of(EVEN[:2], 61))
    before = model(first)
    assert not torch.allclose(model(first), before, atol=1e-3)
    model(second)
    model.memory.reset()
    assert model.memory.dstore_idx == 0 and not torch.stack(model.memory.keys).any()
    assert torch.equal(model(first), before)


def test_a_memory_too_small_for_the_batch_is_refused_and_stays_as_it_was() -> None:
    model = random_model(small_config(memory_size=40))
    model(torch.randint(4, 61, (2, 12)))
    with pytest.raises(ValueError, match=r"removes 12 chunks before it adds 6, and 6 are stored"):
        model(torch.randint(4, 61, (2, 12)))
    assert model.memory.dstore_idx == 6


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = OfficialLongMem(OfficialConfig())
    assert sum(p.numel() for p in model.backbone.parameters()) == 407_072_768
    assert sum(p.numel() for p in model.parameters()) == 558_155_792
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 151_083_024


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [7, 700])
def test_head_loss_is_the_cross_entropy_of_all_logits(tokens: int) -> None:
    head = torch.nn.Linear(16, 61)
    targets = torch.randint(0, 61, (2, tokens)).masked_fill_(torch.rand(2, tokens) < 0.3, 1)
    results = []
    for frozen in (True, False):
        head.requires_grad_(not frozen)
        hidden = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = head_loss(hidden, head.weight, head.bias, targets, ignore=1)
        (3 * loss).backward()
        results.append((loss.detach(), hidden.grad))
    wanted = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), ignore_index=1)
    torch.testing.assert_close(results[1][0], wanted.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)
    assert head.weight.grad is not None


def test_loss_of_the_model_is_that_of_its_logits() -> None:
    model = random_model(small_config())
    (tokens, targets), (more, labels) = tokens_of(EVEN[:2], 61)
    labels[0, 3:] = 1
    model.loss(tokens, targets)
    loss = model.loss(more, labels, memory_write=False)
    logits = model(more, memory_write=False)
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=1)
    torch.testing.assert_close(loss, wanted)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for mine, other in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"targets must be \(2, 12\), got \(2, 5\)"):
        model.loss(more, labels[:, :5])


def test_loss_without_any_target_is_zero() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    loss = head_loss(hidden, torch.randn(9, 4), torch.randn(9), torch.ones(1, 3, dtype=torch.int64), ignore=1)
    loss.backward()
    assert loss == 0 and hidden.grad is not None and not hidden.grad.any()


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_alone(name: str) -> None:
    model = random_model(small_config(**{name: 0.3}))
    tokens = torch.randint(4, 61, (1, 12))
    model(tokens)
    model.train()
    assert not torch.equal(model(tokens, memory_write=False), model(tokens, memory_write=False))
    model.eval()
    assert torch.equal(model(tokens, memory_write=False), model(tokens, memory_write=False))


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0, "heads": 0}, "layers must be at least 1, got 0; heads must be at least 1, got 0"),
        ({"retrieval_layer_index": 4}, r"retrieval_layer_index must lie in \[0, 4\), got 4"),
        ({"layers": 5, "retrieval_layer_index": 4}, "4 lies above the last SideNet layer"),
        ({"sidenet_layers": 3}, "factor 2 times sidenet_layers 3"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_configurations_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_other_sizes_are_named_where_they_are_used() -> None:
    with pytest.raises(ValueError, match="k must be a positive multiple of chunk_size, got 6 and 4"):
        OfficialLongMem(small_config(k=6))
    with pytest.raises(ValueError, match="hidden_size must be a multiple of heads, got 24 and 5"):
        OfficialLongMem(small_config(heads=5))
    with pytest.raises(ValueError, match="missing chunk, k"):
        OfficialConfig.from_dict({name: 4 for name in small_config().__dict__ if name not in ("chunk", "k")})
    with pytest.raises(ValueError, match="layer 3 would start from backbone layer 4 of 4"):
        OfficialLongMem(small_config(layer_reduction_factor=1)).initialise_from_backbone()
