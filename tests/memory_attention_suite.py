"""What every memory_attention kernel must do, values and gradients held against float64: one suite, run per kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from longmem_kernels import memory_attention


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; the defaults are what the other cases vary."""

    B: int = 2
    T: int = 5
    S: int = 5
    H: int = 2
    G: int = 1
    R: int = 2
    M: int = 9
    C: int = 4
    K: int = 3
    D: int = 32
    fusion: str = "gated"
    options: tuple[tuple[str, Any], ...] = ()
    slopes: bool = False
    own_memory_query: bool = True
    ring_index: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    bank_dtype: torch.dtype | None = None


CASES = {
    "gated": Case(T=17, S=17),
    "joint": Case(T=17, S=17, fusion="joint"),
    "joint_alibi_window": Case(fusion="joint", slopes=True, options=(("window", 5),), T=33, S=70),
    "gated_alibi_gqa": Case(slopes=True, H=4, G=2),
    "window_1": Case(options=(("window", 1),)),
    "not_causal": Case(options=(("causal", False),), S=40),
    "scale": Case(options=(("scale", 0.5),), fusion="joint"),
    "one_query": Case(T=1, S=70, fusion="joint"),
    "several_blocks": Case(B=1, R=1, T=65, S=70, H=2, G=1),
    "one_token_chunks": Case(C=1, K=5),
    "three_token_chunks": Case(C=3, K=7, T=17, S=17, fusion="joint"),
    "long_chunks": Case(C=64, K=2, T=3, S=3),
    "one_chunk_of_one_token": Case(C=1, K=1),
    "same_memory_query": Case(own_memory_query=False),
    "shared_ring": Case(R=1, B=3, T=3, S=3),
    "ring_index": Case(R=4, ring_index=(2, 0), fusion="joint"),
    "head_dim_80": Case(D=80, S=9),
    "head_dim_256": Case(D=256, S=9, fusion="joint"),
    "bf16_bank": Case(bank_dtype=torch.bfloat16),
}
# Sizes at which a kernel works on many blocks at once.
LARGE_CASES = {
    "training": Case(B=4, T=1024, S=1024, H=16, G=16, R=4, M=4096, K=16, D=64, slopes=True),
    "long_window": Case(B=1, T=129, S=2049, H=8, G=2, R=1, M=1000, K=33, D=128, options=(("window", 700),)),
    "decode": Case(B=8, T=1, S=4097, H=16, G=4, R=8, M=16384, K=64, D=128, fusion="joint"),
}


