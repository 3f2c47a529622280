"""The options that commands share. Defaults stand with the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from longmem.cli.definitions import finite, option, path_option
from longmem.cli.options import DeviceName as DeviceName

Dtype = Literal["float32", "bfloat16", "float16"]
Scale = Literal["auto", "paper", "small"]
Model = Literal["tiny", "smollm2", "llama-8b", "llama-1b", "llama-tiny"]
TritonOp = Literal["chunk_topk", "memory_attention", "memory_attention_backward", "memory_layer"]

MEASURED, PLACES = "What is measured", "Places"

Sweep = Annotated[
    str | None,
    option(help="M=4096,16384 (any size), the name of a kept sweep (M), or all.", panel=MEASURED),
]
Providers = Annotated[
    str | None, option(help="Parts of names, by commas: longmem,faiss. Default: all.", panel=MEASURED)
]
Without = Annotated[str | None, option(help="Parts of names to leave out, by commas: reference.", panel=MEASURED)]
Kernels = Annotated[
    bool, option("--kernels", help="Print the times of single kernels (CPU: ops) as well.", panel=MEASURED)
]
BaseAlone = Annotated[bool, option("--base", help="The base shapes alone.", panel=MEASURED)]
SweepsAlone = Annotated[bool, option("--sweeps", help="The sweeps alone.", panel=MEASURED)]
KernelNames = Annotated[
    str | None, option("--kernel", help="Parts of kernels' names, by commas. Default: all.", panel=MEASURED)
]
Workers = Annotated[int, option(min=0, help="Processes that compile candidates beforehand; 0: none.", panel=MEASURED)]
Compilers = Annotated[
    int | None, option("--workers", min=1, help="Processes that compile; default: one per core.", panel=MEASURED)
]
RankingsFile = Annotated[
    Path | None, path_option("--json", help="Write rankings and winners; LONGMEM_TILES reads it.", panel=PLACES)
]
Update = Annotated[bool, option("--update", help="Put the winners into the tables of longmem_kernels.", panel=PLACES)]
Architecture = Annotated[int, option("--arch", min=1, help="Compute capability: 80 or 90.", panel=MEASURED)]
AlsoSweeps = Annotated[bool, option("--sweeps", help="Also what sweeps launch.", panel=MEASURED)]
AlsoTiles = Annotated[bool, option("--tiles", help="Also all candidates that `tune` would try.", panel=MEASURED)]
AlsoGoals = Annotated[bool, option("--goals", help="Also what `goals` launches.", panel=MEASURED)]
GoalGroups = Annotated[
    list[str] | None, typer.Argument(help="Of search, attention, layer, step and model. Default: all.")
]
SmallGoals = Annotated[
    bool,
    option("--small", help="Everything small and without bounds, to try it on any machine.", panel=MEASURED),
]
OutcomesFile = Annotated[Path | None, path_option("--json", help="Write the outcomes to this file.", panel=PLACES)]
Ops = Annotated[
    str | None, option(help=f"By commas, of {', '.join(get_args(TritonOp))}. Default: all.", panel=MEASURED)
]
Sizes = Annotated[str | None, option("--shape", help="Other sizes than the base shape's: B=1,T=256.", panel=MEASURED)]
DtypeName = Annotated[Dtype | None, option("--dtype", help="Number format; default: the base shape's.", panel=MEASURED)]
ScaleName = Annotated[
    Scale, option("--scale", help="The paper's shapes or small ones; auto: the paper's on a GPU.", panel=MEASURED)
]
ModelName = Annotated[Model | None, option("--model", help="Backbone of generate and train.", panel=MEASURED)]
Seconds = Annotated[
    float, option(callback=finite(above=0), help="Time that a row is measured for, about.", panel=MEASURED)
]
Minutes = Annotated[
    float | None, option(callback=finite(least=0), help="Begin nothing new after this time.", panel=MEASURED)
]
ProfileSteps = Annotated[int, option("--steps", min=1, help="Steps of each layer that are averaged.", panel=MEASURED)]
JsonFile = Annotated[Path | None, path_option("--json", help="Write the rows to this file; - is stdout.", panel=PLACES)]
Plots = Annotated[Path | None, path_option("--plots", help="Write PNGs to this folder.", panel=PLACES)]
Keep = Annotated[
    Path | None,
    path_option("--keep", help="Keep the rows in this folder, by device and commit: benchmarks/results.", panel=PLACES),
]
ResultFile = Annotated[Path, typer.Argument(help="A result: from --json, or kept.")]
Stored = Annotated[Path, path_option("--stored", help="File of what the kernels are held to.", panel=PLACES)]
OnlyKind = Annotated[Literal["ratios", "instructions"] | None, option("--only", help="One of the two.", panel=MEASURED)]
StoreAnew = Annotated[
    bool, option("--update", help="Store what is measured; on an otherwise idle machine.", panel=PLACES)
]
SmallModel = Annotated[bool, option("--small", help="A model of a few million parameters.", panel=MEASURED)]
Layers = Annotated[int, option("--layers", min=2, help="Backbone layers of the published size.", panel=MEASURED)]
BatchRows = Annotated[int, option("--rows", min=1, help="Rows of the batch.", panel=MEASURED)]
TimedSteps = Annotated[int, option("--steps", min=2, help="Timed; even: every second one evicts.", panel=MEASURED)]
Root = Annotated[Path, path_option("--root", help="Folder of the repository whose pages are rewritten.", panel=PLACES)]
ResultsFolder = Annotated[Path, path_option("--results", help="Folder of kept results.", panel=PLACES)]
TraceOut = Annotated[Path, path_option("--out", help="Folder for one Chrome trace per layer.", panel=PLACES)]
