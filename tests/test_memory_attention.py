"""The memory_attention reference: gradients, its two limits, isolation of rows, and the official code's numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import random_ring
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longmem_kernels import chunk_topk, memory_attention

GOLDEN = Path(__file__).parent / "data/official_joint_attention.npz"
FUSIONS = ["gated", "joint"]


@dataclass(frozen=True)
class Case:
    """Arguments of one call; differentiable ones first."""

    query: Tensor
    key: Tensor
    value: Tensor
    memory_key: Tensor
    memory_value: Tensor
    chunk_ids: Tensor
    memory_query: Tensor | None = None
    ring_index: Tensor | None = None
    gate: Tensor | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def run(self) -> Tensor:
        return memory_attention(
            self.query, self.key, self.value, self.memory_key, self.memory_value, self.chunk_ids,
            memory_query=self.memory_query, ring_index=self.ring_index, gate=self.gate, impl="reference",
            **dict(self.options),
        )  # fmt: skip


def make_case(
    fusion: str = "gated",
    *,
    B: int = 2,
    H: int = 4,
    G: int = 2,
    T: int = 5,
    S: int = 5,
    D: int = 8,
    M: int = 7,
    C: int = 2,
    K: int = 3,
    rings: int = 2,
    dtype: torch.dtype = torch.float64,
    missing: str = "some",
    memory_query: bool = False,
    ring_index: bool = False,
    alibi: bool = False,
    **options: object,
) -> Case:
    """A random call. `missing` ids: "none", "some" (and every id of the first query) or "all"."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    ids = torch.rand(B, H, T, M).argsort(-1)[..., :K].to(torch.int32)
    if missing != "none":
        ids = ids.masked_fill(torch.rand(ids.shape) < 0.3 if missing == "some" else torch.tensor(True), -1)
        ids[:, :, :1] = -1
    if alibi:
        options["alibi_slopes"] = torch.rand(H) + 0.1
    return Case(
        random(B, H, T, D), random(B, G, S, D), random(B, G, S, D),
        random(rings, G, M, C, D), random(rings, G, M, C, D), ids,
        memory_query=random(B, H, T, D) if memory_query else None,
        ring_index=torch.randint(rings, (B,), dtype=torch.int32) if ring_index else None,
        gate=torch.randn(H) if fusion == "gated" else None,
        options=(("fusion", fusion), *options.items()),
    )  # fmt: skip


