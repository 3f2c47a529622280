"""The goals of the GPU kernels: measured beside what was set, in one table.

`goals.json` holds the rows: shapes, the time when the goal was set ("now"), the first gate, and the goal. A row's unit
says what is measured: "ms" the device's time (of a replayed graph where there is one), "host ms" the host's time to
launch a call, "MB" peak extra memory, "x" one time over another.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from longmem.files import check_fields, load_json

from . import environment
from .case import Case, Clock, first_line
from .inputs import RetrievalInputs, draw
from .provider import MODEL_OPS, Unavailable
from .providers import providers
from .report import aligned, significant
from .row import Row
from .shapes import Shape, change
from .timing import wall_times

TABLE = Path(__file__).with_name("goals.json")
GROUPS = ("search", "attention", "layer", "step", "model")
UNITS = ("ms", "host ms", "MB", "x")
DRAWS = ("normal", "equal", "ascending", "one tile")
_SMALL = {"B": 2, "T": 8, "S": 8, "M": 256, "K": 16}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Measure = Callable[["Goal"], Mapping[str, Row]]
"""From a goal to the rows that its number is made of, by provider; those of other goals' may be the same."""


@dataclass(frozen=True)
class Goal:
    """One row of `goals.json`.

    Attributes:
        group: one of `GROUPS`.
        op: one of `provider.OPS`, or "published_step", of which shape.B alone counts.
        dtype: of the inputs; of the published step, of its products.
        draw: one of `DRAWS`, of a search: how its inputs are drawn.
        unit: one of `UNITS`.
        now, gate, goal: in this unit; None where there is none.
        least: the number is to be at least the goal, not at most.
        over: of "x": the time divided by is that of the row with this name in the group.
        of: of "x" and a whole model: "added", "window" or "full", see `number`.
    """

    group: str
    what: str
    op: str
    shape: Shape
    dtype: str = "bfloat16"
    draw: str = "normal"
    unit: str = "ms"
    now: float | None = None
    gate: float | None = None
    goal: float | None = None
    least: bool = False
    over: str | None = None
    of: str | None = None


def load(path: Path = TABLE) -> list[Goal]:
    """Raises ValueError where the table is damaged."""
    wanted = {"group": str, "what": str, "op": str, "shape": dict}
    numbers, words = ("now", "gate", "goal"), ("dtype", "draw", "unit", "over", "of", "model")
    optional = [*numbers, *words, "least"]
    found = []
    rows = load_json(path, "goals")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: wanted a list of goals, got {type(rows).__name__}")
    for row in rows:
        fields = {**wanted, **dict.fromkeys(numbers, float), **dict.fromkeys(words, str), "least": bool}
        values = dict(check_fields(f"{path}, a goal", row, fields, optional=optional))
        model, dtype = values.pop("model", ""), values.get("dtype", "bfloat16")
        for name, allowed in (("group", GROUPS), ("unit", UNITS), ("draw", DRAWS), ("dtype", tuple(_DTYPES))):
            if values.get(name, allowed[0]) not in allowed:
                raise ValueError(f"{path}: {name} must be one of {', '.join(allowed)}, got {values[name]!r}")
        start = Shape(B=1, T=1, H=1, G=1, D=64, M=16384, dtype=_DTYPES[dtype], model=model)
        found.append(Goal(**{**values, "shape": change(start, **values["shape"])}))
    return found


def shrunk(goal: Goal) -> Goal:
    """The same question at a small size and without bounds, to try everything on any machine in seconds."""
    shape, G = goal.shape, 2 if goal.shape.model else 4
    sizes: dict[str, Any] = {name: min(getattr(shape, name), most) for name, most in _SMALL.items()}
    small = replace(shape, **sizes, H=4, G=G, D=32, model="llama-tiny" if shape.model else "")
    return replace(goal, shape=small, now=None, gate=None, goal=None)


