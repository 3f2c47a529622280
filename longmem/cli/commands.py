"""The work of the subcommands. Everything that needs no model is checked before one is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longmem.backbones.load import default_memory_layers
from longmem.config import LongMemConfig
from longmem.console import (
    announce,
    check_folder,
    check_sources,
    choose_device,
    evaluate_with_bar,
    fitting_rows,
    load_documents,
    load_named,
    load_run,
    probe_with_bars,
    read_run,
    recall_with_bar,
    remember_with_bar,
    report_content,
    save_recall,
    save_report,
    show_text,
    split_documents,
    train_with_bar,
    write_json,
)
from longmem.data.stream import SegmentStream
from longmem.evaluate.probe import ProbePlan, default_candidates
from longmem.model import LongMem
from longmem.states import StateCache, encode_now
from longmem.tasks.recall import QUICK, RecallConfig
from longmem.text import check_request, generate_text, sampling_options, stop_tokens
from longmem.training.config import TrainConfig
from longmem.training.processes import process_group, quiet
from longmem.training.trainer import Trainer

from .failures import doing
from .options import TEMPERATURE, TOP_P
from .output import results

_ANY_DEPTH = 2**31  # of a backbone that is not loaded yet


def train(
    config: TrainConfig,
    memory: dict[str, Any],
    *,
    data: list[str],
    out: Path,
    backbone: str,
    document_tokens: int | None,
    cache_states: bool,
    tensorboard: bool,
    device: str,
    json: bool,
    rows: int | None,
) -> None:
    """Train; `memory`: fields of `LongMemConfig`, `rows`: None for as many as fit, the rest as the options."""
    _check_memory(memory)
    check_sources(data)
    check_folder(out)
    segment, special_tokens = memory["segment"], memory["special_tokens"]
    if document_tokens is not None and document_tokens <= segment:
        raise ValueError(
            f"--document-tokens must be more than --segment {segment}, got {document_tokens}: memory would be empty"
            " whenever it is read"
        )
    if config.shard_memory and "RANK" not in os.environ:
        raise ValueError("--shard-memory needs several processes: torchrun --nproc-per-node N -m longmem train ...")
    target = choose_device(device)
    with (
        doing("training", lambda: kept_of_training(out)),
        process_group(target) as processes,
        quiet(not processes.first),
        results(json) as show,
    ):
        torch.manual_seed(config.seed)
        frozen, tokenizer = load_named(backbone, target)
        layers = memory.get("memory_layers") or default_memory_layers(frozen, memory["sidenet"], memory["reduction"])
        model = LongMem(frozen, LongMemConfig(**memory | {"memory_layers": tuple(sorted(layers))}))
        loaded = load_documents(
            data, "train", tokenizer, min_tokens=segment + 1, cut=document_tokens, special_tokens=special_tokens
        )
        config = replace(config, rows=fitting_rows(rows, len(loaded), processes.count))
        documents = processes.share_of(loaded)
        announce(model, config.precision)
        cache = StateCache(model, documents, out / "states", precision=config.precision) if cache_states else None
        stream = SegmentStream(documents, rows=config.rows, segment=segment, seed=config.seed, repeat=True)
        trainer = Trainer(model, stream, cache or encode_now(model), config, out, tensorboard=tensorboard)
        metrics = train_with_bar(trainer)
        files = {"model": str(out / "longmem.safetensors"), "metrics": str(out / "metrics.jsonl")}
        about = {"out": str(out), "files": files, "step": trainer.step, "metrics": metrics}
        show(f"saved {files['model']}; metrics in {files['metrics']}", about | {"model": model.config.to_dict()})


def kept_of_training(out: Path) -> str:
    """Describes what a training run in `out` that ended early has kept."""
    if any(path.suffix != ".part" for path in out.glob("checkpoint*")):
        return f"kept: the last checkpoint, in {out}; the same command goes on from there"
    return "nothing was kept: there was no checkpoint yet"


def probe(
    config: TrainConfig,
    memory: dict[str, Any],
    *,
    data: list[str],
    out: Path,
    backbone: str,
    layers: list[int] | None,
    held_out: int,
    score_from: int,
    document_tokens: int,
    device: str,
    json: bool,
    rows: int | None,
) -> None:
    """Probe layers; the arguments are as those of `train`."""
    _check_memory(memory)
    check_sources(data)
    check_folder(out)
    segment = memory["segment"]
    _check_scored(score_from, segment, document_tokens)
    shortest = score_from + segment + 1
    with results(json) as show, doing("probing layers", lambda: _kept_files(out, "what is finished")):
        frozen, tokenizer = load_named(backbone, choose_device(device))
        candidates = sorted(set(layers)) if layers else default_candidates(len(frozen.layers))
        training, measured = split_documents(
            data, tokenizer, held_out, min_tokens=shortest, special_tokens=memory["special_tokens"]
        )
        config = replace(config, rows=fitting_rows(rows, len(training)))
        # No more is encoded than is used.
        training = [tokens[: config.steps * segment + 1] for tokens in training[: config.rows]]
        measured = [tokens[: document_tokens + 1] for tokens in measured]
        plan = ProbePlan(LongMemConfig(memory_layers=(candidates[0],), **memory), config, score_from, out)
        report, content = probe_with_bars(frozen, candidates, training, measured, plan)
        try:
            write_json(out / "probe.json", content)
        finally:  # what was measured is shown, kept or not
            show(f"{report.table()}\n{report.verdict()}", content)


def evaluate(
    *,
    run: Path,
    data: list[str],
    score_from: int,
    document_tokens: int,
    full_context: int | None,
    memory_tokens: int | None,
    segment: int | None,
    backbone: str | None,
    special_tokens: str | None,
    cache_states: bool,
    out: Path | None,
    precision: str,
    device: str,
    json: bool,
) -> None:
    """Measure held-out perplexity; the arguments are the options' values."""
    trained = LongMemConfig.from_dict(read_run(run)["config"])
    _check_scored(score_from, segment or trained.segment, document_tokens, full_context)
    check_sources(data)
    folder = out or run / "eval"
    check_folder(folder)
    with results(json) as show, doing("evaluating", lambda: _kept_files(folder / "states", "states encoded so far")):
        model, tokenizer = load_run(
            run, device, backbone, memory_tokens=memory_tokens, segment=segment, special_tokens=special_tokens
        )
        documents = load_documents(
            data,
            "test",
            tokenizer,
            min_tokens=score_from + model.config.segment + 1,
            cut=document_tokens + 1,
            special_tokens=model.config.special_tokens,
        )
        announce(model, precision)
        cache = StateCache(model, documents, folder / "states", precision=precision) if cache_states else None
        report = evaluate_with_bar(model, documents, cache or encode_now(model), score_from, precision, full_context)
        about = {"data": data, "score_from": score_from, "full_context": full_context, "model": model.config.to_dict()}
        content = report_content(report, **about)
        try:
            save_report(report, content, folder, f"{model.backbone.name}, {', '.join(data)}")
        finally:
            show(report.table(), content)


