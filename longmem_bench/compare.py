"""Changes between two results, beyond noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .results import Result
from .row import Row, compared_ms

FLOOR = 0.05
RULE = (
    "A time has changed when the p20 - p80 ranges of the two runs do not overlap and the medians differ by more than"
    f" {FLOOR:.0%}.\nThe ranges hold what varies within a run; the {FLOOR:.0%} are for what varies between runs: clock"
    " speed, heat, placement of memory.\nRows that got different shares of the processor (cores, by more than a tenth)"
    " are not judged."
)


@dataclass(frozen=True)
class Change:
    before: Row
    after: Row

    @property
    def times(self) -> tuple[float, float]:
        """Milliseconds before and after: of replayed graphs where both have one, see `compared_ms`."""
        return compared_ms(self.before, self.after) or (1.0, 0.0)

    @property
    def factor(self) -> float:
        """Time after over time before."""
        before, after = self.times
        return after / (before or 1.0)

    def _ranges(self) -> list[tuple[float, float]]:
        """p20 and p80 before and after, of the times compared."""
        rows = (self.before, self.after)
        if all(row.graph_ms is not None for row in rows):
            # An older result has no spread of its graphs.
            return [(row.graph_p20_ms or row.graph_ms or 0.0, row.graph_p80_ms or row.graph_ms or 0.0) for row in rows]
        return [(row.p20_ms or 0.0, row.p80_ms or 0.0) for row in rows]

    @property
    def verdict(self) -> str:
        """ "faster", "slower", "same", or "not judged": see `RULE`."""
        shares = self.before.cores, self.after.cores
        if None not in shares and not self.before.device.startswith("cuda"):
            low, high = sorted(share or 0.0 for share in shares)
            if high - low > 0.1 * high:
                return "not judged"
        if abs(self.factor - 1) <= FLOOR:
            return "same"
        (low, high), (new_low, new_high) = self._ranges()
        if new_high < low:
            return "faster"
        if new_low > high:
            return "slower"
        return "same"


def compare(before: Result, after: Result) -> list[Change]:
    """Rows timed in both, matched by operation, provider, shape, dtype, device and threads.

    Raises:
        ValueError: the results have no row in common.
    """
    earlier = {_key(row): row for row in before.rows if row.median_ms is not None}
    changes = [
        Change(earlier[_key(row)], row) for row in after.rows if row.median_ms is not None and _key(row) in earlier
    ]
    if not changes:
        raise ValueError(
            "compare: the two results have no timed row in common (operation, provider, shape, dtype, device, threads)"
        )
    return changes


def _key(row: Row) -> tuple[str, ...]:
    return row.op, row.provider, row.shape, row.dtype, row.device_name, str(row.threads), row.sweep or ""


def comparison(before: Result, after: Result) -> str:
    """The changes as text: slower first, then faster, then what was not judged; what stayed is counted."""
    changes = compare(before, after)
    return "\n".join([*_lines(before, after, changes), "", RULE])


def _lines(before: Result, after: Result, changes: list[Change]) -> Iterator[str]:
    yield f"before: {before.headline()}"
    yield f"after:  {after.headline()}"
    for verdict in ("slower", "faster", "not judged"):
        chosen = [change for change in changes if change.verdict == verdict]
        chosen.sort(key=lambda change: -abs(change.factor - 1))
        yield f"\n{verdict}: {len(chosen)} of {len(changes)}"
        for change in chosen:
            (old, new_ms), new = change.times, change.after
            yield (
                f"  {change.factor:5.2f}x  {old:.4g} -> {new_ms:.4g} ms  {new.provider},"
                f" {new.op} [{new.shape} {new.dtype}]"
            )
    yield f"\nsame within noise: {sum(change.verdict == 'same' for change in changes)} of {len(changes)}"
    missing = {_key(row) for row in before.rows if row.median_ms} - {_key(row) for row in after.rows if row.median_ms}
    if missing:
        yield f"timed before and not after: {len(missing)}, " + "; ".join(
            sorted(f"{key[1]} {key[0]}" for key in missing)[:5]
        )
