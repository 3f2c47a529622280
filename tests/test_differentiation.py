"""Kinds of differentiation: the reference has them all, kernels have one and refuse the others in words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from memory_attention_cases import Case, Inputs, make
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

from longmem_kernels import Ring, chunk_topk, memory_fused_attention, ring_write

FUSIONS = ["gated", "joint"]


def attend(inputs: Inputs, impl: str, query: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    leaves = {name: leaf.to(dtype or leaf.dtype) for name, leaf in inputs.leaves.items()}
    return inputs.attend({**leaves, "query": query}, impl, dtype)["out"]


def penalty(function: Callable[[Tensor], Tensor], query: Tensor) -> Tensor:
    """The gradient of a gradient's squared norm."""
    query = query.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(function(query).sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), query)
    return second


def small(fusion: str = "joint") -> Inputs:
    """Small enough for second derivatives by differences. The query searches memory, too."""
    return make(Case(B=1, R=1, T=3, S=4, fusion=fusion, own_memory_query=False, key_mask="holes"), "cpu")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_reference_is_differentiable_twice_and_forward(fusion: str) -> None:
    inputs = make(Case(B=1, R=1, T=3, S=4, fusion=fusion, D=4, key_mask="holes"), "cpu")
    leaves = {name: leaf.double().requires_grad_() for name, leaf in inputs.leaves.items()}

    def function(*tensors: Tensor) -> Tensor:
        return inputs.attend(dict(zip(leaves, tensors, strict=True)), "reference", torch.float64)["out"]

    torch.autograd.gradgradcheck(function, tuple(leaves.values()))
    torch.autograd.gradcheck(function, tuple(leaves.values()), check_forward_ad=True, check_batched_grad=True)


KINDS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "penalty": penalty,
    "hessian of torch.autograd": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).sum(), x),
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
    "jvp compiled": lambda f, x: torch.compile(partial(jvp, f), backend="aot_eager")((x,), (torch.ones_like(x),)),
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "grad of grad": lambda f, x: grad(lambda x: grad(lambda x: f(x).sum())(x).pow(2).sum())(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "hessian": lambda f, x: hessian(lambda x: f(x).sum())(x),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).sum()))(torch.stack([x, 2 * x])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_refuse_what_they_cannot_do(kind: str) -> None:
    """36fcfa3 gave zeros, or PyTorch's words about itself. The same calls of the reference are right."""
    torch.compiler.reset()
    inputs = small()
    KINDS[kind](partial(attend, inputs, "reference"), inputs.leaves["query"])
    with pytest.raises(NotImplementedError, match=r'^memory_attention: .*ask for impl="reference"'):
        KINDS[kind](partial(attend, inputs, "cpp"), inputs.leaves["query"])


def test_dual_tensors_are_refused_and_go_through_the_reference() -> None:
    inputs = small()
    query = inputs.leaves["query"]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        assert forward_ad.unpack_dual(attend(inputs, "reference", dual)).tangent.count_nonzero() > 0
        with pytest.raises(NotImplementedError, match=r"^memory_attention: forward-mode differentiation"):
            attend(inputs, "cpp", dual)


def test_the_first_derivative_with_create_graph_is_the_usual_one() -> None:
    inputs = small()
    query = inputs.leaves["query"].clone().requires_grad_()
    out = attend(inputs, "cpp", query).sum()
    want, got = (torch.autograd.grad(out, query, create_graph=graph, retain_graph=True)[0] for graph in (False, True))
    assert torch.equal(got, want)


def test_vmap_without_differentiation_is_right() -> None:
    inputs = small()
    queries = torch.stack([inputs.leaves["query"], 2 * inputs.leaves["query"]])
    for impl in ("cpp", "reference"):
        want = torch.stack([attend(inputs, impl, query) for query in queries])
        torch.testing.assert_close(vmap(partial(attend, inputs, impl))(queries), want)


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_searching_and_writing_take_no_part(impl: str) -> None:
    ring = Ring.new(rings=1, kv_heads=1, chunks=4, chunk_size=2, head_dim=32)
    query = torch.randn(1, 2, 8, 32, requires_grad=True)
    key = torch.randn(1, 1, 8, 32, requires_grad=True)
    ring_write(ring, key, key * 2, impl=impl)
    found = chunk_topk(query, ring.centroid, 2, count=ring.count(), impl=impl)
    assert not any(tensor.requires_grad for tensor in (*found, ring.store, ring.centroid, ring.tail))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query.detach(), torch.ones_like(query))
        ring_write(ring, dual[:, :1], dual[:, :1], impl=impl)
        found = chunk_topk(dual, ring.centroid, 2, count=ring.count(), impl=impl)
        for tensor in (*found, ring.store, ring.centroid, ring.tail):
            assert forward_ad.unpack_dual(tensor).tangent is None


def test_both_operations_in_one_refuse_as_they_do() -> None:
    ring = Ring.new(rings=1, kv_heads=1, chunks=4, chunk_size=2, head_dim=32)
    key = torch.randn(1, 1, 8, 32)
    ring_write(ring, key, key)

    def fused(query: Tensor) -> Tensor:
        return memory_fused_attention(query, key, key, ring, 2, fusion="joint", impl="cpp")  # type: ignore[no-any-return]

    with pytest.raises(NotImplementedError, match=r"^memory_attention: gradients of gradients"):
        penalty(fused, torch.randn(1, 2, 8, 32))
