"""Training in several processes: equal to one process with all of it, and killed at any moment, equal to no kill."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks, start_ranks
from models import VOCABULARY, learnable_longmem
from torch import Tensor

from longmem import LongMem
from longmem.backbones import States
from longmem.data.stream import Batch, SegmentStream
from longmem.states import StateCache, StateSource, encode_now
from longmem.training import checkpoint
from longmem.training.config import TrainConfig
from longmem.training.processes import Processes, whole
from longmem.training.trainer import Trainer

SEGMENT = 6
SIDENET = {"sidenet": "exact", "reduction": 1, "trainable": "all", "fusion": "gated"}


def documents(*lengths: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randint(0, VOCABULARY, (6,))[torch.randint(0, 6, (length,))] for length in lengths]


def trainer(
    folder: Path, lengths: list[int], rows: int, model_options: dict[str, Any], train_options: dict[str, Any]
) -> Trainer:
    """Of this process, on its share of the documents. `train_options`: those of `TrainConfig`, and where `states` come
    from."""
    torch.manual_seed(7)
    model = learnable_longmem(segment=SEGMENT, **model_options).double()
    share = Processes().share_of(documents(*lengths))
    options: dict[str, Any] = {"steps": 8, "learning_rate": 1e-2, "warmup": 2, "save_every": 3, "precision": "float32"}
    options |= train_options
    states: StateSource = {
        "live": lambda: encode_now(model),
        "cached": lambda: StateCache(model, share, folder / "states", precision="float32"),
        "noisy": lambda: noisy(model),
    }[options.pop("states", "live")]()
    stream = SegmentStream(share, rows=rows, segment=SEGMENT, repeat=True)
    return Trainer(model, stream, states, TrainConfig(rows=rows, **options), folder)


def noisy(model: LongMem) -> StateSource:
    """States that random numbers have a part in, as dropout would give them."""
    live = encode_now(model)

    def states(batch: Batch) -> States:
        exact = live(batch)
        hidden = {depth: x + 0.01 * torch.randn_like(x) for depth, x in exact.hidden.items()}
        return replace(exact, hidden=hidden)

    return states


def weights(model: LongMem) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()).clone() for name, parameter in model.trainable().items()}


def train(rank: int, *arguments: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The metrics of every step, and the weights in the end."""
    lines: list[dict[str, float]] = []
    one = trainer(*arguments)
    one.run(lines.append)
    return lines, weights(one.model)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("model_options", "train_options"),
    [
        ({}, {}),
        (SIDENET, {"accumulate": 2, "checkpoint_activations": True}),
        ({"memory_layers": (0, 1), "scope": "shared"}, {"shard_memory": True, "reset": "never"}),
    ],
    ids=["read", "sidenet", "sharded memory"],
)
def test_two_processes_learn_what_one_learns(
    parallel: str, model_options: dict[str, Any], train_options: dict[str, Any], tmp_path: Path
) -> None:
    """The first document ends in a short segment, so that the processes have different numbers of tokens."""
    train_options = {**train_options, "parallel": parallel, "steps": 4}
    lengths = [21, 80, 60]  # one process with two rows gives its first row the third document too
    together = run_ranks(2, train, tmp_path, tmp_path / "two", lengths, 1, model_options, train_options)
    alone = {**train_options, "shard_memory": False}
    metrics, wanted = train(0, tmp_path / "one", lengths, 2, model_options, alone)
    for lines, got in together:
        for line, expected in zip(lines, metrics, strict=True):
            for name in expected.keys() - {"tokens_per_second", "memory_age"}:  # the age is a mean of means
                assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), (line["step"], name)
        for name, weight in got.items():
            torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=1e-5)
    assert metrics[0]["memory_found"] < metrics[1]["memory_found"] == 1
    written = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert written == together[0][0]
    assert (tmp_path / "two" / "longmem.safetensors").exists()


