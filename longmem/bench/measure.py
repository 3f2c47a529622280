"""Gate, time and weigh the providers of one operation on one shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import environment
from .gate import Gate, GateError
from .inputs import draw
from .memory import peak_extra_bytes
from .providers import Prepared, Provider
from .providers import providers as all_providers
from .shapes import Shape

MIN_ROUNDS, MAX_ROUNDS = 3, 200


class Unavailable(RuntimeError):
    """A provider cannot run this case; the message says why."""


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none (then the numbers are None).

    `peak_bytes` is None where memory could not be measured. `bound` marks what does less than the operation. `cores` is
    processor time over wall time while the rounds ran: rows of one table that got different shares of a busy machine do
    not compare.
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
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    cores: float | None = None
    peak_bytes: int | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Case:
    """One operation on one shape and device: the same inputs and the same gate for all providers."""

    def __init__(self, op: str, shape: Shape, device: torch.device | str = "cpu", *, seed: int = 0) -> None:
        self.op, self.shape, self.device = op, shape, torch.device(device)
        self.inputs = draw(op.removesuffix("_backward"), shape, self.device, seed)
        self.gate = Gate(op, self.inputs)

    def admit(self, provider: Provider) -> Prepared:
        """Prepare `provider`, run it once and check its result.

        Raises:
            Unavailable: it cannot run here, or memory does not suffice.
            GateError: its result is wrong.
        """
        reason = provider.unavailable(self.shape, self.device)
        if reason is not None:
            raise Unavailable(reason)
        try:
            prepared = provider.prepare(self.inputs)
            result = prepared.collect(prepared.run())
        except torch.OutOfMemoryError as error:
            raise Unavailable(f"out of memory: {str(error).splitlines()[0]}") from None
        self.gate.check(provider.name, result, provider.computes)
        return prepared

    def timed(self, prepared: Prepared) -> Callable[[], object]:
        """`prepared.run`, returning only when the device is done."""
        if self.device.type != "cuda":
            return prepared.run

        def run() -> object:
            result = prepared.run()
            torch.cuda.synchronize(self.device)
            return result

        return run

    def peak_bytes(self, provider: Provider, call: Callable[[], object]) -> int | None:
        if provider.own_memory and self.device.type == "cuda":
            return None
        return peak_extra_bytes(call, self.device)

    def row(self, provider: Provider, **numbers: Any) -> Row:
        """A row with everything but the numbers filled in."""
        return Row(
            op=self.op,
            provider=provider.name,
            shape=self.shape.describe(self.op),
            dtype=self.shape.dtype_name,
            device=str(self.device),
            device_name=environment.device_name(str(self.device)),
            threads=torch.get_num_threads(),
            commit=environment.commit(),
            ours=provider.ours,
            bound=provider.computes != "op",
            **numbers,
        )


class CoreClock:
    """`with CoreClock() as clock: ...; clock.cores`: how many cores this process kept busy in the block."""

    cores = 0.0

    def __enter__(self) -> CoreClock:
        self._wall, self._processor = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cores = (time.process_time() - self._processor) / max(time.perf_counter() - self._wall, 1e-9)


def rounds_within(call: Callable[[], object], seconds: float) -> int:
    """How many rounds of `call` to take in about `seconds`, judged by one call, which also warms it up."""
    begin = time.perf_counter()
    call()
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / (time.perf_counter() - begin))))


def summarise(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, p20 and p80 in milliseconds, and the number of rounds: the timing fields of a Row."""
    if len(seconds) < 2:
        raise ValueError(f"at least 2 rounds are needed for percentiles, got {len(seconds)}")
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "p20_ms": fifths[0] * 1e3,
        "p80_ms": fifths[3] * 1e3,
        "rounds": len(seconds),
    }


def measure(
    op: str,
    shape: Shape,
    providers: Sequence[Provider] | None = None,
    rounds: int | None = None,
    *,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
) -> list[Row]:
    """Time providers side by side; one row each, in the order given.

    Args:
        op: one of `OPS`.
        shape: sizes and dtype.
        providers: default all of `longmem.bench.providers(op)`. One that cannot run gets a row with the reason.
        rounds: calls per provider, at least 2; default as many as take about `seconds`, 3 to 200.
        device: "cpu" or "cuda".
        seconds: see `rounds`.

    Raises:
        GateError: a provider's result is wrong. Nothing is reported beside a wrong result.
    """
    case = Case(op, shape, device)
    rows = []
    for provider in all_providers(op) if providers is None else providers:
        try:
            call = case.timed(case.admit(provider))
        except Unavailable as why:
            rows.append(case.row(provider, reason=str(why)))
            continue
        peak = case.peak_bytes(provider, call)
        taken = []
        count = rounds_within(call, seconds) if rounds is None else rounds
        with CoreClock() as clock:
            for _ in range(count):
                begin = time.perf_counter()
                call()
                taken.append(time.perf_counter() - begin)
        rows.append(case.row(provider, peak_bytes=peak, cores=clock.cores, **summarise(taken)))
    return rows


__all__ = ["Case", "CoreClock", "GateError", "Row", "Unavailable", "measure", "rounds_within", "summarise"]
