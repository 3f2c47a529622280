"""Timers. CPU: wall clock per call. CUDA: events around each call, the L2 cache flushed before it or left warm, and
replays of a CUDA graph for calls that the host may hold up: between the events lie its pauses as well.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 200
LATENCY_ROUNDS = 1000  # of single queries: enough for a 99th percentile
SHORT_MS = 0.2  # below this a graph is timed as well, however quick the host is
_LAUNCHES = 10  # calls by which the host's part is timed, at most
_FLUSH_BYTES = 2**28  # several times any L2 cache so far

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds per call.

    Attributes:
        cold, warm: on the device between two events, pauses of the host included, with a cold and a warm L2 cache.
        graph: cold, as a replayed graph; None where that was not asked, not worth it or not possible.
        launch: of the host, until the call returns and the device has what to do.
        no_graph: why the call could not be captured.
    """

    cold: list[float]
    warm: list[float]
    graph: list[float] | None
    launch: float
    no_graph: str | None = None


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
    """Cold and warm L2, and of a `graphable` call that is short, or that the host takes half its time to launch, the
    same as a graph.

    The flush keeps the device busy while the host enqueues the call, for a quarter of a millisecond or less: what the
    host takes beyond that is a pause of the device, and timed.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    with torch.cuda.device(device):
        cold = _event_times(run, rounds, flush.zero_)
        warm = _event_times(run, rounds, None)
        launch = statistics.median(_launch_times(run, min(rounds, _LAUNCHES)))
        middle, graph, why = statistics.median(cold), None, None
        if graphable and (middle * 1e3 < SHORT_MS or launch > 0.5 * middle):
            try:
                graph = _event_times(_captured(run), rounds, flush.zero_)
            except RuntimeError as error:
                why = str(error).strip().splitlines()[0]
    return Times(cold, warm, graph, launch, why)


def _launch_times(run: Call, rounds: int) -> list[float]:
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        taken += wall_times(run, 1)
    torch.cuda.synchronize()
    return taken


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
    """Median of one operation, where a call does `repeat` of them."""
    return None if seconds is None else statistics.median(seconds) * 1e3 / repeat


def spread_ms(seconds: Sequence[float], repeat: int = 1) -> tuple[float, float]:
    """p20 and p80 of one operation, where a call does `repeat` of them."""
    percent = statistics.quantiles(seconds, n=5, method="inclusive")
    return percent[0] * 1e3 / repeat, percent[3] * 1e3 / repeat


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