def test_fsdp_learns_what_ddp_learns_with_the_usage_penalty_and_cached_states(tmp_path: Path) -> None:
    options = {"usage_weight": 0.5, "usage_target": 0.9, "steps": 4, "states": "cached"}
    ends = [
        run_ranks(2, train, tmp_path, tmp_path / parallel, [60, 80], 1, SIDENET, {**options, "parallel": parallel})
        for parallel in ("ddp", "fsdp")
    ]
    plain = run_ranks(2, train, tmp_path, tmp_path / "plain", [60, 80], 1, SIDENET, {"steps": 4})
    for name, weight in ends[0][0][1].items():
        torch.testing.assert_close(ends[1][0][1][name], weight, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ends[0][0][1]["reads.1.gate"], plain[0][1]["reads.1.gate"])


def stop_after(rank: int, step: int, *arguments: Any) -> None:
    def interrupt(metrics: dict[str, float]) -> None:
        if metrics["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(*arguments).run(interrupt)


@pytest.mark.parametrize(
    ("world", "train_options"),
    [
        (2, {"parallel": "fsdp", "shard_memory": True}),
        # More than two: gradients must be summed in an order that no restart changes.
        (4, {"parallel": "ddp", "accumulate": 2}),
        (4, {"parallel": "fsdp"}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else value["parallel"],
)
def test_interrupted_together_they_end_where_uninterrupted_ones_do(
    world: int, train_options: dict[str, Any], tmp_path: Path
) -> None:
    arguments = ([50] * 6, 1, SIDENET, {"steps": 6, "states": "noisy", **train_options})
    whole_run = run_ranks(world, train, tmp_path, tmp_path / "whole", *arguments)
    run_ranks(world, stop_after, tmp_path, 4, tmp_path / "stopped", *arguments)
    resumed = run_ranks(world, train, tmp_path, tmp_path / "stopped", *arguments)
    for (lines, got), (_, wanted) in zip(resumed, whole_run, strict=True):
        assert [line["step"] for line in lines] == [4, 5, 6]
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def train_saving_slowly(rank: int, *arguments: Any) -> None:
    """With more time to be killed in between the parts of a save."""
    for module, name in ((checkpoint.dcp, "save"), (checkpoint.os, "rename")):
        setattr(module, name, delayed(getattr(module, name)))
    train(rank, *arguments)


def delayed(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        result = function(*args, **kwargs)
        time.sleep(0.02)
        return result

    return run


def newest_step(folder: Path) -> int:
    return max((int(path.name[-8:]) for path in folder.glob("checkpoint-????????")), default=0)


def wait_for(processes: list[BaseProcess], condition: Callable[[], bool]) -> None:
    while not condition() and all(process.is_alive() for process in processes):
        time.sleep(0.001)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_at_any_moment_they_end_where_unkilled_ones_do(parallel: str, tmp_path: Path) -> None:
    """SIGKILL at random times, many of them while a checkpoint is being written: there is one after every step."""
    arguments = ([70, 50, 64], 1, {}, {"steps": 30, "save_every": 1, "states": "noisy", "parallel": parallel})
    wanted = run_ranks(2, train, tmp_path, tmp_path / "whole", *arguments)
    moment, folder = random.Random(parallel), tmp_path / "killed"
    reached, unfinished = [0], 0
    for i in range(6):
        processes = [process for process, _ in start_ranks(2, train_saving_slowly, tmp_path, folder, *arguments)]
        wait_for(processes, lambda: newest_step(folder) > reached[-1])
        # At the start of a save, at its end, or at any time.
        if sign := ("*.part/about.json", "*.part/process-0.json", None)[i % 3]:
            wait_for(processes, lambda sign=sign: any(folder.glob(sign)))
        time.sleep(moment.random() * (0.01 if sign else 0.2))
        moment.shuffle(processes)
        for process in processes:
            process.kill()
            process.join()
        unfinished += len(list(folder.glob("*.part")))
        reached.append(newest_step(folder))
    assert unfinished, "no kill met a checkpoint being written"
    assert reached == sorted(set(reached)) and reached[-1] < 30, reached
    got = run_ranks(2, train, tmp_path, folder, *arguments)
    for (_, weights_got), (_, weights_wanted) in zip(got, wanted, strict=True):
        assert all(torch.equal(weights_got[name], weights_wanted[name]) for name in weights_wanted)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert [line["loss"] for line in lines] == [line["loss"] for line in wanted[0][0]]
    assert not list(folder.glob("*.part"))


def first_steps(rank: int, folder: Path) -> list[bool]:
    """Whether each trainable weight has a gradient after a step that found an empty memory."""
    one = trainer(folder, [60, 60], 1, SIDENET, {"steps": 3})
    with_gradient: list[bool] = []

    def look(metrics: dict[str, float]) -> None:
        if metrics["step"] == 1:
            assert metrics["memory_found"] == 0
            with_gradient.extend(parameter.grad is not None for parameter in one.model.trainable().values())

    one.run(look)
    return with_gradient


def test_the_first_step_with_an_empty_memory_does_not_stop_ddp(tmp_path: Path) -> None:
    """DDP stops at the second step when a weight had no gradient in the first: the gate has one, zero."""
    for with_gradient in run_ranks(2, first_steps, tmp_path, tmp_path / "run"):
        assert with_gradient and all(with_gradient)


def refuse(rank: int, folder: Path) -> None:
    arguments = ([60, 60], 1, {}, {"steps": 2})
    if rank == 0:
        (folder / "alone").mkdir()
        (folder / "alone" / "checkpoint.safetensors").touch()
    dist.barrier()
    with pytest.raises(ValueError, match="holds that of a run without torchrun"):
        trainer(folder / "alone", *arguments)
    train(rank, folder / "run", *arguments)
    with pytest.raises(ValueError, match=r"train\.accumulate: saved 1, now 2"):
        trainer(folder / "run", [60, 60], 1, {}, {"steps": 3, "accumulate": 2})
    with pytest.raises(ValueError, match="a document for each of 2 processes, got 1"):
        trainer(folder / "run", [60], 1, {}, {})
    one = trainer(folder / "nan", *arguments)
    if rank == 1:  # a loss that is not finite in one process stops all
        with torch.no_grad():
            for parameter in one.model.trainable().values():
                parameter.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="loss of step 1 is nan"):
        one.run()


def test_what_cannot_go_on_is_refused_everywhere(tmp_path: Path) -> None:
    run_ranks(2, refuse, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="holds that of a run with torchrun"):
        trainer(tmp_path / "run", [60, 60], 1, {}, {"steps": 2})


def read_damaged(rank: int, folder: Path, part: str) -> str:
    """A copy of the run with one file of its checkpoint missing or cut: what every process is told."""
    damaged = folder / part.replace("*", "x")
    if rank == 0:
        shutil.copytree(folder / "run", damaged)
        (found,) = damaged.glob(f"checkpoint-????????/{part.split()[0]}")
        content = found.read_bytes()
        found.unlink() if part.endswith("gone") else found.write_bytes(content[: len(content) // 2])
    dist.barrier()
    with pytest.raises(ValueError) as error:
        trainer(damaged, [60, 60], 1, {}, {"steps": 2})
    return str(error.value)


def read_all_damaged(rank: int, folder: Path) -> list[tuple[str, str]]:
    train(rank, folder / "run", [60, 60], 1, {}, {"steps": 2})
    files = ("about.json", "process-1.json", ".metadata", "__0_*.distcp", "__1_*.distcp")
    parts = [f"{file} {how}" for file in files for how in ("gone", "cut")]
    return [(part, read_damaged(rank, folder, part)) for part in parts]


def test_a_damaged_checkpoint_folder_is_refused_by_all_in_one_line(tmp_path: Path) -> None:
    for answers in run_ranks(2, read_all_damaged, tmp_path, tmp_path):
        for part, message in answers:
            assert str(tmp_path / part.replace("*", "x") / "checkpoint-") in message and "\n" not in message, message


def other_number(rank: int, folder: Path) -> None:
    with pytest.raises(ValueError, match="processes: saved 2, now 3"):
        trainer(folder / "run", [60, 60, 60], 1, {}, {"steps": 2})


def test_a_run_of_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    run_ranks(2, train, tmp_path, tmp_path / "run", [60, 60], 1, {}, {"steps": 2})
    run_ranks(3, other_number, tmp_path, tmp_path)


def test_processes_share_documents() -> None:
    one = Processes()
    assert one.share_of([1, 2, 3]) == [1, 2, 3] and one.first and one.sum([1.5]) == [1.5]
    one.rank, one.count = 1, 2
    assert one.share_of([1, 2, 3]) == [2]
