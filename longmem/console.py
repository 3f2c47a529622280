"""What the commands share: checking, choosing and loading things, saying what runs, progress bars, reports."""

from __future__ import annotations

import glob
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longmem_kernels.info import report as kernels_report

from .backbones import Backbone
from .backbones.load import find_backbone, load_backbone
from .cli.failures import doing
from .cli.output import json_text, note
from .data.documents import CORPORA, Document, named_corpus, read_documents
from .data.stream import tokenize_documents
from .evaluate.perplexity import PerplexityReport, perplexity
from .evaluate.plots import plot_perplexity, plot_recall
from .evaluate.probe import ProbePlan, ProbeReport, probe_layers
from .files import save_text
from .memory import MemoryBank
from .model import LongMem
from .precision import autocast, resolve_precision
from .states import StateSource
from .tasks.recall import RecallConfig, RecallReport, run_recall
from .training.config import TrainConfig
from .training.trainer import Trainer


def check_folder(folder: Path) -> None:
    """Raises ValueError where `folder` cannot be made or written to; makes nothing."""
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                raise ValueError(f"{folder} cannot be written: permission denied, or a read-only file system")
            return
        if place.exists():
            raise ValueError(f"{folder} cannot be a folder: {place} is a file")


def check_sources(data: Sequence[str]) -> None:
    """Raises ValueError naming what of `data` is neither a corpus nor there: before a model is loaded for it."""
    for name in data:
        if name in CORPORA or os.path.exists(os.path.expanduser(name)) or glob.glob(os.path.expanduser(name)):
            continue
        raise ValueError(f"no file or folder {name}, nor a corpus of that name ({', '.join(CORPORA)})")


