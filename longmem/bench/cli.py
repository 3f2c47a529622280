"""The work of `longmem bench` and `longmem profile`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch
import typer
from tqdm import tqdm

from longmem.cli.failures import doing
from longmem.cli.output import note

from ..console import check_folder, choose_device
from . import compare as comparing
from . import suite
from .ceilings import ceilings
from .measure import Row
from .plots import plot, plot_sweeps
from .report import quantity, table
from .results import Result
from .shapes import Shape

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
    seconds: float,
    json: Path | None,
    plots: Path | None,
    keep: bool,
    sweep: str | None = None,
    shape: str | None = None,
    model: str | None = None,
    minutes: float | None = None,
) -> None:
    """Measure what answers `question` (None: all of them), print, save, draw; the arguments are the options' values.

    Raises:
        typer.Exit: with status 1, when something of ours was wrong.
    """
    adjust = _adjustment(shape, dtype, model)
    wanted = [word.strip() for word in providers.split(",")] if providers else []
    for folder in [plots, json.parent if json not in (None, _STDOUT) else None]:
        if folder is not None:
            check_folder(folder)
    target = choose_device(device)
    paper = _paper(scale, target)
    if question is None:
        todo = suite.everything(paper=paper, adjust=adjust)
    else:
        todo = suite.points(question, sweep, paper=paper, adjust=adjust)
    work = suite.tasks(todo, wanted)
    _announce(target)
    # With JSON on stdout, a library that prints must not get in between.
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if json == _STDOUT else contextlib.nullcontext():
        rows = _measure(work, target, seconds=seconds, minutes=minutes, file=None if json == _STDOUT else json)
        _report(Result.now(rows, target), json, plots, keep, stdout)
    wrong = [row for row in rows if row.wrong and row.ours]
    for row in wrong:
        note(f"WRONG: {row.provider}, {row.op} [{row.shape} {row.dtype}]: {row.reason}", red=True)
    if wrong:
        raise typer.Exit(1)


def _paper(scale: str, device: torch.device) -> bool:
    return scale == "paper" or (scale == "auto" and device.type == "cuda")


def _adjustment(sizes: str | None, dtype: str | None, model: str | None = None) -> Callable[[Shape], Shape]:
    return suite.adjustment(suite.parse_sizes(sizes) if sizes else {}, DTYPES[dtype] if dtype else None, model)


def _measure(
    work: Sequence[suite.Task], device: torch.device, *, seconds: float, minutes: float | None, file: Path | None
) -> list[Row]:
    """The rows, saved to `file` every now and then: a run that is cut short leaves what it has."""
    rows: list[Row] = []
    saved = time.monotonic()

    def kept() -> str:
        return f"rows measured so far are in {file}" if file is not None and file.exists() else "no row was kept"

    with doing("measuring", kept), tqdm(total=len(work), desc="bench", unit="row") as bar:
        for task, row in suite.run(work, device, seconds=seconds, minutes=minutes):
            rows.append(row)
            if file is not None and time.monotonic() - saved > _SAVE_EVERY:
                Result.now(rows, device).save(file)
                saved = time.monotonic()
            bar.set_postfix_str(f"{task.point.op}: {task.provider.name}"[:60], refresh=False)
            bar.update()
    return rows


def _report(result: Result, json: Path | None, plots: Path | None, keep: bool, stdout: TextIO) -> None:
    """Print the table, or JSON where `json` says so, and write what was asked for."""
    print(result.text() if json == _STDOUT else table(result.rows), file=stdout, flush=True)
    if json is not None and json != _STDOUT:
        note(f"wrote {result.save(json)}")
    if keep:
        note(f"wrote {result.keep()}")
    if plots is not None:
        for path in draw(result.rows, plots, result.date):
            note(f"wrote {path}")


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


def compare(before: Path, after: Path) -> None:
    """Print what changed. Raises typer.Exit with status 1 when something got slower."""
    old, new = Result.load(before), Result.load(after)
    typer.echo(comparing.comparison(old, new))
    if any(change.verdict == "slower" for change in comparing.compare(old, new)):
        raise typer.Exit(1)


def profile(device: str, shape: str | None, dtype: str | None, scale: str, steps: int, out: Path) -> None:
    """Print where the time of a memory layer goes, and write a trace per layer to `out`."""
    from .profile import profile_layers

    adjust = _adjustment(shape, dtype)
    check_folder(out)
    target = choose_device(device)
    [base, *_] = suite.points("layer", None, paper=_paper(scale, target), adjust=adjust)
    typer.echo(profile_layers(base.shape, target, steps=steps, out=out))
