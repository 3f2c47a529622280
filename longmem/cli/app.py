"""The subcommands and their options. The work is in `commands`, loaded when a command runs."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from longmem.config import LongMemConfig
from longmem.evaluate import DOCUMENT_TOKENS, SCORE_FROM
from longmem.training.config import TrainConfig

from . import options as o

app = typer.Typer(add_completion=False, no_args_is_help=True, help="A frozen language model with a long-term memory.")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"longmem {version('longmem')}")
        except PackageNotFoundError:  # a source tree that is not installed
            from longmem import __version__

            typer.echo(f"longmem {__version__}")
        raise typer.Exit


@app.callback()
def _longmem(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _taken(config: type, given: dict[str, Any]) -> dict[str, Any]:
    """Takes the options that are fields of `config` out of `given`; those that were not given are left out."""
    found = {field.name: given.pop(field.name) for field in fields(config) if field.name in given}
    return {name: value for name, value in found.items() if value is not None}


@app.command()
def train(
    data: o.Data,
    out: o.RunOut,
    backbone: o.Backbone = "smollm2",
    memory_layers: o.MemoryLayers = None,
    sidenet: o.SideNet = LongMemConfig.sidenet,
    trainable: o.Trained = LongMemConfig.trainable,
    reduction: o.Reduction = LongMemConfig.reduction,
    fusion: o.FusionKind = LongMemConfig.fusion,
    chunk_size: o.ChunkSize = LongMemConfig.chunk_size,
    chunks_per_query: o.ChunksPerQuery = LongMemConfig.chunks_per_query,
    memory_tokens: o.MemoryTokens = LongMemConfig.memory_tokens,
    segment: o.Segment = LongMemConfig.segment,
    scope: o.MemoryScope = LongMemConfig.scope,
    reset: o.ResetAt = TrainConfig.reset,
    steps: o.Steps = TrainConfig.steps,
    rows: o.Rows = None,
    accumulate: o.Accumulate = TrainConfig.accumulate,
    learning_rate: o.LearningRate = TrainConfig.learning_rate,
    head_rate: o.HeadRate = TrainConfig.head_rate,
    warmup: o.Warmup = TrainConfig.warmup,
    clip: o.Clip = TrainConfig.clip,
    weight_decay: o.WeightDecay = TrainConfig.weight_decay,
    usage_weight: o.UsageWeight = TrainConfig.usage_weight,
    usage_target: o.UsageTarget = TrainConfig.usage_target,
    save_every: o.SaveEvery = TrainConfig.save_every,
    tensorboard: o.TensorBoard = False,
    seed: o.Seed = TrainConfig.seed,
    document_tokens: o.TrainTokens = None,
    special_tokens: o.Special = LongMemConfig.special_tokens,
    cache_states: o.KeepStates = False,
    parallel: o.ParallelKind = TrainConfig.parallel,
    shard_memory: o.ShardMemory = TrainConfig.shard_memory,
    checkpoint_activations: o.CheckpointActivations = TrainConfig.checkpoint_activations,
    compile: o.Compile = TrainConfig.compile,
    precision: o.Products = TrainConfig.precision,
    device: o.DeviceName = "auto",
    json: o.Json = False,
) -> None:
    """Train a memory around a frozen language model, on documents read in order.

    In several processes: torchrun --nproc-per-node N -m longmem train ...
    """
    given = dict(locals())
    from .commands import train as work

    config = TrainConfig(**_taken(TrainConfig, given))
    work(config, _taken(LongMemConfig, given), rows=rows, **given)


@app.command("probe-layers")
def probe(
    data: o.Data,
    out: o.ProbeOut,
    backbone: o.Backbone = "smollm2",
    layers: o.Candidates = None,
    steps: o.Steps = 30,
    rows: o.Rows = None,
    learning_rate: o.LearningRate = TrainConfig.learning_rate,
    segment: o.Segment = LongMemConfig.segment,
    memory_tokens: o.MemoryTokens = LongMemConfig.memory_tokens,
    chunk_size: o.ChunkSize = LongMemConfig.chunk_size,
    chunks_per_query: o.ChunksPerQuery = LongMemConfig.chunks_per_query,
    fusion: o.FusionKind = LongMemConfig.fusion,
    held_out: o.HeldOut = 3,
    score_from: o.ScoreFrom = 4096,
    document_tokens: o.UsedTokens = 8192,
    special_tokens: o.Special = LongMemConfig.special_tokens,
    seed: o.Seed = TrainConfig.seed,
    precision: o.Products = TrainConfig.precision,
    device: o.DeviceName = "auto",
    json: o.Json = False,
) -> None:
    """Rank layers by what a document's own memory is worth there over another's, after a short training of the read."""
    given = dict(locals())
    from .commands import probe as work

    config = TrainConfig(save_every=steps, **_taken(TrainConfig, given))
    work(config, _taken(LongMemConfig, given), rows=rows, **given)


@app.command("eval")
def evaluate(
    run: o.Run,
    data: o.Data,
    score_from: o.ScoreFrom = SCORE_FROM,
    document_tokens: o.UsedTokens = DOCUMENT_TOKENS,
    full_context: o.FullContext = None,
    memory_tokens: o.OtherMemoryTokens = None,
    segment: o.OtherSegment = None,
    backbone: o.OwnBackbone = None,
    special_tokens: o.OwnSpecial = None,
    cache_states: o.KeepStates = False,
    out: o.EvalOut = None,
    precision: o.Products = TrainConfig.precision,
    device: o.DeviceName = "auto",
    json: o.Json = False,
) -> None:
    """Held-out perplexity: backbone alone, and LongMem with an empty, its own and another document's memory."""
    given = dict(locals())
    from .commands import evaluate as work

    work(**given)


