"""The command line: `longmem train | probe-layers | eval | generate | recall | quickstart | bench | profile`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .backbones.load import default_memory_layers, load_backbone
from .bench.cli import bench_app, profile_app
from .bench.environment import restart_with_quiet_threads
from .config import LongMemConfig
from .console import (
    announce,
    choose_device,
    evaluate_with_bar,
    load_documents,
    load_run,
    probe_with_bars,
    recall_with_bar,
    remember_with_bar,
    save_report,
    split_documents,
    train_with_bar,
)
from .data.documents import CORPORA
from .data.fetch import FetchError
from .data.stream import SegmentStream
from .evaluate.probe import ProbePlan, default_candidates
from .model import LongMem
from .quickstart import run_quickstart
from .states import StateCache, encode_now
from .tasks.recall import QUICK, RecallConfig
from .training.config import TrainConfig
from .training.processes import process_group, quiet
from .training.trainer import Trainer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="A frozen language model with a long-term memory.")
app.add_typer(bench_app, name="bench")
app.add_typer(profile_app, name="profile")

Data = Annotated[
    list[str], typer.Option("--data", help=f"Files, folders or globs (.txt .jsonl .parquet), or {', '.join(CORPORA)}.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Precision = Annotated[str, typer.Option(help="Of matrix products: auto, float32 or bfloat16.")]


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Run folder; an interrupted run in it is continued.")],
    backbone: Annotated[
        str, typer.Option(help="smollm2, or a folder or hub name of a transformers model.")
    ] = "smollm2",
    memory_layers: Annotated[
        list[int] | None,
        typer.Option(
            "--memory-layer", help="Layer stored and read, may be repeated; default: 1/3 to 5/6 of the depth."
        ),
    ] = None,
    sidenet: Annotated[str, typer.Option(help="none, exact or paper.")] = "none",
    trainable: Annotated[str, typer.Option(help="read, or all (with a SideNet).")] = "read",
    reduction: Annotated[int, typer.Option(help="Backbone layers per SideNet layer.")] = 2,
    fusion: Annotated[str, typer.Option(help="joint or gated.")] = "joint",
    chunk_size: Annotated[int, typer.Option(help="Tokens per chunk.")] = 4,
    chunks_per_query: Annotated[int, typer.Option(help="Chunks retrieved per token and head.")] = 16,
    memory_tokens: Annotated[int, typer.Option(help="Capacity of a row's memory.")] = 16_384,
    segment: Annotated[int, typer.Option(help="Tokens encoded at once: the local context.")] = 256,
    scope: Annotated[str, typer.Option(help="row: each document its own memory. shared: one for all rows.")] = "row",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = TrainConfig.steps,
    rows: Annotated[int, typer.Option(help="Documents side by side, per process.")] = TrainConfig.rows,
    accumulate: Annotated[int, typer.Option(help="Segments per row and optimiser step.")] = TrainConfig.accumulate,
    learning_rate: float = TrainConfig.learning_rate,
    head_rate: Annotated[
        float, typer.Option(help="Times as fast learn temperatures and gates.")
    ] = TrainConfig.head_rate,
    warmup: int = TrainConfig.warmup,
    clip: float = TrainConfig.clip,
    weight_decay: float = TrainConfig.weight_decay,
    usage_weight: Annotated[
        float, typer.Option(help="Of the penalty on heads that attend to memory less than --usage-target.")
    ] = TrainConfig.usage_weight,
    usage_target: Annotated[float, typer.Option(help="Share of attention, in (0, 1).")] = TrainConfig.usage_target,
    reset: Annotated[str, typer.Option(help="Empty memory at the next document, or never.")] = TrainConfig.reset,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = TrainConfig.save_every,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Less memory: compute layers again in the backward pass.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Compile layers that read no memory.")] = False,
    parallel: Annotated[
        str, typer.Option(help="Under torchrun: ddp, or fsdp (weights in pieces).")
    ] = TrainConfig.parallel,
    shard_memory: Annotated[
        bool, typer.Option("--shard-memory", help="Under torchrun: one memory in pieces over all processes.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log there too, in OUT/tensorboard.")] = False,
    seed: int = TrainConfig.seed,
    document_tokens: Annotated[int | None, typer.Option(help="Cut documents after this many tokens.")] = None,
    cache_states: Annotated[
        bool, typer.Option(help="Keep the backbone's states on disk, for repeated epochs.")
    ] = False,
    precision: Precision = "auto",
    device: Device = "auto",
) -> None:
    """Train a memory around a frozen language model, on documents read in order.

    In several processes: torchrun --nproc-per-node N -m longmem.cli train ...
    """
    config = TrainConfig(
        steps=steps,
        rows=rows,
        accumulate=accumulate,
        learning_rate=learning_rate,
        head_rate=head_rate,
        warmup=warmup,
        clip=clip,
        weight_decay=weight_decay,
        usage_weight=usage_weight,
        usage_target=usage_target,
        reset=reset,
        save_every=save_every,
        precision=precision,
        checkpoint_activations=checkpoint_activations,
        compile=compile,
        parallel=parallel,
        shard_memory=shard_memory,
        seed=seed,
    )
    target = choose_device(device)
    with process_group(target) as processes, quiet(not processes.first):
        torch.manual_seed(seed)
        frozen, tokenizer = load_backbone(backbone, target)
        model = LongMem(
            frozen,
            LongMemConfig(
                memory_layers=tuple(sorted(memory_layers))
                if memory_layers
                else default_memory_layers(frozen, sidenet, reduction),
                sidenet=sidenet,
                trainable=trainable,
                reduction=reduction,
                fusion=fusion,
                chunk_size=chunk_size,
                chunks_per_query=chunks_per_query,
                memory_tokens=memory_tokens,
                segment=segment,
                scope=scope,
            ),
        )
        documents = processes.share_of(
            load_documents(data, "train", tokenizer, min_tokens=segment + 1, cut=document_tokens)
        )
        announce(model, precision)
        cache = StateCache(model, documents, out / "states", precision=precision) if cache_states else None
        stream = SegmentStream(documents, rows=rows, segment=segment, seed=seed, repeat=True)
        train_with_bar(Trainer(model, stream, cache or encode_now(model), config, out, tensorboard=tensorboard))
        typer.echo(f"saved {out}/longmem.safetensors; metrics in {out}/metrics.jsonl")


@app.command("probe-layers")
def probe(
    data: Data,
    out: Annotated[Path, typer.Option(help="Where states, runs and probe.json go; what is there is not done again.")],
    backbone: Annotated[
        str, typer.Option(help="smollm2, or a folder or hub name of a transformers model.")
    ] = "smollm2",
    layers: Annotated[
        list[int] | None, typer.Option("--layer", help="Candidate, may be repeated; default: ten, evenly spread.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps per candidate.")] = 30,
    rows: Annotated[int, typer.Option(help="Documents side by side.")] = TrainConfig.rows,
    learning_rate: float = TrainConfig.learning_rate,
    segment: Annotated[int, typer.Option(help="Tokens encoded at once: the local context.")] = 256,
    memory_tokens: Annotated[int, typer.Option(help="Capacity of a row's memory.")] = 16_384,
    chunk_size: Annotated[int, typer.Option(help="Tokens per chunk.")] = 4,
    chunks_per_query: Annotated[int, typer.Option(help="Chunks retrieved per token and head.")] = 16,
    fusion: Annotated[str, typer.Option(help="joint or gated.")] = "joint",
    held_out: Annotated[int, typer.Option(help="Documents measured on: of files the last ones.")] = 3,
    score_from: Annotated[int, typer.Option(help="Tokens of each that fill the memory before scoring.")] = 4096,
    document_tokens: Annotated[int, typer.Option(help="Tokens of each held-out document used.")] = 8192,
    seed: int = TrainConfig.seed,
    precision: Precision = "auto",
    device: Device = "auto",
) -> None:
    """Rank layers by what a document's own memory is worth there over another's, after a short training of the read."""
    frozen, tokenizer = load_backbone(backbone, choose_device(device))
    candidates = sorted(set(layers)) if layers else default_candidates(len(frozen.layers))
    shortest = score_from + segment + 1
    training, measured = split_documents(data, tokenizer, held_out, min_tokens=shortest)
    # No more is encoded than is used.
    training = [tokens[: steps * segment + 1] for tokens in training[: max(rows, 1)]]
    measured = [tokens[: document_tokens + 1] for tokens in measured]
    config = LongMemConfig(
        memory_layers=(candidates[0],),
        segment=segment,
        memory_tokens=memory_tokens,
        chunk_size=chunk_size,
        chunks_per_query=chunks_per_query,
        fusion=fusion,
    )
    train_config = TrainConfig(
        steps=steps, rows=rows, learning_rate=learning_rate, save_every=steps, precision=precision, seed=seed
    )
    plan = ProbePlan(config, train_config, score_from, out)
    report = probe_with_bars(frozen, candidates, training, measured, plan)
    typer.echo(f"{report.table()}\n{report.verdict()}")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Option(help="Folder of a trained LongMem.")],
    data: Data,
    score_from: Annotated[
        int, typer.Option(help="Tokens of each document that fill the memory before scoring.")
    ] = 8192,
    document_tokens: Annotated[int, typer.Option(help="Tokens of each document used.")] = 12_288,
    full_context: Annotated[
        int | None, typer.Option(help="Score the backbone with so many tokens of context too; slow.")
    ] = None,
    memory_tokens: Annotated[int | None, typer.Option(help="Capacity of the memory; default: as trained.")] = None,
    segment: Annotated[int | None, typer.Option(help="Local context in tokens; default: as trained.")] = None,
    cache_states: Annotated[
        bool, typer.Option("--cache-states", help="Keep the backbone's states in OUT/states: half the encoding.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Where JSON and plot go; default RUN/eval.")] = None,
    precision: Precision = "auto",
    device: Device = "auto",
) -> None:
    """Held-out perplexity: backbone alone, and LongMem with an empty, its own and another document's memory."""
    model, tokenizer = load_run(run, device, memory_tokens=memory_tokens, segment=segment)
    documents = load_documents(
        data, "test", tokenizer, min_tokens=score_from + model.config.segment + 1, cut=document_tokens + 1
    )
    announce(model, precision)
    folder = out or run / "eval"
    cache = StateCache(model, documents, folder / "states", precision=precision) if cache_states else None
    report = evaluate_with_bar(model, documents, cache or encode_now(model), score_from, precision, full_context)
    typer.echo(report.table())
    about = {"data": data, "score_from": score_from, "full_context": full_context, "model": model.config.to_dict()}
    save_report(report, folder, f"{model.backbone.name}, {', '.join(data)}", **about)


