"""Training: it learns, it resumes bit for bit, and cached states are the states."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import sys
import time
import warnings
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks, start_ranks
from models import VOCABULARY, learnable_longmem

from longmem import LongMem
from longmem.backbones import States
from longmem.data.stream import Batch, SegmentStream
from longmem.evaluate.perplexity import perplexity
from longmem.states import encode_now
from longmem.training.config import TrainConfig
from longmem.training.step import usage_penalty
from longmem.training.trainer import EMPTY_STEPS, Trainer

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
        live = encode_now(model)

        def noisy(batch: Batch) -> States:  # random numbers have a part in it, as dropout would
            exact = live(batch)
            return replace(exact, hidden={i: x + 0.01 * torch.randn_like(x) for i, x in exact.hidden.items()})

        return Trainer(model, stream(documents), noisy, CONFIG, tmp_path / folder)

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


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_used(tmp_path: Path) -> None:
    model = fresh_model()
    before = weights(model)
    model.sidenet.reads["0"].output.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(FloatingPointError, match=r"gradient norm of step 1 is (nan|inf)"):
        Trainer(model, stream(topical(2)), encode_now(model), CONFIG, tmp_path).run()
    assert all(torch.equal(weights(model)[name], tensor) for name, tensor in before.items())


def killed(_: int, folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    documents, model = topical(3), fresh_model()
    config = replace(CONFIG, steps=40, save_every=1)
    Trainer(model, stream(documents), encode_now(model), config, folder).run()
    return weights(model)


def test_a_run_killed_at_any_moment_ends_where_an_unkilled_one_does(tmp_path: Path) -> None:
    (wanted,) = run_ranks(None, killed, tmp_path, tmp_path / "whole")
    folder, kills = tmp_path / "killed", 0
    for moment in (0.0, 0.013, 0.03, 0.047):
        ((process, _),) = start_ranks(None, killed, tmp_path, folder)
        seen = (folder / "checkpoint.safetensors").stat().st_mtime_ns if kills else 0
        while process.is_alive() and not (
            (folder / "checkpoint.safetensors").exists()
            and (folder / "checkpoint.safetensors").stat().st_mtime_ns > seen
        ):
            time.sleep(0.001)
        time.sleep(moment)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills == 4 and not (folder / "longmem.safetensors").exists()
    (got,) = run_ranks(None, killed, tmp_path, folder)
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == list(range(1, 41))
    assert not list(folder.glob("*.part"))


# --- options ---


def test_accumulated_gradients_are_those_of_all_segments_at_once(tmp_path: Path) -> None:
    """Every token counts the same: the second of the three segments is short in one row."""
    documents, model = [topical(1, 9)[0], topical(1, 60)[0], topical(1, 60)[0]], fresh_model()
    config = replace(CONFIG, steps=1, accumulate=3, clip=1e9)
    trainer = Trainer(model, stream(documents), encode_now(model), config, tmp_path)
    wanted_model, walk = fresh_model(), iter(stream(documents))
    trainer.run()
    memory, total, targets = wanted_model.new_memory(2), 0.0, 0
    for batch in itertools.islice(walk, 3):
        output = wanted_model(
            batch.tokens, memory, targets=batch.targets, mask=batch.mask, new_document=batch.new_document
        )
        count = int((batch.targets >= 0).sum())
        (output.loss * count).backward()
        total, targets = total + output.loss.item() * count, targets + count
    assert targets % 3  # the segments have different numbers of targets
    for name, parameter in wanted_model.trainable().items():
        torch.testing.assert_close(model.trainable()[name].grad, parameter.grad / targets, rtol=1e-4, atol=1e-6)
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert line["loss"] == pytest.approx(total / targets) and line["tokens"] == targets + 1


def run_with(folder: Path, documents: list[torch.Tensor], model: LongMem, **options: Any) -> list[dict[str, float]]:
    """Metrics of a run."""
    lines: list[dict[str, float]] = []
    Trainer(model, stream(documents), encode_now(model), replace(CONFIG, **options), folder).run(lines.append)
    return lines


@pytest.mark.parametrize(
    "options", [{"memory_layers": (0,)}, {"sidenet": "exact", "reduction": 1, "trainable": "all"}], ids=str
)
def test_checkpointing_activations_changes_nothing_but_when_they_are_computed(
    options: dict[str, Any], tmp_path: Path
) -> None:
    documents, ends, calls = topical(2), [], []
    for checkpoint in (False, True):
        model = fresh_model(**options)
        layer = model.sidenet.stack[-1 if "sidenet" not in options else 0]
        seen: list[bool] = []
        layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.is_grad_enabled()))
        run_with(tmp_path / str(checkpoint), documents, model, checkpoint_activations=checkpoint)
        ends.append(weights(model))
        calls.append(sum(seen))
    assert calls == [CONFIG.steps, 2 * CONFIG.steps]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_compiled_layers_learn_the_same(
    checkpoint_activations: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, model = topical(2), fresh_model(memory_layers=(0,))
    plain = run_with(tmp_path / "plain", documents, model)
    compiled: list[Any] = []
    # Without code generation, which would take a minute.
    eager = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or eager(function))
    other = fresh_model(memory_layers=(0,))
    names = set(other.state_dict())
    lines = run_with(
        tmp_path / "compiled", documents, other, compile=True, checkpoint_activations=checkpoint_activations
    )
    assert len(compiled) == 1 and compiled[0].__self__ is other.backbone.layers[1]  # layer 0 reads
    assert set(other.state_dict()) == names
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in plain], rel=1e-4)


def test_bfloat16_learns_about_the_same(tmp_path: Path) -> None:
    documents = topical(2)
    plain = run_with(tmp_path / "float32", documents, fresh_model())
    half = run_with(tmp_path / "bfloat16", documents, fresh_model(), precision="bfloat16")
    differences = [abs(one["loss"] - other["loss"]) for one, other in zip(plain, half, strict=True)]
    assert 0 < max(differences) < 0.3, differences


def test_usage_penalty_is_the_distance_to_the_target_in_nats() -> None:
    share = torch.tensor([[[0.2, 0.3], [0.01, 0.5], [0.0, 0.0]]], requires_grad=True)  # [1, 3 heads, 2]
    found = torch.tensor([[[True, True], [True, False], [False, False]]])
    # Heads: mean 0.25, 0.01 and none found; target 0.1.
    penalty = usage_penalty(share, found, 0.1)
    assert penalty.item() == pytest.approx((0 + math.log(0.1 / 0.01)) / 2)
    penalty.backward()
    assert share.grad is not None and share.grad.isfinite().all()
    assert share.grad.nonzero().tolist() == [[0, 1, 0]] and share.grad[0, 1, 0] < 0
    assert usage_penalty(share, torch.zeros_like(found), 0.1).item() == 0


def test_the_usage_penalty_brings_memory_back(tmp_path: Path) -> None:
    """On random tokens, where memory is worth nothing."""
    documents, shares = [torch.randint(0, VOCABULARY, (400,)) for _ in range(2)], {}
    for weight in (0.0, 10.0):
        model = fresh_model(fusion="gated", gate_start=-3.0)
        options = {"steps": 40, "learning_rate": 0.1, "usage_weight": weight, "usage_target": 0.2}
        shares[weight] = run_with(tmp_path / str(weight), documents, model, **options)[-1]["memory_share"]
    assert shares[0.0] < 0.05 and shares[10.0] > 0.15, shares


@pytest.mark.parametrize(
    ("scope", "reset", "begins_anew"),
    [
        ("row", "document", [False, True, False, True, True]),
        ("row", "never", [False] * 5),
        ("shared", "document", [False, False, False, False, True]),
        ("shared", "never", [False] * 5),
    ],
)
def test_memory_is_emptied_as_told(scope: str, reset: str, begins_anew: list[bool], tmp_path: Path) -> None:
    """Rows of 2 and 4 segments: the first row begins a document at the third step, both at the fifth."""
    documents = [torch.randint(0, VOCABULARY, (length * SEGMENT,)) for length in (2, 4, 2, 9, 9)]
    model = fresh_model(scope=scope, memory_tokens=400)
    walk = SegmentStream(documents, rows=2, segment=SEGMENT)
    trainer = Trainer(model, walk, encode_now(model), replace(CONFIG, steps=5, reset=reset), tmp_path)
    tokens: list[list[int]] = []
    trainer.run(lambda _: tokens.append(trainer.memory.ring.cursor.tolist()))
    if scope == "row":
        begun = [[False, False], [False, False], [True, False], [False, False], [True, True]]
        wanted = [[0, 0]]
        for new in begun:
            wanted.append(
                [SEGMENT + (0 if n and reset == "document" else w) for n, w in zip(new, wanted[-1], strict=True)]
            )
    else:
        wanted = [[0]]
        for new in begins_anew:
            wanted.append([2 * SEGMENT + (0 if new else wanted[-1][0])])
    assert tokens == wanted[1:]


def test_memory_that_is_empty_whenever_it_is_read_is_warned_about_once(tmp_path: Path) -> None:
    """Documents of one segment: the memory of the one before is gone when the next is read."""
    documents = [torch.randint(0, VOCABULARY, (SEGMENT,)) for _ in range(4)]
    with pytest.warns(RuntimeWarning, match="no token has found anything in memory") as caught:
        lines = run_with(tmp_path / "short", documents, fresh_model(), steps=EMPTY_STEPS + 5)
    assert len([warning for warning in caught if warning.category is RuntimeWarning]) == 1
    assert {line["memory_found"] for line in lines} == {0.0} and lines[-1]["memory_fill"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run_with(tmp_path / "long", topical(2), fresh_model(), steps=EMPTY_STEPS + 1)


def test_tensorboard_gets_what_the_metrics_file_gets(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    documents = topical(2)

    def interrupt(metrics: dict[str, float]) -> None:
        if metrics["step"] == 5:
            raise KeyboardInterrupt

    for report in (interrupt, None):  # interrupted after the checkpoint of step 3, steps 4 and 5 are run again
        model = fresh_model()
        trainer = Trainer(model, stream(documents), encode_now(model), CONFIG, tmp_path, tensorboard=True)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.run(report)
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    for name in ("loss", "memory_share"):
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [line["step"] for line in lines] == list(range(1, 9))
        assert [event.value for event in logged] == pytest.approx([line[name] for line in lines])


def test_tensorboard_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    model = fresh_model()
    with pytest.raises(ValueError, match=r"TensorBoard was asked for and is not installed.*longmem\[tensorboard\]"):
        Trainer(model, stream(topical(2)), encode_now(model), CONFIG, tmp_path, tensorboard=True)


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


@pytest.mark.parametrize("context", [4 * SEGMENT, 9 * SEGMENT + 1])
def test_perplexity_of_the_backbone_with_long_context(context: int) -> None:
    """Each scored token has between three quarters of the context and all of it before it, or the whole document."""
    model, documents = fresh_model(), topical(2)
    report = perplexity(
        model, encode_now(model), documents, score_from=SEGMENT, full_context=context, precision="float32"
    )
    stride, wanted = context // 4 // SEGMENT * SEGMENT, []
    for tokens in documents:
        for at in range(SEGMENT, 239 // SEGMENT * SEGMENT, SEGMENT):
            group = (at - SEGMENT) // stride
            stop = min(SEGMENT + (group + 1) * stride, 239 // SEGMENT * SEGMENT)
            window = tokens[max(0, stop - context) : stop][None]
            states = model.backbone.encode(window, (0,), (len(model.backbone.layers),))
            logits = model.backbone.logits(states.hidden[len(model.backbone.layers)])[0]
            place = at - max(0, stop - context)
            wanted.append(F.cross_entropy(logits[place : place + SEGMENT], tokens[at + 1 : at + SEGMENT + 1]))
    got = report.nll["backbone, long context"]
    torch.testing.assert_close(got, torch.stack(wanted).double(), atol=1e-4, rtol=1e-4)
    assert "backbone, long context" in report.table()


def test_perplexity_refuses_a_long_context_that_is_none() -> None:
    model = fresh_model()
    with pytest.raises(ValueError, match="full_context must be at least four segments, got 6"):
        perplexity(model, encode_now(model), topical(2), full_context=SEGMENT)


def test_perplexity_refuses_a_document_as_its_own_control() -> None:
    model, documents = fresh_model(), topical(2)
    longer = torch.cat([documents[0], documents[1]])  # the same over what is scored
    with pytest.raises(ValueError, match="documents 0 and 1 are the same text"):
        perplexity(model, encode_now(model), [documents[0], longer, documents[1]], score_from=60)


def test_perplexity_takes_compact_documents() -> None:
    model, documents = fresh_model(), topical(2, length=60)
    reports = [
        perplexity(model, encode_now(model), [ids.to(dtype) for ids in documents], full_context=24, precision="float32")
        for dtype in (torch.int64, torch.int32)
    ]
    assert all(torch.equal(reports[0].nll[name], reports[1].nll[name]) for name in reports[0].nll)


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
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"usage_weight": -1.0}, "usage_weight must not be negative"),
        ({"usage_target": 1.0}, r"usage_target must lie in \(0, 1\)"),
        ({"reset": "sometimes"}, "reset must be one of document, never, got 'sometimes'"),
        ({"parallel": "tp"}, "parallel must be one of ddp, fsdp"),
    ],
)
def test_bad_training_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


WRONG: tuple[Any, ...] = (None, -1, 2**120, -0.5, math.nan, math.inf, -math.inf, "", "1", b"x", [], {}, torch.tensor(1))
RIGHT: dict[type, tuple[Any, ...]] = {int: (1, 2, 1000), float: (0.25, 0.5), bool: (True, False), str: ()}


@pytest.mark.parametrize("field", fields(TrainConfig), ids=lambda field: field.name)
def test_every_training_option_refuses_every_kind_of_nonsense(field: Field[Any]) -> None:
    """Generated, so that a new option is covered. An option that takes one of these values must be listed here."""
    others = {int: (True, 1.5), float: (True,), bool: (0, 1, "True"), str: (0, True, "nonsense")}
    for value in (*WRONG, *others[type(field.default)]):
        with pytest.raises((TypeError, ValueError), match=rf"^TrainConfig: {field.name} must "):
            TrainConfig(**{field.name: value})
    for value in (field.default, *RIGHT[type(field.default)]):
        assert getattr(TrainConfig(**{field.name: value}), field.name) == value