def local_attention(case: Case) -> Tensor:
    """PyTorch's own attention over the local keys, with masks and ALiBi written out."""
    options = dict(case.options)
    T, S = case.query.shape[2], case.key.shape[2]
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
    bias = torch.zeros(1, T, S, dtype=case.query.dtype)
    if options.get("alibi_slopes") is not None:
        bias = -options["alibi_slopes"].to(bias.dtype)[:, None, None] * distance
    hidden = torch.zeros(T, S, dtype=torch.bool)
    if options.get("causal", True):
        hidden |= distance < 0
    if options.get("window") is not None:
        hidden |= distance >= options["window"]
    bias = bias.masked_fill(hidden, -torch.inf)
    return F.scaled_dot_product_attention(
        case.query, case.key, case.value, attn_mask=bias, scale=options.get("scale"), enable_gqa=True
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alibi": {"alibi": True},
    "window": {"window": 2},
    "past keys": {"S": 9, "window": 4, "alibi": True},
    "bidirectional": {"causal": False},
    "no grouping": {"G": 4},
    "one kv head": {"G": 1},
    "scale": {"scale": 0.7},
}


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    "variant",
    [
        *VARIANTS.values(),
        {"memory_query": True},
        {"memory_query": True, "ring_index": True, "B": 2, "rings": 3, "S": 5, "alibi": True},
        {"missing": "none"},
        {"missing": "all"},
        {"C": 1, "K": 1},
        {"S": 0},
    ],
    ids=lambda variant: "-".join(variant) or "plain",
)
def test_gradients_are_right(fusion: str, variant: dict[str, Any]) -> None:
    # The second of two queries keeps some of its ids, the first has none (see `make_case`).
    case = make_case(fusion, **{"B": 1, "T": 2, "S": 3, "D": 2, "M": 5, "rings": 1, **variant})
    names = ["query", "key", "value"] + (["memory_query"] if case.memory_query is not None else [])
    inputs = [getattr(case, name).requires_grad_() for name in names]
    if case.gate is not None:
        names, inputs = [*names, "gate"], [*inputs, case.gate.double().requires_grad_()]
    torch.autograd.gradcheck(lambda *tensors: replace(case, **dict(zip(names, tensors, strict=True))).run(), inputs)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradient_checkpointing_changes_nothing(fusion: str) -> None:
    case = make_case(fusion, memory_query=True, S=9)
    tensors = [x.requires_grad_() for x in (case.query, case.key, case.value, case.memory_query)]  # type: ignore[union-attr]

    def attend(query: Tensor, key: Tensor, value: Tensor, memory_query: Tensor) -> Tensor:
        return replace(case, query=query, key=key, value=value, memory_query=memory_query).run()

    wanted = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
    got = torch.autograd.grad(checkpoint(attend, *tensors, use_reentrant=False).square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_compiles_into_one_graph_forward_and_backward(fusion: str) -> None:
    case = make_case(fusion, S=9, alibi=True)
    gates = [] if case.gate is None else [case.gate.requires_grad_()]
    tensors = [x.requires_grad_() for x in (case.query, case.key, case.value)]

    def attend(query: Tensor, key: Tensor, value: Tensor, *gate: Tensor) -> Tensor:
        return replace(case, query=query, key=key, value=value, gate=gate[0] if gate else None).run() * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    wanted, got = attend(*tensors, *gates), compiled(*tensors, *gates)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
    inputs = [*tensors, *gates]
    pairs = zip(
        torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(wanted.square().sum(), inputs), strict=True
    )
    for ours, eager in pairs:
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["memory_key", "memory_value"])
def test_a_gradient_of_the_bank_is_refused(name: str) -> None:
    case = make_case()
    getattr(case, name).requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require grad"):
        case.run()


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_closed_gate_is_local_attention(variant: dict[str, Any]) -> None:
    case = make_case("gated", missing="none", **variant)
    closed = replace(case, gate=torch.full_like(case.gate, -torch.inf))  # type: ignore[arg-type]
    torch.testing.assert_close(closed.run(), local_attention(case), rtol=0, atol=1e-14)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_no_ids_is_local_attention_whatever_the_gate(fusion: str, variant: dict[str, Any]) -> None:
    case = make_case(fusion, missing="all", **variant)
    torch.testing.assert_close(case.run(), local_attention(case), rtol=0, atol=1e-14)