@app.command()
def generate(
    run: Annotated[Path, typer.Option(help="Folder of a trained LongMem.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    memory_text: Annotated[list[str] | None, typer.Option("--remember", help="Files read into memory first.")] = None,
    max_new_tokens: int = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.7,
    top_p: float = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages what was said; 1 is none.")] = 1.0,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Continue a prompt, with texts of any length in memory."""
    model, tokenizer = load_run(run, device)
    memory = model.new_memory(rows=1)
    for document in load_documents(memory_text, "train", tokenizer, min_tokens=1) if memory_text else []:
        remember_with_bar(model, document, memory)
    typer.echo(f"memory: {memory.stats()['tokens']:.0f} tokens, {memory.stats()['fill']:.0%} full", err=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.backbone.device)
    if ids.shape[1] == 0:
        raise typer.BadParameter("the prompt holds no token", param_hint="--prompt")
    generator = torch.Generator(model.backbone.device).manual_seed(seed)
    written, shown = ids[0].tolist(), prompt
    typer.echo(prompt, nl=False)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "generator": generator}
    options |= {"repetition_penalty": repetition_penalty}
    for token in model.generate(ids, memory, max_new_tokens=max_new_tokens, **options):
        if int(token) == tokenizer.eos_token_id:
            break
        written.append(int(token))
        text = tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # half of a multi-byte character waits for its other half
            typer.echo(text[len(shown) :], nl=False)
            shown = text
    typer.echo()


@app.command()
def recall(
    out: Annotated[Path, typer.Option(help="Where JSON and plot go.")] = Path("out/recall"),
    quick: Annotated[bool, typer.Option(help="Seconds instead of a minute: short distances, few documents.")] = False,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Show that memory works: a tiny model recalls pairs it read up to 65,536 tokens ago, and could not without."""
    more: dict[str, Any] = QUICK if quick else {}
    typer.echo(recall_with_bar(RecallConfig(seed=seed, **more), choose_device(device), out).table())


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Where everything goes; an interrupted run is continued.")] = Path(
        "out/quickstart"
    ),
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Your own files instead of Shakespeare; the last three are held out."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 60,
    device: Device = "auto",
) -> None:
    """Train a memory around SmolLM2-135M, show what it is worth, and time the kernels."""
    run_quickstart(out, data, steps, device)


def main() -> None:
    """Entry point: errors that a person can do something about are printed, not traced."""
    if sys.argv[1:2] in (["bench"], ["profile"]):
        restart_with_quiet_threads()
    try:
        app()
    except (ValueError, FetchError, FloatingPointError, OSError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from None
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            typer.secho("\ninterrupted; the same command goes on from the last checkpoint", err=True)
        raise


if __name__ == "__main__":
    main()
