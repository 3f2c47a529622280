"""Probing layers: the layer that holds something is found, and each document is encoded once for all candidates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import VOCABULARY, learnable_longmem

from longmem import Backbone, LongMemConfig
from longmem.data.stream import SegmentStream
from longmem.evaluate.perplexity import PerplexityReport
from longmem.evaluate.probe import ProbePlan, ProbeReport, default_candidates, probe_layers
from longmem.states import StateCache, fill_together
from longmem.training.trainer import TrainConfig

SEGMENT = 6


def topical(documents: int, length: int = 240, words: int = 6) -> list[torch.Tensor]:
    """Documents that draw on a few random words each: which ones, a segment tells badly and a memory well."""
    return [torch.randperm(VOCABULARY)[:words][torch.randint(0, words, (length,))] for _ in range(documents)]


def backbone() -> Backbone:
    """Two layers, the lower of which has nothing to remember: its values are zero."""
    frozen = learnable_longmem().backbone
    with torch.no_grad():
        frozen.layer(0).value.weight.zero_()  # type: ignore[operator, union-attr]
    return frozen


def plan(folder: Path, steps: int = 100) -> ProbePlan:
    config = LongMemConfig(memory_layers=(1,), segment=SEGMENT, memory_tokens=64, chunks_per_query=6)
    train = TrainConfig(steps=steps, rows=16, learning_rate=3e-2, save_every=steps, precision="float32")
    return ProbePlan(config, train, 60, folder)


def test_the_layer_that_holds_something_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, training, held_out = backbone(), topical(200), topical(4)
    encoded: list[int] = []
    told: list[tuple[int, str]] = []

    def probe() -> ProbeReport:
        return probe_layers(
            frozen,
            [0, 1],
            training,
            held_out,
            plan(tmp_path),
            encoded=encoded.append,
            progress=lambda layer, what: told.append((layer, what)),
        )

    report = probe()
    assert report.winner == 1 and report.ranking == [1, 0]
    assert report.gain(1).mean < -5 * report.gain(1).error
    assert abs(report.gain(0).mean) < 3 * report.gain(0).error + 1e-3
    assert report.lead.mean < -5 * report.lead.error
    assert "--memory-layer 1" in report.verdict() and "own - other memory" in report.table()
    content = report.as_dict()
    assert content["winner"] == 1 and list(content["layers"]) == ["1", "0"]
    assert content["layers"]["1"]["memory - other memory"]["mean"] == report.gain(1).mean
    assert sum(encoded) == sum(map(len, training)) + sum(map(len, held_out)), "each document once for all candidates"
    segments = 4 * (239 // SEGMENT)
    assert told.count((0, "step")) == told.count((1, "step")) == 100 and told.count((0, "segment")) == segments

    monkeypatch.setattr(frozen, "encode", lambda *_: pytest.fail("encoded again"))
    told.clear()
    again = probe()
    assert again.gain(1) == report.gain(1) and (1, "step") not in told, "what is there is not done again"


def test_states_of_several_layers_are_each_ones_own(tmp_path: Path) -> None:
    documents = [torch.randint(0, VOCABULARY, (length,)) for length in (50, 31)]
    models = [learnable_longmem(memory_layers=layers) for layers in ((0,), (1,), (0, 1))]
    for model in models[1:]:
        model.backbone.load_state_dict(models[0].backbone.state_dict())
    models = [type(model)(models[0].backbone, model.config) for model in models]
    together = [StateCache(model, documents, tmp_path / "together", precision="float32") for model in models]
    fill_together(together)
    batch = next(iter(SegmentStream(documents, rows=2, segment=SEGMENT)))
    for cache in together:
        alone = StateCache(cache.model, documents, tmp_path / "alone", precision="float32")
        wanted, got = alone(batch), cache(batch)
        assert torch.equal(wanted.key, got.key) and torch.equal(wanted.value, got.value)
        assert wanted.hidden.keys() == got.hidden.keys()
        assert all(torch.equal(wanted.hidden[depth], got.hidden[depth]) for depth in got.hidden)
        now = cache.model.backbone.encode(batch.tokens, cache.model.config.memory_layers, cache.model.sidenet.depths)
        torch.testing.assert_close(got.key, now.key, atol=1e-5, rtol=1e-4)


def test_states_kept_in_bf16_come_out_in_the_backbones_dtype(tmp_path: Path) -> None:
    model, documents = learnable_longmem(), [torch.randint(0, VOCABULARY, (50,))]
    batch = next(iter(SegmentStream(documents, rows=1, segment=SEGMENT)))
    full = StateCache(model, documents, tmp_path, precision="float32")
    half = StateCache(model, documents, tmp_path, precision="float32", dtype=torch.bfloat16)
    wanted, got = full(batch), half(batch)
    assert got.key.dtype == torch.float32 and half.path(0) != full.path(0)
    assert torch.equal(got.key, wanted.key.bfloat16().float())
    assert torch.equal(got.hidden[1], wanted.hidden[1].bfloat16().float())
    assert half.path(0).stat().st_size < 0.6 * full.path(0).stat().st_size


def made_up(*gains: float) -> ProbeReport:
    noise = torch.randn(50).double() * 0.01
    empty = torch.zeros(50).double()
    return ProbeReport(
        {
            layer: PerplexityReport(
                {"backbone": empty, "empty memory": empty, "memory": empty + gain + noise, "other memory": empty}, 300
            )
            for layer, gain in enumerate(gains)
        }
    )


def test_the_verdict_says_when_there_is_none() -> None:
    assert made_up(-0.1, -0.3, 0.0).verdict().startswith("best: --memory-layer 1, -0.2000 ± 0.0000 nats ahead of layer")
    assert made_up(-0.1).verdict() == "best: --memory-layer 0"
    assert made_up(0.0, 0.1).verdict().startswith("no layer reads its memory")


def test_candidates_are_spread_over_the_upper_layers() -> None:
    assert default_candidates(30) == [10, 12, 14, 16, 18, 20, 22, 24, 26, 28]
    assert default_candidates(2) == [0] and default_candidates(3) == [1]
    with pytest.raises(ValueError, match=r"different candidate layers, at least one, got \[1, 1\]"):
        probe_layers(backbone(), [1, 1], [], [], plan(Path("nowhere")))
    with pytest.raises(ValueError, match=r"got \(9,\)"):
        probe_layers(backbone(), [9], [], [], plan(Path("nowhere")))