def verdict(goal: Goal, number: float) -> str:
    """Names the stricter of gate and goal that `number` meets: "goal", "gate" or "no"; "-" where neither is set."""
    for name, bound in (("goal", goal.goal), ("gate", goal.gate)):
        if bound is not None and (number >= bound if goal.least else number <= bound):
            return name
    return "-" if goal.gate is None and goal.goal is None else "no"


def number(goal: Goal, rows: Mapping[str, Row], base: float | None = None) -> float:
    """The goal's number from measured rows, by provider.

    Of a whole model, the time of "longmem, memory": "added": what it takes longer than without memory, over the frozen
    forward pass; "window": over the backbone with the same local window; "full": over full attention.

    Args:
        base: milliseconds of the row that `goal.over` names.

    Raises:
        Unavailable: a row has no number; the message names it and says why.
    """
    if goal.op == "published_step":
        ours, theirs = (_time(row) for row in rows.values())
        return theirs / ours
    if goal.of is not None:
        from .providers import models  # needs transformers

        ours = _time(rows[models.WITH_MEMORY])
        if goal.of == "added":
            return (ours - _time(rows[models.WITHOUT_MEMORY])) / _time(rows[models.FORWARD])
        return ours / _time(rows[models.LOCAL_BACKBONE if goal.of == "window" else models.FULL_ATTENTION])
    (row,) = rows.values()
    if goal.over is not None:
        if base is None:
            raise Unavailable(f"{goal.over!r} has no time to compare with")
        return _time(row) / base
    time = _time(row)
    if goal.unit == "ms":
        return time
    found = row.launch_ms if goal.unit == "host ms" else row.peak_bytes
    if found is None:
        raise Unavailable(f"{row.provider}: no {goal.unit} was measured")
    return found if goal.unit == "host ms" else found / 1e6


def _time(row: Row) -> float:
    if row.device_ms is None:
        raise Unavailable(f"{row.provider}: {row.reason}")
    return row.device_ms


@dataclass(frozen=True)
class Outcome:
    """A goal and its number, or the reason why there is none."""

    goal: Goal
    number: float | None
    reason: str | None = None
    peak_bytes: int | None = None
    wrong: bool = False

    @property
    def met(self) -> str:
        return "not measured" if self.number is None else verdict(self.goal, self.number)


def outcomes(goals: Sequence[Goal], measure: Measure) -> Iterator[Outcome]:
    """Every goal's outcome, as soon as it is there. A wrong result, or one that raises, is an outcome that says so."""
    times: dict[tuple[str, str], float] = {}
    for goal in goals:
        rows: Mapping[str, Row] = {}
        try:
            rows = measure(goal)
            found = number(goal, rows, times.get((goal.group, goal.over or "")))
        except Exception as why:
            wrong = not isinstance(why, Unavailable) or any(row.wrong for row in rows.values())
            yield Outcome(goal, None, str(why) if isinstance(why, Unavailable) else first_line(why), wrong=wrong)
            continue
        if goal.unit == "ms":
            times[goal.group, goal.what] = found
        peaks = [row.peak_bytes for row in rows.values() if row.ours and row.peak_bytes is not None]
        yield Outcome(goal, found, peak_bytes=max(peaks, default=None))


def table(found: Sequence[Outcome]) -> str:
    """Columns: what, shape, measured, gate, goal, which is met, and peak extra memory."""
    lines = [["what", "shape", "unit", "at first", "measured", "gate", "goal", "met", "peak extra MB"]]
    for one in found:
        goal, sign = one.goal, ">= " if one.goal.least else ""
        gate, wanted = (sign + significant(bound) if bound is not None else "-" for bound in (goal.gate, goal.goal))
        lines.append([
            f"{goal.group}: {goal.what}", _sizes(goal), goal.unit, "-" if goal.now is None else significant(goal.now),
            "-" if one.number is None else significant(one.number), gate, wanted, one.met,
            "-" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:,.0f}",
        ])  # fmt: skip
    reasons = [f"{one.goal.group}: {one.goal.what}: {one.reason}" for one in found if one.reason is not None]
    return "\n".join([*aligned(lines), *reasons])