@app.command()
def generate(
    run: o.Run,
    prompt: o.Prompt,
    remember: o.Remember = None,
    memory_tokens: o.OtherMemoryTokens = None,
    max_new_tokens: o.MaxNewTokens = 100,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    repetition_penalty: o.RepetitionPenalty = None,
    stop: o.StopAt = None,
    ignore_eos: o.IgnoreEos = False,
    backbone: o.OwnBackbone = None,
    special_tokens: o.OwnSpecial = None,
    seed: o.Seed = 0,
    device: o.DeviceName = "auto",
    json: o.Json = False,
) -> None:
    """Continue a prompt, with texts of any length in memory.

    The prompt and what follows it go to standard output as UTF-8, then one line end; special tokens among it are shown,
    but not the one that ends it.
    """
    given = dict(locals())
    from .commands import generate as work

    work(**given)


@app.command()
def recall(
    out: o.RecallOut = Path("out/recall"),
    quick: o.Quick = False,
    seed: o.Seed = 0,
    device: o.DeviceName = "auto",
    json: o.Json = False,
) -> None:
    """Show that memory works: a tiny model recalls pairs it read up to 65,536 tokens ago, and could not without."""
    given = dict(locals())
    from .commands import recall as work

    work(**given)


@app.command()
def quickstart(
    out: o.QuickstartOut = Path("out/quickstart"),
    data: o.OwnData = None,
    steps: o.Steps = TrainConfig.steps,
    device: o.DeviceName = "auto",
) -> None:
    """Train a memory around SmolLM2-135M and show what it is worth on unseen texts."""
    from longmem.quickstart import run_quickstart

    run_quickstart(out, data, steps, device)


def _moved(name: str, arguments: list[str] | None) -> None:
    words = ["longmem-bench", *(["profile"] if name == "profile" else []), *(arguments or [])]
    raise ValueError(f"longmem {name} has become a command of its own: {shlex.join(words)}")


_ANYTHING = {"ignore_unknown_options": True, "allow_extra_args": True}
_Words = Annotated[list[str] | None, typer.Argument()]


@app.command(hidden=True, context_settings=_ANYTHING, add_help_option=False)
def bench(arguments: _Words = None) -> None:
    """Moved: longmem-bench."""
    _moved("bench", arguments)


@app.command(hidden=True, context_settings=_ANYTHING, add_help_option=False)
def profile(arguments: _Words = None) -> None:
    """Moved: longmem-bench profile."""
    _moved("profile", (arguments or [])[1:])  # after its one subcommand
