"""Verify and time the providers of one operation on one shape, and measure their peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import torch

from . import environment
from .inputs import draw
from .peak_memory import peak_extra_bytes
from .provider import MODEL_OPS, Prepared, Provider, Unavailable, WrongResult
from .providers import providers as all_providers
from .roofline import Work, ceilings, work
from .row import Row
from .shapes import Shape
from .timing import (
    LATENCY_ROUNDS,
    MAX_ROUNDS,
    Call,
    CoreClock,
    Times,
    cuda_times,
    median_ms,
    rounds_within,
    spread_ms,
    summarise,
    synchronised,
    wall_times,
)
from .verify import Verifier


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


_HOST_ROUNDS = 20
_TURNS = 4  # of every provider of a case on the CPU

_Attempted = TypeVar("_Attempted")

Clock = Callable[[Call, int], list[float]]
"""From a call and a number of rounds to the seconds that each round took."""


Watch = Callable[[Row, Prepared], None]


class Case:
    """One operation on one shape and device: the same inputs, drawn when needed, and the same verifier for all.

    Args:
        watch: called with every row that has a time and with what was timed.
    """

    def __init__(
        self,
        op: str,
        shape: Shape,
        device: torch.device | str = "cpu",
        *,
        sweep: str | None = None,
        seed: int = 0,
        watch: Watch | None = None,
    ) -> None:
        self.op, self.shape, self.device, self.sweep = op, shape, torch.device(device), sweep
        self.seed, self.watch = seed, watch

    @cached_property
    def inputs(self) -> Any:
        if self.op in MODEL_OPS:
            from . import models  # needs transformers

            return models.draw(self.op, self.shape, self.device, self.seed)
        return draw(self.op.removesuffix("_backward"), self.shape, self.device, self.seed)

    @cached_property
    def verifier(self) -> Any:
        if self.op in MODEL_OPS:
            from .verify_models import ModelVerifier

            return ModelVerifier(self.inputs)
        return Verifier(self.op, self.inputs)

    def admit(self, provider: Provider) -> Prepared:
        """Prepare `provider`, run it once and check its result.

        Raises:
            Unavailable: it cannot run here, or memory does not suffice.
            WrongResult: its result is wrong.
        """
        reason = provider.unavailable(self.shape, self.device)
        if reason is not None:
            raise Unavailable(reason)
        try:
            prepared = provider.prepare(self.inputs)
            result = prepared.collect(prepared.run())
            self.verifier.check(provider.name, result, provider.computes, prepared.repeat)
        except WrongResult:
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
        """Admit and time `provider`, and measure its peak memory.

        Args:
            rounds: default as many as take about `seconds`.
            clock: what runs and times the rounds by the host's clock.

        Raises:
            Unavailable, WrongResult: see `admit`.
        """
        timing = Timing(self, provider, rounds, seconds)
        timing.take(timing.rounds, clock)
        return timing.row()

    def side_by_side(
        self,
        providers: Sequence[Provider],
        *,
        rounds: int | None = None,
        seconds: float = 1.0,
        strict: bool = False,
        clock: Clock = wall_times,
    ) -> Iterator[Row]:
        """`measure` all `providers`; one row each, in order.

        A CPU's speed changes by the second, with heat and with what else runs: there all providers are admitted first
        and then take turns, so that a slow moment meets all of them. On CUDA one follows the other, each with the
        device's memory to itself.

        Args:
            strict: raise what `measure` raises, but Unavailable; otherwise the row says so, without a time.

        Raises:
            WrongResult: a provider's result is wrong, and `strict`.
        """

        def attempt(provider: Provider, action: Callable[[], _Attempted]) -> _Attempted | Row:
            try:
                return action()
            except Exception as why:
                if strict and not isinstance(why, Unavailable):
                    raise
                return self.refused(provider, why)

        if self.device.type == "cuda":
            for provider in providers:
                yield attempt(provider, partial(self.measure, provider, rounds=rounds, seconds=seconds, clock=clock))
            return
        found = [attempt(provider, partial(Timing, self, provider, rounds, seconds)) for provider in providers]
        for turn in range(_TURNS):
            for place, timing in enumerate(found):
                if isinstance(timing, Timing):
                    share = timing.rounds * (turn + 1) // _TURNS - timing.rounds * turn // _TURNS
                    found[place] = attempt(timing.provider, partial(timing.take, share, clock))
        for timing in found:
            yield timing.row() if isinstance(timing, Timing) else timing

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
        """The row of a provider that was not timed, because of Unavailable, WrongResult or what it raised."""
        if isinstance(why, Unavailable):
            return self.row(provider, reason=str(why))
        what = f"refused by the correctness check: {why.detail}" if isinstance(why, WrongResult) else first_line(why)
        return self.row(provider, reason=what, wrong=True)

    def least(self) -> dict[str, Any]:
        """Least work of the operation, and the time it takes at the machine's ceilings: fields of a row."""
        amount: Work | None = self.inputs.work() if self.op in MODEL_OPS else work(self.op, self.shape)
        if amount is None:
            return {}
        ceiling = ceilings(str(self.device), self.shape.dtype, torch.get_num_threads())
        floor_ms, floor = ceiling.floor_ms(amount.bytes, amount.flops)
        return {"bytes": amount.bytes, "flops": amount.flops, "floor_ms": floor_ms, "floor": floor}