def summary(found: Sequence[Outcome], device: torch.device) -> dict[str, Any]:
    """The table's content with the machine, for a file."""
    rows = [
        {"what": f"{one.goal.group}: {one.goal.what}", "shape": _sizes(one.goal), "unit": one.goal.unit,
         "measured": one.number, "now": one.goal.now, "gate": one.goal.gate, "goal": one.goal.goal, "met": one.met,
         "peak_bytes": one.peak_bytes, "reason": one.reason}
        for one in found
    ]  # fmt: skip
    return {"machine": environment.describe(device), "goals": rows}


def _sizes(goal: Goal) -> str:
    if goal.op == "published_step":
        return f"B={goal.shape.B} T=1024"
    return f"{goal.shape.describe(goal.op)} {goal.dtype}"


# Measuring


class Measurer:
    """Measures goals on one device; what several goals are made of is measured once.

    Args:
        seconds: that a provider is timed for, about.
        small: the published step of a small model, for `shrunk` goals.
        clock: see `Case.measure`.
    """

    def __init__(
        self, device: torch.device, seconds: float = 0.1, *, small: bool = False, clock: Clock = wall_times
    ) -> None:
        self.device, self.seconds, self.small, self.clock = device, seconds, small, clock
        self._once = lru_cache(maxsize=None)(self._measured)

    def __call__(self, goal: Goal) -> Mapping[str, Row]:
        if goal.op == "published_step":
            rows = self._once(goal.op, goal.shape, "normal")
            return {name: row for name, row in rows.items() if name.endswith(goal.dtype)}
        return self._once(goal.op, goal.shape, goal.draw)

    def _measured(self, op: str, shape: Shape, how: str) -> Mapping[str, Row]:
        try:
            return self._step(shape) if op == "published_step" else self._case(op, shape, how)
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _step(self, shape: Shape) -> Mapping[str, Row]:
        """Rows of ours and of the published composition, in float32 and in bfloat16."""
        from .published_step import measure_steps, published, small

        size = small(rows=shape.B) if self.small else published(rows=shape.B)
        rows = measure_steps(size, 4, self.device)
        alike = [row for row in rows if "oneDNN" not in row.provider]
        return {f"{row.provider}, {row.dtype.rpartition(' ')[2]}": row for row in alike}

    def _case(self, op: str, shape: Shape, how: str) -> Mapping[str, Row]:
        case = Case(op, shape, self.device)
        shown = providers(op)
        if op not in MODEL_OPS:
            kernels = [one for one in shown if one.ours and one.unswept is None]
            shown = [one for one in kernels if one.unavailable(shape, self.device) is None][:1]
            if not shown:
                raise Unavailable("; ".join(f"{one.name}: {one.unavailable(shape, self.device)}" for one in kernels))
        if how != "normal":
            case.__dict__["inputs"] = adversarial(shape, self.device, how)  # in place of what the case would draw
        return {row.provider: row for row in case.side_by_side(shown, seconds=self.seconds, clock=self.clock)}


def adversarial(shape: Shape, device: torch.device, how: str) -> RetrievalInputs:
    """Inputs that are hard on a search which expects scores in no order: "equal", "ascending" or "one tile".

    All queries point along one direction. "equal": so does every centroid, at the same length. "ascending": at growing
    length, so that each chunk beats those before it. "one tile": the K best are neighbours.
    """
    drawn = draw("chunk_topk", shape, device)
    assert isinstance(drawn, RetrievalInputs)
    direction = torch.randn(shape.D, generator=torch.Generator(device).manual_seed(1), device=device)
    length = torch.ones(shape.M, device=device)
    if how == "ascending":
        length = torch.linspace(0, 1, shape.M, device=device)
    if how == "one tile":
        length = torch.full_like(length, 0.25)
        first = shape.M // 2
        length[first : first + shape.K] = torch.linspace(1, 2, shape.K, device=device)
    centroid = (length[:, None] * direction).to(shape.dtype)
    query = direction.to(shape.dtype).expand(drawn.query.shape).contiguous()
    return RetrievalInputs(shape, query, centroid.expand(drawn.centroid.shape).contiguous(), drawn.count)
