"""The work of the subcommands. Their options are in `app`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch
import typer
from tqdm import tqdm

from longmem.cli.failures import doing
from longmem.cli.output import json_text, note
from longmem.console import check_folder, choose_device
from longmem.files import save_text
from longmem_kernels._tiles import ARCHITECTURES

from .. import compare as comparing
from .. import suite
from ..case import Watch
from ..goals import load as wanted_goals
from ..kernels import kernel_times
from ..kernels import table as kernel_table
from ..plots import plot, plot_sweeps
from ..precompile import TRITON_OPS
from ..provider import Prepared
from ..report import brief, quantity, table, title
from ..results import Result
from ..roofline import ceilings
from ..row import Row
from ..shapes import Shape, default_sweeps
from ..tune import compile_points, tune_points

_SAVE_EVERY = 20.0  # seconds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STDOUT = Path("-")


def answer(
    question: str | None,
    *,
    device: str,
    dtype: str | None,
    scale: str,
    providers: str | None,
    without: str | None,
    seconds: float,
    json: Path | None,
    plots: Path | None,
    keep: Path | None,
    kernels: bool,
    sweep: str | None = None,
    shape: str | None = None,
    model: str | None = None,
    minutes: float | None = None,
    base: bool = False,
    sweeps: bool = False,
) -> None:
    """Measure what answers `question` (None: all of them), print, save, draw; the arguments are the options' values.

    Raises:
        typer.Exit: with status 1 when something of ours was wrong, 130 after an interrupt, which leaves what was
            measured before it.
    """
    adjust = _adjustment(shape, dtype, model)
    for folder in [plots, json.parent if json is not None and json != _STDOUT else None]:
        if folder is not None:
            check_folder(folder)
    target = choose_device(device)
    paper = _paper(scale, target)
    if question is None:
        todo = suite.everything(paper=paper, adjust=adjust, base=not sweeps, sweeps=not base)
    else:
        todo = suite.points(question, sweep, paper=paper, adjust=adjust)
    if keep is not None:
        check_folder(keep)
    work = suite.tasks(todo, _words(providers), _words(without))
    # With JSON on stdout, a library that prints must not get in between.
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if json == _STDOUT else contextlib.nullcontext():
        _answer(work, target, seconds, minutes, json, plots, keep, kernels, stdout)


def _paper(scale: str, device: torch.device) -> bool:
    return scale == "paper" or (scale == "auto" and device.type == "cuda")


def _adjustment(sizes: str | None, dtype: str | None, model: str | None = None) -> Callable[[Shape], Shape]:
    return suite.adjustment(suite.parse_sizes(sizes) if sizes else {}, DTYPES[dtype] if dtype else None, model)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",")] if text else []


def _answer(
    work: Sequence[suite.Task],
    device: torch.device,
    seconds: float,
    minutes: float | None,
    json: Path | None,
    plots: Path | None,
    keep: Path | None,
    kernels: bool,
    stdout: TextIO,
) -> None:
    rows: list[Row] = []
    found: list[str] = []

    def look_into(row: Row, prepared: Prepared) -> None:
        times = kernel_times(prepared.run, device, prepared.repeat)
        found.append(kernel_table(f"{row.provider}, {title(row)}: ms per operation", times))

    file, interrupted = None if json == _STDOUT else json, False
    with doing("measuring"):
        try:
            watch = look_into if kernels else None
            _measure(work, device, rows, seconds=seconds, minutes=minutes, file=file, watch=watch)
        except KeyboardInterrupt:
            if not rows:
                raise
            interrupted = True
    result = Result.now(rows, device)
    print(result.text() if json == _STDOUT else "\n\n".join([table(rows), *found]), file=stdout, flush=True)
    if file is not None:
        note(f"wrote {result.save(file)}")
    if keep is not None and not interrupted:
        note(f"wrote {result.keep(keep)}")
    if plots is not None and any(row.median_ms is not None for row in rows):
        for path in draw(rows, plots, result.date):
            note(f"wrote {path}")
    wrong = [row for row in rows if row.wrong and row.ours]
    for row in wrong:
        note(f"WRONG: {row.provider}, {row.op} [{row.shape} {row.dtype}]: {row.reason}", red=True)
    if interrupted:
        note(f"interrupted after {len(rows)} of {len(work)} rows", red=True)
        raise typer.Exit(130)
    if wrong:
        raise typer.Exit(1)


def _measure(
    work: Sequence[suite.Task],
    device: torch.device,
    rows: list[Row],
    *,
    seconds: float,
    minutes: float | None,
    file: Path | None,
    watch: Watch | None,
) -> None:
    """Append a row for every task, each of them said as soon as it is there."""
    saved = time.monotonic()
    with tqdm(total=len(work), desc="bench", unit="row") as bar:
        for task, row in suite.run(work, device, seconds=seconds, minutes=minutes, watch=watch):
            if not rows:
                _announce(device)
            rows.append(row)
            if row.median_ms is not None:
                note(f"{row.op} [{row.shape} {row.dtype}] {row.provider}: {brief(row)}")
            # A run that is cut short leaves what it has.
            if file is not None and time.monotonic() - saved > _SAVE_EVERY:
                Result.now(rows, device).save(file)
                saved = time.monotonic()
            bar.set_postfix_str(f"{task.point.op}: {task.provider.name}"[:60], refresh=False)
            bar.update()


def _announce(device: torch.device) -> None:
    """The machine's ceilings, which every row is held against."""
    for dtype in (torch.float32, torch.bfloat16):
        found = ceilings(str(device), dtype, torch.get_num_threads())
        name = str(dtype).removeprefix("torch.")
        copy, matmul = quantity(found.copy, "B/s"), quantity(found.matmul, "FLOP/s")
        note(f"{device}: copies {copy}, multiplies {name} matrices at {matmul}")