def _kept_files(folder: Path, what: str) -> str:
    """Says what a command that ended early has kept, where it has kept any file in `folder`."""
    if any(path.is_file() and path.suffix != ".part" for path in folder.rglob("*")):
        return f"kept: {what}, in {folder}; the same command goes on from there"
    return "nothing was kept"


def generate(
    *,
    run: Path,
    prompt: str,
    remember: list[str] | None,
    memory_tokens: int | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    stop: list[str] | None,
    ignore_eos: bool,
    backbone: str | None,
    special_tokens: str | None,
    seed: int,
    device: str,
    json: bool,
) -> None:
    """Continue a prompt; the arguments are the options' values."""
    read_run(run)
    check_sources(remember or [])
    check_request(prompt, stop or ())
    with results(json) as show, doing("generating"):
        model, tokenizer = load_run(run, device, backbone, memory_tokens=memory_tokens, special_tokens=special_tokens)
        memory = model.new_memory(rows=1)
        given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty}
        options = {"temperature": TEMPERATURE, "top_p": TOP_P}
        options |= sampling_options(model.backbone.generation_config, **given)
        pieces = generate_text(  # refuses here what is wrong, and begins when the first piece is asked for
            model,
            tokenizer,
            prompt,
            memory,
            ends=() if ignore_eos else stop_tokens(tokenizer, model.backbone),
            stop=stop or (),
            max_new_tokens=max_new_tokens,
            generator=torch.Generator(model.backbone.device).manual_seed(seed),
            **options,
        )
        own = model.config.special_tokens
        texts = load_documents(remember, "all", tokenizer, min_tokens=1, special_tokens=own) if remember else []
        remember_with_bar(model, texts, memory)
        remembered = memory.stats()
        if not json:
            show_text(prompt, pieces)
            return
        read = {"tokens_read": sum(map(len, texts)), "tokens_kept": int(remembered["tokens"])}
        show("", {"prompt": prompt, "text": "".join(pieces), "options": options | {"seed": seed}, "memory": read})


def recall(*, out: Path, quick: bool, seed: int, device: str, json: bool) -> None:
    """Run the recall task; the arguments are the options' values."""
    check_folder(out)
    more: dict[str, Any] = QUICK if quick else {}
    with results(json) as show, doing("running the recall task", lambda: "nothing was kept"):
        config = RecallConfig(seed=seed, **more)
        report, content = recall_with_bar(config, choose_device(device))
        try:
            save_recall(report, content, out, config.capacity)
        finally:
            show(report.table(), content)


def _check_memory(memory: dict[str, Any]) -> None:
    """Raises ValueError where these options fit no backbone at all; what depends on it is checked once it is loaded."""
    layers = tuple(sorted(memory.get("memory_layers") or (0,)))
    LongMemConfig(**memory | {"memory_layers": layers}).check(_ANY_DEPTH)


def _check_scored(score_from: int, segment: int, document_tokens: int, full_context: int | None = None) -> None:
    first = score_from // segment * segment
    if document_tokens < first + segment:
        raise ValueError(
            f"--document-tokens must be at least {first + segment}, one segment more than --score-from, got"
            f" {document_tokens}: nothing would be scored"
        )
    if full_context is not None and full_context < 4 * segment:
        raise ValueError(f"--full-context must be at least four segments, {4 * segment}, got {full_context}")
