"""A whole memory layer step by step: search, read and write, by our kernels and by compositions of others.

Each layer keeps a memory of its own, as full at the start as the inputs' ring, and names its parts, so that `bench
layer` times it and `profile retrieval` says where the time goes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from longmem_kernels import chunk_topk, memory_attention, ring_write

from .baselines.faiss_search import Indices
from .baselines.fusion import gated, gather, gathered_attention, local_attention
from .baselines.retrieval import SCORE_BYTES, by_key_head, by_query_head, multiply
from .baselines.write import EagerRing, OfficialMemory
from .inputs import LayerInputs
from .providers import contents, copy_of

Span = Callable[[str], AbstractContextManager[Any]]


def quiet(name: str) -> AbstractContextManager[None]:
    """A span that measures nothing."""
    return nullcontext()


class Layer(Protocol):
    """A memory layer with a memory of its own."""

    def step(self, span: Span = quiet) -> Tensor:
        """One step on the inputs' segment: [B, H, T, D], the fused attention. Parts run inside `span(name)`."""

    def collect(self, out: Tensor) -> tuple[Tensor, ...]:
        """The output, and what the memory then holds, as `contents` of a ring."""


class LongMemLayer:
    """`chunk_topk`, `memory_attention`, `ring_write`."""

    def __init__(self, inputs: LayerInputs, impl: str = "auto") -> None:
        self.inputs, self.impl = inputs, impl
        self.ring = copy_of(inputs.fusion.ring)

    def step(self, span: Span = quiet) -> Tensor:
        inputs, ring, write = self.inputs.fusion, self.ring, self.inputs.write
        with torch.no_grad():
            with span("score + select"):
                k = inputs.shape.K
                ids, _ = chunk_topk(inputs.query, ring.centroid, k, count=ring.count(), impl=self.impl)
            with span("gather + fuse"):
                out = memory_attention(
                    inputs.query, inputs.key, inputs.value, ring.key, ring.value, ids,
                    gate=inputs.gate, alibi_slopes=inputs.slopes, impl=self.impl,
                )  # fmt: skip
            with span("write"):
                ring_write(ring, write.key, write.value, impl=self.impl)
        return out

    def collect(self, out: Tensor) -> tuple[Tensor, ...]:
        return out, *contents(self.ring)


class TorchLayer:
    """Products and `topk` in blocks, gathered copies, eager attention, `index_copy`."""

    def __init__(self, inputs: LayerInputs) -> None:
        self.inputs = inputs
        self.memory = EagerRing(inputs.fusion.ring, inputs.shape)
        self.ring = self.memory.ring

    def _search(self, span: Span) -> Tensor:
        shape, retrieval = self.inputs.shape, self.inputs.retrieval
        query = by_key_head(retrieval)[0]
        centroid = self.ring.centroid.flatten(0, 1).mT
        block = max(1, SCORE_BYTES // (query.shape[1] * shape.M * 4))
        found = []
        for left, right in zip(query.split(block), centroid.split(block), strict=True):
            with span("score"):
                scores = multiply(left, right)
            with span("select"):
                found.append(scores.topk(shape.K, dim=-1).indices)
        return by_query_head(torch.cat(found), shape)

    def step(self, span: Span = quiet) -> Tensor:
        write = self.inputs.write
        with torch.no_grad():
            ids = self._search(span)
            out = _read(self.inputs, self.ring.key, self.ring.value, ids, span)
            with span("write"):
                self.memory.write(write.key, write.value)
        return out

    def collect(self, out: Tensor) -> tuple[Tensor, ...]:
        return out, *contents(self.ring)


class OfficialLayer:
    """As LongMem's published code does it: an index per key head, gathered copies, eager attention, shifting eviction.

    Holds M or M + n chunks in turn where n are written, see `OfficialMemory`.
    """

    def __init__(self, inputs: LayerInputs) -> None:
        self.inputs = inputs
        self.memory = OfficialMemory(inputs.fusion.ring, inputs.shape)

    def step(self, span: Span = quiet) -> Tensor:
        shape, memory, write = self.inputs.shape, self.memory, self.inputs.write
        with torch.no_grad():
            with span("score + select"):
                ids = _search_each(memory.indices, by_key_head(self.inputs.retrieval)[0], shape.K)
            out = _read(self.inputs, memory.keys, memory.values, by_query_head(ids, shape), span)
            with span("write"):
                memory.write(write.key, write.value)
        return out

    def collect(self, out: Tensor) -> tuple[Tensor, ...]:
        return out, *self.memory.as_ring()


def _search_each(indices: Indices, query: Tensor, k: int) -> Tensor:
    """Ids [n, queries, K] of query [n, queries, D], one call per index."""
    found = [index.search(indices.native(part), k)[1] for index, part in zip(indices.indices, query, strict=True)]
    return torch.stack([torch.as_tensor(ids) for ids in found]).to(query.device)


def _read(inputs: LayerInputs, key: Tensor, value: Tensor, ids: Tensor, span: Span) -> Tensor:
    """Gather chunks `ids` [B, H, T, K] of key and value [R, G, M, C, D], attend to them and to local keys, and mix."""
    fusion, shape = inputs.fusion, inputs.shape
    with span("gather"):
        chunk_key, chunk_value = gather(key, ids, shape), gather(value, ids, shape)
    with span("fuse"):
        local = local_attention(fusion.query, fusion.key, fusion.value, fusion.slopes)
        return gated(local, gathered_attention(fusion.query, chunk_key, chunk_value), fusion.gate)
