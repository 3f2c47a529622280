"""The options of `longmem bench` and `longmem profile`. The work is in `longmem.bench.cli`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from . import options as o

bench_app = typer.Typer(
    no_args_is_help=True, help="Time our kernels beside FAISS, PyTorch and others, each behind a correctness check."
)
profile_app = typer.Typer(no_args_is_help=True, help="Where the time goes.")


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
        keep: o.Keep = False,
        model: o.ModelName = None,
        kernels: o.Kernels = False,
    ) -> None:
        given = {"question": question} | locals()
        from longmem.bench.cli import answer

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
    bench_app.command(_name, help=_about)(_question(_name))


@bench_app.command("all")
def everything(
    providers: o.Providers = None,
    without: o.Without = None,
    device: o.DeviceName = "auto",
    dtype: o.DtypeName = None,
    scale: o.ScaleName = "auto",
    seconds: o.Seconds = 0.5,
    json: o.JsonFile = None,
    plots: o.Plots = None,
    keep: o.Keep = False,
    minutes: o.Minutes = None,
    kernels: o.Kernels = False,
    base: o.BaseAlone = False,
    sweeps: o.SweepsAlone = False,
) -> None:
    """Every question at its base shapes, then every sweep."""
    given = dict(locals())
    from longmem.bench.cli import answer

    answer(None, **given)


@bench_app.command("tune")
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
    from longmem.bench.cli import tune_tiles as work

    work(**given)


@bench_app.command("compile")
def compile_kernels(
    arch: o.Architecture = 90,
    sweeps: o.AlsoSweeps = False,
    tiles: o.AlsoTiles = False,
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
    from longmem.bench.cli import compile_kernels as work

    work(**given)


@bench_app.command("compare")
def compare(
    before: Annotated[Path, typer.Argument(help="A result: from --json, or kept.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """What got slower or faster beyond noise. Exit status 1 when something got slower."""
    from longmem.bench.cli import compare as work

    work(before, after)


@profile_app.command("retrieval")
def profile_retrieval(
    device: o.DeviceName = "auto",
    shape: o.Sizes = None,
    dtype: o.DtypeName = None,
    scale: o.ScaleName = "auto",
    steps: o.ProfileSteps = 10,
    out: o.TraceOut = Path("out/profile"),
) -> None:
    """Where the time of a memory layer goes: score, select, gather, fuse, write; ours, eager PyTorch's and FAISS's."""
    from longmem.bench.cli import profile

    profile(device, shape, dtype, scale, steps, out)


@profile_app.callback()
def _profile() -> None:
    """A group, though of one command so far."""