def draw(rows: Sequence[Row], folder: Path, date: str) -> list[Path]:
    """A PNG of bars per operation, and one of lines for its sweeps."""
    written = []
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op]
        for kind, draws, chosen in (
            ("bars", plot, [row for row in mine if not row.sweep]),
            ("sweeps", plot_sweeps, [row for row in mine if row.sweep]),
        ):
            if any(row.median_ms is not None for row in chosen):
                written.append(draws(chosen, folder / f"{op}-{kind}.png", date=date))
    return written


def tune_tiles(
    op: str | None,
    *,
    shape: str | None,
    dtype: str | None,
    kernel: str | None,
    device: str,
    scale: str,
    seconds: float,
    minutes: float | None,
    workers: int,
    json: Path | None,
    write: bool,
) -> None:
    """Rank the candidates of the tile tables; the arguments are the options' values."""
    adjust = _adjustment(shape, dtype)
    target = choose_device(device)
    points = suite.kernel_points([op] if op else TRITON_OPS, paper=_paper(scale, target), adjust=adjust)
    tune_points(
        points,
        target,
        kernels=_words(kernel),
        seconds=seconds,
        minutes=minutes,
        workers=workers,
        json=json,
        write=write,
    )


def compile_kernels(
    *,
    arch: int,
    sweeps: bool,
    tiles: bool,
    goals: bool,
    ops: str | None,
    shape: str | None,
    scale: str,
    workers: int | None,
    minutes: float | None,
) -> None:
    """Compile Triton kernels beforehand; the arguments are the options' values.

    Raises:
        typer.Exit: with status 1, when what the tables have does not compile.
    """
    wanted = _words(ops) or list(TRITON_OPS)
    if arch not in ARCHITECTURES or not set(wanted) <= set(TRITON_OPS):
        raise ValueError(
            f"compile: wanted --arch of {', '.join(map(str, ARCHITECTURES))} and --ops of {', '.join(TRITON_OPS)}, got"
            f" {arch} and {ops}"
        )
    paper, adjust = _paper(scale, torch.device("cuda")), _adjustment(shape, None)
    points = suite.kernel_points(wanted, paper=paper, adjust=adjust)
    if sweeps:
        kept = [(op, shapes) for op in wanted for shapes in default_sweeps(op, paper=paper).values()]
        points += [suite.Point(op, one) for op, shapes in kept for one in shapes]
    if goals:
        points += [suite.Point(goal.op, goal.shape) for goal in wanted_goals() if goal.op in wanted]
    if not compile_points(points, arch, candidates=tiles, workers=workers or os.cpu_count() or 1, minutes=minutes):
        raise typer.Exit(1)


def compare(before: Path, after: Path) -> None:
    """Print what changed. Raises typer.Exit with status 1 when something got slower."""
    old, new = Result.load(before), Result.load(after)
    typer.echo(comparing.comparison(old, new))
    if any(change.verdict == "slower" for change in comparing.compare(old, new)):
        raise typer.Exit(1)