class Timing:
    """A provider whose result is right, the memory it takes, and the rounds it has run so far.

    Args:
        rounds, seconds: see `Case.measure`.

    Raises:
        Unavailable, WrongResult: see `Case.admit`.
    """

    def __init__(self, case: Case, provider: Provider, rounds: int | None, seconds: float) -> None:
        self.case, self.provider = case, provider
        self.prepared = case.admit(provider)
        self.call = synchronised(self.prepared.run, case.device)
        self.peak = None
        if not (provider.own_memory and case.device.type == "cuda"):
            self.peak = peak_extra_bytes(self.call, case.device)
        most = LATENCY_ROUNDS if case.shape.T == 1 else MAX_ROUNDS
        self.rounds = rounds_within(self.call, seconds, most) if rounds is None else rounds
        self.by_host: list[float] = []
        self.by_events: Times | None = None
        self.clock = CoreClock()

    def take(self, rounds: int, clock: Clock = wall_times) -> Timing:
        """Time `rounds` more rounds, after a call that brings back what another provider's turn drove out of caches; a
        single long round needs none."""
        if self.case.device.type == "cuda":
            self.by_host += clock(self.call, min(rounds, _HOST_ROUNDS))
            graphable = self.provider.graphable and self.prepared.graphable and self.prepared.repeat == 1
            self.by_events = cuda_times(self.prepared.run, self.case.device, rounds, graphable=graphable)
            return self
        if rounds > 1:
            self.call()
        with self.clock:
            self.by_host += clock(self.call, rounds)
        return self

    def row(self) -> Row:
        each = self.prepared.repeat
        taken, numbers, note = self.by_host, dict[str, Any](), self.prepared.note
        if self.by_events is not None:
            taken = self.by_events.cold
            numbers["host_ms"] = median_ms(self.by_host, each)
            numbers["warm_ms"] = median_ms(self.by_events.warm, each)
            numbers["launch_ms"] = self.by_events.launch * 1e3 / each
            numbers["graph_ms"] = median_ms(self.by_events.graph, each)
            if self.by_events.graph is not None:
                numbers["graph_p20_ms"], numbers["graph_p80_ms"] = spread_ms(self.by_events.graph, each)
            if self.by_events.no_graph is not None:
                note = "; ".join(filter(None, [note, f"could not be captured as a graph: {self.by_events.no_graph}"]))
        row = self.case.row(
            self.provider,
            **summarise([one / each for one in taken]),
            **numbers,
            **self.case.least(),
            cores=None if self.by_events is not None else self.clock.cores,
            peak_bytes=self.peak,
            note=note,
        )
        if self.case.watch is not None:
            self.case.watch(row, self.prepared)
        return row


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
    """Time providers side by side; one row each, in the order given. See `Case.side_by_side`.

    Args:
        op: one of `OPS`.
        shape: sizes and dtype.
        providers: default all of `longmem_bench.providers(op)`. One that cannot run gets a row with the reason.
        rounds: calls per provider, at least 2; default as many as take about `seconds`, 3 to 200 (one query: to 1000).
        device: "cpu" or "cuda".
        seconds: see `rounds`.
        strict: raise for a wrong result, or what a provider of ours raises; otherwise its row says so, without a time.
        sweep: kept in the rows, see `Row`.
        done: called with every row as soon as it is there.

    Raises:
        WrongResult: a provider's result is wrong, and `strict`.
    """
    case = Case(op, shape, device, sweep=sweep)
    rows = []
    shown = all_providers(op) if providers is None else providers
    for row in case.side_by_side(shown, rounds=rounds, seconds=seconds, strict=strict):
        rows.append(row)
        done(row)
    return rows
