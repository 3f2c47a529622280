"""`longmem bench` and `longmem profile`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from longmem_kernels._tiles import ARCHITECTURES

from ..console import choose_device
from . import compare as comparing
from . import suite
from .ceilings import ceilings
from .kernels import kernel_times
from .kernels import table as kernel_table
from .measure import Row, Watch
from .plots import plot, plot_sweeps
from .precompile import TRITON_OPS
from .providers import Prepared
from .report import brief, quantity, table, title
from .results import Result
from .shapes import MODELS, Shape, default_sweeps
from .tune import compile_points, tune_points

_SAVE_EVERY = 20.0  # seconds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

bench_app = typer.Typer(
    no_args_is_help=True, help="Time our kernels beside FAISS, PyTorch and others, each behind a correctness check."
)
profile_app = typer.Typer(no_args_is_help=True, help="Where the time goes.")

Sweep = Annotated[str | None, typer.Option(help="M=4096,16384 (any size), the name of a kept sweep (M), or all.")]
Providers = Annotated[str | None, typer.Option(help="Parts of names, by commas: longmem,faiss. Default: all.")]
Without = Annotated[str | None, typer.Option(help="Parts of names to leave out, by commas: reference.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Sizes = Annotated[str | None, typer.Option("--shape", help="Other sizes than the base shape's: B=1,T=256.")]
Dtype = Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: the base shape's.")]
Scale = Annotated[str, typer.Option(help="paper, small, or auto: paper on a GPU.")]
Seconds = Annotated[float, typer.Option(help="Timed per row, about.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")]
Plots = Annotated[Path | None, typer.Option("--plots", help="Write PNGs to this folder.")]
Model = Annotated[str | None, typer.Option(help=f"Backbone of generate and train: {', '.join(MODELS)}.")]
Keep = Annotated[bool, typer.Option("--keep", help="Keep the rows under benchmarks/results/.")]
Kernels = Annotated[bool, typer.Option("--kernels", help="Print the times of single kernels (CPU: ops) as well.")]
Minutes = Annotated[float | None, typer.Option(help="Begin nothing new after this time.")]


def _paper(scale: str, device: torch.device) -> bool:
    if scale not in ("paper", "small", "auto"):
        raise ValueError(f"scale must be paper, small or auto, got {scale!r}")
    return scale == "paper" or (scale == "auto" and device.type == "cuda")


def _adjustment(sizes: str | None, dtype: str | None, model: str | None = None) -> Callable[[Shape], Shape]:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if model is not None and model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    return suite.adjustment(suite.parse_sizes(sizes) if sizes else {}, DTYPES[dtype] if dtype else None, model)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",")] if text else []


def _answer(
    todo: Sequence[suite.Point],
    providers: str | None,
    device: torch.device,
    *,
    without: str | None = None,
    seconds: float,
    minutes: float | None = None,
    json: Path | None,
    plots: Path | None,
    keep: bool,
    kernels: bool = False,
) -> None:
    """Run, print, save, draw. Exit status 1 when something of ours was wrong, 130 after an interrupt, which leaves what
    was measured before it."""
    work = suite.tasks(todo, _words(providers), _words(without))
    rows: list[Row] = []
    found: list[str] = []

    def look_into(row: Row, prepared: Prepared) -> None:
        times = kernel_times(prepared.run, device, prepared.repeat)
        found.append(kernel_table(f"{row.provider}, {title(row)}: ms per operation", times))

    interrupted = False
    try:
        _measure(work, device, rows, seconds=seconds, minutes=minutes, json=json, watch=look_into if kernels else None)
    except KeyboardInterrupt:
        interrupted = True
    if not rows:
        raise typer.Exit(130)
    typer.echo("\n\n".join([table(rows), *found]))
    result = Result.now(rows, device)
    if json is not None:
        typer.echo(f"wrote {result.save(json)}", err=True)
    if keep and not interrupted:
        typer.echo(f"wrote {result.keep()}", err=True)
    if plots is not None and any(row.median_ms is not None for row in rows):
        for path in draw(rows, plots, result.date):
            typer.echo(f"wrote {path}", err=True)
    wrong = [row for row in rows if row.wrong and row.ours]
    for row in wrong:
        typer.secho(f"WRONG: {row.provider}, {row.op} [{row.shape} {row.dtype}]: {row.reason}", fg="red", err=True)
    if interrupted:
        typer.secho(f"interrupted after {len(rows)} of {len(work)} rows", fg="red", err=True)
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
    json: Path | None,
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
                bar.write(f"{row.op} [{row.shape} {row.dtype}] {row.provider}: {brief(row)}", file=sys.stderr)
            # A run that is cut short leaves what it has.
            if json is not None and time.monotonic() - saved > _SAVE_EVERY:
                Result.now(rows, device).save(json)
                saved = time.monotonic()
            bar.set_postfix_str(f"{task.point.op}: {task.provider.name}"[:60], refresh=False)
            bar.update()


def _announce(device: torch.device) -> None:
    """The machine's ceilings, which every row is held against."""
    for dtype in (torch.float32, torch.bfloat16):
        found = ceilings(str(device), dtype, torch.get_num_threads())
        name = str(dtype).removeprefix("torch.")
        copy, matmul = quantity(found.copy, "B/s"), quantity(found.matmul, "FLOP/s")
        typer.echo(f"{device}: copies {copy}, multiplies {name} matrices at {matmul}", err=True)


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


