"""What the commands share: choosing and loading things, saying what runs, progress bars, reports."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from tqdm import tqdm

from longmem_kernels.info import report as kernels_report

from .backbones import Backbone
from .backbones.load import load_backbone
from .data.documents import (
    CORPORA,
    Document,
    Skipped,
    TextFile,
    find_files,
    iter_documents,
    named_corpus,
)
from .data.stream import tokenize_documents
from .evaluate.perplexity import PerplexityReport, perplexity
from .evaluate.plots import plot_perplexity, plot_recall
from .evaluate.probe import ProbePlan, ProbeReport, probe_layers
from .files import check_fields, load_json
from .memory import MemoryBank
from .model import ABOUT, CONFIG, LongMem
from .precision import autocast, resolve_precision
from .states import StateSource
from .tasks.recall import RecallConfig, RecallReport, run_recall
from .training.trainer import Trainer

SHOW_READING = 20_000_000  # bytes of files from which reading them has a progress bar
SHOW_SKIPPED = 50  # reasons that are printed one by one


def choose_device(device: str) -> torch.device:
    """Raises ValueError when there is no such device here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or auto, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device cuda was asked for, but PyTorch {torch.__version__} finds no CUDA device")
    return torch.device(device)


def load_run(run: Path, device: str, **changes: Any) -> tuple[LongMem, Any]:
    """The model in `run`, and its tokenizer. `changes`: see `LongMem.from_pretrained`; None changes nothing."""
    about = run / CONFIG
    if not about.exists():
        raise ValueError(f"no trained LongMem in {run}: config.json is missing (longmem train --out {run} makes one)")
    name = check_fields(f"longmem model: {about}", load_json(about, "longmem model"), ABOUT, others=True)["backbone"]
    backbone, tokenizer = load_backbone(name, choose_device(device))
    changes = {name: value for name, value in changes.items() if value is not None}
    return LongMem.from_pretrained(run, backbone, **changes), tokenizer


def load_documents(
    data: Sequence[str], split: str, tokenizer: Any, *, min_tokens: int, cut: int | None = None
) -> list[torch.Tensor]:
    """Token ids [n] int32 of named corpora (`split` of them, or "all") and of files, saying what is left out and why.

    Files and texts that come twice are used once. At most `cut` tokens of a document are kept, and tokenised.

    Raises:
        FileNotFoundError, ValueError: a path does not exist, is of no known kind, or nothing can be used.
    """
    seen: set[Any] = set()
    sources = [name if name in CORPORA else find_files([name], seen) for name in dict.fromkeys(data)]
    paths = [entry for source in sources if not isinstance(source, str) for entry in source]
    size = sum(_size(entry) for entry in paths)
    with tqdm(total=size, desc="read", unit="B", unit_scale=True, disable=size < SHOW_READING, leave=False) as bar:

        def documents() -> Iterator[Document | TextFile | Skipped]:
            for source in sources:
                if isinstance(source, str):
                    yield from getattr(named_corpus(source), split)
                else:
                    yield from iter_documents(source, told=bar.update)

        tokens, skipped = tokenize_documents(documents(), tokenizer, min_tokens, cut=cut, distinct=True)
    for item in skipped[:SHOW_SKIPPED]:
        typer.echo(f"skipped {item.name}: {item.reason}", err=True)
    if len(skipped) > SHOW_SKIPPED:
        typer.echo(f"and {len(skipped) - SHOW_SKIPPED:,} more", err=True)
    left_out = sum(item.count for item in skipped)
    of = f" of {len(tokens) + left_out:,}" if left_out else ""
    typer.echo(f"{split}: {len(tokens):,} documents{of}, {sum(map(len, tokens)):,} tokens", err=True)
    return tokens


def _size(entry: Path | Skipped) -> int:
    try:
        return 0 if isinstance(entry, Skipped) else entry.stat().st_size
    except OSError:  # vanished: reading it says so
        return 0


