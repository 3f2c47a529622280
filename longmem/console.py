"""Parts that the commands share: checks, choices, loading, announcements, progress bars, reports."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
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
from .config import LongMemConfig
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
from .files import check_fields, load_json, naming, save_text
from .memory import MemoryBank
from .model import ABOUT, CONFIG, LongMem
from .precision import autocast, resolve_precision
from .states import StateSource
from .tasks.recall import RecallConfig, RecallReport, run_recall
from .training.config import TrainConfig
from .training.trainer import Trainer

SHOW_READING = 20_000_000  # bytes of files from which reading them has a progress bar
SHOW_SKIPPED = 50  # reasons that are printed one by one


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
    """Raises FileNotFoundError or ValueError where `data` names what is neither a corpus nor a file, folder or pattern
    that can be read: before a model is loaded for it."""
    for name in data:
        try:
            find_files([] if name in CORPORA else [name])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}, nor a corpus of that name ({', '.join(CORPORA)})") from None


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
    """Reads config.json in `run`: at least the keys of `ABOUT`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    about = run / CONFIG
    if not about.is_file():
        raise ValueError(f"no trained LongMem in {run}: config.json is missing (longmem train --out {run} makes one)")
    found = check_fields(f"longmem model: {about}", load_json(about, "longmem model"), ABOUT, others=True)
    with naming(f"longmem model: {about}"):
        LongMemConfig.from_dict(found["config"])
    return found


def load_run(run: Path, device: str, backbone: str | None = None, **changes: Any) -> tuple[LongMem, Any]:
    """The model in `run`, and its tokenizer.

    Args:
        backbone: what to load as its backbone; None: what it was trained on, where `find_backbone` finds it.
        changes: see `LongMem.from_pretrained`; None changes nothing.
    """
    saved = read_run(run)
    with naming(f"longmem model: {run / CONFIG}"):
        config = LongMemConfig.from_dict(saved["config"])
    changes = {name: value for name, value in changes.items() if value is not None}
    LongMemConfig.from_dict(config.to_dict() | changes)  # refused before a backbone is loaded
    if backbone is None:
        backbone = find_backbone(saved["backbone"], saved.get("backbone_place", {}), run)
    frozen, tokenizer = load_named(backbone, choose_device(device))
    with doing(f"loading the run {run}"):
        return LongMem.from_pretrained(run, frozen, **changes), tokenizer


def load_documents(
    data: Sequence[str],
    split: str,
    tokenizer: Any,
    *,
    min_tokens: int,
    cut: int | None = None,
    special_tokens: str = "auto",
) -> list[torch.Tensor]:
    """Token ids [n] int32 of named corpora (`split` of them, or "all") and of files, saying what is left out and why.

    Files and texts that come twice are used once. At most `cut` tokens of a document are kept, and tokenised.
    `special_tokens`: see `LongMemConfig`.

    Raises:
        FileNotFoundError, ValueError: a path does not exist, is of no known kind, or nothing can be used.
    """
    seen: set[Any] = set()
    special = special_tokens == "auto"
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

        tokens, skipped = tokenize_documents(
            documents(), tokenizer, min_tokens, add_special_tokens=special, cut=cut, distinct=True
        )
    for item in skipped[:SHOW_SKIPPED]:
        note(f"skipped {item.name}: {item.reason}")
    if len(skipped) > SHOW_SKIPPED:
        note(f"and {len(skipped) - SHOW_SKIPPED:,} more")
    left_out = sum(item.count for item in skipped)
    of = f" of {len(tokens) + left_out:,}" if left_out else ""
    what = "texts" if split == "all" else split
    note(f"{what}: {len(tokens):,} document{'s' * (len(tokens) != 1)}{of}, {sum(map(len, tokens)):,} tokens")
    return tokens


def _size(entry: Path | Skipped) -> int:
    try:
        return 0 if isinstance(entry, Skipped) else entry.stat().st_size
    except OSError:  # vanished: reading it says so
        return 0


