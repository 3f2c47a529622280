"""Every op, provider by provider, and the published training step of a small model. README.md says how to run it."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import pytest
import torch

from longmem_bench import OPS, Provider, Row, Shape, Unavailable, WrongResult, shapes_for
from longmem_bench.case import Case
from longmem_bench.peak_memory import peak_extra_bytes
from longmem_bench.providers import providers
from longmem_bench.published_step import Steps, check_losses, small, step_providers
from longmem_bench.timing import Call, CoreClock, summarise, wall_times

_SECONDS_PER_PROVIDER = 1.0
_STEPS = 10


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark per op, shape and provider."""
    option = metafunc.config.getoption
    if "shape" in metafunc.fixturenames:
        paper = option("--paper") or (not option("--small") and option("--device").startswith("cuda"))
        cases = [
            pytest.param(op, shape, provider, id=f"{op}-T{shape.T}-{provider.name}".replace(" ", "_"))
            for op in OPS
            for shape in shapes_for(op, paper=paper)
            for provider in providers(op)
        ]
        metafunc.parametrize(("op", "shape", "provider"), cases)
    else:
        steps = step_providers(torch.device(option("--device")))
        metafunc.parametrize("number", range(len(steps)), ids=[f"{one.name}-{one.precision}" for one in steps])


@lru_cache(maxsize=1)  # the providers of one case follow each other, and its inputs may be gigabytes
def _case(op: str, shape: Shape, device: str) -> Case:
    return Case(op, shape, device)


def test_op(
    benchmark: Any, request: pytest.FixtureRequest, not_timed: list[Row], op: str, shape: Shape, provider: Provider
) -> None:
    """Verify, measure the memory of, and time one provider; everything measured ends up in `extra_info`."""
    case = _case(op, shape, request.config.getoption("--device"))
    benchmark.group = f"{op} [{shape.describe(op)} {shape.dtype_name}]"

    def clock(call: Call, rounds: int) -> list[float]:
        benchmark.pedantic(call, rounds=rounds, iterations=1)
        # None under --benchmark-disable, which runs a call once
        return wall_times(call, 2) if benchmark.stats is None else list(benchmark.stats.stats.data)

    try:
        row = case.measure(provider, seconds=_SECONDS_PER_PROVIDER, clock=clock)
    except (Unavailable, WrongResult) as why:
        not_timed.append(case.refused(provider, why))
        if isinstance(why, Unavailable):
            pytest.skip(str(why))
        raise
    benchmark.extra_info.update(row.as_dict())


@cache
def _steps(device: str) -> Steps:
    return Steps(small(), device)


@cache
def _wanted(device: str) -> list[float]:
    """Losses of as many steps as a benchmark takes, from ours in float32."""
    step, losses = _steps(device).prepare(step_providers(torch.device(device))[0])
    for _ in range(_STEPS + 2):
        step()
    return losses


def test_published_step(benchmark: Any, request: pytest.FixtureRequest, number: int) -> None:
    device = request.config.getoption("--device")
    case, wanted, provider = _steps(device), _wanted(device), step_providers(torch.device(device))[number]
    step, losses = case.prepare(provider)
    step()
    peak = peak_extra_bytes(step, case.device)
    benchmark.group = f"official_step [{case.shape.describe()}]"
    with CoreClock() as clock:
        benchmark.pedantic(step, rounds=_STEPS, iterations=1)
    check_losses(provider, losses, wanted[: len(losses)])
    if benchmark.stats is not None:  # None under --benchmark-disable
        taken = summarise(benchmark.stats.stats.data)
        benchmark.extra_info.update(case.row(provider, peak_bytes=peak, cores=clock.cores, **taken).as_dict())
