"""The benchmark of a whole training step: same losses, or no numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import bench
from official_models import small_config

from longmem_bench import WrongResult, published_step, table
from longmem_bench.published_step import Steps, StepShape, check_losses, measure_steps, published, step_providers

TINY = StepShape(2, small_config())
CPU = torch.device("cpu")


def test_all_providers_take_the_same_steps_from_the_same_start() -> None:
    rows = measure_steps(TINY, steps=4)
    names = [row.provider for row in rows]
    assert names == [provider.name for provider in step_providers(CPU)]
    assert [row.ours for row in rows] == [name.startswith("longmem") for name in names]
    assert {row.dtype for row in rows} == {"float32", "float32, products in bfloat16"}
    assert all(row.median_ms for row in rows)
    assert "B=2 T=12 layers=4+2 E=24 H=3 V=61 memory=96 k=8 C=4" in table(rows)


def test_the_memory_is_as_full_as_it_gets_and_evicts_every_other_step() -> None:
    case, provider = Steps(TINY), step_providers(CPU)[0]
    step, _ = case.prepare(provider)
    stored = []
    for _ in range(5):
        stored.append(case.model.memory.dstore_idx)
        step()
    assert stored == [18, 12, 18, 12, 18]


def test_both_sides_keep_keys_and_values_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    compositions = []

    class Noted(published_step.PublishedModel):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            compositions.append(self)

    monkeypatch.setattr(published_step, "PublishedModel", Noted)
    case = Steps(TINY)
    for provider in step_providers(CPU):
        step, _ = case.prepare(provider)
        step()
        step()
        assert case.model.memory.dtype == torch.float16
    assert {part.dtype for part in case.model.memory.keys + case.model.memory.vals} == {torch.float16}
    stored = [part for composition in compositions for part in (composition.memory.keys, composition.memory.values)]
    assert len(compositions) == 2 and {part.dtype for part in stored} == {torch.float16}


def test_a_start_leaves_nothing_of_the_steps_before_it() -> None:
    case, provider = Steps(TINY), step_providers(CPU)[0]
    losses = []
    for _ in range(2):
        step, taken = case.prepare(provider)
        step()
        step()
        losses.append(taken)
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_another_loss_is_refused() -> None:
    provider = step_providers(CPU)[-1]
    check_losses(provider, [2.0, 3.0002], [2.0, 3.0])
    provider = replace(provider, precision="float32")
    check_losses(provider, [2.0, 3.00009], [2.0, 3.0])
    with pytest.raises(WrongResult, match=r"'published composition, .*' in float32 differs by 0.0002 nats"):
        check_losses(provider, [2.0, 3.0002], [2.0, 3.0])
    with pytest.raises(WrongResult):
        check_losses(provider, [float("nan")], [2.0])


def test_fewer_layers_keep_the_memory_at_its_depth() -> None:
    assert published().config == published_step.PUBLISHED
    six = published(layers=6).config
    assert (six.layers, six.sidenet_layers, six.retrieval_layer_index, six.memory_layer) == (6, 3, 4, 2)


def test_the_command_writes_what_the_report_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(published_step, "small", lambda rows: replace(TINY, rows=rows))
    path = tmp_path / "results" / "step.json"
    arguments = ["published-step", "--small", "--rows", "2", "--steps", "2", "--device", "cpu", "--json", path]
    assert bench(*arguments) == 0
    printed = capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert {row["op"] for row in rows} == {"official_step"} and len(rows) == len(step_providers(CPU))
    assert bench("report", path) == 0
    assert table_part(capsys.readouterr().out) == table_part(printed)


def table_part(text: str) -> str:
    return text.split("\n\n", 1)[1]
