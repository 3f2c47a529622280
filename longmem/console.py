"""What the commands share: choosing and loading things, saying what runs, progress bars, reports."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from tqdm import tqdm

from longmem_kernels.info import report as kernels_report

from .backbones import Backbone
from .backbones.load import load_backbone
from .data.documents import CORPORA, Document, named_corpus, read_documents
from .data.stream import tokenize_documents
from .evaluate.perplexity import PerplexityReport, perplexity
from .evaluate.plots import plot_perplexity, plot_recall
from .evaluate.probe import ProbePlan, ProbeReport, probe_layers
from .memory import MemoryBank
from .model import LongMem
from .precision import autocast, resolve_precision
from .states import StateSource
from .tasks.recall import RecallConfig, RecallReport, run_recall
from .training.trainer import Trainer


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
    about = run / "config.json"
    if not about.exists():
        raise ValueError(f"no trained LongMem in {run}: config.json is missing (longmem train --out {run} makes one)")
    backbone, tokenizer = load_backbone(json.loads(about.read_text())["backbone"], choose_device(device))
    changes = {name: value for name, value in changes.items() if value is not None}
    return LongMem.from_pretrained(run, backbone, **changes), tokenizer


def load_documents(
    data: list[str], split: str, tokenizer: Any, *, min_tokens: int, cut: int | None = None
) -> list[torch.Tensor]:
    """Token ids of named corpora (`split` of them) and of files, saying what is skipped and why."""
    documents: list[Document] = []
    for name in data:
        if name in CORPORA:
            documents += getattr(named_corpus(name), split)
            continue
        found, skipped = read_documents([name])
        documents += found
        for item in skipped:
            typer.echo(f"skipped {item.name}: {item.reason}", err=True)
    tokens, skipped = tokenize_documents(documents, tokenizer, min_tokens)
    for item in skipped:
        typer.echo(f"skipped {item.name}: {item.reason}", err=True)
    tokens = [ids[:cut] for ids in tokens]
    typer.echo(f"{split}: {len(tokens)} documents, {sum(map(len, tokens)):,} tokens", err=True)
    return tokens


def split_documents(
    data: list[str], tokenizer: Any, held_out: int, *, min_tokens: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Documents to train on and to measure on: the splits of named corpora, or all but the last `held_out` files.

    Raises:
        ValueError: there are too few documents.
    """
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
        f" ({trainable / total:.2%}); matrix products in {resolve_precision(precision, device, model.backbone.dtype)}",
        err=True,
    )


def train_with_bar(trainer: Trainer) -> None:
    if trainer.step:
        typer.echo(f"continuing from step {trainer.step}", err=True)
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
    backbone = model.backbone
    with (
        tqdm(total=len(document), desc="remember", unit="tok", unit_scale=True) as bar,
        autocast("auto", backbone.device, backbone.dtype),
    ):
        (kept,) = model.remember(document[None].to(backbone.device), memory, progress=bar.update)
    if kept < len(document):
        typer.echo(f"the memory holds the last {kept:,} of {len(document):,} tokens", err=True)


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
