"""No CPU kernel has become slower than what benchmarks/regression.json holds it to; `longmem_bench.regression` says why
the margins are what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from longmem_bench import regression
from longmem_bench.provider import Unavailable


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Memory is not poisoned here: it would cost the baselines more than us."""


STORED = Path(__file__).parent.parent / "benchmarks" / "regression.json"
RATIOS = {case.name: case for case in regression.RATIOS}


@pytest.mark.parametrize("name", RATIOS)
def test_times_faster_than_a_baseline(name: str) -> None:
    kept = regression.stored(STORED, "ratios", regression.simd())
    if not kept:
        pytest.skip(f"no ratio is stored for {regression.simd()} kernels (longmem-bench regression --update)")
    assert name in kept, "no ratio is stored for this case: longmem-bench regression --update"
    wanted = regression.MARGIN * kept[name]
    try:
        found = regression.ratio(RATIOS[name], wanted)
    except Unavailable as why:
        pytest.skip(str(why))
    assert found >= wanted, f"{found:.2f} times faster, stored {kept[name]:.2f}: slower than half of that is not noise"


@pytest.mark.slow
def test_instructions_of_the_kernels() -> None:
    kept = regression.stored(STORED, "instructions", regression.compiler())
    if not kept:
        pytest.skip(f"no count is stored for {regression.compiler()} (longmem-bench regression --update)")
    try:
        counts = regression.instructions()
    except Unavailable as why:
        pytest.skip(str(why))
    grown = {op: f"{count:,}, stored {kept[op]:,}" for op, count in counts.items()
             if count > (1 + regression.ALLOWANCE) * kept[op]}  # fmt: skip
    assert not grown


def test_a_slower_kernel_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does its work ten times falls below half of its stored ratio, on a busy machine too."""
    case = regression.RATIOS[-1]
    normal = regression.ratio(case)
    admitted = regression._admitted

    def ten_times(shared: regression.Case, name: str) -> object:
        call = admitted(shared, name)
        return (lambda: [call() for _ in range(10)]) if name == regression._OURS else call

    monkeypatch.setattr(regression, "_admitted", ten_times)
    assert regression.ratio(case) < regression.MARGIN * normal
