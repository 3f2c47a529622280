"""The options that commands share: names, help, and what each accepts. Defaults stand with the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from longmem.config import Fusion, Precision, Scope, SideNetKind, SpecialTokens, Trainable
from longmem.data.documents import CORPORA
from longmem.training.config import Parallel, Reset

from .definitions import finite as _finite
from .definitions import option as _option
from .definitions import path_option as _path_option

Device = Literal["auto", "cpu", "cuda"]

# Of `generate`, where the model's generation configuration says nothing.
TEMPERATURE, TOP_P = 0.7, 0.95

_TEXTS, _MODEL, _MEMORY, _TRAINING = "Texts and places", "Model", "Memory", "Training"
_PROCESSES, _MACHINE = "Several processes", "Machine and output"
_GENERATION, _MEASURED = "Generation", "What is measured"

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
