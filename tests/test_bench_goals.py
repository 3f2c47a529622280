"""The goals: what is measured is what the table asks for, and the verdicts are those of its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import bench

from longmem_bench import Row, Unavailable
from longmem_bench.case import Case
from longmem_bench.goals import (
    DRAWS,
    GROUPS,
    Goal,
    Measurer,
    adversarial,
    load,
    number,
    outcomes,
    shrunk,
    table,
    verdict,
)
from longmem_bench.provider import OPS
from longmem_bench.providers import models, providers
from longmem_bench.shapes import Shape

CPU = torch.device("cpu")
GOALS = load()
SEARCH = Shape(B=1, T=4, H=2, G=2, D=32, M=64, K=4)


def row(milliseconds: float | None, provider: str = "longmem triton", **more: object) -> Row:
    about = {"op": "o", "shape": "s", "dtype": "float32", "device": "cuda", "device_name": "x", "threads": 1}
    return Row(provider=provider, commit="c", ours=True, median_ms=milliseconds, **about, **more)  # type: ignore[arg-type]


def test_the_table_holds_what_can_be_measured() -> None:
    assert {goal.group for goal in GOALS} == set(GROUPS) and {goal.draw for goal in GOALS} == set(DRAWS)
    names = [(goal.group, goal.what) for goal in GOALS]
    assert len(set(names)) == len(names)
    for goal in GOALS:
        assert goal.op in (*OPS, "published_step")
        assert goal.over is None or (goal.group, goal.over) in names[: names.index((goal.group, goal.what))]
        if goal.gate is not None and goal.goal is not None:
            assert goal.goal < goal.gate


@pytest.mark.parametrize(
    ("found", "gate", "goal", "least", "wanted"),
    [
        (0.55, 1.2, 0.55, False, "goal"),
        (0.6, 1.2, 0.55, False, "gate"),
        (1.3, 1.2, 0.55, False, "no"),
        (1.3, None, 0.55, False, "no"),
        (1.2, None, 1.3, True, "no"),
        (1.4, None, 1.3, True, "goal"),
        (9.0, None, None, False, "-"),
        (float("nan"), 1.2, 0.55, False, "no"),
    ],
)
def test_a_number_meets_goal_or_gate_or_none(
    found: float, gate: float | None, goal: float | None, least: bool, wanted: str
) -> None:
    assert verdict(Goal("search", "w", "chunk_topk", SEARCH, gate=gate, goal=goal, least=least), found) == wanted


def test_each_unit_has_its_number() -> None:
    goal = Goal("search", "w", "chunk_topk", SEARCH)
    one = row(3.0, graph_ms=0.1, launch_ms=0.3, peak_bytes=5_000_000)
    numbers = {unit: number(replace(goal, unit=unit), {"a": one}) for unit in ("ms", "host ms", "MB")}
    assert numbers == {"ms": 0.1, "host ms": 0.3, "MB": 5.0}
    assert number(replace(goal, unit="x", over="base"), {"a": row(3.0)}, base=1.5) == 2.0
    step = Goal("step", "w", "published_step", SEARCH, unit="x", least=True)
    assert number(step, {"ours": row(2.0), "theirs": row(3.0)}) == 1.5
    times = {models.WITH_MEMORY: 6.0, models.WITHOUT_MEMORY: 5.0, models.FORWARD: 4.0}
    times |= {models.LOCAL_BACKBONE: 3.0, models.FULL_ATTENTION: 12.0}
    rows = {name: row(time, name) for name, time in times.items()}
    whole = {of: number(Goal("model", "w", "generate", SEARCH, of=of), rows) for of in ("added", "window", "full")}
    assert whole == {"added": 0.25, "window": 2.0, "full": 0.5}
    with pytest.raises(Unavailable, match="no host ms was measured"):
        number(replace(goal, unit="host ms"), {"a": row(3.0)})


def test_what_cannot_be_measured_stops_nothing_and_says_why() -> None:
    goals = [Goal("search", what, "chunk_topk", SEARCH, goal=1.0) for what in ("wrong", "broken", "slow", "late")]
    goals.append(replace(goals[-1], what="twice", unit="x", over="slow"))
    goals.append(replace(goals[-1], what="of nothing", over="broken"))

    def measured(goal: Goal) -> dict[str, Row]:
        if goal.what == "broken":
            raise RuntimeError("out of registers")
        if goal.what == "wrong":
            return {"p": replace(row(None, reason="an id is returned twice"), wrong=True)}
        return {"p": row(2.0, peak_bytes=3_000_000)}

    found = list(outcomes(goals, measured))
    assert [one.met for one in found] == ["not measured", "not measured", "no", "no", "goal", "not measured"]
    assert [one.wrong for one in found] == [True, True, False, False, False, False]
    text = table(found)
    assert "search: wrong: longmem triton: an id is returned twice" in text
    assert "search: broken: RuntimeError: out of registers" in text and "'broken' has no time" in text


def test_the_clock_is_what_is_shown_and_equal_cases_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = []
    begin: Callable[..., None] = Case.__init__
    monkeypatch.setattr(Case, "__init__", lambda self, *a, **k: (cases.append(a), begin(self, *a, **k))[1])
    measurer = Measurer(CPU, clock=lambda call, rounds: [0.002] * rounds)
    goals = [Goal("search", unit, "chunk_topk", SEARCH, unit=unit, gate=3, goal=1) for unit in ("ms", "MB")]
    first, second = outcomes(goals, measurer)
    assert first.number == pytest.approx(2.0) and first.met == "gate" and second.number is not None
    assert len(cases) == 1


@pytest.mark.parametrize("how", DRAWS[1:])
def test_worst_cases_are_the_worst(how: str) -> None:
    inputs = adversarial(SEARCH, CPU, how)
    scores = inputs.query @ inputs.centroid.mT
    if how == "equal":
        assert bool((scores == scores[..., :1]).all())
    if how == "ascending":
        assert bool((scores.diff(dim=-1) > 0).all())
    if how == "one tile":
        ids = scores.topk(SEARCH.K).indices
        assert int(ids.amax() - ids.amin()) == SEARCH.K - 1
    case = Case("chunk_topk", SEARCH)
    case.__dict__["inputs"] = inputs
    kernel = next(one for one in providers("chunk_topk") if one.ours and not one.unavailable(SEARCH, CPU))
    assert case.measure(kernel, rounds=2).median_ms


def test_the_command_measures_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "goals.json"
    groups = ["layer", "model"]  # every kernel, and whole models
    assert bench("goals", *groups, "--small", "--device", "cpu", "--seconds", "0.001", "--json", file) == 0
    shown = capsys.readouterr().out
    rows = json.loads(file.read_text())["goals"]
    assert len(rows) == sum(goal.group in groups for goal in GOALS)
    # A CPU has no launches to time apart.
    assert {row["unit"] for row in rows if row["measured"] is None} <= {"host ms"}
    assert all(row["what"] in shown for row in rows)


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("goals", "search", "--device", "cpu") == 1
    assert "wanted a CUDA device, got a CPU" in capsys.readouterr().err
    assert bench("goals", "serach") == 1
    assert "wanted some of search, attention" in capsys.readouterr().err


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    for text, message in {
        '[{"group": "search"}]': "what is missing",
        '[{"group": "none", "what": "w", "op": "chunk_topk", "shape": {}}]': "group must be one of search",
        '[{"group": "step", "what": "w", "op": "o", "shape": {"Z": 1}}]': "wanted one of B T",
        "{}": "wanted a list",
    }.items():
        (tmp_path / "goals.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "goals.json")


def test_small_goals_ask_the_same() -> None:
    for goal in GOALS:
        small = shrunk(goal)
        assert (small.op, small.unit, small.draw, small.gate) == (goal.op, goal.unit, goal.draw, None)
