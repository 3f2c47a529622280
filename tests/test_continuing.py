"""How a run ends early, and how it goes on: signals, a full disk, more steps, other settings."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks, start_ranks
from models import VOCABULARY, learnable_longmem
from torch import Tensor

from longmem.data.stream import SegmentStream
from longmem.states import encode_now
from longmem.training.config import TrainConfig
from longmem.training.processes import Processes, whole
from longmem.training.trainer import Trainer

CONFIG = TrainConfig(steps=8, rows=2, learning_rate=1e-2, warmup=2, save_every=100, precision="float32")


def trainer(folder: Path, config: TrainConfig = CONFIG, **options: Any) -> Trainer:
    torch.manual_seed(0)
    documents = Processes().share_of([torch.randint(0, VOCABULARY, (n,)) for n in (80, 90, 70, 60)])
    torch.manual_seed(7)
    model = learnable_longmem(segment=6)
    stream = SegmentStream(documents, rows=config.rows, segment=6, seed=0, repeat=True)
    return Trainer(model, stream, encode_now(model), config, folder, **options)


def end_of(one: Trainer) -> dict[str, Tensor]:
    """The weights and the memory after a run."""
    one.run()
    weights = {name: whole(parameter.detach()).clone() for name, parameter in one.model.trainable().items()}
    return weights | {f"memory {name}": tensor.clone() for name, tensor in one.memory.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def at_step(step: int, action: Callable[[], None]) -> Callable[[dict[str, float]], None]:
    return lambda metrics: action() if metrics["step"] == step else None


class Ended(BaseException):
    """What an application makes of a signal."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_with_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    """Before the first --save-every, and the run goes on from there to the same bits."""

    def handler(*_: object) -> None:
        raise Ended

    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else handler)
    try:
        with pytest.raises((KeyboardInterrupt, Ended)) as caught:
            trainer(tmp_path / "stopped").run(at_step(3, lambda: signal.raise_signal(number)))
        assert signal.getsignal(number) is (signal.default_int_handler if number == signal.SIGINT else handler)
    finally:
        signal.signal(number, before)
    if number == signal.SIGINT:
        assert f"stopped after step 3 of 8; {tmp_path}/stopped has its checkpoint" in str(caught.value)
    resumed = trainer(tmp_path / "stopped")
    assert resumed.step == 3
    assert same(end_of(resumed), end_of(trainer(tmp_path / "whole")))


def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path: Path) -> None:
    steps: list[float] = []

    def twice(metrics: dict[str, float]) -> None:
        steps.append(metrics["step"])
        if metrics["step"] == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second one was not obeyed")

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path).run(twice)
    assert steps == [1, 2, 3] and not list(tmp_path.glob("checkpoint*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_that_end_nothing_and_signals_that_are_ignored_end_no_run(tmp_path: Path) -> None:
    heard: list[int] = []
    before = (
        signal.signal(signal.SIGTERM, lambda number, _: heard.append(number)),
        signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    saved: list[bool] = []

    def report(metrics: dict[str, float]) -> None:
        if metrics["step"] == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            assert not heard
        saved.append((tmp_path / "checkpoint.safetensors").exists())

    try:
        trainer(tmp_path).run(report)
    finally:
        signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGHUP, before[1])
    assert heard == [signal.SIGTERM] and saved == [False] * 3 + [True] * 5


def train_slowly(_: int, folder: Path) -> None:
    trainer(folder, replace(CONFIG, steps=10_000)).run(lambda _: time.sleep(0.01))


def test_a_process_that_is_terminated_saves_first(tmp_path: Path) -> None:
    ((process, _),) = start_ranks(None, train_slowly, tmp_path, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == -signal.SIGTERM
    lines = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert trainer(tmp_path / "run", replace(CONFIG, steps=10_000)).step == lines[-1] > 0


def stop_one_of(rank: int, folder: Path) -> int:
    one = trainer(folder, replace(CONFIG, rows=1))
    action = at_step(3, lambda: signal.raise_signal(signal.SIGINT) if rank == 1 else None)
    with pytest.raises(KeyboardInterrupt):
        one.run(action)
    return one.step


def finish(rank: int, folder: Path) -> dict[str, Tensor]:
    return end_of(trainer(folder, replace(CONFIG, rows=1)))


def test_a_signal_to_one_process_ends_all_at_the_same_step(tmp_path: Path) -> None:
    assert run_ranks(2, stop_one_of, tmp_path, tmp_path / "stopped") == [3, 3]
    resumed = run_ranks(2, finish, tmp_path, tmp_path / "stopped")
    uninterrupted = run_ranks(2, finish, tmp_path, tmp_path / "whole")
    assert all(same(*ends) for ends in zip(resumed, uninterrupted, strict=True))


# --- a disk that is full ---


def fill_the_disk(rank: int, folder: Path, world: int | None) -> str:
    config = replace(CONFIG, steps=3, rows=1)
    trainer(folder, config).run()
    if rank == (world or 1) - 1:
        # Python ignores the signal that comes with it: writing fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
    with pytest.raises(OSError) as caught:
        trainer(folder, replace(config, steps=6)).run()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert trainer(folder, config).step == 3
    return str(caught.value)


@pytest.mark.parametrize("world", [None, 2])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(world: int | None, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if world is None:
        (message,) = run_ranks(None, fill_the_disk, tmp_path, folder, None)  # type: ignore[arg-type]
        assert "too large" in message.lower()
    else:
        message, _ = run_ranks(world, fill_the_disk, tmp_path, folder, world)
    assert "the checkpoint of step 6 could not be written" in message and str(folder) in message
    assert not list(folder.glob("*.part"))


# --- other settings ---


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    end_of(trainer(tmp_path / "run", replace(CONFIG, steps=5)))
    more = trainer(tmp_path / "run", replace(CONFIG, steps=8, save_every=1))
    assert more.step == 5 and more.changed == {"train.steps": (5, 8), "train.save_every": (100, 1)}
    lines: list[dict[str, float]] = []
    more.run(lines.append)
    assert [line["step"] for line in lines] == [6, 7, 8]
    assert [line["learning_rate"] for line in lines] == [CONFIG.rate(step) for step in (5, 6, 7)]
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()] == list(range(1, 9))
    with pytest.raises(
        ValueError, match=rf"the run in {tmp_path}/run has made 8 steps already: wanted steps=8 or more, got 7"
    ):
        trainer(tmp_path / "run", replace(CONFIG, steps=7))
    done = trainer(tmp_path / "run")
    done.run(lambda _: pytest.fail("there was nothing left to do"))


def interrupted(folder: Path, step: int = 4) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(folder).run(at_step(step, lambda: signal.raise_signal(signal.SIGINT)))


def test_how_a_run_is_saved_and_computed_may_change_and_changes_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    other = trainer(tmp_path / "run", replace(CONFIG, save_every=2, checkpoint_activations=True), exact=True)
    assert same(end_of(other), end_of(trainer(tmp_path / "whole")))


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 1e-3}, {"clip": 0.1}, {"warmup": 3}, {"usage_weight": 0.1}, {"weight_decay": 0.1}, {"steps": 9}],
    ids=str,
)
def test_how_the_steps_that_are_left_are_made_may_change_and_is_told(change: dict[str, Any], tmp_path: Path) -> None:
    (name,) = change
    interrupted(tmp_path)
    with pytest.raises(ValueError, match=rf"train\.{name}: saved"):
        trainer(tmp_path, replace(CONFIG, **change), exact=True)
    one = trainer(tmp_path, replace(CONFIG, **change))
    assert one.changed == {f"train.{name}": (getattr(CONFIG, name), change[name])}
    one.run()
    assert one.step == one.config.steps
    if name != "steps":
        with pytest.raises(
            ValueError, match=rf"train\.{name}: saved .*made all its 8 steps: with more of them it goes on"
        ):
            trainer(tmp_path)


def test_a_rate_that_was_too_high_can_be_lowered_as_the_error_says(tmp_path: Path) -> None:
    end_of(trainer(tmp_path, replace(CONFIG, steps=2)))
    one = trainer(tmp_path)
    with torch.no_grad():
        next(iter(one.model.trainable().values())).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"lower learning_rate, or clip, and run again"):
        one.run()
    lower = trainer(tmp_path, replace(CONFIG, learning_rate=1e-4, clip=0.1))
    lower.run()
    assert lower.step == 8


@pytest.mark.parametrize("change", [{"rows": 1}, {"accumulate": 2}, {"reset": "never"}, {"seed": 1}], ids=str)
def test_what_a_checkpoint_depends_on_may_not_change(change: dict[str, Any], tmp_path: Path) -> None:
    interrupted(tmp_path)
    (name,) = change
    with pytest.raises(ValueError, match=rf"train\.{name}: saved .*, now .*choose another folder"):
        trainer(tmp_path, replace(CONFIG, **change))
