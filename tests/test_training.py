"""Training: it learns, it resumes bit for bit, and cached states are the states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, learnable_longmem

from longmem import LongMem
from longmem.data.stream import SegmentStream
from longmem.evaluate.perplexity import perplexity
from longmem.states import StateCache, encode_now
from longmem.training.config import TrainConfig
from longmem.training.trainer import Trainer

SEGMENT = 6
CONFIG = TrainConfig(steps=8, rows=2, learning_rate=1e-2, warmup=2, save_every=3, precision="float32")


def topical(documents: int, length: int = 240, words: int = 6) -> list[torch.Tensor]:
    """Documents that draw on a few random words each: which ones, a segment tells badly and a memory well."""
    return [torch.randperm(VOCABULARY)[:words][torch.randint(0, words, (length,))] for _ in range(documents)]


def stream(documents: list[torch.Tensor]) -> SegmentStream:
    return SegmentStream(documents, rows=2, segment=SEGMENT, repeat=True, seed=0)


def weights(model: LongMem) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.trainable().items()}


def fresh_model(**options: Any) -> LongMem:
    torch.manual_seed(7)
    return learnable_longmem(segment=SEGMENT, **options)


@pytest.mark.parametrize("options", [{}, {"sidenet": "exact", "reduction": 1, "trainable": "all", "fusion": "gated"}])
def test_training_lowers_the_loss(options: dict[str, Any], tmp_path: Path) -> None:
    model = fresh_model(**options)
    config = TrainConfig(steps=60, rows=2, learning_rate=3e-2, save_every=60, precision="float32")
    losses: list[float] = []
    Trainer(model, stream(topical(4)), encode_now(model), config, tmp_path).run(lambda m: losses.append(m["loss"]))
    assert sum(losses[-10:]) / 10 < losses[0] - 2.0, (losses[0], losses[-10:])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert {"loss", "tokens_per_second", "memory_fill", "temperature"} <= lines[-1].keys()
    assert (tmp_path / "longmem.safetensors").exists()


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(stop_after: int, tmp_path: Path) -> None:
    documents = topical(3)

    def trainer(folder: str) -> Trainer:
        model = fresh_model()
        return Trainer(model, stream(documents), encode_now(model), CONFIG, tmp_path / folder)

    whole = trainer("whole")
    whole.run()

    def interrupt(metrics: dict[str, float]) -> None:
        if metrics["step"] == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer("stopped").run(interrupt)
    resumed = trainer("stopped")
    assert resumed.step == stop_after - 1 - (stop_after - 1) % CONFIG.save_every
    resumed.run()
    for name, tensor in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], tensor), name
    for name, tensor in whole.memory.state_dict().items():
        assert torch.equal(resumed.memory.state_dict()[name], tensor), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, CONFIG.steps + 1))


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    documents, model = topical(2), fresh_model()
    Trainer(model, stream(documents), encode_now(model), CONFIG, tmp_path).run()
    other = TrainConfig(**{**CONFIG.__dict__, "learning_rate": 5e-3})
    with pytest.raises(ValueError, match=r"train\.learning_rate: saved 0\.01, now 0\.005"):
        Trainer(model, stream(documents), encode_now(model), other, tmp_path)
    with pytest.raises(ValueError, match="another stream"):
        Trainer(model, stream(topical(2)), encode_now(model), CONFIG, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = fresh_model()
    with torch.no_grad():
        model.sidenet.reads["0"].output.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="loss of step 1 is nan"):
        Trainer(model, stream(topical(2)), encode_now(model), CONFIG, tmp_path).run()


@pytest.mark.parametrize("sidenet", ["none", "exact"])
def test_cached_states_are_the_states(sidenet: str, tmp_path: Path) -> None:
    model = fresh_model(sidenet=sidenet, reduction=1)
    documents = [torch.randint(0, VOCABULARY, (length,)) for length in (50, 12, 31)]
    live, cache = encode_now(model), StateCache(model, documents, tmp_path, rows=2, precision="float32")
    seen: list[int] = []
    cache.fill(seen.append)
    assert sum(seen) == 50 + 12 + 31
    for batch in SegmentStream(documents, rows=2, segment=SEGMENT):
        now, kept = live(batch), cache(batch)
        mask = batch.mask[:, None, :, None]
        torch.testing.assert_close(kept.key * mask, now.key * mask, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(kept.value * mask, now.value * mask, atol=1e-5, rtol=1e-4)
        for depth, hidden in now.hidden.items():
            expected = hidden * batch.mask[..., None]
            torch.testing.assert_close(kept.hidden[depth] * batch.mask[..., None], expected, atol=1e-5, rtol=1e-4)


def test_cached_states_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents = fresh_model(), topical(2)
    StateCache(model, documents, tmp_path, precision="float32").fill()
    monkeypatch.setattr(model.backbone, "encode", lambda *_: pytest.fail("encoded again"))
    StateCache(model, documents, tmp_path, precision="float32").fill()


def test_perplexity_tells_the_right_memory_from_a_wrong_one(tmp_path: Path) -> None:
    """On documents with words of their own, a trained memory of the document must beat an empty and a foreign one."""
    model = fresh_model()
    config = TrainConfig(steps=200, rows=16, learning_rate=3e-2, save_every=200, precision="float32")
    walk = SegmentStream(topical(400), rows=16, segment=SEGMENT, repeat=True)
    Trainer(model, walk, encode_now(model), config, tmp_path).run()
    report = perplexity(model, encode_now(model), topical(4), score_from=60, precision="float32")
    assert report.tokens == 4 * (239 // SEGMENT - 60 // SEGMENT) * SEGMENT
    for baseline in ("empty memory", "other memory"):
        gain = report.difference("memory", baseline)
        assert gain.mean < -3 * gain.error, (baseline, gain)
    assert "memory - other memory" in report.table()


def test_perplexity_needs_two_documents_that_are_long_enough() -> None:
    model = fresh_model()
    with pytest.raises(ValueError, match=r"two documents or more, each longer than 66 tokens, got 1 of \[240\]"):
        perplexity(model, encode_now(model), topical(1), score_from=60)
    with pytest.raises(ValueError, match=r"got 2 of \[60, 60\]"):
        perplexity(model, encode_now(model), topical(2, length=60), score_from=60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_bad_training_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
