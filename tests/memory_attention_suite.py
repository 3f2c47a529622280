"""What every memory_attention kernel must do, values and gradients held against float64: one suite, run per kernel."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from memory_attention_cases import CASES, LARGE_CASES, OUTPUTS, Case, Inputs, make
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longmem_kernels.memory_attention.reference import dropout_keep

__all__ = ["LARGE_CASES", "Case", "MemoryAttentionSuite", "check", "make"]


def largest(tensor: Tensor) -> float:
    """Magnitude; 0 of nothing, NaN with a NaN."""
    return float(torch.linalg.vector_norm(tensor.double(), torch.inf)) if tensor.numel() else 0.0


def floor(name: str, inputs: Inputs, exact: Tensor) -> float:
    """Error granted besides a multiple of the reference's, which is 0 when that happens to round exactly.

    - One unit in the last place of the largest value: the kernel rounds to the storage dtype three times (softmax
      weights, the memory's output, the result); the reference, which computes in float32, once.
    - A score's gradient is a difference of two numbers of size grad . value, which cancel, in float32; gradients of
      queries and keys are made of it. (Values of the memory have the size of the local ones here.)
    - Scores are sums of D products in float32, in an order of the kernel's own, forward and backward; softmax weights
      are off by as much, relatively, as scores and their log-sum-exp are.
    - The gate's gradient is float32, but the kernel makes it of both outputs as saved, in the storage dtype: one sum of
      B * T * D products of numbers about 1, each off by half a unit in the last place, times g (1 - g) <= 1/4.
    """
    query, key, value = (inputs.leaves[name].detach().double() for name in ("query", "key", "value"))
    epsilon = torch.finfo(inputs.leaves["query"].dtype).eps
    scale = inputs.options.get("scale", query.shape[-1] ** -0.5)

    def products(queries: Tensor, keys: Tensor) -> float:
        return largest(queries.unflatten(1, (keys.shape[1], -1)) @ keys[:, :, None].mT)

    score_error = 2.0**-22 * (1 + scale * products(query.abs(), key.abs()))
    granted = (epsilon + score_error) * largest(exact)
    if name in ("query", "key", "memory_query") and "out" in inputs.grads:
        cancelled = products(inputs.grads["out"].double(), value) / (1 - inputs.options.get("dropout_p", 0.0))
        granted += (2.0**-23 + score_error) * scale * cancelled * largest(query)
    if name == "gate":
        granted += epsilon / 2 / 4 * math.sqrt(query.numel() / query.shape[1])
    return granted


def check(case: Case, impl: str, device: str) -> None:
    inputs = make(case, device)
    kernel, eager, exact = inputs.run(impl), inputs.run("reference"), inputs.run("reference", torch.float64)
    failed = []
    for name, value in exact.items():
        assert kernel[name].dtype == eager[name].dtype and kernel[name].shape == value.shape
        error, eager_error = (largest(run[name] - value) for run in (kernel, eager))
        bound = (2 if name in OUTPUTS else 3) * eager_error + floor(name, inputs, value)
        if not error <= bound:  # also when it is NaN
            failed.append(f"{name}: error {error:.3g}, allowed {bound:.3g} (reference {eager_error:.3g})")
    assert not failed, "\n".join(failed)


def op_arguments(inputs: Inputs) -> tuple[Any, ...]:
    leaves, options = inputs.leaves, inputs.options
    return (
        *(leaves[name] for name in ("query", "key", "value", "memory_query")), *inputs.memory, inputs.ids,
        options.get("memory_scale"), options["ring_index"], leaves.get("gate"), options.get("alibi_slopes"),
        options.get("key_mask"), options.get("seed"), options["fusion"], 0.2, True, None, 0.25,
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
        check(replace(CASES[name], dtype=torch.bfloat16), self.impl, self.device)

    @pytest.mark.parametrize("name", ["joint", "gated"])
    def test_float16(self, name: str) -> None:
        check(replace(CASES[name], dtype=torch.float16), self.impl, self.device)

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
        inputs = make(replace(CASES["gated"], fusion=fusion), self.device)
        first, second = inputs.run(self.impl), inputs.run(self.impl)
        for name in first:
            assert torch.equal(first[name], second[name]), name

    def test_ids_out_of_range_count_as_none(self) -> None:
        inputs = make(Case(T=3, S=3, M=9), self.device)
        inputs.ids[:, :, 0] = -1
        want = self.op()(*op_arguments(inputs))
        inputs.ids[:, :, 0] = torch.tensor([9, -7, 2**31 - 1], dtype=torch.int32, device=self.device)
        if self.impl == "cpp":  # forward refuses them; backward, where they changed since, takes them for none
            with pytest.raises(RuntimeError, match=r"memory_attention: chunk_ids must lie in \[-1, 9\), got"):
                self.op()(*op_arguments(inputs))
            got = want
        else:
            got = self.op()(*op_arguments(inputs))
        backward = self.op("_backward")(inputs.grads["out"], None, None, *op_arguments(inputs), *got[1:])
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        assert all(gradient.isfinite().all() for gradient in backward)

    def test_gradient_of_a_sum(self) -> None:
        # its grad is one number, expanded: no contiguous last axis
        inputs = make(Case(T=3, S=3, loss=("out", "local_lse", "memory_lse")), self.device)
        inputs.grads = {
            name: torch.ones((), device=self.device).expand(grad.shape) for name, grad in inputs.grads.items()
        }
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
        "case",
        [Case(B=0, R=1, loss=OUTPUTS), Case(T=0, S=0, loss=OUTPUTS), Case(T=0, S=5)],
        ids=["rows", "tokens", "queries"],
    )
    def test_empty(self, case: Case) -> None:
        inputs = make(case, self.device)
        for name, value in inputs.run(self.impl).items():
            assert value.isfinite().all() and (name in OUTPUTS or value.shape == inputs.leaves[name].shape)
            assert case.T > 0 or value.count_nonzero() == 0

    @pytest.mark.parametrize("fusion", ["gated", "joint"])
    def test_opcheck(self, fusion: str) -> None:
        case = Case(T=3, S=5, fusion=fusion, slopes=True, key_mask="holes", loss=OUTPUTS[:3])
        inputs = make(case, self.device)
        inputs.options["seed"] = torch.tensor([3], device=self.device)
        arguments = op_arguments(inputs)
        saved = self.op()(*arguments)[1:]
        for grads in (tuple(inputs.grads.values()), (None, inputs.grads["local_lse"], None)):
            torch.library.opcheck(self.op("_backward"), (*grads, *arguments, *saved))
        for leaf in inputs.leaves.values():
            leaf.requires_grad_()
        torch.library.opcheck(self.op(), op_arguments(inputs))

    def test_hidden_keys_leave_no_trace(self) -> None:
        inputs = make(Case(key_mask="holes", T=17, S=40, loss=OUTPUTS), self.device)
        hidden = ~inputs.options["key_mask"][:, None, :, None]
        want = inputs.run(self.impl)
        for name in ("key", "value"):
            inputs.leaves[name] = torch.where(hidden, 1e4, inputs.leaves[name])
        got = inputs.run(self.impl)
        for name in got:
            assert torch.equal(got[name], want[name]), name
        for name in ("key", "value"):
            assert got[name].masked_select(hidden).count_nonzero() == 0

    @pytest.mark.parametrize("seed", [0, 1, -1, 2**33 + 5])
    @pytest.mark.parametrize("T", [1, 20])
    def test_dropout_keeps_exactly_the_specified_weights(self, seed: int, T: int) -> None:
        """Values are unit vectors, so the output is the weights themselves."""
        inputs = make(
            Case(S=32, T=T, fusion="joint", options=(("dropout_p", 0.4), ("dropout_seed", seed))), self.device
        )
        inputs.ids.fill_(-1)
        inputs.leaves["query"] *= 0.1  # no weight vanishes
        unit = torch.eye(32, device=self.device).expand_as(inputs.leaves["value"])
        inputs.leaves["value"] = unit.contiguous()
        kept = dropout_keep(torch.tensor([seed], device=self.device), (2, 2, T, 32), 0.4)
        visible = torch.ones(T, 32, dtype=torch.bool, device=self.device).tril(32 - T)
        assert torch.equal(inputs.run(self.impl)["out"] != 0, kept & visible)

    def test_dropout_seed_is_drawn_from_the_generator_and_checkpointing_draws_it_again(self) -> None:
        inputs = make(Case(T=17, S=17, fusion="joint", options=(("dropout_p", 0.5),)), self.device)
        leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves.items()}

        def attend(*tensors: Tensor) -> Tensor:
            return inputs.attend(dict(zip(leaves, tensors, strict=True)), self.impl)["out"]

        results = []
        for seed, recompute in ((0, False), (0, True), (1, False)):
            torch.manual_seed(seed)
            tensors = tuple(leaves.values())
            out = checkpoint(attend, *tensors, use_reentrant=False) if recompute else attend(*tensors)
            results.append((out, *torch.autograd.grad(out, tensors, inputs.grads["out"])))
        for a, b in zip(results[0], results[1], strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(results[0][0], results[2][0])

    def test_autocast(self) -> None:
        inputs = make(Case(), self.device)
        half = replace(inputs, leaves={name: x.bfloat16() for name, x in inputs.leaves.items()})
        half.leaves["gate"] = inputs.leaves["gate"]
        with torch.autocast(self.device, torch.bfloat16):
            got = inputs.attend(inputs.leaves, self.impl)["out"]
        assert torch.equal(got, half.attend(half.leaves, self.impl)["out"])

    @pytest.mark.parametrize("permuted", ["rows", "rings", "slots"])
    def test_permutations_move_nothing_else(self, permuted: str) -> None:
        case = Case(B=3, R=4, ring_index=(2, 0, 2), T=6, S=9, loss=OUTPUTS, slopes=True)
        inputs, moved = make(case, self.device), make(case, self.device)
        want = inputs.run(self.impl)
        if permuted == "rows":
            order = torch.tensor([2, 0, 1], device=self.device)
            moved.leaves = {name: x if name == "gate" else x[order] for name, x in inputs.leaves.items()}
            moved.grads = {name: x[order] for name, x in inputs.grads.items()}
            moved.ids, moved.options["ring_index"] = inputs.ids[order], inputs.options["ring_index"][order]
            want = {name: x if name == "gate" else x[order] for name, x in want.items()}
        elif permuted == "rings":
            order = torch.tensor([3, 1, 2, 0], device=self.device)
            moved.memory = (inputs.memory[0][order], inputs.memory[1][order])
            moved.options["ring_index"] = order.argsort()[inputs.options["ring_index"].long()].int()
        else:
            order = torch.arange(case.M, device=self.device).flip(0)
            moved.memory = (inputs.memory[0][:, :, order], inputs.memory[1][:, :, order])
            moved.ids = torch.where(inputs.ids < 0, -1, case.M - 1 - inputs.ids)
        for name, value in moved.run(self.impl).items():
            if name == "gate":  # a sum over rows
                torch.testing.assert_close(value, want[name])
            else:
                assert torch.equal(value, want[name]), name

    @pytest.mark.parametrize("fusion", ["gated", "joint"])
    def test_rows_never_read_the_ring_of_another(self, fusion: str) -> None:
        inputs = make(Case(T=6, S=6, fusion=fusion), self.device)
        want = inputs.run(self.impl)
        inputs.memory[0][1], inputs.memory[1][1] = torch.nan, torch.nan
        got = inputs.run(self.impl)
        assert got["out"][1].isnan().any()
        for name in ("out", "query", "key", "value", "memory_query"):
            assert torch.equal(got[name][0], want[name][0]), name

    def test_closed_gate_is_local_attention(self) -> None:
        inputs = make(Case(T=6, S=9), self.device)
        inputs.leaves["gate"].fill_(-torch.inf)
        closed = inputs.run(self.impl)
        inputs.ids.fill_(-1)
        local = inputs.run(self.impl)
        for name in ("out", "query", "key", "value", "memory_query"):
            torch.testing.assert_close(closed[name], local[name])

    @pytest.mark.parametrize("name", ["joint_alibi_window", "gated_alibi_gqa", "left_padding", "fp8_bank", "bf16_bank"])
    def test_decoding_is_the_last_row_of_prefill(self, name: str) -> None:
        inputs = make(CASES[name], self.device)
        whole = inputs.attend(inputs.leaves, self.impl)
        last = {key: x[:, :, -1:] if "query" in key else x for key, x in inputs.leaves.items()}
        one = replace(inputs, ids=inputs.ids[:, :, -1:]).attend(last, self.impl)
        for key in OUTPUTS:
            torch.testing.assert_close(one[key], whole[key][:, :, -1:], rtol=1e-5, atol=1e-5)
