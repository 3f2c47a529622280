"""Gate, time and weigh the providers of one operation on one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from . import environment
from .ceilings import ceilings
from .gate import Gate, GateError
from .inputs import draw
from .memory import peak_extra_bytes
from .providers import MODEL_OPS, Prepared, Provider
from .providers import providers as all_providers
from .shapes import Shape
from .timing import (
    LATENCY_ROUNDS,
    MAX_ROUNDS,
    Call,
    CoreClock,
    cuda_times,
    median_ms,
    rounds_within,
    summarise,
    synchronised,
    wall_times,
)
from .work import Work, work


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


_HOST_ROUNDS = 20

Clock = Callable[[Call, int], list[float]]
"""From a call and a number of rounds to the seconds that each round took."""


class Unavailable(RuntimeError):
    """A provider cannot run this case; the message says why."""


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none (then the numbers are None).

    Attributes:
        bound: computes less than the operation, or something near it.
        wrong: refused by the gate, or failed where it should run; `reason` says how.
        median_ms, p20_ms, p80_ms, p95_ms, p99_ms: time per operation; on CUDA with a cold L2 cache.
        warm_ms, graph_ms, host_ms: CUDA only: median with a warm L2 cache; replayed as a CUDA graph (cold); by the
            host's clock from the call to the end of the device's work (warm).
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
    host_ms: float | None = None
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


class Case:
    """One operation on one shape and device: the same inputs, drawn when needed, and the same gate for all."""

    def __init__(
        self, op: str, shape: Shape, device: torch.device | str = "cpu", *, sweep: str | None = None, seed: int = 0
    ) -> None:
        self.op, self.shape, self.device, self.sweep = op, shape, torch.device(device), sweep
        self.seed = seed

    @cached_property
    def inputs(self) -> Any:
        if self.op in MODEL_OPS:
            from . import models  # needs transformers

            return models.draw(self.op, self.shape, self.device, self.seed)
        return draw(self.op.removesuffix("_backward"), self.shape, self.device, self.seed)

    @cached_property
    def gate(self) -> Any:
        if self.op in MODEL_OPS:
            from .models import ModelGate

            return ModelGate(self.inputs)
        return Gate(self.op, self.inputs)

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
            self.gate.check(provider.name, result, provider.computes, prepared.repeat)
        except GateError:
            raise
        except torch.OutOfMemoryError as error:
            raise Unavailable(f"out of memory: {first_line(error)}") from None
        except Exception as error:
            if provider.ours:
                raise
            # Other libraries' limits cannot all be known beforehand; ours are bugs.
            raise Unavailable(first_line(error)) from error
        return prepared

    def measure(
        self, provider: Provider, *, rounds: int | None = None, seconds: float = 1.0, clock: Clock = wall_times
    ) -> Row:
        """Admit, weigh and time `provider`.

        Args:
            rounds: default as many as take about `seconds`.
            clock: what runs and times the rounds by the host's clock.

        Raises:
            Unavailable, GateError: see `admit`.
        """
        prepared = self.admit(provider)
        call = synchronised(prepared.run, self.device)
        peak = self._peak_bytes(provider, call)
        most = LATENCY_ROUNDS if self.shape.T == 1 else MAX_ROUNDS
        count = rounds_within(call, seconds, most) if rounds is None else rounds
        each = prepared.repeat
        with CoreClock() as cores:
            host = clock(call, count if self.device.type == "cpu" else min(count, _HOST_ROUNDS))
        numbers: dict[str, Any] = {}
        taken = host
        if self.device.type == "cuda":
            graphable = provider.graphable and prepared.graphable and each == 1
            times = cuda_times(prepared.run, self.device, count, graphable=graphable)
            taken = times.cold
            for name, seconds_taken in (("host_ms", host), ("warm_ms", times.warm), ("graph_ms", times.graph)):
                numbers[name] = median_ms(seconds_taken, each)
        return self.row(
            provider,
            **summarise([one / each for one in taken]),
            **numbers,
            **self._least(),
            cores=cores.cores if self.device.type == "cpu" else None,
            peak_bytes=peak,
            note=prepared.note,
        )

    def _peak_bytes(self, provider: Provider, call: Call) -> int | None:
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
            tokens=self.shape.B * (1 if self.op == "generate" else self.shape.T),
            sweep=self.sweep,
            **numbers,
        )

    def refused(self, provider: Provider, why: Exception) -> Row:
        """The row of a provider that was not timed, because of Unavailable, GateError or what it raised."""
        if isinstance(why, Unavailable):
            return self.row(provider, reason=str(why))
        what = f"refused by the correctness gate: {why.detail}" if isinstance(why, GateError) else first_line(why)
        return self.row(provider, reason=what, wrong=True)

    def _least(self) -> dict[str, Any]:
        amount: Work | None = self.inputs.work() if self.op in MODEL_OPS else work(self.op, self.shape)
        if amount is None:
            return {}
        ceiling = ceilings(str(self.device), self.shape.dtype, torch.get_num_threads())
        floor_ms, floor = ceiling.floor_ms(amount.bytes, amount.flops)
        return {"bytes": amount.bytes, "flops": amount.flops, "floor_ms": floor_ms, "floor": floor}


def measure(
    op: str,
    shape: Shape,
    providers: Sequence[Provider] | None = None,
    rounds: int | None = None,
    *,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
    strict: bool = True,
    sweep: str | None = None,
    done: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Time providers side by side; one row each, in the order given.

    Args:
        op: one of `OPS`.
        shape: sizes and dtype.
        providers: default all of `longmem.bench.providers(op)`. One that cannot run gets a row with the reason.
        rounds: calls per provider, at least 2; default as many as take about `seconds`, 3 to 200 (one query: to 1000).
        device: "cpu" or "cuda".
        seconds: see `rounds`.
        strict: raise for a wrong result, or what a provider of ours raises; otherwise its row says so, without a time.
        sweep: kept in the rows, see `Row`.
        done: called with every row as soon as it is there.

    Raises:
        GateError: a provider's result is wrong, and `strict`.
    """
    case = Case(op, shape, device, sweep=sweep)
    rows = []
    for provider in all_providers(op) if providers is None else providers:
        try:
            row = case.measure(provider, rounds=rounds, seconds=seconds)
        except Unavailable as why:
            row = case.refused(provider, why)
        except Exception as why:
            if strict:
                raise
            row = case.refused(provider, why)
        rows.append(row)
        done(row)
    return rows


__all__ = ["Case", "Clock", "GateError", "Row", "Unavailable", "measure"]
