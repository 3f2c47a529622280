"""A row of a table: one measurement, or the reason why there is none."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none (then the numbers are None).

    Attributes:
        bound: computes less than the operation, or something near it.
        wrong: refused by the correctness check, or failed where it should run; `reason` says how.
        median_ms, p20_ms, p80_ms, p95_ms, p99_ms: time per operation; on CUDA with a cold L2 cache.
        warm_ms: CUDA only: median with a warm L2 cache.
        graph_ms, graph_p20_ms, graph_p80_ms: CUDA only: replayed as a CUDA graph (cold): the device's own time, where
            `median_ms` holds the pauses that the host leaves between launches.
        host_ms: CUDA only: by the host's clock from the call to the end of the device's work (warm).
        launch_ms: CUDA only: by the host's clock until the call returns, its launches made.
        cores: processor time over wall time while the rounds ran: rows of one table that got different shares of a busy
            machine do not compare.
        peak_bytes: extra memory at the peak of one run; None where it could not be measured.
        bytes, flops: what the operation has to do at least.
        floor_ms, floor: the time that takes at the machine's measured ceilings, and which one: "copy" or "matmul".
        tokens: tokens per operation.
        sweep: the sweep that this is a point of, named after the size that grows.
        note: what a reader of the number must know.
    """

    op: str
    provider: str
    shape: str
    dtype: str
    device: str
    device_name: str
    threads: int
    commit: str
    ours: bool = False
    bound: bool = False
    wrong: bool = False
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    warm_ms: float | None = None
    graph_ms: float | None = None
    graph_p20_ms: float | None = None
    graph_p80_ms: float | None = None
    host_ms: float | None = None
    launch_ms: float | None = None
    rounds: int = 0
    cores: float | None = None
    peak_bytes: int | None = None
    bytes: int | None = None
    flops: int | None = None
    floor_ms: float | None = None
    floor: str | None = None
    tokens: int | None = None
    sweep: str | None = None
    note: str | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def device_ms(self) -> float | None:
        """The device's time: of a replayed graph where there is one."""
        return self.median_ms if self.graph_ms is None else self.graph_ms

    @property
    def held_up(self) -> bool:
        """The host takes longer to launch the work than the device to do it."""
        host = self.host_ms if self.launch_ms is None else self.launch_ms
        return host is not None and self.device_ms is not None and host > self.device_ms


def compared_ms(one: Row, other: Row) -> tuple[float, float] | None:
    """The times by which two rows are compared: as replayed graphs where both have one, else as called; None where one
    has no time."""
    if one.graph_ms is not None and other.graph_ms is not None:
        return one.graph_ms, other.graph_ms
    if one.median_ms is None or other.median_ms is None:
        return None
    return one.median_ms, other.median_ms
