"""The subcommands and their options. The work is in `commands`, loaded when a command runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from . import options as o

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Time our kernels beside FAISS, PyTorch and others, each behind a correctness check.",
)


def _question(question: str) -> Callable[..., None]:
    def command(
        sweep: o.Sweep = None,
        providers: o.Providers = None,
        without: o.Without = None,
        device: o.DeviceName = "auto",
        shape: o.Sizes = None,
        dtype: o.DtypeName = None,
        scale: o.ScaleName = "auto",
        seconds: o.Seconds = 1.0,
        json: o.JsonFile = None,
        plots: o.Plots = None,
        keep: o.Keep = None,
        model: o.ModelName = None,
        kernels: o.Kernels = False,
    ) -> None:
        given = {"question": question} | locals()
        from .commands import answer

        answer(**given)

    return command


for _name, _about in {
    "fusion": "Local and memory attention, forward and with backward, training and decoding.",
    "retrieval": "Exact search of the best chunks: throughput, and latency of single queries.",
    "write": "Appending a segment, or a token, to the memory.",
    "layer": "A whole memory layer: search, attention and write.",
    "generate": "Generating text with a memory, per token.",
    "train": "A training step of a LongMem model.",
}.items():
    app.command(_name, help=_about)(_question(_name))


@app.command("all")
def everything(
    providers: o.Providers = None,
    without: o.Without = None,
    device: o.DeviceName = "auto",
    dtype: o.DtypeName = None,
    scale: o.ScaleName = "auto",
    seconds: o.Seconds = 0.5,
    json: o.JsonFile = None,
    plots: o.Plots = None,
    keep: o.Keep = None,
    minutes: o.Minutes = None,
    kernels: o.Kernels = False,
    base: o.BaseAlone = False,
    sweeps: o.SweepsAlone = False,
) -> None:
    """Every question at its base shapes, then every sweep."""
    given = dict(locals())
    from .commands import answer

    answer(None, **given)


@app.command()
def goals(
    groups: o.GoalGroups = None,
    device: o.DeviceName = "auto",
    small: o.SmallGoals = False,
    seconds: o.Seconds = 0.1,
    json: o.OutcomesFile = None,
) -> None:
    """The goals set for a GPU beside what is measured: search, attention, layer, step and model, or some of them.

    Exit status 1 when a result is wrong; a goal that is not met is none.
    """
    from .commands import goals as work

    work(groups, device, small, seconds, json)


@app.command("tune")
def tune_tiles(
    op: Annotated[o.TritonOp | None, typer.Argument(help="The operation; default: all.")] = None,
    shape: o.Sizes = None,
    dtype: o.DtypeName = None,
    kernel: o.KernelNames = None,
    device: o.DeviceName = "auto",
    scale: o.ScaleName = "auto",
    seconds: o.Seconds = 0.05,
    minutes: o.Minutes = None,
    workers: o.Workers = 0,
    json: o.RankingsFile = None,
    write: o.Update = False,
) -> None:
    """Time all candidates of the Triton kernels' tile tables, each behind the correctness check.

    Without a shape, at the base shapes, prefill and decoding.
    """
    given = dict(locals())
    from .commands import tune_tiles as work

    work(**given)


@app.command("compile")
def compile_kernels(
    arch: o.Architecture = 90,
    sweeps: o.AlsoSweeps = False,
    tiles: o.AlsoTiles = False,
    goals: o.AlsoGoals = False,
    ops: o.Ops = None,
    shape: o.Sizes = None,
    scale: o.ScaleName = "paper",
    workers: o.Compilers = None,
    minutes: o.Minutes = None,
) -> None:
    """Compile the Triton kernels that benchmarks launch, into Triton's cache; no GPU is needed.

    Exit status 1 when what the tables have does not compile or needs more than a block can have.
    """
    given = dict(locals())
    from .commands import compile_kernels as work

    work(**given)


@app.command("compare")
def compare(
    before: o.ResultFile,
    after: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Show what got slower or faster beyond noise. Exit status 1 when something got slower."""
    from .commands import compare as work

    work(before, after)


@app.command("profile")
def profile_layers(
    device: o.DeviceName = "auto",
    shape: o.Sizes = None,
    dtype: o.DtypeName = None,
    scale: o.ScaleName = "auto",
    steps: o.ProfileSteps = 10,
    out: o.TraceOut = Path("out/profile"),
) -> None:
    """Show the time of each part of a memory layer (score, select, gather, fuse, write), ours and the baselines'."""
    from .commands import profile as work

    work(device, shape, dtype, scale, steps, out)


@app.command()
def quick(
    device: o.DeviceName = "auto",
    scale: o.ScaleName = "auto",
    json: o.JsonFile = None,
    plots: o.Plots = None,
) -> None:
    """Search and attention beside their baselines, in a minute: what compiles for long is left out."""
    from .commands import quick as work

    work(device, scale, json, plots)


@app.command()
def report(
    result: o.ResultFile,
    plots: o.Plots = None,
    keep: o.Keep = None,
) -> None:
    """The tables of a result, from --json, from pytest benchmarks/ --benchmark-json, or kept."""
    from .commands import report as work

    work(result, plots, keep)


@app.command()
def regression(
    stored: o.Stored = Path("benchmarks/regression.json"),
    only: o.OnlyKind = None,
    update: o.StoreAnew = False,
) -> None:
    """Show what CI holds the CPU kernels to, measured beside stored."""
    from .commands import regression as work

    work(stored, only, update)


@app.command("published-step")
def published_step(
    small: o.SmallModel = False,
    layers: o.Layers = 24,
    rows: o.BatchRows = 1,
    steps: o.TimedSteps = 4,
    device: o.DeviceName = "auto",
    json: o.JsonFile = None,
    kernels: o.Kernels = False,
) -> None:
    """A training step of the published model, ours beside the published composition: some minutes on two cores.

    The same weights, tokens and optimiser for every provider, a memory as full as the published arithmetic lets it be,
    and the same loss at every step, or no numbers.
    """
    from .commands import published_step as work

    work(small, layers, rows, steps, device, json, kernels)


@app.command()
def readme(
    root: o.Root = Path(),
    results: o.ResultsFolder = Path("benchmarks/results"),
) -> None:
    """Put the newest kept results into README and docs/measured.md: tables and plots."""
    from .commands import readme as work

    work(root, results)
