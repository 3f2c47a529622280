"""Random inputs of each operation, drawn once per case and shared by all providers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longmem_kernels import Ring

from .shapes import Shape


@dataclass(frozen=True)
class RetrievalInputs:
    shape: Shape
    query: Tensor  # [B, H, T, D]
    centroid: Tensor  # [R, G, M, D]
    count: Tensor  # [R]


@dataclass(frozen=True)
class FusionInputs:
    shape: Shape
    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, G, S, D]
    value: Tensor  # [B, G, S, D]
    ring: Ring
    chunk_ids: Tensor  # [B, H, T, K], no id twice for one query
    gate: Tensor  # [H]
    slopes: Tensor  # [H]
    grad: Tensor  # [B, H, T, D], gradient of the output


@dataclass(frozen=True)
class WriteInputs:
    shape: Shape
    key: Tensor  # [B, G, T, D]
    value: Tensor  # [B, G, T, D]
    ring: Ring  # providers write into a copy


@dataclass(frozen=True)
class LayerInputs:
    """One memory layer: search with the query, attend, then write key and value. The ring is full."""

    fusion: FusionInputs  # its chunk_ids are not used: the layer finds its own

    @property
    def shape(self) -> Shape:
        return self.fusion.shape

    @property
    def write(self) -> WriteInputs:
        """Keys and values that are written: of the segment, not those cached before it."""
        fusion, T = self.fusion, self.fusion.shape.T
        return WriteInputs(fusion.shape, fusion.key[:, :, -T:], fusion.value[:, :, -T:], fusion.ring)

    @property
    def retrieval(self) -> RetrievalInputs:
        ring = self.fusion.ring
        return RetrievalInputs(self.fusion.shape, self.fusion.query, ring.centroid, ring.count())


OpInputs = RetrievalInputs | FusionInputs | WriteInputs | LayerInputs


def draw(op: str, shape: Shape, device: torch.device, seed: int = 0) -> OpInputs:
    """Inputs of `op`, normally distributed: zeros would hide unwritten outputs, and some GPUs multiply them faster."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def fill(ring: Ring) -> None:
        ring.store.normal_(generator=generator)
        if op != "memory_attention":
            _average(ring)

    return _compose(op, shape, device, normal, fill, lambda: _distinct_ids(shape, generator, device))


def blank(op: str, shape: Shape) -> OpInputs:
    """Inputs of the same sizes and dtypes on the CPU, to ask what would be launched: memory that is not written to is
    not taken from the system."""

    def empty(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype)

    def ids() -> Tensor:
        return torch.zeros(shape.B, shape.H, shape.T, shape.K, dtype=torch.int32)

    return _compose(op, shape, torch.device("cpu"), empty, lambda ring: None, ids)


def _compose(
    op: str,
    shape: Shape,
    device: torch.device,
    tensor: Callable[..., Tensor],
    fill: Callable[[Ring], None],
    ids: Callable[[], Tensor],
) -> OpInputs:
    B, T, S, H, G, D, M, R = shape.B, shape.T, shape.keys, shape.H, shape.G, shape.D, shape.M, shape.rings
    if op == "chunk_topk":
        count = torch.full((R,), M, dtype=torch.int32, device=device)
        return RetrievalInputs(shape, tensor(B, H, T, D), tensor(R, G, M, D), count)
    ring = Ring.new(rings=R, kv_heads=G, chunks=M, chunk_size=shape.C, head_dim=D, dtype=shape.dtype, device=device)
    fill(ring)
    if op == "ring_write":
        # Three chunks before the end of a full ring, so that the write of a segment wraps.
        ring.cursor.fill_((2 * M - min(3, M)) * shape.C)
        return WriteInputs(shape, tensor(B, G, T, D), tensor(B, G, T, D), ring)
    ring.cursor.fill_(M * shape.C)
    fusion = FusionInputs(
        shape,
        tensor(B, H, T, D),
        tensor(B, G, S, D),
        tensor(B, G, S, D),
        ring,
        ids(),
        tensor(H, dtype=torch.float32),
        torch.tensor([2 ** (-8 * (head + 1) / H) for head in range(H)], device=device),
        tensor(B, H, T, D),
    )
    return LayerInputs(fusion) if op == "memory_layer" else fusion


def _average(ring: Ring) -> None:
    """Centroids of what is stored, a ring at a time to bound the float32 sums."""
    for ring_number in range(ring.rings):
        ring.centroid[ring_number].copy_(ring.key[ring_number].mean(-2, dtype=torch.float32))


def _distinct_ids(shape: Shape, generator: torch.Generator, device: torch.device) -> Tensor:
    """[B, H, T, K] int32 in random order, one of each of K equal parts of the ring: no search finds a chunk twice."""
    size = (shape.B, shape.H, shape.T, shape.K)
    part = shape.M // shape.K
    ids = torch.randint(part, size, generator=generator, device=device) + part * torch.arange(shape.K, device=device)
    order = torch.rand(size, generator=generator, device=device).argsort(-1)
    return ids.gather(-1, order).to(torch.int32)


def copy_of(ring: Ring) -> Ring:
    scale = None if ring.scale is None else ring.scale.clone()
    return Ring(ring.store.clone(), ring.centroid.clone(), ring.tail.clone(), ring.cursor.clone(), scale)


def contents(ring: Ring) -> tuple[Tensor, ...]:
    """Everything a ring holds, the unwritten part of the open chunk blanked: it means nothing."""
    written = torch.arange(ring.chunk_size, device=ring.cursor.device) < (ring.cursor % ring.chunk_size)[:, None]
    tail = torch.where(written[:, None, None, :, None], ring.tail, 0.0)
    return ring.store, ring.centroid, tail, ring.cursor, *(() if ring.scale is None else (ring.scale,))


def by_key_head(inputs: RetrievalInputs) -> tuple[Tensor, Tensor]:
    """Queries [R * G, n, D] and centroids [R * G, M, D]: all queries of one key head together, row by row.

    Query heads that share a key head, and rows that share a ring, are more queries of the same centroids.
    """
    shape = inputs.shape
    query = inputs.query.view(shape.rings, shape.rows_per_ring, shape.G, shape.H // shape.G, shape.T, shape.D)
    return query.transpose(1, 2).reshape(shape.rings * shape.G, -1, shape.D), inputs.centroid.flatten(0, 1)


def by_query_head(found: Tensor, shape: Shape) -> Tensor:
    """[R * G, n, K] of `by_key_head`'s queries as [B, H, T, K]."""
    split = found.view(shape.rings, shape.G, shape.rows_per_ring, shape.H // shape.G, shape.T, shape.K)
    return split.transpose(1, 2).reshape(shape.B, shape.H, shape.T, shape.K)


def by_ring(tokens: Tensor, shape: Shape) -> Tensor:
    """[B, G, T, D] as the tokens of each ring, [R, G, n, D], rows that share a ring one after another."""
    return tokens.unflatten(0, (shape.rings, shape.rows_per_ring)).transpose(1, 2).flatten(2, 3)


def written(shape: Shape) -> int:
    """Whole chunks that one write adds to a ring."""
    return shape.rows_per_ring * shape.T // shape.C


def in_whole_chunks(shape: Shape) -> bool:
    """Every write begins and ends with a chunk, so that all writes are the same."""
    return shape.rows_per_ring * shape.T % shape.C == 0
