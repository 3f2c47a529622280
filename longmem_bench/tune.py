"""Tile sizes found by trying: every candidate of a kernel's table, behind the correctness check, ranked by time."""

from __future__ import annotations

import datetime
import json as json_format
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from tqdm import tqdm

from longmem_kernels import _tiles
from longmem_kernels._tiles import Lookup, Use

from . import environment
from .case import Case, Clock
from .precompile import TRITON_OPS, Variant, candidates_of, compile_all, triton_provider
from .report import aligned, milliseconds
from .row import Row
from .shapes import Shape
from .suite import Point
from .timing import wall_times

MARGIN = 0.03  # a candidate less than this much faster than the row in use does not take its place


@dataclass(frozen=True)
class Tried:
    """A candidate with the row it was measured as; without a time, the row says why."""

    use: Use
    row: Row

    @property
    def ms(self) -> float | None:
        """Time of the whole operation, replayed as a CUDA graph where that was measured."""
        return self.row.graph_ms or self.row.median_ms


@dataclass(frozen=True)
class Ranking:
    """The candidates of one kernel at one shape, fastest first, those that were refused last.

    Attributes:
        lookup: the launch: kernel, architecture, facts, and what the table has for it.
        left_out: candidates that the time did not suffice for.
    """

    lookup: Lookup
    op: str
    shape: str
    tried: list[Tried]
    left_out: int = 0

    @property
    def in_use(self) -> Tried:
        """Row of the table in use."""
        return next(one for one in self.tried if one.use == dict(self.lookup.use))

    @property
    def winner(self) -> Tried:
        """The fastest, or what the table has where that is as fast within `MARGIN`."""
        best, now = self.tried[0], self.in_use
        if best.ms is None or (now.ms is not None and best.ms > (1 - MARGIN) * now.ms):
            return now
        return best


def tune(
    op: str,
    shape: Shape,
    device: torch.device | str,
    *,
    kernels: Sequence[str] = (),
    known: set[Lookup] | None = None,
    seconds: float = 0.05,
    rounds: int | None = None,
    until: float | None = None,
    clock: Clock = wall_times,
    done: Callable[[Lookup, Tried], object] = lambda lookup, tried: None,
) -> list[Ranking]:
    """Rank the candidates of every kernel that `op` launches on `shape`, one kernel after another: a kernel is tuned
    with the winners of those before it.

    Args:
        kernels: only those whose names hold one of these.
        known: launches ranked before; they are left out, and what is ranked here is added.
        seconds, rounds, clock: see `Case.measure`.
        until: begin no candidate after this moment of `time.monotonic()`.
        done: called with every candidate as soon as it is measured.

    Raises:
        WrongResult: what the table has is itself wrong.
        ValueError: `op` has no Triton kernels.
    """
    if op not in TRITON_OPS:
        raise ValueError(f"tune: op must be one of {', '.join(TRITON_OPS)}, got {op!r}")
    case, provider, known = Case(op, shape, device), triton_provider(op), set() if known is None else known
    with _tiles.noted() as lookups:
        case.admit(provider)
    first = {lookup.kernel: lookup for lookup in reversed(lookups)}
    winners: dict[str, Use] = {}
    rankings = []
    for lookup in first.values():
        named = not kernels or any(word in lookup.kernel for word in kernels)
        if not named or lookup in known:
            continue
        known.add(lookup)
        tried: list[Tried] = []
        waiting = _tiles.candidates(lookup.kernel, lookup.architecture, dict(lookup.facts))
        while waiting and not (tried and until is not None and time.monotonic() > until):
            use = waiting.pop(0)
            with _tiles.forced({**winners, lookup.kernel: use}):
                [row] = case.side_by_side([provider], rounds=rounds, seconds=seconds, clock=clock)
            tried.append(Tried(use, row))
            done(lookup, tried[-1])
        tried.sort(key=lambda one: (one.ms is None, one.ms))
        rankings.append(Ranking(lookup, op, f"{row.shape} {row.dtype}", tried, len(waiting)))
        winners[lookup.kernel] = rankings[-1].winner.use
    return rankings


def table(ranking: Ranking, most: int = 8) -> str:
    """The ranking as text: the `most` fastest, what the table has, and how many failed for which reason."""
    lookup, now = ranking.lookup, ranking.in_use
    lines = [["", "ms", "host ms", "x table", *now.use]]
    for number, one in enumerate(ranking.tried):
        if one.ms is None or (number >= most and one is not now):
            continue
        times = "" if now.ms is None else f"{now.ms / one.ms:.2f}"
        mark = "table" if one is now else "winner" if one is ranking.winner else ""
        sizes = ["-" if one.use.get(name) is None else str(one.use[name]) for name in now.use]
        extra = [f"{name}={value}" for name, value in one.use.items() if name not in now.use and value is not None]
        sizes[-1] = " ".join([sizes[-1], *extra])
        lines.append([mark, milliseconds(one.ms), milliseconds(one.row.host_ms), times, *sizes])
    facts = " ".join(f"{name}={value}" for name, value in lookup.facts)
    text = [f"{lookup.kernel} (sm_{lookup.architecture}; {facts}) in {ranking.op} [{ranking.shape}]", *aligned(lines)]
    refused = [one.row.reason or "" for one in ranking.tried if one.ms is None]
    text += [f"{refused.count(reason)} refused: {reason}" for reason in dict.fromkeys(refused)]
    if ranking.left_out:
        text.append(f"{ranking.left_out} not begun: the time limit was reached")
    return "\n".join(text)


