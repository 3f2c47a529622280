"""Without a GPU: the tests of the Triton kernels under Triton's interpreter, each file in a process of its own.

Triton decides on import whether kernels are interpreted, and interpreted kernels cannot be compiled
(test_triton_compile.py): the two cannot share a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: these files run on it, here")
@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: these files run here")
@pytest.mark.parametrize("name", ["test_chunk_topk_triton.py", "test_memory_attention_triton.py"])
def test_under_the_interpreter(name: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout
    print(run.stdout.splitlines()[-1])
