"""The figures in README and docs/measured.md, from the newest results kept.

Nothing in their measured parts is written by hand: a test holds them to what this makes of the file they name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from longmem.files import save_text

from .plots import plot as plot_bars
from .plots import plot_sweeps
from .report import WORDS, best_of_ours, grouped, significant, times_faster
from .results import Result, newest
from .row import Row

LEADING = {"chunk_topk": ("M", "K"), "memory_attention": ("T", "K")}  # ops that are drawn, and their sweeps
PAGES = {
    "plot": "README.md",
    "plots": "docs/measured.md",
    "measured": "docs/measured.md",
    "official-step": "docs/measured.md",
}
"""The file of each block, from the root of the repository."""


def block(name: str) -> re.Pattern[str]:
    """Matches the part of a page between the comments `<!-- name -->` and `<!-- /name -->`."""
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.S)


def measured(paths: list[Path], root: Path) -> str:
    """The text of the block "measured" for these results, one table each; `root` is the repository's."""
    parts = []
    for path in paths:
        result = Result.load(path)
        parts.append("\n".join([_heading(result), "", *_table(result), "", _source(path, root)]))
    if not any(Result.load(path).on_gpu for path in paths):
        parts.append("GPU: no kept result yet; what was measured once is below.")
    return "\n\n".join(parts) + "\n"


def plot(result: Result) -> str:
    """The text of the block "plot": one picture, the first sweep of each leading operation."""
    words = ", and ".join(WORDS[op] for op in LEADING)
    return f"![{words.capitalize()} beside baselines, {_device(result)}, {result.date}](docs/measured.png)\n"


def plots(result: Result) -> str:
    """The text of the block "plots": a picture for each leading operation, with all its sweeps."""
    about = f"{_device(result)}, {result.date}"
    lines = [f"![{WORDS[op].capitalize()} beside baselines, {about}](measured-{op}.png)" for op in LEADING]
    return "\n".join(lines) + "\n"


def draw(result: Result, folder: Path) -> None:
    """The pictures that `plot` and `plots` name: the sweeps, or bars where none was measured."""
    base = [row for row in result.rows if row.op in LEADING and not row.sweep]
    first = [row for op, sweeps in LEADING.items() for row in result.rows if (row.op, row.sweep) == (op, sweeps[0])]
    _draw(first, base, folder / "measured.png", result.date)
    for op, sweeps in LEADING.items():
        mine = [row for row in result.rows if row.op == op]
        path = folder / f"measured-{op}.png"
        _draw([row for row in mine if row.sweep in sweeps], [row for row in mine if not row.sweep], path, result.date)


def _draw(swept: list[Row], base: list[Row], path: Path, date: str) -> None:
    if swept:
        plot_sweeps(swept, path, date=date)
    else:
        plot_bars(base, path, date=date)


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
    return f"(All rows with spreads, and what could not run: `longmem-bench report {where}`.)"


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
            f"| {WORDS[first.op]} (`{first.op}`) | {first.shape} {first.dtype} | **{_time(own)}**"
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


def rewrite(root: Path, results: Path) -> list[Path]:
    """Put the newest of `results` into the pages of the repository `root`, draw their plots, and return what was used.

    Raises:
        ValueError: no result is kept, or a page has no place for one.
    """
    paths = [path for path in (newest(results, on_gpu=True), newest(results, on_gpu=False)) if path is not None]
    if not paths:
        raise ValueError(f"{results} holds no result: `longmem-bench all --keep {results}` makes one")
    leading, kind = Result.load(paths[0]), "official-step"
    step = newest(results, leading.on_gpu, kind) or newest(results, False, kind)
    if step is None:
        raise ValueError(f"{results} holds no */{kind}/*.json: `longmem-bench published-step --json` makes one")
    blocks = {"plot": plot(leading), "plots": plots(leading), "measured": measured(paths, root)}
    pages = {name: (root / name).read_text(encoding="utf-8") for name in PAGES.values()}
    for name, wanted in (blocks | {kind: official_step(step, root)}).items():
        page = PAGES[name]
        if block(name).search(pages[page]) is None:
            raise ValueError(f"{root / page} has no <!-- {name} --> ... <!-- /{name} -->")
        pages[page] = block(name).sub(lambda _, wanted=wanted: wanted, pages[page])  # type: ignore[misc]
    for page, content in pages.items():
        save_text(root / page, content)
    draw(leading, root / "docs")
    return paths
