"""README's figures and its two leading plots, from the newest results kept.

Nothing in README's measured parts is written by hand: a test holds them to what this makes of the file they name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from longmem.files import save_text

from .plots import plot, plot_sweeps
from .report import best_of_ours, grouped, significant, times_faster
from .results import Result, newest
from .row import Row

LEADING = {"chunk_topk": ("M", "K"), "memory_attention": ("T", "K")}  # ops that are drawn, and their sweeps
_WORDS = {
    "chunk_topk": "search",
    "memory_attention": "local and memory attention",
    "memory_attention_backward": "the same, forward and backward",
    "ring_write": "write",
    "memory_layer": "search, attention and write",
    "generate": "generation, per token",
    "train_step": "training step",
}


def block(name: str) -> re.Pattern[str]:
    """Matches the part of README between the comments `<!-- name -->` and `<!-- /name -->`."""
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.S)


def measured(paths: list[Path], root: Path) -> str:
    """The text of the block "measured" for these results, one table each; `root` is README's folder."""
    parts = []
    for path in paths:
        result = Result.load(path)
        parts.append("\n".join([_heading(result), "", *_table(result), "", _source(path, root)]))
    if not any(Result.load(path).on_gpu for path in paths):
        parts.append("GPU: no kept result yet; what was measured once is below.")
    return "\n\n".join(parts) + "\n"


def plots(result: Result) -> str:
    """The text of the block "plots"."""
    device, date = _device(result), result.date
    lines = []
    for op in LEADING:
        lines.append(f"![{_WORDS[op].capitalize()} beside baselines, {device}, {date}](docs/measured-{op}.png)")
    return "\n".join(lines) + "\n"


def draw(result: Result, folder: Path) -> None:
    """The pictures that `plots` names: the sweeps, or bars where none was measured."""
    for op, sweeps in LEADING.items():
        mine = [row for row in result.rows if row.op == op]
        swept = [row for row in mine if row.sweep in sweeps]
        path = folder / f"measured-{op}.png"
        if swept:
            plot_sweeps(swept, path, date=result.date)
        else:
            plot([row for row in mine if not row.sweep], path, date=result.date)


def official_step(path: Path, root: Path) -> str:
    """The text of the block "official-step" for what `longmem-bench published-step --json` wrote."""
    result = Result.load(path)
    lines = [
        f"A training step of the published model ({result.rows[0].shape}), {_device(result)}, {result.date}, commit"
        f" {result.machine['commit']}, PyTorch {result.machine['torch']}:",
        "",
        "| who | matrix products | seconds | processor seconds | memory beyond weights, MB |",
        "|---|---|---|---|---|",
    ]
    for row in result.rows:
        if row.median_ms is None:
            raise ValueError(f"{path}: {row.provider} has no time")
        seconds = row.median_ms / 1000
        busy = "-" if row.cores is None else f"{seconds * row.cores:.1f}"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"
        lines.append(f"| {row.provider} | {row.dtype.rpartition(' ')[2]} | {seconds:.1f} | {busy} | {peak} |")
    return "\n".join([*lines, "", _source(path, root)]) + "\n"


def _device(result: Result) -> str:
    machine = result.machine
    return machine["device"] if result.on_gpu else f"{machine['device']}, {machine['threads']} threads"


def _heading(result: Result) -> str:
    machine = result.machine
    return (
        f"{_device(result)}, {result.date}, commit {machine['commit']}, PyTorch {machine['torch']}, FAISS"
        f" {machine['faiss'].removeprefix('faiss-cpu ')}; medians, milliseconds:"
    )


def _source(path: Path, root: Path) -> str:
    where = path.resolve().relative_to(root.resolve()).as_posix()
    return f"(All rows with spreads, and what could not run: [{where}]({where}), `longmem-bench report FILE`.)"


def _table(result: Result) -> Iterator[str]:
    yield "| what | shape | longmem | baselines (times ours is faster) | bounds | extra memory, MB |"
    yield "|---|---|---|---|---|---|"
    for group in grouped([row for row in result.rows if not row.sweep]).values():
        timed = [row for row in group if row.median_ms is not None]
        own = best_of_ours(timed)
        if own is None:
            continue
        faster = {row.provider: times_faster(own, [row]) or 0.0 for row in timed}
        baselines = sorted((r for r in timed if not r.ours and not r.bound), key=lambda row: faster[row.provider])
        bounds = [row for row in timed if row.bound]
        against = "; ".join(f"{_named(row)} ({significant(faster[row.provider], 2)}x)" for row in baselines)
        first = group[0]
        yield (
            f"| {_WORDS[first.op]} (`{first.op}`) | {first.shape} {first.dtype} | **{_time(own)}**"
            f" | {against or '-'} | {'; '.join(map(_named, bounds)) or '-'} | {_memory(own, baselines)} |"
        )


def _time(row: Row) -> str:
    if row.graph_ms is not None:  # the device's time, and what a caller waits for
        return f"{significant(row.graph_ms)} (graph; host {significant(row.host_ms or 0.0)})"
    tail = "" if row.p99_ms is None or "T=1" not in row.shape.split() else f", p99 {significant(row.p99_ms)}"
    return significant(row.median_ms or 0.0) + tail


def _named(row: Row) -> str:
    return f"{row.provider} {_time(row)}"


def _memory(own: Row, baselines: list[Row]) -> str:
    known = [row.peak_bytes for row in baselines if row.peak_bytes is not None]
    if own.peak_bytes is None:
        return "-"
    mine = f"{own.peak_bytes / 1e6:.1f}"
    others = list(dict.fromkeys(f"{peak / 1e6:.1f}" for peak in (min(known), max(known)))) if known else []
    return f"{mine}; baselines {' to '.join(others)}" if others else mine


def rewrite(text: Path, results: Path, docs: Path) -> list[Path]:
    """Put the newest of `results` into the README `text`, draw its plots to `docs`, and return what was used.

    Raises:
        ValueError: no result is kept, or README has no place for one.
    """
    paths = [path for path in (newest(results, on_gpu=True), newest(results, on_gpu=False)) if path is not None]
    if not paths:
        raise ValueError(f"{results} holds no result: `longmem-bench all --keep {results}` makes one")
    leading, root = Result.load(paths[0]), text.parent
    kind = "official-step"
    step = newest(results, leading.on_gpu, kind) or newest(results, False, kind)
    if step is None:
        raise ValueError(f"{results} holds no */{kind}/*.json: `longmem-bench published-step --json` makes one")
    blocks = {"plots": plots(leading), "measured": measured(paths, root), kind: official_step(step, root)}
    content = text.read_text(encoding="utf-8")
    for name, wanted in blocks.items():
        if block(name).search(content) is None:
            raise ValueError(f"{text} has no <!-- {name} --> ... <!-- /{name} -->")
        content = block(name).sub(lambda _, wanted=wanted: wanted, content)  # type: ignore[misc]
    save_text(text, content)
    draw(leading, docs)
    return paths
