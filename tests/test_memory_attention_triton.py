"""The Triton memory_attention on a GPU, or under the interpreter (runs are started by test_triton_interpreter.py)."""

from __future__ import annotations

import os

import pytest
import torch
from memory_attention_suite import LARGE_CASES, Case, MemoryAttentionSuite, check

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device: run by test_triton_interpreter.py", allow_module_level=True)

pytestmark = [pytest.mark.gpu] if CUDA else []


class TestTriton(MemoryAttentionSuite):
    impl = "triton"
    device = "cuda" if CUDA else "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LARGE_CASES)
def test_large(name: str, dtype: torch.dtype) -> None:
    check(Case(**{**vars(LARGE_CASES[name]), "dtype": dtype}), "triton", "cuda")
