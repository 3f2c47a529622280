"""The published LongMem composed of ordinary operations: FAISS per head, gathered copies, attention with every score.

Written from a description of what the published code computes (Victorwz/LongMem), apart from this package's models and
kernels: its memory and its reading as baselines of single operations and of a memory layer. `published_model` is the
whole model on the same memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from longmem_kernels import Ring

from ..inputs import (
    FusionInputs,
    LayerInputs,
    WriteInputs,
    by_key_head,
    by_query_head,
    by_ring,
    in_whole_chunks,
    written,
)
from ..provider import Prepared, Provider, Span, quiet
from ..shapes import Shape
from .attention import attention
from .faiss_search import FaissIndex, why_none
from .torch_eager import gated, local_attention, why_no_eager, why_no_index_copy

EVICTION_NOTE = "mean of a step that evicts and one that does not; holds M or M + n chunks in turn, n being written"


class Index(Protocol):
    """Exact search of one head's vectors, numbered from the oldest on."""

    def __init__(self, size: int, device: torch.device) -> None: ...
    def add(self, vectors: Tensor) -> None: ...
    def remove_oldest(self, count: int) -> None: ...
    def search(self, queries: Tensor, k: int) -> Tensor:
        """Numbers [n, k] int64 by descending inner product, -1 where there are fewer than k."""
        ...

    def vectors(self) -> Tensor:
        """Everything in the index, [n, D], the oldest first."""
        ...


class TorchIndex:
    """The same by matrix product and `topk`, on any device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.held = torch.zeros(0, size, device=device)

    def add(self, vectors: Tensor) -> None:
        self.held = torch.cat([self.held, vectors.float()])

    def remove_oldest(self, count: int) -> None:
        self.held = self.held[count:]

    def search(self, queries: Tensor, k: int) -> Tensor:
        ids = (queries @ self.held.T).topk(min(k, len(self.held))).indices
        return F.pad(ids, (0, k - ids.shape[1]), value=-1)

    def vectors(self) -> Tensor:
        return self.held


class PublishedMemory:
    """Chunks of every head in the order of their age, and an index per head that holds their means.

    When n new chunks would reach the capacity, the 2n oldest are removed first: what is left is shifted to the front by
    `cat`, and numbers of the indices with it. So every second write of a full memory evicts.

    Args:
        heads: separate memories, written together.
        capacity: chunks of each.
        chunk, size: tokens of a chunk, and D.
        dtype: of the keys and values kept.
        index: what searches; it keeps float32.
    """

    def __init__(
        self, heads: int, capacity: int, chunk: int, size: int, dtype: torch.dtype, device: torch.device,
        index: type[Index] = FaissIndex,
    ) -> None:  # fmt: skip
        self.capacity, self.chunk, self.stored = capacity, chunk, 0
        self.indices = [index(size, device) for _ in range(heads)]
        self.keys, self.values = (
            torch.zeros(heads, capacity, chunk, size, dtype=dtype, device=device) for _ in range(2)
        )

    def write(self, key: Tensor, value: Tensor, means: Tensor | None = None) -> None:
        """Append key, value [heads, tokens, D] chunk by chunk; tokens beyond whole chunks are dropped.

        Args:
            means: of the chunks, [heads, n, D]; computed in float32 by default.
        """
        new = key.shape[1] // self.chunk
        if self.stored + new >= self.capacity:
            self._evict(2 * key.shape[1] // self.chunk)
        key, value = (part[:, : new * self.chunk].unflatten(1, (new, self.chunk)) for part in (key, value))
        slots = slice(self.stored, self.stored + new)
        self.keys[:, slots], self.values[:, slots] = key, value
        for index, mean in zip(self.indices, key.mean(2, dtype=torch.float32) if means is None else means, strict=True):
            index.add(mean)
        self.stored += new

    def _evict(self, count: int) -> None:
        self.stored -= count
        for index in self.indices:
            index.remove_oldest(count)
        room = torch.zeros_like(self.keys[:, :count])
        self.keys, self.values = (torch.cat([part[:, count:], room], 1) for part in (self.keys, self.values))

    def search(self, query: Tensor, k: int) -> Tensor:
        """Numbers [heads, n, k] of query [heads, n, D], one call per index."""
        return torch.stack([index.search(part, k) for index, part in zip(self.indices, query, strict=True)])


def gather_heads(stored: Iterable[Tensor], ids: Iterable[Tensor]) -> Tensor:
    """[n, heads, K*C, D]: of each head's stored [M, C, D] the chunks ids [n, K], copied head by head."""
    return torch.stack([mine[found].flatten(1, 2) for mine, found in zip(stored, ids, strict=True)], 1)


