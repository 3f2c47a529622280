"""Rows as pictures: bars per shape, lines per sweep. Needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import (
    WORDS,
    best_baseline,
    common_shape,
    grouped,
    name_of,
    significant,
    size_of,
    sweeps,
    times_faster,
    title,
    yardstick,
)
from .row import Row

_OURS, _BASELINE, _BOUND = "#0b6e4f", "#5b7db1", "#c9ced6"
# Of lines: greens are ours. As many markers as colours would repeat together, so there are others of them.
_OUR_LINES = (_OURS, "#58b368", "#a3c639", "#00403a")
_LINES = ("#5b7db1", "#c0713c", "#8c5aa8", "#3c9aa8", "#a83c5a", "#b8a12e", "#555555", "#e08fb5")
_MARKERS = "osD^vPX<>"
_SIZES = {
    "B": "rows (B)",
    "T": "query tokens per row (T)",
    "S": "local keys (S)",
    "H": "query heads (H)",
    "G": "key/value heads (G)",
    "D": "head dim (D)",
    "M": "chunks in memory (M)",
    "C": "tokens per chunk (C)",
    "K": "chunks retrieved per query (K)",
    "R": "memories: 0 is one for each row (R)",
}


def plot(rows: Sequence[Row], path: str | Path, *, date: str = "") -> Path:
    """Draw one panel of bars per shape into a PNG and return its path; points of sweeps are shapes as others.

    Args:
        date: when the rows were measured, for the picture to say.

    Raises:
        ValueError: no row has a time.
    """
    groups = [group for group in grouped(rows).values() if any(row.median_ms is not None for row in group)]
    if not groups:
        raise ValueError("plot: no row has a time")
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    heights = [0.36 * sum(r.median_ms is not None for r in g) + 0.13 * len(_not_timed(g)) + 1.1 for g in groups]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, group in zip(axes, groups, strict=True):
        _bars(panel, group)
    return _save(figure, path, groups[0][0], date)


def plot_sweeps(rows: Sequence[Row], path: str | Path, *, date: str = "") -> Path:
    """Draw one panel of lines per sweep into a PNG, both axes logarithmic, and return its path. `date`: as in `plot`.

    Raises:
        ValueError: no sweep has a time.
    """
    found = {key: points for key, points in sweeps(rows).items() if any(r.median_ms for point in points for r in point)}
    if not found:
        raise ValueError("plot_sweeps: no sweep has a time")
    from matplotlib.figure import Figure

    across = min(2, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(5.4 * across + 0.6, 4.1 * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    timed = [row for points in found.values() for point in points for row in point if row.median_ms is not None]
    styles = line_styles(list(dict.fromkeys(map(name_of, timed))))
    for panel, ((op, sweep), points) in zip(axes, found.items(), strict=False):
        _lines(panel, op, sweep, points, styles)
    for panel in axes[len(found) :]:
        panel.set_axis_off()
    return _save(figure, path, next(iter(found.values()))[0][0], date)


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each series: greens for ours, and no two alike."""
    ours = [name for name in names if name.startswith("longmem")]
    groups = ((ours, _OUR_LINES, 2.4), ([name for name in names if name not in ours], _LINES, 1.3))
    return {
        name: {"color": colours[i % len(colours)], "marker": _MARKERS[i % len(_MARKERS)], "lw": width}
        for group, colours, width in groups
        for i, name in enumerate(group)
    }


