"""Rows as tables to read: one per shape, and one per sweep with a column for every size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .row import Row, compared_ms

WORDS = {
    "chunk_topk": "search",
    "memory_attention": "local and memory attention",
    "memory_attention_backward": "the same, forward and backward",
    "ring_write": "write",
    "memory_layer": "search, attention and write",
    "generate": "generation, per token",
    "train_step": "training step",
}
"""Operations in words, in the order of tables."""

_LEGEND = (
    "x best: time of the fastest baseline over this one, above 1 is faster than it (x bound: of the fastest bound);\n"
    "graph: the device's own time, replayed as a CUDA graph; host: until the device is done; launch: until the call\n"
    "returns (longer than the graph, it holds the device up: rows that both have a graph are compared by it);\n"
    "*: a bound, it computes less or something near;\n"
    "ceiling: the time that the work takes at the machine's own copy bandwidth or matrix rate, over the time taken\n"
    "(copies are of main memory: data in a cache can exceed 100 %);\n"
    "cores: what the process got while it was timed"
)


def grouped(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows that can be compared with each other: by operation, shape, dtype, device, threads, commit and sweep."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row.op, row.shape, row.dtype, row.device_name, str(row.threads), row.commit, row.sweep or "")
        groups.setdefault(key, []).append(row)
    return groups


def sweeps(rows: Sequence[Row]) -> dict[tuple[str, str], list[list[Row]]]:
    """By operation and sweep, the groups of its points in the order they were measured."""
    found: dict[tuple[str, str], list[list[Row]]] = {}
    for group in grouped([row for row in rows if row.sweep]).values():
        found.setdefault((group[0].op, group[0].sweep or ""), []).append(group)
    return found


def table(rows: Sequence[Row]) -> str:
    """Every measurement as text, what could not run with its reason."""
    single = [_one_table(group) for group in grouped([row for row in rows if not row.sweep]).values()]
    swept = [_sweep_table(points) for points in sweeps(rows).values()]
    return "\n\n".join([*single, *swept, *_missing([row for row in rows if row.sweep]), _LEGEND])


def title(row: Row) -> str:
    """Title of a group: all that its numbers depend on, in one line."""
    processor = row.device_name if row.device.startswith("cuda") else f"{row.device_name}, {row.threads} threads"
    return f"{row.op} [{row.shape} {row.dtype}] on {processor}, commit {row.commit}"


def best_baseline(rows: Sequence[Row]) -> float | None:
    """Milliseconds of the fastest that does the whole operation and is not ours."""
    times = [row.median_ms for row in rows if not row.ours and not row.bound and row.median_ms is not None]
    return min(times, default=None)


def yardstick(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The rows that ratios refer to, and the column's name: the baselines or, without one, the bounds."""
    baselines = [row for row in rows if not row.ours and not row.bound and row.median_ms is not None]
    if baselines:
        return baselines, "x best"
    return [row for row in rows if row.bound and not row.ours and row.median_ms is not None], "x bound"


def times_faster(row: Row, others: Sequence[Row]) -> float | None:
    """The time of the fastest of `others` over that of `row`; pairs are compared as `compared_ms` says."""
    pairs = [pair for other in others if (pair := compared_ms(row, other)) is not None]
    return min((theirs / own for own, theirs in pairs if own), default=None)


def best_of_ours(rows: Sequence[Row]) -> Row | None:
    """The fastest row of ours that does the whole operation."""
    ours = [row for row in rows if row.ours and not row.bound and row.median_ms is not None]
    return min(ours, key=lambda row: row.device_ms or 0.0, default=None)


def name_of(row: Row) -> str:
    return row.provider + (" *" if row.bound else "")


def brief(row: Row) -> str:
    """The time of a row in a few words; beside each other the device's and the host's where the host holds it up."""
    if row.median_ms is None:
        return _why(row)
    if row.graph_ms is not None:
        return f"{milliseconds(row.graph_ms)} ms in a graph, {milliseconds(row.host_ms)} by the host's clock"
    return f"{milliseconds(row.median_ms)} ms" + (", held up by the host" if row.held_up else "")


def significant(value: float, digits: int = 3) -> str:
    """1234.5 -> "1230", 0.01234 -> "0.0123": no exponents."""
    if value == 0:
        return "0"
    before = math.floor(math.log10(abs(value))) + 1
    return f"{round(value, digits - before):,.{max(0, digits - before)}f}"


def quantity(amount: float, unit: str) -> str:
    """1234567, "B" -> "1.23 MB"."""
    for prefix in ("", "k", "M", "G"):
        if amount < 999.5:
            return f"{amount:.3g} {prefix}{unit}"
        amount /= 1000
    return f"{amount:.3g} T{unit}"


def milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _columns(others: Sequence[Row], ratio_name: str) -> dict[str, Callable[[Row], str]]:
    def spread(row: Row) -> str:
        return f"{milliseconds(row.p20_ms)} - {milliseconds(row.p80_ms)}"

    def peak(row: Row) -> str:
        return "not measured" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"

    def rate(row: Row) -> str:
        return (
            ""
            if row.tokens is None or not row.median_ms
            else quantity(row.tokens / row.median_ms * 1e3, "").replace(" ", "")
        )

    def ceiling(row: Row) -> str:
        # A bound does other work than the operation's.
        if row.floor_ms is None or row.bound or not row.median_ms:
            return ""
        return f"{row.floor_ms / (row.device_ms or row.median_ms):.0%}"

    def ratio(row: Row) -> str:
        times = times_faster(row, others)
        return "" if times is None else f"{times:.2f}"

    return {
        "median ms": lambda row: milliseconds(row.median_ms),
        "p20 - p80": spread,
        "p95": lambda row: milliseconds(row.p95_ms),
        "p99": lambda row: milliseconds(row.p99_ms),
        "warm L2": lambda row: milliseconds(row.warm_ms),
        "graph": lambda row: milliseconds(row.graph_ms),
        "host": lambda row: milliseconds(row.host_ms),
        "launch": lambda row: milliseconds(row.launch_ms),
        "tokens/s": rate,
        "peak MB": peak,
        "cores": lambda row: "" if row.cores is None else f"{row.cores:.1f}",
        "ceiling": ceiling,
        ratio_name: ratio,
    }


def _one_table(rows: list[Row]) -> str:
    columns = _columns(*yardstick(rows))
    timed = [row for row in rows if row.median_ms is not None]
    cells = {header: [cell(row) for row in timed] for header, cell in columns.items()}
    latency = any(part in rows[0].shape.split() for part in ("T=1",))
    shown = {
        header: values
        for header, values in cells.items()
        if any(values) and (latency or header not in ("p95", "p99"))
    }  # fmt: skip
    lines = [["provider", *shown]]
    lines += [[name_of(row), *(values[number] for values in shown.values())] for number, row in enumerate(timed)]
    text = [title(rows[0]), *_least(timed), *aligned(lines)]
    text += [f"{name_of(row)}: {row.note}" for row in timed if row.note]
    text += [f"{name_of(row)}: {_why(row)}" for row in rows if row.median_ms is None]
    return "\n".join(text)


def _why(row: Row) -> str:
    return row.reason if row.wrong and row.reason else f"cannot run: {row.reason or 'not measured'}"


def _least(timed: list[Row]) -> list[str]:
    row = next((row for row in timed if row.floor_ms is not None), None)
    if row is None or row.bytes is None or row.flops is None:
        return []
    amounts = f"{quantity(row.bytes, 'B')}, {quantity(row.flops, 'FLOP')}"
    return [f"at least {amounts}: {milliseconds(row.floor_ms)} ms at the machine's {row.floor} ceiling"]


def aligned(lines: list[list[str]]) -> list[str]:
    """Columns under each other, the first to the left, a rule under the header."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        text.append("  ".join(cells).rstrip())
    return [text[0], "  ".join("-" * width for width in widths), *text[1:]]


def size_of(row: Row, sweep: str) -> int:
    """The size that the sweep varies, from the row's shape."""
    symbol = sweep.split()[0]
    sizes = dict(part.split("=") for part in row.shape.split())
    # R is named only where rows share a ring.
    return int(sizes[symbol]) if symbol in sizes else int(sizes["B"])


def common_shape(points: Sequence[Sequence[Row]], sweep: str) -> str:
    """Sizes that the shapes of a sweep have in common, the swept size as "M=..."."""
    symbol = sweep.split()[0]
    *others, last = (point[0].shape.split() for point in points)
    # A single row shares its ring with nobody, and does not name R.
    parts = [part for part in last if part.startswith("R=") or all(part in other for other in others)]
    return " ".join([*(part for part in parts if not part.startswith(f"{symbol}=")), f"{symbol}=..."])


def _sweep_table(points: list[list[Row]]) -> str:
    """Milliseconds of every provider at every size, and how many times faster ours is than the fastest baseline."""
    first = points[0][0]
    sweep = first.sweep or ""
    symbol = sweep.split()[0]
    processor = title(first).split("] on ", 1)[1]
    lines = [["ms", *(f"{symbol}={size_of(point[0], sweep):,}" for point in points)]]
    for name in dict.fromkeys(name_of(row) for point in points for row in point):
        rows = [next((row for row in point if name_of(row) == name), None) for point in points]
        cells = ["-" if row is None else milliseconds(row.device_ms) or "-" for row in rows]
        if any(cell != "-" for cell in cells):
            lines.append([name, *cells])
    ratios = []
    for point in points:
        ours, (others, against) = best_of_ours(point), yardstick(point)
        times = times_faster(ours, others) if ours is not None and against == "x best" else None
        ratios.append("-" if times is None else f"{times:.2f}")
    lines.append(["ours x best", *ratios])
    heading = f"{first.op}, {sweep} [{common_shape(points, sweep)} {first.dtype}] on {processor}"
    return "\n".join([heading, *aligned(lines)])


def _missing(rows: Sequence[Row]) -> list[str]:
    """Why rows of sweeps have no time, each reason once."""
    reasons = dict.fromkeys(f"{row.op}: {name_of(row)}: {_why(row)}" for row in rows if row.median_ms is None)
    return ["\n".join(["Without a time in these sweeps:", *reasons])] if reasons else []
