"""Timers. CPU: wall clock per call. CUDA: events around each call, the L2 cache flushed before it or left warm, and
replays of a CUDA graph for launches so short that the host would be timed instead.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 200
LATENCY_ROUNDS = 1000  # of single queries: enough for a 99th percentile
SHORT_MS = 0.2  # below this the host's launch overhead shows, and a graph is timed as well
_FLUSH_BYTES = 2**28  # several times any L2 cache so far

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds per call on the device, with a cold and a warm L2 cache, and as a replayed graph where that was asked."""

    cold: list[float]
    warm: list[float]
    graph: list[float] | None


class CoreClock:
    """`with clock: ...` any number of times; `clock.cores`: how many cores this process kept busy in the blocks."""

    def __init__(self) -> None:
        self._wall = self._processor = 0.0

    def __enter__(self) -> CoreClock:
        self._wall -= time.perf_counter()
        self._processor -= time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._wall += time.perf_counter()
        self._processor += time.process_time()

    @property
    def cores(self) -> float:
        return self._processor / max(self._wall, 1e-9)


def rounds_within(call: Call, seconds: float, most: int = MAX_ROUNDS) -> int:
    """How many rounds of `call` to take in about `seconds`, judged by one call, which also warms it up."""
    begin = time.perf_counter()
    call()
    return max(MIN_ROUNDS, min(most, int(seconds / (time.perf_counter() - begin))))


def wall_times(call: Call, rounds: int) -> list[float]:
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return taken


def synchronised(run: Call, device: torch.device) -> Call:
    """`run`, returning only when the device is done."""
    if device.type != "cuda":
        return run

    def call() -> object:
        result = run()
        torch.cuda.synchronize(device)
        return result

    return call


def cuda_times(run: Call, device: torch.device, rounds: int, *, graphable: bool) -> Times:
    """Cold and warm L2, and with `graphable` and a short `run`, a graph of it.

    The flush keeps the device busy while the host enqueues the call: what is timed is the device's work, and the gaps
    that the host leaves between its launches.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    with torch.cuda.device(device):
        cold = _event_times(run, rounds, flush.zero_)
        warm = _event_times(run, rounds, None)
        graph = None
        if graphable and statistics.median(cold) * 1e3 < SHORT_MS:
            graph = _event_times(_captured(run), rounds, flush.zero_)
    return Times(cold, warm, graph)


def _event_times(run: Call, rounds: int, before: Call | None) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda.synchronize()
    for start, end in events:
        if before is not None:
            before()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _captured(run: Call) -> Call:
    """`run` as one CUDA graph, after a warm-up on the stream that captures."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def median_ms(seconds: Sequence[float] | None, repeat: int = 1) -> float | None:
    """Of one operation, where a call does `repeat` of them."""
    return None if seconds is None else statistics.median(seconds) * 1e3 / repeat


def summarise(seconds: Sequence[float]) -> dict[str, float | int | None]:
    """Median, p20 and p80 in milliseconds, p95 and p99 where the rounds suffice, and the rounds: fields of a Row."""
    if len(seconds) < 2:
        raise ValueError(f"at least 2 rounds are needed for percentiles, got {len(seconds)}")
    percent = statistics.quantiles(seconds, n=100, method="inclusive")
    enough = len(seconds) >= 200  # two rounds beyond the 99th percentile
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "p20_ms": percent[19] * 1e3,
        "p80_ms": percent[79] * 1e3,
        "p95_ms": percent[94] * 1e3 if enough else None,
        "p99_ms": percent[98] * 1e3 if enough else None,
        "rounds": len(seconds),
    }