def _question(name: str) -> Callable[..., None]:
    def command(
        sweep: Sweep = None,
        providers: Providers = None,
        without: Without = None,
        device: Device = "auto",
        shape: Sizes = None,
        dtype: Dtype = None,
        scale: Scale = "auto",
        seconds: Seconds = 1.0,
        json: Json = None,
        plots: Plots = None,
        keep: Keep = False,
        model: Model = None,
        kernels: Kernels = False,
    ) -> None:
        target = choose_device(device)
        adjust = _adjustment(shape, dtype, model)
        todo = suite.points(name, sweep, paper=_paper(scale, target), adjust=adjust)
        _answer(
            todo,
            providers,
            target,
            without=without,
            seconds=seconds,
            json=json,
            plots=plots,
            keep=keep,
            kernels=kernels,
        )

    return command


for _name, _about in {
    "fusion": "Local and memory attention, forward and with backward, training and decoding.",
    "retrieval": "Exact search of the best chunks: throughput, and latency of single queries.",
    "write": "Appending a segment, or a token, to the memory.",
    "layer": "A whole memory layer: search, attention and write.",
    "generate": "Generating text with a memory, per token.",
    "train": "A training step of a LongMem model.",
}.items():
    bench_app.command(_name, help=_about)(_question(_name))


@bench_app.command("all")
def everything(
    providers: Providers = None,
    without: Without = None,
    device: Device = "auto",
    dtype: Dtype = None,
    scale: Scale = "auto",
    seconds: Seconds = 0.5,
    json: Json = None,
    plots: Plots = None,
    keep: Keep = False,
    minutes: Minutes = None,
    kernels: Kernels = False,
    base: Annotated[bool, typer.Option("--base", help="The base shapes alone.")] = False,
    sweeps: Annotated[bool, typer.Option("--sweeps", help="The sweeps alone.")] = False,
) -> None:
    """Every question at its base shapes, then every sweep."""
    target = choose_device(device)
    paper, adjust = _paper(scale, target), _adjustment(None, dtype)
    todo = suite.everything(paper=paper, adjust=adjust, base=not sweeps, sweeps=not base)
    _answer(
        todo,
        providers,
        target,
        without=without,
        seconds=seconds,
        minutes=minutes,
        json=json,
        plots=plots,
        keep=keep,
        kernels=kernels,
    )


@bench_app.command("tune")
def tune_tiles(
    op: Annotated[str | None, typer.Argument(help=f"{', '.join(TRITON_OPS)}; default: all.")] = None,
    shape: Sizes = None,
    dtype: Dtype = None,
    kernel: Annotated[str | None, typer.Option(help="Parts of kernels' names, by commas. Default: all.")] = None,
    device: Device = "auto",
    scale: Scale = "auto",
    seconds: Annotated[float, typer.Option(help="Timed per candidate, about.")] = 0.05,
    minutes: Minutes = None,
    workers: Annotated[int, typer.Option(help="Processes that compile candidates beforehand; 0: none.")] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write rankings and winners; LONGMEM_TILES reads it.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--update", help="Put the winners into the tables of longmem_kernels.")
    ] = False,
) -> None:
    """Time all candidates of the Triton kernels' tile tables, each behind the correctness check.

    Without a shape, at the base shapes, prefill and decoding."""
    target = choose_device(device)
    if op is not None and op not in TRITON_OPS:
        raise ValueError(f"tune: op must be one of {', '.join(TRITON_OPS)}, got {op!r}")
    adjust = _adjustment(shape, dtype)
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


@bench_app.command("compile")
def compile_kernels(
    arch: Annotated[int, typer.Option(help=f"Architecture: {', '.join(map(str, ARCHITECTURES))}.")] = 90,
    sweeps: Annotated[bool, typer.Option("--sweeps", help="Also what sweeps launch.")] = False,
    tiles: Annotated[bool, typer.Option("--tiles", help="Also all candidates that `tune` would try.")] = False,
    ops: Annotated[str | None, typer.Option(help=f"By commas, of {', '.join(TRITON_OPS)}. Default: all.")] = None,
    shape: Sizes = None,
    scale: Scale = "paper",
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    minutes: Minutes = None,
) -> None:
    """Compile the Triton kernels that benchmarks launch, into Triton's cache; no GPU is needed.

    Exit status 1 when what the tables have does not compile or needs more than a block can have."""
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
    if not compile_points(points, arch, candidates=tiles, workers=workers, minutes=minutes):
        raise typer.Exit(1)


@bench_app.command("compare")
def compare(
    before: Annotated[Path, typer.Argument(help="A result: from --json, or kept.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """What got slower or faster beyond noise. Exit status 1 when something got slower."""
    old, new = Result.load(before), Result.load(after)
    typer.echo(comparing.comparison(old, new))
    if any(change.verdict == "slower" for change in comparing.compare(old, new)):
        raise typer.Exit(1)


@profile_app.command("retrieval")
def profile_retrieval(
    device: Device = "auto",
    shape: Sizes = None,
    dtype: Dtype = None,
    scale: Scale = "auto",
    steps: Annotated[int, typer.Option(help="Steps of each layer to average.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder for one Chrome trace per layer.")] = Path("out/profile"),
) -> None:
    """Where the time of a memory layer goes: score, select, gather, fuse, write; ours, eager PyTorch's and FAISS's."""
    from .profile import profile_layers

    target = choose_device(device)
    [base, *_] = suite.points(
        "layer", None, paper=_paper(scale, target), adjust=_adjustment(shape, dtype)
    )  # fmt: skip
    typer.echo(profile_layers(base.shape, target, steps=steps, out=out))


@profile_app.callback()
def _profile() -> None:
    """A group, though of one command so far."""
