"""A training step of a small model with the published rules. The published size: benchmarks/official_step.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from longmem.bench.measure import CoreClock, summarise
from longmem.bench.memory import peak_extra_bytes
from longmem.bench.official_step import Steps, check_losses, small, step_providers

_PROVIDERS = step_providers(torch.device("cpu"))
_STEPS = 10


@cache
def _case(device: str) -> Steps:
    return Steps(small(), device)


@cache
def _wanted(device: str) -> list[float]:
    """Losses of as many steps as a benchmark takes, from ours in float32."""
    step, losses = _case(device).prepare(_PROVIDERS[0])
    for _ in range(_STEPS + 2):
        step()
    return losses


@pytest.mark.parametrize("number", range(len(_PROVIDERS)), ids=[f"{p.name}-{p.precision}" for p in _PROVIDERS])
def test_official_step(benchmark: Any, request: pytest.FixtureRequest, number: int) -> None:
    device = request.config.getoption("--device")
    wanted = _wanted(device)
    case, provider = _case(device), step_providers(torch.device(device))[number]
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
