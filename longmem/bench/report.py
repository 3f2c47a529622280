"""Rows as a table to read and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from .measure import Row

_HEADER = ("provider", "median ms", "p20 - p80", "peak MB", "cores", "time / ours")


def grouped(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows that can be compared with each other: by operation, shape, dtype, device, threads and commit."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row.op, row.shape, row.dtype, row.device_name, str(row.threads), row.commit)
        groups.setdefault(key, []).append(row)
    return groups


def table(rows: Sequence[Row]) -> str:
    """One table per group. The last column is time relative to our fastest implementation: above 1 is slower than ours.

    `*` marks a lower bound, which does less than the operation; `cores` is what the process got while it was timed.
    """
    return "\n\n".join(_one_table(group) for group in grouped(rows).values())


def title(row: Row) -> str:
    """What the numbers of a group depend on, in one line."""
    processor = row.device_name if row.device.startswith("cuda") else f"{row.device_name}, {row.threads} threads"
    return f"{row.op} [{row.shape} {row.dtype}] on {processor}, commit {row.commit}"


def _one_table(rows: list[Row]) -> str:
    best = _best_of_ours(rows)
    lines: list[tuple[str, ...]] = [_HEADER]
    notes = {}
    for number, row in enumerate(rows, start=1):
        if row.median_ms is None:
            notes[number] = row.reason or "not measured"
            lines.append((_name(row), "-", "", "", "", ""))
            continue
        spread = f"{row.p20_ms:.3g} - {row.p80_ms:.3g}"
        peak = "not measured" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
        cores = "" if row.cores is None else f"{row.cores:.1f}"
        ratio = "" if best is None else f"{row.median_ms / best:.2f}"
        lines.append((_name(row), f"{row.median_ms:.3f}", spread, peak, cores, ratio))
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    text = [title(rows[0])]
    for number, line in enumerate(lines):
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        cells = [line[0].ljust(widths[0]), *numbers]
        if number in notes:
            cells = [line[0].ljust(widths[0]), f"  cannot run: {notes[number]}"]
        text.append("  ".join(cells).rstrip())
        if number == 0:
            text.append("  ".join("-" * width for width in widths))
    return "\n".join(text)


def _best_of_ours(rows: Sequence[Row]) -> float | None:
    return min((row.median_ms for row in rows if row.ours and row.median_ms is not None), default=None)


def _name(row: Row) -> str:
    return row.provider + (" *" if row.bound else "")


def plot(rows: Sequence[Row], path: str | Path) -> Path:
    """Draw one panel of bars per group into a PNG and return its path. Needs matplotlib.

    Raises:
        ValueError: no row has a time.
    """
    groups = [group for group in grouped(rows).values() if any(row.median_ms is not None for row in group)]
    if not groups:
        raise ValueError("plot: no row has a time")
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    heights = [0.42 * len(group) + 1.35 for group in groups]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, group in zip(axes, groups, strict=True):
        _draw(panel, group)
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def _scale(rows: Sequence[Row]) -> float:
    """Milliseconds that the axis must show. The reference, an oracle, is cut off where it would dwarf the others."""
    slowest = max(row.p80_ms or 0.0 for row in rows)
    others = max((row.p80_ms or 0.0 for row in rows if row.provider != "longmem reference"), default=0.0)
    return others if 0 < 4 * others < slowest else slowest


def _draw(panel, rows: list[Row]) -> None:  # type: ignore[no-untyped-def]  # matplotlib's Axes, imported lazily
    slowest = _scale(rows)
    limit = slowest * 1.25
    best = _best_of_ours(rows)
    for position, row in enumerate(rows):
        if row.median_ms is None or row.p20_ms is None or row.p80_ms is None:
            reason = textwrap.shorten(f"cannot run: {row.reason}", 78, placeholder=" ...")
            panel.text(limit * 0.01, position, reason, va="center", fontsize=8, color="0.4", style="italic")
            continue
        color = "#0b6e4f" if row.ours else "#c9ced6" if row.bound else "#5b7db1"
        spread = [[row.median_ms - row.p20_ms], [row.p80_ms - row.median_ms]]
        panel.barh(position, row.median_ms, color=color, xerr=spread, error_kw={"lw": 1, "capsize": 2}, height=0.7)
        label = f" {row.median_ms:.4g} ms"
        if best is not None and row.median_ms != best:
            label += f" ({row.median_ms / best:.2f}x)"
        if row.p80_ms > slowest:
            label = f"{label}, cut off "
            panel.text(limit, position, label, va="center", ha="right", fontsize=8, color="white", weight="bold")
        else:
            panel.text(row.p80_ms, position, label, va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlim(0, limit)
    legend = "milliseconds, median; whiskers p20 - p80;  x: time / our fastest;  * does less than the op"
    panel.set_xlabel(legend, fontsize=7)
    panel.tick_params(axis="x", labelsize=7)
    panel.set_title("\n".join(textwrap.wrap(title(rows[0]), 105)), fontsize=8, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
