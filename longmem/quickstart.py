"""The quick start: train a memory around SmolLM2-135M and show what it is worth on unseen texts."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .backbones.load import default_memory_layers, load_backbone
from .cli.commands import kept_of_training
from .cli.failures import doing
from .cli.output import note
from .config import LongMemConfig
from .console import (
    announce,
    check_folder,
    check_sources,
    choose_device,
    evaluate_with_bar,
    fitting_rows,
    load_documents,
    report_content,
    save_report,
    train_with_bar,
)
from .data.stream import SegmentStream
from .evaluate import DOCUMENT_TOKENS, SCORE_FROM
from .model import LongMem
from .states import StateCache, encode_now
from .training.config import TrainConfig
from .training.trainer import Trainer

HELD_OUT = 3


def run_quickstart(out: Path, data: list[str] | None, steps: int, device: str) -> None:
    """Run every stage, or what an interrupted run in `out` left undone, and print a table.

    Raises:
        ValueError: the texts are too few or too short.
        FetchError: a package could not be fetched; the message says how to supply it by hand.
    """
    check_sources(data or [])
    check_folder(out)
    with doing("running the quick start", lambda: kept_of_training(out)):
        _run(out, data, steps, choose_device(device))


def _run(out: Path, data: list[str] | None, steps: int, target: torch.device) -> None:
    note("1/3 model and texts")
    backbone, tokenizer = load_backbone("smollm2", target)
    model = LongMem(backbone, LongMemConfig(memory_layers=default_memory_layers(backbone)))
    announce(model, "auto")
    train, test = _texts(data, tokenizer)

    note("2/3 training")
    config = TrainConfig(steps=steps, rows=fitting_rows(None, len(train)))
    stream = SegmentStream(train, rows=config.rows, segment=model.config.segment, repeat=True)
    train_with_bar(Trainer(model, stream, encode_now(model), config, out))

    note("3/3 held-out perplexity (the backbone's states are computed once and kept)")
    test_states = StateCache(model, test, out / "states")
    with tqdm(total=sum(map(len, test)), desc="encode", unit="tok", unit_scale=True) as bar:
        test_states.fill(bar.update)
    report = evaluate_with_bar(model, test, test_states, SCORE_FROM, "auto")
    texts = "Shakespeare's plays" if data is None else ", ".join(data)
    title = f"SmolLM2-135M on {texts}, local context {model.config.segment} tokens, {steps} steps"
    try:
        save_report(report, report_content(report), out, title)
    finally:  # what was measured is shown, kept or not
        print(f"\n{report.table()}\n", flush=True)
    note(f"plot: {out}/perplexity.png; metrics: {out}/metrics.jsonl")
    note(next_commands(out))


def next_commands(out: Path) -> str:
    """Commands to type next, called as this one was."""
    called = Path(sys.argv[0])
    command = str(called) if called.name == "longmem" else "python -m longmem"
    if shutil.which("longmem") == str(called.absolute()):
        command = "longmem"
    return (
        f"next, with texts of your own:\n"
        f'  {command} generate --run {out} --remember BOOK.txt --prompt "It was"\n'
        f"  {command} eval --run {out} --data BOOKS/"
    )


def _texts(data: list[str] | None, tokenizer: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Documents to train on, one for each row, and `HELD_OUT` to measure on.

    Those to train on are whole, whatever the number of steps: the run goes on with more steps over the same documents.
    """
    rows = TrainConfig.rows
    shortest = DOCUMENT_TOKENS + 1
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