def _save(figure: Any, path: str | Path, row: Row, date: str) -> Path:
    """Write the PNG with what its numbers depend on as its title and its description."""
    about = title(row).split("] on ", 1)[1] + (f", {date}" if date else "")
    figure.suptitle(f"{about}, {row.dtype}", fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Description": about})
    return path


def _scale(rows: Sequence[Row]) -> float:
    """Milliseconds that the axis must show. What is much slower than the fastest baseline is cut off."""
    slowest = max(row.p80_ms or 0.0 for row in rows)
    best = best_baseline(rows)
    if best is None:
        return slowest
    near = max((row.p80_ms or 0.0 for row in rows if (row.median_ms or 0.0) <= 5 * best), default=slowest)
    return near if slowest > 2 * near else slowest


def _bars(panel: Any, group: list[Row]) -> None:
    rows = [row for row in group if row.median_ms is not None]
    slowest = _scale(rows)
    limit = slowest * 1.28
    others, against = yardstick(rows)
    for position, row in enumerate(rows):
        median, low, high = row.median_ms or 0.0, row.p20_ms or 0.0, row.p80_ms or 0.0
        color = _OURS if row.ours else _BOUND if row.bound else _BASELINE
        spread = [[median - low], [high - median]]
        panel.barh(position, median, color=color, xerr=spread, error_kw={"lw": 1, "capsize": 2}, height=0.7)
        label = f" {significant(median)} ms"
        times = times_faster(row, others) if row.ours and against == "x best" else None
        if row.graph_ms is not None:
            label += f", {significant(row.graph_ms)} in a graph"
            panel.plot(row.graph_ms, position, marker="D", ms=4, color="white", mec="black", mew=0.7)
        if times is not None:
            label += f" ({significant(times, 2)}x)"
        if high > slowest:
            at = {"va": "center", "ha": "right", "fontsize": 8, "color": "white", "weight": "bold"}
            panel.text(limit, position, f"{label}, cut off ", **at)
        else:
            panel.text(high, position, label, va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [name_of(row) for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlim(0, limit)
    legend = (
        "time per call, ms (median, p20 to p80);  x: the fastest baseline's time over ours;  * a bound: less, or near"
    )
    if any(row.graph_ms is not None for row in rows):
        legend += ";  diamond: the device's own time, in a graph"
    panel.set_xlabel("\n".join([legend, *_not_timed(group)]), fontsize=7, loc="left")
    panel.tick_params(axis="x", labelsize=7)
    heading = textwrap.wrap(f"{group[0].op} [{group[0].shape} {group[0].dtype}]", 88)
    panel.set_title("\n".join(heading), fontsize=8, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def _not_timed(group: list[Row]) -> list[str]:
    """One entry per reason, wrapped to the panel's width."""
    reasons: dict[str, list[str]] = {}
    for row in group:
        if row.median_ms is None:
            reasons.setdefault(row.reason or "not measured", []).append(row.provider)
    lines = [f"not timed: {'; '.join(names)} ({reason})" for reason, names in reasons.items()]
    return [part for line in lines for part in textwrap.wrap(line, 130)]


def _lines(panel: Any, op: str, sweep: str, points: list[list[Row]], styles: dict[str, dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    symbol = sweep.split()[0]
    for name in dict.fromkeys(name_of(row) for point in points for row in point):
        timed = [
            (size_of(row, sweep), row)
            for point in points
            for row in point
            if name_of(row) == name and row.median_ms is not None
        ]
        if not timed:
            continue
        sizes, times = [size for size, _ in timed], [row.median_ms for _, row in timed]
        bound, style = timed[0][1].bound, styles[name]
        panel.plot(sizes, times, label=name, ls=":" if bound else "-", ms=4, **style)
        panel.fill_between(
            sizes,
            [row.p20_ms for _, row in timed],
            [row.p80_ms for _, row in timed],
            color=style["color"],
            alpha=0.15,
            lw=0,
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = [size_of(point[0], sweep) for point in points]
    panel.set_xticks(ticks, [_short(size) for size in ticks], fontsize=7)
    low, high = panel.get_ylim()
    # Enough of them to read a value by, where all lie within one power of ten.
    panel.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if high > 10 * low else (1.0, 2.0, 3.0, 4.0, 6.0, 8.0))
    )
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value, 1)))
    panel.minorticks_off()
    panel.tick_params(axis="y", labelsize=7)
    panel.set_xlabel(f"{_SIZES.get(symbol, symbol)}, log scale", fontsize=8)
    panel.set_ylabel("time per call, ms, log scale (median, p20 to p80)", fontsize=7)
    growing = _SIZES.get(symbol, symbol) + sweep.removeprefix(symbol)
    heading = f"{WORDS[op]} ({op}) by {growing}\n" + "\n".join(textwrap.wrap(common_shape(points, sweep), 62))
    panel.set_title(heading, fontsize=8, loc="left")
    panel.grid(axis="y", color="0.9", lw=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=6.5, frameon=False)


def _short(size: int) -> str:
    """16384 -> "16k"."""
    for power, letter in ((2**20, "M"), (2**10, "k")):
        if size >= power and size % power == 0:
            return f"{size // power}{letter}"
    return str(size)
