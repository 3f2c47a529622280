"""memory_fused_attention is chunk_topk, then memory_attention."""

from __future__ import annotations

import pytest
import torch
from factories import random_ring

from longmem_kernels import chunk_topk, memory_attention, memory_fused_attention

FUSIONS = ["gated", "joint"]


def inputs(H: int = 4, G: int = 2, T: int = 3, S: int = 5, D: int = 8) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, H, T, D), torch.randn(2, G, S, D), torch.randn(2, G, S, D)


@pytest.mark.parametrize("own_query", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_is_search_then_attention(fusion: str, own_query: bool) -> None:
    ring = random_ring(30, rings=3, chunks=6)
    query, key, value = inputs()
    memory_query = torch.randn_like(query) if own_query else None
    index = torch.tensor([2, 0], dtype=torch.int32)
    gate = torch.randn(4) if fusion == "gated" else None
    options = {"gate": gate, "fusion": fusion, "alibi_slopes": torch.rand(4), "window": 4, "return_lse": True}
    options["impl"] = "reference"
    got = memory_fused_attention(query, key, value, ring, 3, memory_query=memory_query, ring_index=index, **options)
    searching = query if memory_query is None else memory_query
    ids, _ = chunk_topk(searching, ring.centroid, 3, count=ring.count(), ring_index=index, impl="reference")
    wanted = memory_attention(
        query, key, value, ring.key, ring.value, ids, memory_query=memory_query, ring_index=index, **options
    )
    assert len(got) == 3 and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_gradients_reach_both_queries_and_the_gate() -> None:
    ring = random_ring(30, chunks=6)
    query, key, value = (x.requires_grad_() for x in inputs())
    memory_query, gate = torch.randn_like(query).requires_grad_(), torch.zeros(4, requires_grad=True)
    out = memory_fused_attention(query, key, value, ring, 2, memory_query=memory_query, gate=gate, impl="reference")
    for gradient in torch.autograd.grad(out.square().sum(), (query, key, value, memory_query, gate)):
        assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_empty_memory_is_local_attention(fusion: str) -> None:
    ring = random_ring(3, chunks=6)  # no chunk is complete
    query, key, value = inputs(T=5)
    gate = torch.randn(4) if fusion == "gated" else None
    options = {"gate": gate, "fusion": fusion, "return_memory_share": True, "impl": "reference"}
    out, share = memory_fused_attention(query, key, value, ring, 2, **options)
    local = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, local)
    assert (share == 0).all()


def test_errors_name_the_operation_that_raises_them() -> None:
    ring = random_ring(30, chunks=6)
    query, key, value = inputs()
    with pytest.raises(ValueError, match="chunk_topk: k "):
        memory_fused_attention(query, key, value, ring, 0, gate=torch.zeros(4))
    with pytest.raises(ValueError, match="memory_attention: fusion='gated' needs gate"):
        memory_fused_attention(query, key, value, ring, 2)
    with pytest.raises(ValueError, match="impl must be one of auto"):
        memory_fused_attention(query, key, value, ring, 2, gate=torch.zeros(4), impl="fast")


def test_compiles_into_one_graph() -> None:
    ring = random_ring(30, chunks=6)
    query, key, value = inputs()
    gate = torch.randn(4)

    def attend(query: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = memory_fused_attention(query, key, value, ring, 2, gate=gate, impl="reference")
        return out

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), attend(query))
