"""Associative recall, end to end: a tiny model answers from memory, and only from its own."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longmem import LongMem
from longmem.console import recall_with_bar, save_recall
from longmem.tasks.recall import (
    QUICK,
    RecallConfig,
    RecallReport,
    documents,
    evaluate_recall,
    longmem_config,
    pretrain_backbone,
    train_read,
)

QUICK_OPTIONS: dict[str, Any] = QUICK
CONFIG = RecallConfig(**QUICK_OPTIONS)


def silent(stage: str, value: float) -> None:
    pass


@pytest.fixture(scope="module")
def trained() -> tuple[LongMem, float]:
    torch.manual_seed(0)
    backbone, within_segment = pretrain_backbone(CONFIG, silent)
    model = LongMem(backbone, longmem_config(CONFIG))
    train_read(model, CONFIG, silent)
    return model, within_segment


def test_pairs_lie_where_the_questions_say() -> None:
    context, questions = documents(CONFIG, CONFIG.capacity, CONFIG.distances)
    assert context.shape == (CONFIG.rows, CONFIG.capacity)
    kinds = torch.tensor([CONFIG.keys, CONFIG.values, CONFIG.fillers]).cumsum(0)
    for distance, question in zip(CONFIG.distances, questions, strict=True):
        keys, values = question[:, ::2], question[:, 1::2]
        assert (keys < kinds[0]).all() and (values >= kinds[0]).all() and (values < kinds[1]).all()
        assert all(len(set(row.tolist())) == CONFIG.pairs for row in keys)
        written = context[:, None] == keys[..., None]
        assert (written.sum(-1) == 1).all()
        place = written.int().argmax(-1)
        assert torch.equal(context.gather(1, place + 1), values)
        back = CONFIG.capacity - place
        assert (back >= distance).all() and (back <= distance + 2 * CONFIG.segment).all()
        assert (place % 2 == 0).all(), "a segment's end would part a pair"


def test_answers_come_from_memory_and_only_from_the_right_one(trained: tuple[LongMem, float]) -> None:
    model, within_segment = trained
    assert within_segment > 0.97
    steps: list[str] = []
    report = evaluate_recall(model, CONFIG, within_segment, lambda stage, _: steps.append(stage))
    assert {name: CONFIG.stages()[name] for name in steps} == Counter(steps)
    for distance in CONFIG.distances:
        assert report.accuracy("memory", distance)[0] > 0.9, report.table()
        for other in ("empty memory", "other memory"):
            mean, error = report.accuracy(other, distance)
            assert abs(mean - report.chance) < 4 * error + 0.02, report.table()


@pytest.mark.parametrize("fault", ["not written", "random chunks"])
def test_a_broken_memory_shows(fault: str, trained: tuple[LongMem, float], monkeypatch: pytest.MonkeyPatch) -> None:
    from longmem.memory import MemoryBank

    retrieve = MemoryBank.retrieve
    if fault == "not written":
        monkeypatch.setattr(MemoryBank, "write", lambda *_: None)
    else:

        def somewhere(self: MemoryBank, query: torch.Tensor, k: int, **options: Any) -> Any:
            ids, scores = retrieve(self, query, k, **options)
            stored = int(self.ring.count().min())
            return torch.randint_like(ids, stored) if stored else ids, scores

        monkeypatch.setattr(MemoryBank, "retrieve", somewhere)
    model, within_segment = trained
    report = evaluate_recall(model, replace(CONFIG, distances=(1024,)), within_segment, silent)
    assert report.accuracy("memory", 1024)[0] < 0.3


def test_the_bar_ends_at_its_total_though_the_first_stage_ends_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {1024: torch.tensor([1.0, 0.5]).double()}
    report = RecallReport(dict.fromkeys(("memory", "empty memory", "other memory"), row), 0.0625, 0.99, 24)

    def early(config: RecallConfig, device: torch.device, progress: Any) -> RecallReport:
        for stage, steps in config.stages().items():
            for _ in range(7 if stage == "pretrain" else steps):
                progress(stage, 0.0)
        return report

    monkeypatch.setattr("longmem.console.run_recall", early)
    recall_with_bar(CONFIG, torch.device("cpu"))
    last = 7 + sum(steps for stage, steps in CONFIG.stages().items() if stage != "pretrain")
    assert f"{last}/{last} [" in capsys.readouterr().err


def test_the_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {1024: torch.tensor([1.0, 0.5]).double(), 4096: torch.tensor([1.0, 1.0]).double()}
    report = RecallReport(dict.fromkeys(("memory", "empty memory", "other memory"), row), 0.0625, 0.99, 24)
    monkeypatch.setattr("longmem.console.run_recall", lambda *_: report)
    found, content = recall_with_bar(CONFIG, torch.device("cpu"))
    assert found is report
    save_recall(found, content, tmp_path, CONFIG.capacity)
    content = json.loads((tmp_path / "recall.json").read_text())
    assert content["accuracy"]["memory"]["1024"]["accuracy"] == 0.75 and content["config"]["keys"] == CONFIG.keys
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 40}, "40 pairs at 2 distances need more than 64 keys or 64 tokens a segment"),
        ({"distances": (4096, 1024)}, r"distances must ascend in multiples of 128, got \(4096, 1024\)"),
        ({"distances": (100,)}, "multiples of 128"),
        ({"documents": 33}, "documents one of 32, got 1024 and 33"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecallConfig(**(QUICK_OPTIONS | options))
