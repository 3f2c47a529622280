"""The C++ memory_attention: the kernel suite, head dims and sizes that need its tails, threads and instruction sets."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from memory_attention_cases import FP8, OUTPUTS, Case, make, random_cases
from memory_attention_suite import MemoryAttentionSuite, check

from longmem_kernels import memory_attention


class TestCpp(MemoryAttentionSuite):
    impl = "cpp"
    device = "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(D=5, T=33, S=40, H=6, G=3, fusion="joint"),
        Case(D=33, T=31, S=31, C=5, K=9),
        Case(D=1, T=2, S=70),
        Case(D=64, T=129, S=200, K=16, M=300, slopes=True, options=(("window", 70),)),
        Case(D=96, T=64, S=64, options=(("causal", False),), H=3),
    ],
    ids=lambda case: f"D{case.D}",
)
def test_sizes_that_are_no_multiples_of_a_vector(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype), "cpp", "cpu")


@settings(max_examples=150)
@given(random_cases())
def test_random_cases(case: Case) -> None:
    check(case, "cpp", "cpu")


def test_nan_comes_out_where_it_goes_in() -> None:
    inputs = make(Case(T=9, S=9, B=1, R=1, H=1), "cpu")
    inputs.leaves["query"][0, 0, 4] = torch.nan
    out = inputs.run("cpp")["out"]
    assert out[0, 0, 4].isnan().all() and out[0, 0, [3, 5]].isfinite().all()


# Key/value heads shared out whole, and in pairs of blocks; the last by queries, few of them.
@pytest.mark.parametrize(
    "case",
    [
        Case(B=3, T=70, S=90, R=3, H=6, G=3, fusion="joint"),
        Case(B=1, T=200, S=300, R=1, H=3, G=1, options=(("dropout_p", 0.2), ("dropout_seed", 1)), slopes=True),
        Case(B=1, T=130, S=200, R=1, H=4, G=1, options=(("causal", False),), dtype=torch.bfloat16, key_mask="holes"),
        Case(B=1, T=200, S=333, R=1, H=3, G=3, options=(("window", 70),), D=20),
        Case(B=1, T=2, S=1000, R=1, H=4, G=2, fusion="joint"),
    ],
    ids=["heads", "pairs", "pairs_not_causal", "pairs_window", "few_queries"],
)
def test_bit_equal_for_any_number_of_threads(case: Case) -> None:
    inputs = make(replace(case, loss=OUTPUTS), "cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(inputs.run("cpp"))
    finally:
        torch.set_num_threads(before)
    for run in found[1:]:
        assert all(torch.equal(run[name], value) for name, value in found[0].items())


@pytest.mark.parametrize("scale", [1.0, 2.0**-126, 3.0, math.nan], ids=str)
def test_every_float8_is_read_exactly(scale: float) -> None:
    """One chunk of one token: the memory's part is the token's value. All 256 bytes, 8 tokens at a time."""
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 8, 1, 32).view(FP8)
    scales = torch.full((1, 1, 8, 2), scale)
    ids = torch.arange(8, dtype=torch.int32).view(1, 1, 8, 1)
    zeros = torch.zeros(1, 1, 8, 32)
    key = torch.zeros(bytes_.shape).to(FP8)
    out = memory_attention(
        zeros, zeros, zeros, key, bytes_, ids,
        memory_scale=scales, gate=torch.tensor([torch.inf]), impl="cpp",
    )  # fmt: skip
    torch.testing.assert_close(out.view(-1), bytes_.view(-1).float() * scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fusion", ["gated", "joint"])
def test_compiles_into_one_graph_forward_and_backward(fusion: str) -> None:
    inputs = make(Case(fusion=fusion, slopes=True), "cpu")
    eager = inputs.run("cpp")
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in inputs.leaves.items()}

    def attend(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        query, key, value = (leaves[name] for name in ("query", "key", "value"))
        optional = {name: leaves[name] for name in ("memory_query", "gate") if name in leaves}
        options = {**optional, **inputs.options}
        return memory_attention(query, key, value, *inputs.memory, inputs.ids, **options, impl="cpp")

    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.grads["out"])
    torch.testing.assert_close(out, eager["out"])
    for name, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, eager[name])


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_instruction_sets(level: str) -> None:
    """The level is read once per process."""
    check_all = (
        "from memory_attention_cases import CASES\n"
        "from memory_attention_suite import check\n"
        "for case in CASES.values(): check(case, 'cpp', 'cpu')\n"
        "from longmem_kernels._extension import build_info\n"
        "print(build_info()['simd'])"
    )
    environment = {**os.environ, "LONGMEM_SIMD": level, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", check_all], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (level, "baseline")


def test_needs_less_memory_than_the_gathered_chunks() -> None:
    """Nothing of size T x S or T x K*C*D is made, forward or backward."""
    from longmem_bench.peak_memory import peak_extra_bytes

    inputs = make(Case(B=1, R=1, H=4, G=4, T=1024, S=1024, M=512, K=16, D=64), "cpu")
    gathered = 4 * 1024 * 16 * 4 * 64 * 4 * 2
    peak = peak_extra_bytes(lambda: inputs.run("cpp"), torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not report peak memory")
    assert peak < gathered / 5, f"{peak / 1e6:.0f} MB, gathered keys and values alone would be {gathered / 1e6:.0f} MB"