def save(rankings: Sequence[Ranking], device: torch.device, path: Path) -> Path:
    """Write the rankings, and the winners as a table that LONGMEM_TILES can name."""
    tables: dict[str, Any] = {}
    for ranking in rankings:
        _put(tables.setdefault(f"sm_{ranking.lookup.architecture}", {}), ranking)
    content = {
        "machine": environment.describe(device),
        "date": datetime.date.today().isoformat(),
        "tiles": tables,
        "rankings": [_as_dict(ranking) for ranking in rankings],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_format.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def update(rankings: Sequence[Ranking], folder: Path = _tiles.FOLDER) -> list[Path]:
    """Put the winners into the rows of the tables that were in use; the files changed."""
    changed = []
    for number in dict.fromkeys(ranking.lookup.architecture for ranking in rankings):
        path = folder / f"sm_{number}.json"
        content = json_format.loads(path.read_text(encoding="utf-8"))
        for ranking in rankings:
            if ranking.lookup.architecture == number:
                _put(content, ranking)
        text = _tiles.as_text(content)
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def compile_points(
    points: Sequence[Point], architecture: int, *, candidates: bool, workers: int, minutes: float | None = None
) -> bool:
    """Compile what the points launch on sm_`architecture` into Triton's cache, with `candidates` also what
    `tune_points` would try there. Prints what does not fit; whether the tables' own rows all do."""
    variants = list(dict.fromkeys(Variant(point.op, point.shape) for point in points))
    if candidates:
        variants = candidates_of(variants, architecture)
    with tqdm(total=len(variants), desc=f"sm_{architecture}", unit="variant") as bar:
        seconds = None if minutes is None else 60 * minutes
        compiled = compile_all(variants, architecture, workers=workers, seconds=seconds, done=lambda _: bar.update())
    refused = [one for one in compiled if one.reason]
    for one in refused:
        typer.echo(f"{one.variant}: {one.reason}", err=True)
    wrong = [one for one in refused if not one.variant.uses]
    typer.echo(
        f"sm_{architecture}: {len(compiled)} of {len(variants)} variants compiled, {len(refused) - len(wrong)}"
        f" candidates need more than there is, {len(wrong)} of the tables do not fit"
    )
    return not wrong


def tune_points(
    points: Sequence[Point],
    device: torch.device,
    *,
    kernels: Sequence[str] = (),
    seconds: float = 0.05,
    minutes: float | None = None,
    workers: int = 0,
    json: Path | None = None,
    write: bool = False,
) -> list[Ranking]:
    """Rank candidates at several points, print every ranking, and save what was asked for.

    Args:
        minutes: begin no candidate after this time.
        workers: processes that compile all candidates into Triton's cache first.
        json, write: see `save` and `update`.

    Raises:
        ValueError: there is no device that Triton kernels can be timed on.
    """
    if device.type != "cuda":
        raise ValueError(
            "tune: tiles are tuned on a CUDA device, and"
            + (f" PyTorch {torch.__version__} finds none" if not torch.cuda.is_available() else f" this is {device}")
        )
    until = None if minutes is None else time.monotonic() + 60 * minutes
    if workers:
        architecture = _tiles.architecture(_tiles.capability(device))
        variants = candidates_of([Variant(point.op, point.shape) for point in points], architecture, kernels)
        with tqdm(total=len(variants), desc="compile", unit="variant") as bar:
            left = None if minutes is None else 30 * minutes  # the other half is for timing
            compile_all(variants, architecture, workers=workers, seconds=left, done=lambda _: bar.update())
    known: set[Lookup] = set()
    rankings: list[Ranking] = []
    with tqdm(desc="tune", unit="candidate") as bar:
        for point in points:
            found = tune(
                point.op, point.shape, device, kernels=kernels, known=known, seconds=seconds, until=until,
                done=lambda lookup, tried: bar.update(),
            )  # fmt: skip
            rankings += found
            for ranking in found:
                bar.write(table(ranking) + "\n", file=sys.stdout)
            if json is not None:
                save(rankings, device, json)
    if write:
        for path in update(rankings):
            typer.echo(f"wrote {path}", err=True)
    return rankings


def _put(content: dict[str, Any], ranking: Ranking) -> None:
    use = {name: value for name, value in ranking.winner.use.items() if value is not None}
    _tiles.with_row(content, ranking.lookup.kernel, ranking.lookup.conditions, use)


def _as_dict(ranking: Ranking) -> dict[str, Any]:
    def one(tried: Tried) -> dict[str, Any]:
        row = tried.row
        times = {"ms": tried.ms, "p20_ms": row.p20_ms, "p80_ms": row.p80_ms, "host_ms": row.host_ms}
        return {"use": tried.use, **times, "reason": row.reason}

    lookup = ranking.lookup
    return {
        "kernel": lookup.kernel,
        "architecture": lookup.architecture,
        "facts": dict(lookup.facts),
        "op": ranking.op,
        "shape": ranking.shape,
        "in_use": dict(lookup.use),
        "winner": ranking.winner.use,
        "left_out": ranking.left_out,
        "tried": [one(tried) for tried in ranking.tried],
    }