def split_documents(
    data: list[str], tokenizer: Any, held_out: int, *, min_tokens: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Documents to train on and to measure on: the splits of named corpora or, where there are files among them, all
    but the last `held_out` documents.

    Raises:
        ValueError: there are too few documents.
    """
    if held_out < 1:
        raise ValueError(f"wanted at least 1 document to hold out, got {held_out}")
    if all(name in CORPORA for name in data):
        train = load_documents(data, "train", tokenizer, min_tokens=min_tokens)
        return train, load_documents(data, "test", tokenizer, min_tokens=min_tokens)[:held_out]
    documents = load_documents(data, "all", tokenizer, min_tokens=min_tokens)
    if len(documents) <= held_out:
        raise ValueError(
            f"wanted more than {held_out} documents of {min_tokens} tokens or more ({held_out} are held out), got"
            f" {len(documents)}"
        )
    return documents[:-held_out], documents[-held_out:]


def announce(model: LongMem, precision: str) -> None:
    """What will run, where, and with which kernels."""
    device = model.backbone.device
    trainable = sum(parameter.numel() for parameter in model.trainable().values())
    total = sum(parameter.numel() for parameter in model.backbone.parameters())
    info = kernels_report()
    kernels = ", ".join(f"{op}: {entry['auto'][device.type]}" for op, entry in info["ops"].items())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else info["devices"]["cpu"]["model"]
    typer.echo(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; kernels: {kernels}", err=True)
    typer.echo(
        f"backbone {model.backbone.name}: {total:,} frozen parameters; {trainable:,} trained"
        f" ({trainable / total:.2%}); matrix products in {resolve_precision(precision, device)}",
        err=True,
    )


def train_with_bar(trainer: Trainer) -> None:
    if trainer.step:
        typer.echo(f"continuing from step {trainer.step}", err=True)
        for name, (old, new) in trainer.changed.items():
            typer.echo(f"{name.removeprefix('train.')}: {new} from here on, {old} before", err=True)
    with tqdm(total=trainer.config.steps, initial=trainer.step, desc="train", unit="step") as bar:

        def report(metrics: dict[str, float]) -> None:
            shown = {
                "loss": f"{metrics['loss']:.3f}",
                "tok/s": f"{metrics['tokens_per_second']:.0f}",
                "memory": f"{metrics['memory_fill']:.0%}",
            }
            shown |= {name: f"{metrics[name]:.3f}" for name in ("gate", "temperature") if name in metrics}
            bar.set_postfix(shown, refresh=False)
            bar.update()

        trainer.run(report)


def remember_with_bar(model: LongMem, document: torch.Tensor, memory: MemoryBank) -> None:
    with tqdm(total=len(document), desc="remember", unit="tok", unit_scale=True) as bar:
        for piece in document[None].split(model.config.segment, 1):
            with autocast("auto", model.backbone.device):
                model.remember(piece.long().to(model.backbone.device), memory)
            bar.update(piece.shape[1])


def evaluate_with_bar(
    model: LongMem,
    documents: list[torch.Tensor],
    states: StateSource,
    score_from: int,
    precision: str,
    full_context: int | None = None,
) -> PerplexityReport:
    segment = model.config.segment
    segments = min((len(tokens) - 1) // segment for tokens in documents)
    with tqdm(total=len(documents) * segments * segment, desc="evaluate", unit="tok", unit_scale=True) as bar:
        return perplexity(
            model,
            states,
            documents,
            score_from=score_from,
            full_context=full_context,
            precision=precision,
            progress=bar.update,
        )


def save_report(report: PerplexityReport, folder: Path, title: str, **about: Any) -> None:
    """perplexity.json, with `about`, and perplexity.png."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {
        name: {"perplexity": score.perplexity, "nats": asdict(score), "vs_backbone": asdict(gain)}
        for name, score, gain in report.rows()
    }
    differences = {
        f"memory - {other}": asdict(report.difference("memory", other)) for other in ("empty memory", "other memory")
    }
    content = {"tokens": report.tokens, "scores": scores, "differences": differences, **about}
    (folder / "perplexity.json").write_text(json.dumps(content, indent=2) + "\n")
    plot_perplexity(report, folder / "perplexity.png", f"{title}; {report.tokens:,} held-out tokens")
    typer.echo(f"wrote {folder}/perplexity.json and {folder}/perplexity.png", err=True)


def recall_with_bar(config: RecallConfig, device: torch.device, folder: Path) -> RecallReport:
    """Run the task; write recall.json and recall.png."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with tqdm(desc="recall", unit="step") as bar:

        def report(stage: str, value: float) -> None:
            bar.set_description(stage, refresh=False)
            bar.set_postfix({"now": f"{value:.3f}"}, refresh=False)
            bar.update()

        found = run_recall(config, device, report)
    content = found.as_dict() | {
        "config": asdict(config),
        "seconds": time.perf_counter() - began,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (folder / "recall.json").write_text(json.dumps(content, indent=2) + "\n")
    plot_recall(found, folder / "recall.png", f"Associative recall, {config.capacity:,} tokens of memory")
    typer.echo(f"wrote {folder}/recall.json and {folder}/recall.png", err=True)
    return found


def probe_with_bars(
    backbone: Backbone,
    candidates: list[int],
    training: list[torch.Tensor],
    held_out: list[torch.Tensor],
    plan: ProbePlan,
) -> ProbeReport:
    """Probe the layers; write probe.json."""
    tokens = sum(map(len, [*training, *held_out]))
    segments = min((len(document) - 1) // plan.config.segment for document in held_out) * len(held_out)
    steps = len(candidates) * (plan.train.steps + segments)
    with (
        tqdm(total=tokens, desc="encode", unit="tok", unit_scale=True) as encoding,
        tqdm(total=steps, desc="probe", unit="step") as probing,
    ):

        def told(layer: int, what: str) -> None:
            probing.set_description(f"layer {layer}, {'train' if what == 'step' else 'evaluate'}", refresh=False)
            probing.update()

        report = probe_layers(backbone, candidates, training, held_out, plan, encoded=encoding.update, progress=told)
    about = {"backbone": backbone.name, "train": asdict(plan.train), "config": plan.config.to_dict()}
    (plan.folder / "probe.json").write_text(json.dumps(report.as_dict() | about, indent=2) + "\n")
    typer.echo(f"wrote {plan.folder}/probe.json", err=True)
    return report