def attend_gathered(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of each scaled query [..., D] to keys and values [..., n, D] of its own, as products of one row."""
    weight = (query.unsqueeze(-2) @ key.mT).float().softmax(-1).to(value.dtype)
    return (weight @ value).squeeze(-2)


# Single operations


def providers(op: str) -> list[Provider]:
    """Parts of the published code as baselines of a kernel op, none of "chunk_topk" beside FAISS's own."""
    if op == "ring_write":
        return [Provider("official cat-shift eviction", _prepare_write, _why_no_write, own_memory=True)]
    if op == "memory_layer":
        name = "official: faiss, gather, eager, cat-shift"
        return [Provider(name, _prepare_layer, _why_no_layer, own_memory=True)]
    if op not in ("memory_attention", "memory_attention_backward"):
        return []
    backward = op.endswith("_backward")
    prepare = partial(_prepare_attention, backward=backward)
    return [Provider("official composition", prepare, why_no_eager, graphable=not backward)]


def _by_head(stored: Tensor, shape: Shape) -> list[Tensor]:
    """Chunks [M, C, D] that each query head of each row reads, of stored [R, G, M, C, D]."""
    shared = shape.H // shape.G
    return [stored[row // shape.rows_per_ring, head // shared] for row in range(shape.B) for head in range(shape.H)]


def _attend(inputs: FusionInputs, key: Tensor, value: Tensor, ids: Tensor, span: Span, *leaves: Tensor) -> Tensor:
    """Gather chunks `ids` [B, H, T, K] of key and value [R, G, M, C, D], attend to them and to local keys, and mix."""
    shape, (query, local_key, local_value, gate) = inputs.shape, leaves
    with span("gather"):
        found = ids.flatten(0, 1)
        memory_key, memory_value = (gather_heads(_by_head(part, shape), found).transpose(0, 1) for part in (key, value))
    with span("fuse"):
        memory = attend_gathered((query * shape.D**-0.5).flatten(0, 1), memory_key, memory_value)
        local = local_attention(query, local_key, local_value, inputs.slopes)
        return gated(local, memory.view_as(query), gate)


def _prepare_attention(inputs: FusionInputs, *, backward: bool) -> Prepared:
    """Attention alone: ids are given."""
    ids = inputs.chunk_ids.long()
    return attention(
        inputs, partial(_attend, inputs, inputs.ring.key, inputs.ring.value, ids, quiet), backward=backward
    )  # fmt: skip


class PublishedRing:
    """The published memory with as much in it as a full ring: M chunks or M + n in turn, where n are written."""

    def __init__(self, ring: Ring, shape: Shape) -> None:
        self.shape = shape
        self.total = int(ring.cursor[0]) // shape.C
        heads, capacity = shape.rings * shape.G, ring.chunks + 2 * written(shape)
        device, dtype = ring.store.device, ring.store.dtype
        self.memory = PublishedMemory(heads, capacity, shape.C, shape.D, dtype, device)
        aged = ring.store.roll(-(self.total % ring.chunks), 2).flatten(0, 1)
        means = ring.centroid.roll(-(self.total % ring.chunks), 2).flatten(0, 1)
        self.memory.write(aged[:, :, 0].flatten(1, 2), aged[:, :, 1].flatten(1, 2), means)

    def write(self, inputs: WriteInputs) -> None:
        self.memory.write(*(by_ring(part, self.shape).flatten(0, 1) for part in (inputs.key, inputs.value)))
        self.total += written(self.shape)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values [R, G, capacity, C, D]."""
        size = (self.shape.rings, self.shape.G)
        return self.memory.keys.unflatten(0, size), self.memory.values.unflatten(0, size)

    def contents(self) -> tuple[Tensor, ...]:
        """The newest M chunks where a ring of M chunks holds them."""
        M, size = self.shape.M, (self.shape.rings, self.shape.G)
        newest = slice(self.memory.stored - M, self.memory.stored)
        store = torch.stack([part[:, :, newest] for part in self.stored()], 3).roll(self.total % M, 2)
        means = torch.stack([index.vectors()[newest] for index in self.memory.indices]).unflatten(0, size)
        tail = torch.zeros_like(store[:, :, 0])
        cursor = torch.full((store.shape[0],), self.total * self.shape.C, device=store.device)
        return store, means.roll(self.total % M, 2).to(store), tail, cursor


def _why_no_write(shape: Shape, device: torch.device) -> str | None:
    if not in_whole_chunks(shape):
        return f"writes whole chunks and drops the rest; {shape.rows_per_ring * shape.T} tokens come at once"
    return why_no_index_copy(shape, device) or why_none(shape, device)


def _prepare_write(inputs: WriteInputs) -> Prepared:
    """The mean of a write that evicts and one that does not."""
    ring = PublishedRing(inputs.ring, inputs.shape)

    def run() -> None:
        ring.write(inputs)
        ring.write(inputs)

    return Prepared(run, lambda _: ring.contents(), repeat=2, note=EVICTION_NOTE)


def _why_no_layer(shape: Shape, device: torch.device) -> str | None:
    return _why_no_write(shape, device) or why_no_eager(shape, device)


def _prepare_layer(inputs: LayerInputs) -> Prepared:
    layer = PublishedLayer(inputs)

    def two_steps() -> Tensor:
        out = layer.step()
        layer.step()
        return out

    return Prepared(two_steps, layer.collect, repeat=2, note=EVICTION_NOTE, layer=layer)


class PublishedLayer:
    """An index per key head, gathered copies, attention with every score, eviction by shifting."""

    def __init__(self, inputs: LayerInputs) -> None:
        self.inputs = inputs
        self.ring = PublishedRing(inputs.fusion.ring, inputs.shape)

    def step(self, span: Span = quiet) -> Tensor:
        shape, fusion = self.inputs.shape, self.inputs.fusion
        with torch.no_grad():
            with span("score + select"):
                found = self.ring.memory.search(by_key_head(self.inputs.retrieval)[0], shape.K)
                ids = by_query_head(found, shape)
            leaves = (fusion.query, fusion.key, fusion.value, fusion.gate)
            out = _attend(fusion, *self.ring.stored(), ids, span, *leaves)
            with span("write"):
                self.ring.write(self.inputs.write)
        return out

    def collect(self, out: Tensor) -> tuple[Tensor, ...]:
        return out, *self.ring.contents()
