"""Options of the benchmarks under pytest-benchmark, and what their file says beside the times."""

from __future__ import annotations

import os

# PyTorch and FAISS bring a thread pool each; threads of one that spin while the other works would take its cores.
# Read when the OpenMP runtime is loaded, hence before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from typing import Any

import pytest
import torch

from longmem_bench import Row, environment

NOT_TIMED = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("longmem benchmarks")
    group.addoption("--paper", action="store_true", help="the paper's shapes (default on a GPU)")
    group.addoption("--small", action="store_true", help="small shapes (default on a CPU)")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--paper") and config.getoption("--small"):
        raise pytest.UsageError("--paper and --small exclude each other")
    config.stash[NOT_TIMED] = []


@pytest.fixture
def not_timed(request: pytest.FixtureRequest) -> list[Row]:
    """Rows without a time are put here: pytest-benchmark's file knows only what ran."""
    return request.config.stash[NOT_TIMED]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["longmem"] = environment.describe(torch.device(config.getoption("--device")))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["not_timed"] = [row.as_dict() for row in config.stash[NOT_TIMED]]
