"""Random inputs of each operation, drawn once per case and shared by all providers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longmem_kernels import Ring

from .shapes import Shape


@dataclass(frozen=True)
class RetrievalInputs:
    shape: Shape
    query: Tensor  # [B, H, T, D]
    centroid: Tensor  # [B, G, M, D]
    count: Tensor  # [B]


@dataclass(frozen=True)
class FusionInputs:
    shape: Shape
    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, G, S, D]
    value: Tensor  # [B, G, S, D]
    ring: Ring
    chunk_ids: Tensor  # [B, H, T, K]
    gate: Tensor  # [H]
    slopes: Tensor  # [H]
    grad: Tensor  # [B, H, T, D], gradient of the output


@dataclass(frozen=True)
class WriteInputs:
    shape: Shape
    key: Tensor  # [B, G, T, D]
    value: Tensor  # [B, G, T, D]
    ring: Ring  # providers write into a copy


Inputs = RetrievalInputs | FusionInputs | WriteInputs


def draw(op: str, shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Inputs of `op`, normally distributed: zeros would hide unwritten outputs, and some GPUs multiply them faster."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    B, T, S, H, G, D, M = shape.B, shape.T, shape.keys, shape.H, shape.G, shape.D, shape.M
    if op == "chunk_topk":
        count = torch.full((B,), M, dtype=torch.int32, device=device)
        return RetrievalInputs(shape, normal(B, H, T, D), normal(B, G, M, D), count)
    ring = Ring.new(rings=B, kv_heads=G, chunks=M, chunk_size=shape.C, head_dim=D, dtype=shape.dtype, device=device)
    ring.store.normal_(generator=generator)
    if op == "ring_write":
        # Three chunks before the end of the ring, so that the write of a segment wraps.
        ring.cursor.fill_((M - 3) * shape.C)
        return WriteInputs(shape, normal(B, G, T, D), normal(B, G, T, D), ring)
    ring.cursor.fill_(M * shape.C)
    return FusionInputs(
        shape,
        normal(B, H, T, D),
        normal(B, G, S, D),
        normal(B, G, S, D),
        ring,
        torch.randint(M, (B, H, T, shape.K), generator=generator, device=device, dtype=torch.int32),
        normal(H, dtype=torch.float32),
        torch.tensor([2 ** (-8 * (head + 1) / H) for head in range(H)], device=device),
        normal(B, H, T, D),
    )