@dataclass
class Inputs:
    leaves: dict[str, Tensor]
    memory: tuple[Tensor, Tensor]
    ids: Tensor
    grad: Tensor
    options: dict[str, Any]

    def run(self, impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output and gradients; with `dtype`, of the same numbers in that dtype."""
        # clone(preserve_format) keeps the strides
        leaves = {
            name: leaf.detach().to(dtype or leaf.dtype).clone().requires_grad_() for name, leaf in self.leaves.items()
        }
        key, value = (bank.to(dtype or bank.dtype) for bank in self.memory)
        optional = {name: leaves[name] for name in ("memory_query", "gate") if name in leaves}
        out = memory_attention(
            leaves["query"], leaves["key"], leaves["value"], key, value, self.ids, **optional, **self.options, impl=impl
        )
        gradients = torch.autograd.grad(out, list(leaves.values()), self.grad.to(out.dtype))
        return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def make(case: Case, device: str) -> Inputs:
    """Random inputs in awkward strides. Slots and rings that no id names hold NaN; some ids, and whole rows, are -1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def heads_inside(heads: int, tokens: int) -> Tensor:
        return normal(case.B, tokens, heads, case.D).to(case.dtype).transpose(1, 2)

    store = normal(case.R, case.G, case.M, 2, case.C, case.D).to(case.bank_dtype or case.dtype)  # as in a Ring
    used = max(1, case.M - 2)
    store[:, :, used:] = math.nan
    rings = torch.tensor(case.ring_index, dtype=torch.int32, device=device) if case.ring_index else None
    if case.ring_index:
        store[[r for r in range(case.R) if r not in case.ring_index]] = math.nan
    ids = torch.randint(-1, used, (case.B, case.T, case.H, case.K), generator=generator)
    ids = ids.int().to(device).transpose(1, 2)
    ids[0, :, 0] = -1
    ids[-1, 0, case.T // 2 :: 3] = -1

    leaves = {
        "query": heads_inside(case.H, case.T),
        "key": heads_inside(case.G, case.S),
        "value": heads_inside(case.G, case.S),
    }
    if case.own_memory_query:
        leaves["memory_query"] = heads_inside(case.H, case.T)
    if case.fusion == "gated":
        leaves["gate"] = normal(case.H)
    options = {"fusion": case.fusion, "ring_index": rings, **dict(case.options)}
    if case.slopes:
        options["alibi_slopes"] = 2.0 ** -torch.arange(1, case.H + 1, device=device, dtype=torch.float32)
    return Inputs(leaves, (store[:, :, :, 0], store[:, :, :, 1]), ids, heads_inside(case.H, case.T), options)


def floor(name: str, inputs: Inputs, exact: Tensor) -> float:
    """Error granted besides a multiple of the reference's, which is 0 when that happens to round exactly.

    - One unit in the last place of the largest value: the kernel rounds to the storage dtype three times (softmax
      weights, the memory's output, the result); the reference, which computes in float32, once.
    - A score's gradient is a difference of two numbers of size grad . value, which cancel, in float32; gradients of
      queries and keys are made of it. (Values of the memory have the size of the local ones here.)
    - The gate's gradient is float32, but the kernel makes it of both outputs as saved, in the storage dtype: one sum of
      B * T * D products of numbers about 1, each off by half a unit in the last place, times g (1 - g) <= 1/4.
    """
    query, value = inputs.leaves["query"].detach(), inputs.leaves["value"].detach()
    epsilon = torch.finfo(query.dtype).eps
    granted = epsilon * float(exact.abs().max())
    if name in ("query", "key", "memory_query"):
        groups = inputs.grad.double().unflatten(1, (value.shape[1], -1))
        cancelled = (groups @ value.double()[:, :, None].mT).abs().max()
        scale = inputs.options.get("scale", query.shape[-1] ** -0.5)
        granted += 2.0**-23 * scale * float(cancelled * query.abs().max())
    if name == "gate":
        granted += epsilon / 2 / 4 * math.sqrt(query.numel() / query.shape[1])
    return granted


def check(case: Case, impl: str, device: str) -> None:
    inputs = make(case, device)
    kernel, eager, exact = inputs.run(impl), inputs.run("reference"), inputs.run("reference", torch.float64)
    failed = []
    for name, value in exact.items():
        assert kernel[name].dtype == eager[name].dtype and kernel[name].shape == value.shape
        error, eager_error = (float((run[name] - value).abs().max()) for run in (kernel, eager))
        bound = (2 if name == "out" else 3) * eager_error + floor(name, inputs, value)
        if not error <= bound:  # also when it is NaN
            failed.append(f"{name}: error {error:.3g}, allowed {bound:.3g} (reference {eager_error:.3g})")
    assert not failed, "\n".join(failed)


def op_arguments(inputs: Inputs) -> tuple[Any, ...]:
    leaves, options = inputs.leaves, inputs.options
    return (
        *(leaves[name] for name in ("query", "key", "value", "memory_query")), *inputs.memory, inputs.ids,
        None, options["ring_index"], leaves.get("gate"), options.get("alibi_slopes"), None, None,
        options["fusion"], 0.2, True, None, 0.0,
    )  # fmt: skip


class MemoryAttentionSuite:
    """Subclasses name the implementation and the device."""

    impl: str
    device: str

    def op(self, suffix: str = "") -> Any:
        return getattr(torch.ops.longmem, f"memory_attention{suffix}_{self.impl}")

    @pytest.mark.parametrize("name", CASES)
    def test_float32(self, name: str) -> None:
        check(CASES[name], self.impl, self.device)

    @pytest.mark.parametrize("name", ["gated", "joint_alibi_window", "gated_alibi_gqa", "head_dim_80"])
    def test_bfloat16(self, name: str) -> None:
        check(Case(**{**vars(CASES[name]), "dtype": torch.bfloat16}), self.impl, self.device)

    @pytest.mark.parametrize("name", ["joint", "gated"])
    def test_float16(self, name: str) -> None:
        check(Case(**{**vars(CASES[name]), "dtype": torch.float16}), self.impl, self.device)

    @pytest.mark.parametrize("fusion", ["gated", "joint"])
    def test_without_memory_is_local_attention(self, fusion: str) -> None:
        inputs = make(Case(S=9, fusion=fusion), self.device)
        inputs.ids.fill_(-1)
        found = inputs.run(self.impl)
        query, key, value = (inputs.leaves[name].detach() for name in ("query", "key", "value"))
        seen = torch.ones(5, 9, dtype=torch.bool, device=self.device).tril(4)
        local = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
        torch.testing.assert_close(found["out"], local)
        assert found["memory_query"].count_nonzero() == 0
        assert fusion == "joint" or found["gate"].count_nonzero() == 0

    @pytest.mark.parametrize("fusion", ["gated", "joint"])
    def test_large_scores_stay_finite(self, fusion: str) -> None:
        inputs = make(Case(S=9, fusion=fusion), self.device)
        for name in ("query", "memory_query"):
            inputs.leaves[name] *= 1e4
        kernel, eager = inputs.run(self.impl), inputs.run("reference")
        for name in kernel:
            assert kernel[name].isfinite().all() and eager[name].isfinite().all(), name
        torch.testing.assert_close(kernel["out"], eager["out"], rtol=1e-2, atol=1e-2)  # exp of rounded scores near 1e5

    @pytest.mark.parametrize("fusion", ["gated", "joint"])
    def test_bit_equal_from_run_to_run(self, fusion: str) -> None:
        inputs = make(Case(**{**vars(CASES["gated"]), "fusion": fusion}), self.device)
        first, second = inputs.run(self.impl), inputs.run(self.impl)
        for name in first:
            assert torch.equal(first[name], second[name]), name

    def test_ids_out_of_range_count_as_none(self) -> None:
        inputs = make(Case(T=3, S=3, M=9), self.device)
        inputs.ids[:, :, 0] = -1
        want = self.op()(*op_arguments(inputs))
        inputs.ids[:, :, 0] = torch.tensor([9, -7, 2**31 - 1], dtype=torch.int32, device=self.device)
        got = self.op()(*op_arguments(inputs))
        backward = self.op("_backward")(inputs.grad, None, None, *op_arguments(inputs), *got[1:])
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        assert all(gradient.isfinite().all() for gradient in backward)

    def test_gradient_of_a_sum(self) -> None:
        # its grad is one number, expanded: no contiguous last axis
        inputs = make(Case(T=3, S=3), self.device)
        inputs.grad = torch.ones((), device=self.device).expand(inputs.grad.shape)
        kernel, exact = inputs.run(self.impl), inputs.run("reference", torch.float64)
        for name in kernel:
            torch.testing.assert_close(kernel[name].double(), exact[name], rtol=1e-4, atol=1e-5)

    def test_strided_vectors(self) -> None:
        inputs = make(Case(T=3, S=3, slopes=True), self.device)
        want = inputs.run(self.impl)
        inputs.leaves["gate"] = inputs.leaves["gate"].repeat_interleave(2)[::2]
        inputs.options["alibi_slopes"] = inputs.options["alibi_slopes"].repeat_interleave(2)[::2]
        for name, value in inputs.run(self.impl).items():
            assert torch.equal(value, want[name]), name

    @pytest.mark.parametrize(
        "case", [Case(B=0, R=1), Case(T=0, S=0), Case(T=0, S=5)], ids=["rows", "tokens", "queries"]
    )
    def test_empty(self, case: Case) -> None:
        inputs = Inputs(
            {
                "query": torch.zeros(case.B, case.H, case.T, case.D, device=self.device),
                "key": torch.zeros(case.B, case.G, case.S, case.D, device=self.device),
                "value": torch.zeros(case.B, case.G, case.S, case.D, device=self.device),
                "gate": torch.zeros(case.H, device=self.device),
            },
            (torch.zeros(case.R, case.G, case.M, case.C, case.D, device=self.device),) * 2,
            torch.zeros(case.B, case.H, case.T, case.K, dtype=torch.int32, device=self.device),
            torch.zeros(case.B, case.H, case.T, case.D, device=self.device),
            {},
        )
        for name, value in inputs.run(self.impl).items():
            assert value.count_nonzero() == 0 and (name == "out" or value.shape == inputs.leaves[name].shape)

    @pytest.mark.parametrize("fusion", ["gated", "joint"])
    def test_opcheck(self, fusion: str) -> None:
        inputs = make(Case(T=3, S=5, fusion=fusion, slopes=True), self.device)
        arguments = op_arguments(inputs)
        saved = self.op()(*arguments)[1:]
        torch.library.opcheck(self.op("_backward"), (inputs.grad, None, None, *arguments, *saved))
        for leaf in inputs.leaves.values():
            leaf.requires_grad_()
        torch.library.opcheck(self.op(), op_arguments(inputs))