def profile(device: str, shape: str | None, dtype: str | None, scale: str, steps: int, out: Path) -> None:
    """Print where the time of a memory layer goes, and write a trace per layer to `out`."""
    from ..profile import profile_layers

    adjust = _adjustment(shape, dtype)
    check_folder(out)
    target = choose_device(device)
    [base, *_] = suite.points("layer", None, paper=_paper(scale, target), adjust=adjust)
    typer.echo(profile_layers(base.shape, target, steps=steps, out=out))


def quick(device: str, scale: str, json: Path | None, plots: Path | None) -> None:
    """Search and attention at their first base shape, without the providers that `unswept` says take long."""
    target = choose_device(device)
    ops = ("chunk_topk", "memory_attention")
    todo = [suite.kernel_points([op], paper=_paper(scale, target), adjust=lambda shape: shape)[0] for op in ops]
    work = [task for task in suite.tasks(todo, []) if task.provider.unswept is None]
    _answer(work, target, 0.5, None, json, plots, None, False, sys.stdout)


def goals(groups: Sequence[str] | None, device: str, small: bool, seconds: float, json: Path | None) -> None:
    """Measure the goals of these groups (None: all), print their table, save it.

    Raises:
        ValueError: an unknown group; or the goals are of a GPU, and this is none.
        typer.Exit: with status 1 when a result was wrong.
    """
    from ..goals import GROUPS, Measurer, Outcome, outcomes, shrunk, summary
    from ..goals import table as goal_table

    for group in groups or ():
        if group not in GROUPS:
            raise ValueError(f"goals: wanted some of {', '.join(GROUPS)}, got {group!r}")
    target = choose_device(device)
    if target.type != "cuda" and not small:
        raise ValueError("goals: they are times of a GPU: wanted a CUDA device, got a CPU (--small tries the command)")
    chosen = [goal for group in groups or GROUPS for goal in wanted_goals() if goal.group == group]
    chosen = [shrunk(goal) for goal in chosen] if small else chosen
    found: list[Outcome] = []
    with doing("measuring the goals"), tqdm(total=len(chosen), desc="goals", unit="row") as bar:
        for one in outcomes(chosen, Measurer(target, seconds, small=small)):
            found.append(one)
            bar.update()
    typer.echo(f"{Result.now([], target).headline()}\n\n{goal_table(found)}")
    if json is not None:
        save_text(json, json_text(summary(found, target)) + "\n")
        note(f"wrote {json}")
    if any(one.wrong for one in found):
        raise typer.Exit(1)


def report(path: Path, plots: Path | None, keep: Path | None) -> None:
    """Print a result's tables; draw and keep it where folders are named."""
    result = Result.load(path)
    typer.echo(f"{result.headline()}\n\n{table(result.rows)}")
    for drawn in draw(result.rows, plots, result.date) if plots is not None else []:
        note(f"wrote {drawn}")
    if keep is not None:
        note(f"wrote {result.keep(keep)}")


def regression(stored: Path, only: str | None, update: bool) -> None:
    """Print or store ratios and instructions; see `longmem_bench.regression`."""
    from .. import regression as held

    kinds = (only,) if only else held.KINDS
    if update:
        held.update(stored, kinds)
        note(f"wrote {stored}")
        return
    for line in held.beside(stored, kinds):
        typer.echo(line)


def published_step(
    small: bool, layers: int, rows: int, steps: int, device: str, json: Path | None, kernels: bool
) -> None:
    """Time a training step of the published model, print its rows, and save them."""
    from .. import published_step as step

    target = choose_device(device)
    shape = step.small(rows) if small else step.published(layers, rows)
    found: list[str] = []

    def look_into(row: Row, run: Callable[[], None]) -> None:
        times = kernel_times(run, target, calls=2)
        found.append(kernel_table(f"{row.provider}, {row.dtype}: ms per step", times, most=20))

    with doing("measuring the published step"):
        measured = step.measure_steps(shape, steps, target, look_into if kernels else None)
    result = Result.now(measured, target)
    typer.echo("\n\n".join([result.headline(), table(measured), *found]))
    if json is not None:
        note(f"wrote {result.save(json)}")


def readme(root: Path, results: Path) -> None:
    """Put the newest kept results into the pages of the repository `root`, and their plots beside them."""
    from ..readme import rewrite

    for path in rewrite(root, results):
        typer.echo(path)
