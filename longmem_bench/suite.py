"""Choice of the measurements that answer a question, and running them one after another."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from .architectures import ARCHITECTURES
from .case import Case, Watch
from .provider import Provider, Unavailable, matches
from .providers import providers
from .row import Row
from .shapes import Shape, change, default_sweeps, shapes_for, vary

QUESTIONS: dict[str, tuple[str, ...]] = {
    "fusion": ("memory_attention", "memory_attention_backward"),
    "retrieval": ("chunk_topk",),
    "write": ("ring_write",),
    "layer": ("memory_layer",),
    "generate": ("generate",),
    "train": ("train_step",),
}


@dataclass(frozen=True)
class Point:
    """One operation on one shape, alone or as a point of a sweep."""

    op: str
    shape: Shape
    sweep: str | None = None


def points(question: str, sweep: str | None, *, paper: bool, adjust: Callable[[Shape], Shape]) -> list[Point]:
    """Points to measure for `question`.

    Args:
        sweep: None for the base shapes; "M=4096,16384" for these sizes; "M" for the sizes that are kept for it; "all"
            for every sweep that is kept.
        paper: start from the paper's shapes.
        adjust: applied to every shape.

    Raises:
        ValueError: a sweep that is not known, or impossible sizes.
    """
    found = []
    for op in QUESTIONS[question]:
        if sweep is None:
            found += [Point(op, adjust(shape)) for shape in shapes_for(op, paper=paper)]
        elif "=" in sweep:
            name, _, values = sweep.partition("=")
            try:
                sizes = [int(value) for value in values.split(",")]
            except ValueError:
                raise ValueError(f"sweep: wanted NAME=SIZE,SIZE,..., got {sweep!r}") from None
            shape = adjust(shapes_for(op, paper=paper)[0])
            found += [Point(op, each, name) for each in vary(shape, **{name: sizes})]
        else:
            kept = default_sweeps(op, paper=paper)
            chosen = [name for name in kept if sweep in ("all", name, name.split()[0])]
            found += [Point(op, adjust(shape), name) for name in chosen for shape in kept[name]]
            if not chosen and sweep != "all" and op == QUESTIONS[question][0]:
                raise ValueError(
                    f"sweep: {question} has {', '.join(kept) or 'no sweeps'}; or name sizes: {sweep}=1,2,4"
                )
    return found


def everything(*, paper: bool, adjust: Callable[[Shape], Shape], base: bool = True, sweeps: bool = True) -> list[Point]:
    """Every question's base shapes first, then every sweep: a time limit cuts the latter.

    Raises:
        ValueError: neither is wanted.
    """
    if not (base or sweeps):
        raise ValueError("wanted base shapes, sweeps, or neither named for both")
    wanted = [*([None] if base else []), *(["all"] if sweeps else [])]
    return [point for kind in wanted for name in QUESTIONS for point in points(name, kind, paper=paper, adjust=adjust)]


def kernel_points(ops: Sequence[str], *, paper: bool, adjust: Callable[[Shape], Shape]) -> list[Point]:
    """The base shapes of single operations."""
    return [Point(op, adjust(shape)) for op in ops for shape in shapes_for(op, paper=paper)]


def parse_sizes(text: str) -> dict[str, int]:
    """ "B=2,T=128" -> {"B": 2, "T": 128}. Raises ValueError for anything else."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): int(size) for name, size in pairs}
    except ValueError:
        raise ValueError(f"shape: wanted NAME=SIZE,NAME=SIZE,..., got {text!r}") from None


def _own_heads(model: str) -> dict[str, Any]:
    """H, G and D of a model that has them; a random "tiny" one is as wide as the shape says."""
    sizes = ARCHITECTURES.get(model)
    return {} if sizes is None else {"H": sizes.heads, "G": sizes.kv_heads, "D": sizes.head_dim}


def adjustment(sizes: dict[str, int], dtype: torch.dtype | None, model: str | None) -> Callable[[Shape], Shape]:
    """A function that puts these sizes into a shape, where they belong to it."""

    def adjust(shape: Shape) -> Shape:
        if model is not None and shape.model:
            shape = replace(shape, model=model, **_own_heads(model))
        if dtype is not None:
            shape = replace(shape, dtype=dtype)
        # A decoding shape stays one.
        kept = {name: size for name, size in sizes.items() if not (name == "T" and shape.T == 1 and not shape.model)}
        return change(shape, **kept) if kept else shape

    return adjust


@dataclass(frozen=True)
class Task:
    point: Point
    provider: Provider
    named: bool  # asked for by name


def tasks(todo: Sequence[Point], wanted: Sequence[str], unwanted: Sequence[str] = ()) -> list[Task]:
    """Every provider of every point, or those that `matches` one of `wanted`; none that matches one of `unwanted`.

    Raises:
        ValueError: one of `wanted` fits no provider.
    """
    found = [Task(point, provider, bool(wanted)) for point in todo for provider in providers(point.op)]
    for word in wanted:
        if not any(matches(task.provider, word) for task in found):
            names = "; ".join(dict.fromkeys(task.provider.name for task in found))
            raise ValueError(f"providers: wanted some of: {names}; got {word!r}")
    found = [task for task in found if not any(matches(task.provider, word) for word in unwanted)]
    return [task for task in found if not wanted or any(matches(task.provider, word) for word in wanted)]


def run(
    work: Sequence[Task],
    device: torch.device,
    *,
    seconds: float,
    minutes: float | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[Task, Row]]:
    """Measure every task, yielding its row as soon as it is there; a wrong result is a row that says so. `watch`: see
    `Case`.

    A shape that several sweeps share is measured once. A shape that has not begun after `minutes` is not begun.
    """
    begin = time.monotonic()
    done: dict[tuple[str, Shape, str], Row] = {}
    for _, group in groupby(work, lambda task: task.point):
        late = minutes is not None and time.monotonic() - begin > 60 * minutes
        why = f"not begun: the time limit of {minutes:g} minutes was reached" if late else None
        yield from _point(list(group), device, seconds, done, why, watch)
        gc.collect()  # this shape's inputs, before the next are drawn
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _point(
    group: Sequence[Task],
    device: torch.device,
    seconds: float,
    done: dict[tuple[str, Shape, str], Row],
    late: str | None,
    watch: Watch | None,
) -> Iterator[tuple[Task, Row]]:
    """All tasks of one point."""
    point = group[0].point
    case = Case(point.op, point.shape, device, sweep=point.sweep, watch=watch)
    rows: dict[str, Row] = {}
    for task in group:
        provider, found = task.provider, done.get((point.op, point.shape, task.provider.name))
        if found is not None:
            rows[provider.name] = replace(found, sweep=point.sweep)
        elif late is not None:
            rows[provider.name] = case.refused(provider, Unavailable(late))
        elif provider.unswept and point.sweep and not task.named:
            why = f"{provider.unswept}; left out of sweeps unless asked for with --providers"
            rows[provider.name] = case.refused(provider, Unavailable(why))
    measured = case.side_by_side([task.provider for task in group if task.provider.name not in rows], seconds=seconds)
    for task in group:
        name = task.provider.name
        if name not in rows:
            rows[name] = done[point.op, point.shape, name] = next(measured)
        yield task, rows[name]
