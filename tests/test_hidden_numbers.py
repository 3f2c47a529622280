"""NaN and infinity that a query does not see: the reference and the C++ kernels, at every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hidden_numbers import HiddenNumbersSuite


class TestReference(HiddenNumbersSuite):
    impl = "reference"
    device = "cpu"


class TestCpp(HiddenNumbersSuite):
    impl = "cpp"
    device = "cpu"


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_instruction_sets(level: str) -> None:
    """The level is read once per process."""
    check_all = (
        "from hidden_numbers import *\n"
        "for name in CASES: check_unseen(name, 'cpp', 'cpu'), check_seen(name, math.nan, 'cpp', 'cpu')\n"
        "check_seen_by_none('left_padding', 'cpp', 'cpu')\n"
        "from longmem_kernels._extension import build_info\n"
        "print(build_info()['simd'])"
    )
    path = os.pathsep.join(filter(None, (os.path.dirname(__file__), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "LONGMEM_SIMD": level, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", check_all], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (level, "baseline")