@pytest.mark.parametrize("memory_query", [False, True])
def test_open_gate_is_attention_to_memory_alone(memory_query: bool) -> None:
    case = make_case("gated", missing="none", memory_query=memory_query)
    opened = replace(case, gate=torch.full_like(case.gate, torch.inf))  # type: ignore[arg-type]
    B, H, T, D = case.query.shape
    asked = case.query if case.memory_query is None else case.memory_query
    wanted = torch.empty_like(case.query)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                ids = case.chunk_ids[b, h, t].long()
                key, value = (bank[b, h // 2, ids].flatten(0, 1) for bank in (case.memory_key, case.memory_value))
                wanted[b, h, t] = (key @ asked[b, h, t] * D**-0.5).softmax(0) @ value
    torch.testing.assert_close(opened.run(), wanted, rtol=0, atol=1e-14)


def test_joint_fusion_is_one_softmax_over_local_and_memory() -> None:
    case = make_case("joint", B=1, H=2, G=1, T=1, S=6, rings=1, missing="none")
    chosen = case.chunk_ids[0, :, 0].long()
    for h in range(2):
        key, value = (
            torch.cat([local[0, 0], bank[0, 0, chosen[h]].flatten(0, 1)])
            for local, bank in ((case.key, case.memory_key), (case.value, case.memory_value))
        )
        wanted = (key @ case.query[0, h, 0] * 8**-0.5).softmax(0) @ value
        torch.testing.assert_close(case.run()[0, h, 0], wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_single_token_chunks_equal_the_same_tokens_in_larger_chunks(fusion: str) -> None:
    """C is only a unit of choice: chunks of four tokens, or those tokens one by one, are attended to alike."""
    case = make_case(fusion, C=4)
    tokens = case.chunk_ids[..., None] * 4 + torch.arange(4, dtype=torch.int32)
    tokens = torch.where(case.chunk_ids[..., None] < 0, -1, tokens).flatten(3)
    split = replace(
        case,
        memory_key=case.memory_key.flatten(2, 3).unsqueeze(3),
        memory_value=case.memory_value.flatten(2, 3).unsqueeze(3),
        chunk_ids=tokens.to(torch.int32),
    )
    torch.testing.assert_close(split.run(), case.run(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_stay_finite(fusion: str, dtype: torch.dtype) -> None:
    case = make_case(fusion, dtype=dtype, alibi=True)
    case = replace(case, query=(case.query * 1e4).requires_grad_(), memory_key=case.memory_key * 1e4)
    if case.gate is not None:
        case = replace(case, gate=torch.tensor([-1e4, -100.0, 100.0, 1e4]))
    out = case.run()
    assert out.dtype == dtype and out.isfinite().all()
    (gradient,) = torch.autograd.grad(out.float().sum(), case.query)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_without_local_keys_memory_is_alone(fusion: str) -> None:
    case = make_case(fusion, S=0, missing="some")
    out, local_lse, memory_lse = replace(case, options=(*case.options, ("return_lse", True))).run()
    alone = replace(make_case("gated", S=5), **{name: getattr(case, name) for name in ("query", "memory_key")})
    alone = replace(alone, memory_value=case.memory_value, chunk_ids=case.chunk_ids)
    wanted = replace(alone, gate=torch.full((4,), torch.inf)).run()
    if case.gate is not None:
        wanted = wanted * case.gate.double().sigmoid()[:, None, None]  # the local part of the mean is 0
    found = (case.chunk_ids >= 0).any(-1)
    torch.testing.assert_close(out[found], wanted[found], rtol=0, atol=1e-14)
    assert (out[~found] == 0).all() and torch.equal(memory_lse == -torch.inf, ~found)
    assert (local_lse == -torch.inf).all()


def test_no_queries_give_an_empty_result() -> None:
    assert make_case(T=0, S=4).run().shape == (2, 4, 0, 8)


def test_strided_arguments_are_read_in_place() -> None:
    case = make_case(S=9, memory_query=True, ring_index=True, alibi=True, rings=3)

    def strided(tensor: Tensor) -> Tensor:
        """Equal values with other strides: every axis but the last reversed in memory, with room between."""
        axes = list(range(tensor.dim() - 2, -1, -1))
        wide = F.pad(tensor.permute(*axes, tensor.dim() - 1), (2, 3))
        return wide[..., 2 : 2 + tensor.shape[-1]].permute(*axes, tensor.dim() - 1)

    names = ("query", "key", "value", "memory_query", "memory_key", "memory_value")
    moved = replace(
        case,
        **{name: strided(getattr(case, name)) for name in names},
        chunk_ids=case.chunk_ids.transpose(1, 3).contiguous().transpose(1, 3),
    )
    assert not any(x.is_contiguous() for x in (moved.query, moved.memory_key, moved.chunk_ids))
    torch.testing.assert_close(moved.run(), case.run(), rtol=0, atol=1e-14)


# --- isolation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("permuted", ["rows", "rings", "slots"])
def test_permutations_move_nothing_else(fusion: str, permuted: str) -> None:
    case = make_case(fusion, B=3, rings=3, memory_query=True, alibi=True)
    case = replace(case, ring_index=torch.tensor([2, 0, 2], dtype=torch.int32))
    out = case.run()
    if permuted == "rows":
        order = torch.tensor([2, 0, 1])
        per_row = ("query", "key", "value", "memory_query", "chunk_ids", "ring_index")
        moved, out = replace(case, **{name: getattr(case, name)[order] for name in per_row}), out[order]
    elif permuted == "rings":
        order = torch.tensor([1, 2, 0])
        place = order.argsort().to(torch.int32)  # where each ring went
        moved = replace(
            case,
            memory_key=case.memory_key[order],
            memory_value=case.memory_value[order],
            ring_index=place[case.ring_index.long()],  # type: ignore[union-attr]
        )
    else:
        order = torch.randperm(7)
        place = order.argsort().to(torch.int32)
        ids = torch.where(case.chunk_ids < 0, -1, place[case.chunk_ids.long()])
        moved = replace(
            case, memory_key=case.memory_key[:, :, order], memory_value=case.memory_value[:, :, order], chunk_ids=ids
        )
    torch.testing.assert_close(moved.run(), out, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_rows_read_their_own_ring_and_the_slots_named_by_ids(fusion: str) -> None:
    case = make_case(fusion, rings=3)
    case = replace(case, ring_index=torch.tensor([2, 0], dtype=torch.int32))
    inputs = [case.query.requires_grad_(), case.key.requires_grad_()]
    out = case.run()
    wanted = torch.autograd.grad(out.sum(), inputs)

    named = torch.zeros(3, 2, 7, dtype=torch.bool)
    for row, ring in enumerate((2, 0)):
        for head in range(4):
            ids = case.chunk_ids[row, head].flatten().long()
            named[ring, head // 2, ids[ids >= 0]] = True
    assert not named[1].any() and not named.all()
    for bank in (case.memory_key, case.memory_value):
        bank[~named] = torch.nan
    assert torch.equal(case.run(), out)
    for got, before in zip(torch.autograd.grad(case.run().sum(), inputs), wanted, strict=True):
        assert torch.equal(got, before)


def test_a_partly_filled_ring_is_attended_to_through_its_views() -> None:
    """What the three operations do together: search only finds, and attention only reads, what was written."""
    ring = random_ring(11, chunks=6, chunk_size=4, head_dim=8)
    query = torch.randn(2, 4, 3, 8)
    ids, _ = chunk_topk(query, ring.centroid, 5, count=ring.count())
    assert (ids[..., 2:] == -1).all()
    local = torch.randn(2, 2, 3, 8)
    out = memory_attention(query, local, local, ring.key, ring.value, ids, gate=torch.zeros(4))
    assert out.isfinite().all()


# --- the official code -----------------------------------------------------------------------------------------------


def official(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN) as arrays:
        names = [name for name in arrays if name.startswith(f"{case}/")]
        return {name.removeprefix(f"{case}/"): torch.from_numpy(arrays[name]) for name in names}


@pytest.mark.parametrize("part", ["local", "joint"])
@pytest.mark.parametrize("case", ["np2", "k1"])
def test_reproduces_the_official_joint_attention_layer(case: str, part: str) -> None:
    """Numbers of the published code's layer (projections included), which retrieves per token: here a bank of C = 1."""
    data = official(case)
    trained = ["x", "q_proj", "k_proj", "v_proj", "out_proj"] + (["memory_bias"] if part == "joint" else [])
    for name in trained:
        data[name].requires_grad_()
    T, B, E = data["x"].shape
    H = data["memory_bias"].shape[0]
    D, k = data["retrieval_k"].shape[-1], data["retrieval_k"].shape[2]
    query, key, value = ((data["x"] @ data[f"{name}_proj"].T).view(T, B, H, D).permute(1, 2, 0, 3) for name in "qkv")
    bank_key, bank_value = (data[f"retrieval_{name}"].view(B, H, T * k, 1, D) for name in "kv")
    ids = torch.arange(T * k, dtype=torch.int32).view(T, k).expand(B, H, T, k)
    out = memory_attention(
        query, key, value, bank_key, bank_value, ids if part == "joint" else torch.full_like(ids, -1),
        gate=data["memory_bias"], alibi_slopes=data["alibi"][0, :, 1] - data["alibi"][0, :, 0], impl="reference",
    )  # fmt: skip
    out = out.permute(2, 0, 1, 3).reshape(T, B, E) @ data["out_proj"].T
    torch.testing.assert_close(out, data[f"{part}/out"], rtol=0, atol=1e-5)
    (out * data["cotangent"]).sum().backward()
    for name in trained:
        wanted = data[f"{part}/grad_{name}"]
        torch.testing.assert_close(
            data[name].grad, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
