"""Shapes, providers and records of the benchmarks; what is measured and how lives in longmem.bench.

    pytest benchmarks/ --benchmark-json out/cpu.json              small shapes on a CPU, the paper's on a GPU
    pytest benchmarks/ --paper | --small                          choose the shapes
    pytest benchmarks/ --device cpu -k "chunk_topk and faiss"     choose device and rows
    python -m benchmarks.report out/cpu.json --plot out/cpu.png

`pytest` alone does not come here: its testpaths is tests/.
"""

from __future__ import annotations

import os

# PyTorch and FAISS bring a thread pool each; threads of one that spin while the other works would take its cores.
# Read when the OpenMP runtime is loaded, hence before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from longmem.bench import environment
from longmem.bench.measure import Case, GateError, Row, Unavailable
from longmem.bench.providers import Provider, providers
from longmem.bench.shapes import Shape, shapes_for
from longmem.bench.timing import Call, wall_times

_SECONDS_PER_PROVIDER = 1.0
_NOT_TIMED = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("longmem benchmarks")
    group.addoption("--paper", action="store_true", help="the paper's shapes (default on a GPU)")
    group.addoption("--small", action="store_true", help="small shapes (default on a CPU)")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--paper") and config.getoption("--small"):
        raise pytest.UsageError("--paper and --small exclude each other")
    config.stash[_NOT_TIMED] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark per shape and provider, for each of the module's OPS."""
    if "provider" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    paper = option("--paper") or (not option("--small") and option("--device").startswith("cuda"))
    cases = [
        pytest.param(op, shape, provider, id=f"{op}-T{shape.T}-{provider.name}".replace(" ", "_"))
        for op in metafunc.module.OPS
        for shape in shapes_for(op, paper=paper)
        for provider in providers(op)
    ]
    metafunc.parametrize(("op", "shape", "provider"), cases)


@lru_cache(maxsize=1)  # the providers of one case follow each other, and its inputs may be gigabytes
def _case(op: str, shape: Shape, device: str) -> Case:
    return Case(op, shape, device)


@pytest.fixture
def run_benchmark(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[str, Shape, Provider], None]:
    """Gate, then memory, then time, of one provider; everything measured ends up in `extra_info`."""
    not_timed = request.config.stash[_NOT_TIMED]

    def run(op: str, shape: Shape, provider: Provider) -> None:
        case = _case(op, shape, request.config.getoption("--device"))
        benchmark.group = f"{op} [{shape.describe(op)} {shape.dtype_name}]"

        def clock(call: Call, rounds: int) -> list[float]:
            benchmark.pedantic(call, rounds=rounds, iterations=1)
            # None under --benchmark-disable, which runs a call once
            return wall_times(call, 2) if benchmark.stats is None else list(benchmark.stats.stats.data)

        try:
            row = case.measure(provider, seconds=_SECONDS_PER_PROVIDER, clock=clock)
        except (Unavailable, GateError) as why:
            not_timed.append(case.refused(provider, why))
            if isinstance(why, Unavailable):
                pytest.skip(str(why))
            raise
        benchmark.extra_info.update(row.as_dict())

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["longmem"] = environment.describe(torch.device(config.getoption("--device")))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep the rows without a time: pytest-benchmark's file knows only what ran."""
    output_json["not_timed"] = [row.as_dict() for row in config.stash[_NOT_TIMED]]