def choose_device(device: str) -> torch.device:
    """Raises ValueError when there is no such device here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or auto, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device cuda was asked for, but PyTorch {torch.__version__} finds no CUDA device")
    return torch.device(device)


def load_named(backbone: str, device: torch.device) -> tuple[Backbone, Any]:
    """A backbone and its tokenizer, see `load_backbone`."""
    with doing(f"loading the backbone {backbone!r}"):
        return load_backbone(backbone, device)


def read_run(run: Path) -> dict[str, Any]:
    """What config.json in `run` says: at least the keys "config" and "backbone".

    Raises:
        ValueError: there is none, or it is damaged.
    """
    about = run / "config.json"
    if not about.is_file():
        raise ValueError(f"no trained LongMem in {run}: config.json is missing (longmem train --out {run} makes one)")
    try:
        content = json.loads(about.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{about} is damaged: it is no JSON ({error})") from None
    kinds = {"backbone": str, "config": dict}
    for key, kind in kinds.items():
        found = content.get(key) if isinstance(content, dict) else None
        if not isinstance(found, kind):
            raise ValueError(f"{about} is damaged: wanted {key!r}, a {kind.__name__}, got {found!r}")
    return content


def load_run(run: Path, device: str, backbone: str | None = None, **changes: Any) -> tuple[LongMem, Any]:
    """The model in `run`, and its tokenizer.

    Args:
        backbone: what to load as its backbone; None: what it was trained on, where `find_backbone` finds it.
        changes: see `LongMem.from_pretrained`; None changes nothing.
    """
    saved = read_run(run)
    name = backbone or find_backbone(saved["backbone"], saved.get("backbone_place", {}), run)
    frozen, tokenizer = load_named(name, choose_device(device))
    changes = {name: value for name, value in changes.items() if value is not None}
    with doing(f"loading the run {run}"):
        return LongMem.from_pretrained(run, frozen, **changes), tokenizer


def load_documents(
    data: list[str],
    split: str,
    tokenizer: Any,
    *,
    min_tokens: int,
    cut: int | None = None,
    special_tokens: str = "auto",
) -> list[torch.Tensor]:
    """Token ids of named corpora (`split` of them) and of files, saying what is skipped and why. `special_tokens`: see
    `LongMemConfig`."""
    documents: list[Document] = []
    for name in data:
        if name in CORPORA:
            documents += getattr(named_corpus(name), split)
            continue
        found, skipped = read_documents([name])
        documents += found
        for item in skipped:
            note(f"skipped {item.name}: {item.reason}")
    tokens, skipped = tokenize_documents(documents, tokenizer, min_tokens, add_special_tokens=special_tokens == "auto")
    for item in skipped:
        note(f"skipped {item.name}: {item.reason}")
    tokens = [ids[:cut] for ids in tokens]
    note(f"{split}: {len(tokens)} documents, {sum(map(len, tokens)):,} tokens")
    return tokens


def split_documents(
    data: list[str], tokenizer: Any, held_out: int, *, min_tokens: int, special_tokens: str = "auto"
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Documents to train on and to measure on: the splits of named corpora, or all but the last `held_out` files.

    Raises:
        ValueError: there are too few documents.
    """
    if all(name in CORPORA for name in data):
        train, test = (
            load_documents(data, split, tokenizer, min_tokens=min_tokens, special_tokens=special_tokens)
            for split in ("train", "test")
        )
        return train, test[:held_out]
    documents = load_documents(data, "all", tokenizer, min_tokens=min_tokens, special_tokens=special_tokens)
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
    note(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; kernels: {kernels}")
    note(
        f"backbone {model.backbone.name}: {total:,} frozen parameters; {trainable:,} trained"
        f" ({trainable / total:.2%}); matrix products in {resolve_precision(precision, device)}"
    )


def train_with_bar(trainer: Trainer) -> dict[str, float]:
    """Train to the last step. Returns the metrics of the last step that was run; empty where none was left to run."""
    last: dict[str, float] = {}
    if trainer.step:
        note(f"continuing from step {trainer.step}")
    with tqdm(total=trainer.config.steps, initial=trainer.step, desc="train", unit="step") as bar:

        def report(metrics: dict[str, float]) -> None:
            last.update(metrics)
            shown = {
                "loss": f"{metrics['loss']:.3f}",
                "tok/s": f"{metrics['tokens_per_second']:.0f}",
                "memory": f"{metrics['memory_fill']:.0%}",
            }
            shown |= {name: f"{metrics[name]:.3f}" for name in ("gate", "temperature") if name in metrics}
            bar.set_postfix(shown, refresh=False)
            bar.update()

        trainer.run(report)
    return last


def fitting_rows(rows: int | None, documents: int, processes: int = 1) -> int:
    """Documents that are read side by side in each process: `rows`, or by default no more than there are. Says so."""
    each = max(1, documents // processes)
    if rows is None:
        fitting = min(TrainConfig.rows, each)
        if fitting < TrainConfig.rows:
            note(f"rows: {fitting} instead of {TrainConfig.rows}, one for each document")
        return fitting
    if rows > each:
        note(f"rows: {rows} for {each} documents: some are read by several rows at once, at the cost of each")
    return rows


def remember_with_bar(model: LongMem, documents: Sequence[torch.Tensor], memory: MemoryBank) -> None:
    """Read documents into memory, one after another, and say what of them it holds.

    What the end of the texts would overwrite is not read at all.
    """
    total, capacity, segment = sum(map(len, documents)), model.config.memory_tokens, model.config.segment
    unread, pieces = max(0, total - capacity), []
    for document in documents:
        # Segments stay as they would be: each is encoded alone.
        begin = min(unread, len(document)) // segment * segment
        unread -= min(unread, len(document))
        pieces += document[None, begin:].split(segment, 1)
    total_read = sum(piece.shape[1] for piece in pieces)
    with tqdm(total=total_read, desc="remember", unit="tok", unit_scale=True, disable=not pieces) as bar:
        for piece in pieces:
            with autocast("auto", model.backbone.device):
                model.remember(piece.to(model.backbone.device), memory)
            bar.update(piece.shape[1])
    stats = memory.stats()
    if total > capacity:
        note(
            f"remembered the last {stats['tokens']:,.0f} of {total:,} tokens: memory holds no more"
            f" (--memory-tokens {-(-total // 1024) * 1024} would hold all)"
        )
    note(f"memory: {stats['tokens']:.0f} tokens, {stats['fill']:.0%} full")


def show_text(prompt: str, pieces: Iterable[str]) -> None:
    """Write the text to standard output as it comes, and a line end behind it, whatever happens meanwhile.

    As bytes: text streams leave control characters out, or refuse what the terminal's encoding lacks, in a pipe and not
    on a terminal, or the other way about.
    """
    out = sys.stdout.buffer
    try:
        for piece in chain([prompt], pieces):
            out.write(piece.encode("utf-8", errors="replace"))
            out.flush()
    finally:
        out.write(b"\n")
        out.flush()


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


def save_report(report: PerplexityReport, folder: Path, title: str, **about: Any) -> dict[str, Any]:
    """Write perplexity.json and perplexity.png. Returns what the first holds: the scores, and `about`."""
    scores = {
        name: {"perplexity": score.perplexity, "nats": asdict(score), "vs_backbone": asdict(gain)}
        for name, score, gain in report.rows()
    }
    differences = {
        f"memory - {other}": asdict(report.difference("memory", other)) for other in ("empty memory", "other memory")
    }
    content = {"tokens": report.tokens, "scores": scores, "differences": differences, **about}
    write_json(folder / "perplexity.json", content)
    plot_perplexity(report, folder / "perplexity.png", f"{title}; {report.tokens:,} held-out tokens")
    note(f"wrote {folder}/perplexity.json and {folder}/perplexity.png")
    return content


def write_json(path: Path, content: Any) -> None:
    """Replace the file by `content` as JSON."""
    save_text(path, json_text(content) + "\n")


def recall_with_bar(config: RecallConfig, device: torch.device, folder: Path) -> tuple[RecallReport, dict[str, Any]]:
    """Run the task; write recall.json and recall.png. Returns the report and what recall.json holds."""
    began = time.perf_counter()
    first, total = next(iter(config.stages())), sum(config.stages().values())
    spared = config.stages()[first]  # steps that the first stage turned out not to need
    with tqdm(total=total, desc="recall", unit="step") as bar:

        def report(stage: str, value: float) -> None:
            nonlocal spared
            if stage == first:
                spared -= 1
            else:
                bar.total = total - spared
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
    write_json(folder / "recall.json", content)
    plot_recall(found, folder / "recall.png", f"Associative recall, {config.capacity:,} tokens of memory")
    note(f"wrote {folder}/recall.json and {folder}/recall.png")
    return found, content


def probe_with_bars(
    backbone: Backbone,
    candidates: list[int],
    training: list[torch.Tensor],
    held_out: list[torch.Tensor],
    plan: ProbePlan,
) -> tuple[ProbeReport, dict[str, Any]]:
    """Probe the layers; write probe.json. Returns the report and what probe.json holds."""
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
    content = report.as_dict() | about
    write_json(plan.folder / "probe.json", content)
    note(f"wrote {plan.folder}/probe.json")
    return report, content