def split_documents(
    data: list[str], tokenizer: Any, held_out: int, *, min_tokens: int, special_tokens: str = "auto"
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Documents to train on and to measure on: the splits of named corpora or, where there are files among them, all
    but the last `held_out` documents.

    Raises:
        ValueError: there are too few documents.
    """
    if held_out < 1:
        raise ValueError(f"wanted at least 1 document to hold out, got {held_out}")
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
    """Prints what will run, where, and with which kernels."""
    device = model.backbone.device
    trainable = sum(parameter.numel() for parameter in model.trainable().values())
    total = sum(parameter.numel() for parameter in model.backbone.parameters())
    info = kernels_report()
    kernels = ", ".join(f"{op}: {entry['auto'][device.type]}" for op, entry in info["ops"].items())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else info["devices"]["cpu"]["model"]
    note(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; kernels: {kernels}")
    note(
        f"backbone {model.backbone.name}: {total:,} frozen parameters; {trainable:,} trained"
        f" ({trainable / total:.2%}); matrix products in {resolve_precision(precision, device, model.backbone.dtype)}"
    )


def train_with_bar(trainer: Trainer) -> dict[str, float]:
    """Train to the last step. Returns the metrics of the last step that was run; empty where none was left to run."""
    last: dict[str, float] = {}
    if trainer.step:
        note(f"continuing from step {trainer.step}")
        for name, (old, new) in trainer.changed.items():
            note(f"{name.removeprefix('train.')}: {new} from here on, {old} before")
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
    """Documents that are read side by side in each process: `rows`, or by default no more than there are, saying so."""
    if rows is not None:
        return rows  # `SegmentStream` warns of too many
    fitting = min(TrainConfig.rows, max(1, documents // processes))
    if fitting < TrainConfig.rows:
        note(f"rows: {fitting} instead of {TrainConfig.rows}, one for each document")
    return fitting


def remember_with_bar(model: LongMem, documents: Sequence[torch.Tensor], memory: MemoryBank) -> None:
    """Read documents into memory, one after another, and say what of them it holds.

    What the end of the texts would overwrite is not read at all.
    """
    backbone, capacity, total = model.backbone, model.config.memory_tokens, sum(map(len, documents))
    after, read = total, []
    for document in documents:
        after -= len(document)
        if after < capacity:
            read.append(document)
    with (
        tqdm(total=sum(map(len, read)), desc="remember", unit="tok", unit_scale=True, disable=not read) as bar,
        autocast("auto", backbone.device, backbone.dtype),
    ):
        for document in read:
            model.remember(document[None].long().to(backbone.device), memory, progress=bar.update)
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


def report_content(report: PerplexityReport, **about: Any) -> dict[str, Any]:
    """Content of perplexity.json: the scores, and `about`."""
    scores = {
        name: {"perplexity": score.perplexity, "nats": asdict(score), "vs_backbone": asdict(gain)}
        for name, score, gain in report.rows()
    }
    differences = {
        f"memory - {other}": asdict(report.difference("memory", other)) for other in ("empty memory", "other memory")
    }
    return {"tokens": report.tokens, "scores": scores, "differences": differences, **about}


def save_report(report: PerplexityReport, content: dict[str, Any], folder: Path, title: str) -> None:
    """Write perplexity.json, of the `content`, and perplexity.png."""
    write_json(folder / "perplexity.json", content)
    plot_perplexity(report, folder / "perplexity.png", f"{title}; {report.tokens:,} held-out tokens")
    note(f"wrote {folder}/perplexity.json and {folder}/perplexity.png")


def write_json(path: Path, content: Any) -> None:
    """Replace the file by `content` as JSON."""
    save_text(path, json_text(content) + "\n")


def recall_with_bar(config: RecallConfig, device: torch.device) -> tuple[RecallReport, dict[str, Any]]:
    """Run the task. Returns the report and what recall.json holds."""
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
    return found, found.as_dict() | {
        "config": asdict(config),
        "seconds": time.perf_counter() - began,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def save_recall(report: RecallReport, content: dict[str, Any], folder: Path, capacity: int) -> None:
    """Write recall.json, of the `content`, and recall.png; `capacity`: tokens of memory."""
    write_json(folder / "recall.json", content)
    plot_recall(report, folder / "recall.png", f"Associative recall, {capacity:,} tokens of memory")
    note(f"wrote {folder}/recall.json and {folder}/recall.png")


def probe_with_bars(
    backbone: Backbone,
    candidates: list[int],
    training: list[torch.Tensor],
    held_out: list[torch.Tensor],
    plan: ProbePlan,
) -> tuple[ProbeReport, dict[str, Any]]:
    """Probe the layers. Returns the report and what probe.json holds."""
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
    return report, report.as_dict() | about
