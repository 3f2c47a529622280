"""What every test gets: fixed seeds, uninitialised memory that is NaN, and GPU tests that say why they were skipped."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("memory_attention_suite")

# Compiling and thread start-up make single examples slow now and then; derandomised, a failure is the same everywhere.
settings.register_profile("longmem", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("longmem")


def pytest_configure() -> None:
    # A shell that starts tests in the background has them ignore Ctrl-C, which their processes would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = f"NOT TESTED: needs a CUDA device, and PyTorch {torch.__version__} finds none"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised floats are NaN and integers their maximum, in Python and in C++: what reads them shows.

    PyTorch offers this only together with deterministic algorithms; those that do not exist merely warn.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(2).isnan().all(), "this PyTorch does not poison uninitialised memory"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def asset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
