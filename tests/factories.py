"""Inputs shared by the op tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longmem_kernels import Ring, ring_write

# Implementations by op; what needs a GPU is collected everywhere and skipped aloud where there is none.
GPU = pytest.mark.gpu
RING_WRITE = ["reference", "cpp", pytest.param("cuda", marks=GPU)]


def device_of(implementation: str) -> str:
    return "cuda" if implementation in ("cuda", "triton") else "cpu"


def new_ring(
    rings: int = 2, kv_heads: int = 2, chunks: int = 5, chunk_size: int = 4, head_dim: int = 8, **options: object
) -> Ring:
    """An empty ring, small unless told otherwise."""
    return Ring.new(
        rings=rings,
        kv_heads=kv_heads,
        chunks=chunks,
        chunk_size=chunk_size,
        head_dim=head_dim,
        **options,  # type: ignore[arg-type]
    )


def poison(ring: Ring) -> Ring:
    """Fill what was never written with NaN, so that reading it shows."""
    for part in (ring.store, ring.centroid, ring.tail, ring.scale):
        if part is not None:
            part.fill_(torch.nan)
    return ring


def random_ring(tokens: int, *, rings: int = 2, implementation: str = "reference", **sizes: object) -> Ring:
    """A ring whose every ring was given `tokens` random tokens; the rest of it is NaN."""
    ring = poison(new_ring(rings=rings, **sizes))  # type: ignore[arg-type]
    shape = (rings, ring.kv_heads, tokens, ring.head_dim)
    key, value = (torch.randn(shape, device=ring.store.device).to(ring.tail.dtype) for _ in range(2))
    ring_write(ring, key, value, impl=implementation)
    return ring


def integers(*shape: int, low: int = -4, high: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers so small that every dtype holds them and every sum of products is exact in float32."""
    return torch.randint(low, high + 1, shape).to(dtype)
