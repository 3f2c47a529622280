"""The options that commands share: names, help, and what each accepts. Defaults stand with the commands."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from longmem.config import Fusion, Precision, Scope, SideNetKind, SpecialTokens, Trainable
from longmem.data.documents import CORPORA
from longmem.training.config import Parallel, Reset

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
Scale = Literal["auto", "paper", "small"]
BenchModel = Literal["tiny", "smollm2"]
TritonOp = Literal["chunk_topk", "memory_attention", "memory_attention_backward", "memory_layer"]

# Of `generate`, where the model's generation configuration says nothing.
TEMPERATURE, TOP_P = 0.7, 0.95

_TEXTS, _MODEL, _MEMORY, _TRAINING = "Texts and places", "Model", "Memory", "Training"
_PROCESSES, _MACHINE = "Several processes", "Machine and output"
_GENERATION, _MEASURED = "Generation", "What is measured"


def _finite(
    *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf, most: float = math.inf
) -> Callable[[Any], Any]:
    """A callback that refuses numbers outside (above, below) and [least, most], not-a-number and infinity."""
    limits = [(above, "above"), (least, "of at least"), (below, "below"), (most, "of at most")]
    wanted = " and ".join(f"{word} {value:g}" for value, word in limits if math.isfinite(value))

    def check(value: Any) -> Any:
        inside = value is None or (math.isfinite(value) and above < value < below and least <= value <= most)
        if not inside:
            raise typer.BadParameter(f"wanted a number {wanted}".rstrip() + f", got {value}")
        return value

    return check


def _path(text: str | Path) -> Path:
    """An empty path, out of a variable that is not set, would be the working directory."""
    if not str(text):
        raise typer.BadParameter("wanted a path, got an empty one")
    return Path(text)


def _path_option(*names: str, **more: Any) -> Any:
    return _option(*names, parser=_path, metavar="PATH", **more)


def _option(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


# Texts and places

Data = Annotated[
    list[str],
    _option("--data", help=f"Files, folders or globs (.txt .jsonl .parquet), or {' or '.join(CORPORA)}.", panel=_TEXTS),
]
OwnData = Annotated[
    list[str] | None,
    _option("--data", help="Your own files instead of Shakespeare; the last three are held out.", panel=_TEXTS),
]
RunOut = Annotated[Path, _path_option(help="Run folder; an interrupted run in it is continued.", panel=_TEXTS)]
ProbeOut = Annotated[
    Path, _path_option(help="Where states, runs and probe.json go; what is there is not done again.", panel=_TEXTS)
]
EvalOut = Annotated[Path | None, _path_option(help="Where JSON and plot go; default RUN/eval.", panel=_TEXTS)]
RecallOut = Annotated[Path, _path_option(help="Where JSON and plot go.", panel=_TEXTS)]
QuickstartOut = Annotated[
    Path, _path_option(help="Where everything goes; an interrupted run is continued.", panel=_TEXTS)
]
Run = Annotated[Path, _path_option(help="Folder of a trained LongMem.", panel=_TEXTS)]
TrainTokens = Annotated[
    int | None, _option("--document-tokens", min=2, help="Cut documents after this many tokens.", panel=_TEXTS)
]
UsedTokens = Annotated[
    int, _option("--document-tokens", min=2, help="Tokens of each held-out document that are used.", panel=_TEXTS)
]
ScoreFrom = Annotated[
    int, _option(min=0, help="Tokens of each document that fill the memory before scoring begins.", panel=_TEXTS)
]
HeldOut = Annotated[int, _option(min=2, help="Number of documents measured on: of files, the last ones.", panel=_TEXTS)]
KeepStates = Annotated[
    bool,
    _option("--cache-states", help="Keep the backbone's states on disk and use them again.", panel=_TEXTS),
]

# Model

_BACKBONES = "smollm2, a folder or hub name of a transformers model, or a GGUF file."
_SPECIAL = "auto: texts begin with the special tokens that the model's tokenizer puts there (BOS); none: without."
Backbone = Annotated[str, _option(help=f"The frozen model: {_BACKBONES}", panel=_MODEL)]
OwnBackbone = Annotated[
    str | None, _option("--backbone", help=f"Where the run's own backbone is, if it moved: {_BACKBONES}", panel=_MODEL)
]
Special = Annotated[SpecialTokens, _option("--special-tokens", help=_SPECIAL, panel=_MODEL)]
OwnSpecial = Annotated[
    SpecialTokens | None, _option("--special-tokens", help=f"{_SPECIAL} Default: as trained.", panel=_MODEL)
]
MemoryLayers = Annotated[
    list[int] | None,
    _option(
        "--memory-layer",
        min=0,
        help="Layer that is stored and reads memory; may be repeated. Default: a third to five sixths of the depth.",
        panel=_MODEL,
    ),
]
Candidates = Annotated[
    list[int] | None,
    _option("--layer", min=0, help="Candidate layer; may be repeated. Default: ten, evenly spread.", panel=_MODEL),
]
SideNet = Annotated[
    SideNetKind,
    _option("--sidenet", help="A lighter network beside the backbone that reads memory in its stead.", panel=_MODEL),
]
Trained = Annotated[
    Trainable, _option("--trainable", help="Train the memory read alone, or the SideNet too.", panel=_MODEL)
]
Reduction = Annotated[int, _option(min=1, help="Backbone layers per SideNet layer.", panel=_MODEL)]

# Memory

FusionKind = Annotated[
    Fusion, _option("--fusion", help="One softmax over local tokens and memory, or a gate between two.", panel=_MEMORY)
]
ChunkSize = Annotated[int, _option(min=1, help="Tokens per chunk of memory.", panel=_MEMORY)]
ChunksPerQuery = Annotated[int, _option(min=1, help="Chunks retrieved per token and head.", panel=_MEMORY)]
MemoryTokens = Annotated[int, _option(min=1, help="Tokens that the memory of a row holds.", panel=_MEMORY)]
OtherMemoryTokens = Annotated[
    int | None,
    _option("--memory-tokens", min=1, help="Tokens that the memory holds; default: as trained.", panel=_MEMORY),
]
Segment = Annotated[int, _option(min=1, help="Tokens encoded at once: the local context.", panel=_MEMORY)]
OtherSegment = Annotated[
    int | None, _option("--segment", min=1, help="Local context in tokens; default: as trained.", panel=_MEMORY)
]
MemoryScope = Annotated[
    Scope, _option("--scope", help="A memory for each row of documents, or one for all rows.", panel=_MEMORY)
]
ResetAt = Annotated[
    Reset, _option("--reset", help="Empty a row's memory at its next document, or never.", panel=_MEMORY)
]
Remember = Annotated[
    list[str] | None, _option("--remember", help="Files, folders or globs read into memory first.", panel=_MEMORY)
]

# Training

Steps = Annotated[int, _option(min=1, help="Optimiser steps.", panel=_TRAINING)]
Rows = Annotated[
    int | None,
    _option(min=1, help="Documents side by side, per process. Default: 4, or as many as there are.", panel=_TRAINING),
]
Accumulate = Annotated[
    int, _option(min=1, help="Segments of every row that go into one optimiser step.", panel=_TRAINING)
]
LearningRate = Annotated[
    float, _option(callback=_finite(above=0), help="Highest learning rate, reached after the warm-up.", panel=_TRAINING)
]
HeadRate = Annotated[
    float,
    _option(
        callback=_finite(above=0),
        help="Multiplies the learning rate of the temperatures and gates of single heads.",
        panel=_TRAINING,
    ),
]
Warmup = Annotated[
    int, _option(min=0, help="Steps over which the learning rate rises to its highest.", panel=_TRAINING)
]
Clip = Annotated[float, _option(callback=_finite(above=0), help="Largest norm of the gradient.", panel=_TRAINING)]
WeightDecay = Annotated[
    float, _option(callback=_finite(least=0), help="Decoupled weight decay (AdamW).", panel=_TRAINING)
]
UsageWeight = Annotated[
    float,
    _option(
        callback=_finite(least=0),
        help="Weight of the penalty on heads that attend to memory less than --usage-target; 0 is none.",
        panel=_TRAINING,
    ),
]
UsageTarget = Annotated[
    float,
    _option(callback=_finite(above=0, below=1), help="Share of attention wanted for memory, 0 to 1.", panel=_TRAINING),
]
SaveEvery = Annotated[int, _option(min=1, help="Steps between checkpoints.", panel=_TRAINING)]
TensorBoard = Annotated[
    bool, _option("--tensorboard", help="Log for TensorBoard too, in OUT/tensorboard.", panel=_TRAINING)
]
Seed = Annotated[
    int, _option(min=0, max=2**32 - 1, help="Seed of everything random.", panel=_TRAINING, show_default=True)
]

# Several processes

ParallelKind = Annotated[
    Parallel,
    _option("--parallel", help="Under torchrun: whole weights in every process, or pieces.", panel=_PROCESSES),
]
ShardMemory = Annotated[
    bool,
    _option("--shard-memory", help="Under torchrun: one memory in pieces over all processes.", panel=_PROCESSES),
]

# Machine

CheckpointActivations = Annotated[
    bool,
    _option("--checkpoint-activations", help="Less memory: compute layers again in the backward pass.", panel=_MACHINE),
]
Compile = Annotated[bool, _option("--compile", help="Compile the layers that read no memory.", panel=_MACHINE)]
Products = Annotated[
    Precision,
    _option("--precision", help="Format of matrix products; auto: what the hardware is fast at.", panel=_MACHINE),
]
DeviceName = Annotated[Device, _option("--device", help="auto: the GPU where there is one.", panel=_MACHINE)]
Json = Annotated[
    bool, _option("--json", help="Print the result as JSON on stdout, everything else on stderr.", panel=_MACHINE)
]

# Generation

Prompt = Annotated[str, _option(help="Text to continue.", panel=_GENERATION)]
MaxNewTokens = Annotated[int, _option(min=0, help="Tokens generated at most.", panel=_GENERATION)]
_SAMPLING = "Default: as the model's generation configuration says, else"
Temperature = Annotated[
    float | None,
    _option(
        callback=_finite(least=0),
        help=f"Above 0 samples; 0 takes the most likely token. {_SAMPLING} {TEMPERATURE}.",
        panel=_GENERATION,
    ),
]
TopP = Annotated[
    float | None,
    _option(
        callback=_finite(above=0, most=1),
        help=f"Sample from the likeliest tokens that together reach this probability. {_SAMPLING} {TOP_P}.",
        panel=_GENERATION,
    ),
]
TopK = Annotated[
    int | None,
    _option(min=0, help=f"Sample from so many of the likeliest tokens; 0: all. {_SAMPLING} 0.", panel=_GENERATION),
]
RepetitionPenalty = Annotated[
    float | None,
    _option(
        callback=_finite(least=1e-3, most=1e3),
        help=f"Above 1 discourages what was said; 1 is none. {_SAMPLING} 1.",
        panel=_GENERATION,
    ),
]
StopAt = Annotated[
    list[str] | None,
    _option("--stop", help="End where this text begins, which is not shown; may be repeated.", panel=_GENERATION),
]
IgnoreEos = Annotated[
    bool,
    _option("--ignore-eos", help="Go on behind tokens that end the model's texts, and show them.", panel=_GENERATION),
]

# Measuring

FullContext = Annotated[
    int | None,
    _option(min=1, help="Score the backbone with this many tokens of context too; slow.", panel=_MEASURED),
]
Quick = Annotated[
    bool, _option("--quick", help="Seconds instead of a minute: short distances, few documents.", panel=_MEASURED)
]
Sweep = Annotated[
    str | None,
    _option(help="M=4096,16384 (any size), the name of a kept sweep (M), or all.", panel=_MEASURED),
]
Providers = Annotated[
    str | None, _option(help="Parts of names, by commas: longmem,faiss. Default: all.", panel=_MEASURED)
]
Without = Annotated[str | None, _option(help="Parts of names to leave out, by commas: reference.", panel=_MEASURED)]
Kernels = Annotated[
    bool, _option("--kernels", help="Print the times of single kernels (CPU: ops) as well.", panel=_MEASURED)
]
BaseAlone = Annotated[bool, _option("--base", help="The base shapes alone.", panel=_MEASURED)]
SweepsAlone = Annotated[bool, _option("--sweeps", help="The sweeps alone.", panel=_MEASURED)]
KernelNames = Annotated[
    str | None, _option("--kernel", help="Parts of kernels' names, by commas. Default: all.", panel=_MEASURED)
]
Workers = Annotated[int, _option(min=0, help="Processes that compile candidates beforehand; 0: none.", panel=_MEASURED)]
Compilers = Annotated[
    int | None, _option("--workers", min=1, help="Processes that compile; default: one per core.", panel=_MEASURED)
]
RankingsFile = Annotated[
    Path | None, _path_option("--json", help="Write rankings and winners; LONGMEM_TILES reads it.", panel=_TEXTS)
]
Update = Annotated[bool, _option("--update", help="Put the winners into the tables of longmem_kernels.", panel=_TEXTS)]
Architecture = Annotated[int, _option("--arch", min=1, help="Compute capability: 80 or 90.", panel=_MEASURED)]
AlsoSweeps = Annotated[bool, _option("--sweeps", help="Also what sweeps launch.", panel=_MEASURED)]
AlsoTiles = Annotated[bool, _option("--tiles", help="Also all candidates that `tune` would try.", panel=_MEASURED)]
Ops = Annotated[
    str | None, _option(help=f"By commas, of {', '.join(get_args(TritonOp))}. Default: all.", panel=_MEASURED)
]
Sizes = Annotated[str | None, _option("--shape", help="Other sizes than the base shape's: B=1,T=256.", panel=_MEASURED)]
DtypeName = Annotated[
    Dtype | None, _option("--dtype", help="Number format; default: the base shape's.", panel=_MEASURED)
]
ScaleName = Annotated[
    Scale, _option("--scale", help="The paper's shapes or small ones; auto: the paper's on a GPU.", panel=_MEASURED)
]
ModelName = Annotated[BenchModel | None, _option("--model", help="Backbone of generate and train.", panel=_MEASURED)]
Seconds = Annotated[
    float, _option(callback=_finite(above=0), help="Time that a row is measured for, about.", panel=_MEASURED)
]
Minutes = Annotated[
    float | None, _option(callback=_finite(least=0), help="Begin nothing new after this time.", panel=_MEASURED)
]
ProfileSteps = Annotated[int, _option("--steps", min=1, help="Steps of each layer that are averaged.", panel=_MEASURED)]
JsonFile = Annotated[
    Path | None, _path_option("--json", help="Write the rows to this file; - is stdout.", panel=_TEXTS)
]
Plots = Annotated[Path | None, _path_option("--plots", help="Write PNGs to this folder.", panel=_TEXTS)]
Keep = Annotated[bool, _option("--keep", help="Keep the rows under benchmarks/results/.", panel=_TEXTS)]
TraceOut = Annotated[Path, _path_option("--out", help="Folder for one Chrome trace per layer.", panel=_TEXTS)]
