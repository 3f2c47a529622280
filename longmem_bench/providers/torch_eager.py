"""Compositions of eager PyTorch: search by product and `topk`, two softmaxes and a gate, a ring by `index_copy`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longmem_kernels import Ring

from ..inputs import (
    FusionInputs,
    LayerInputs,
    RetrievalInputs,
    WriteInputs,
    by_key_head,
    by_query_head,
    by_ring,
    contents,
    copy_of,
    in_whole_chunks,
    written,
)
from ..peak_memory import eager_bytes, too_large
from ..provider import Prepared, Provider, Span, quiet
from ..shapes import Shape
from .attention import attention

SCORE_BYTES = 2**30  # how much of the score matrix the matmul baseline holds at once
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def providers(op: str) -> list[Provider]:
    """The eager baselines of a kernel op."""
    if op == "chunk_topk":
        return [Provider("torch matmul + topk", prepare_matmul_topk, _why_no_matmul_topk, graphable=True)]
    if op == "ring_write":
        return [
            Provider("eager index_copy", _prepare_index_copy, why_no_index_copy, graphable=True),
            Provider("copy of the same bytes", _prepare_copy, computes="copy", graphable=True),
        ]
    if op == "memory_layer":
        return [Provider("torch matmul + topk, eager, index_copy", _prepare_layer, _why_no_layer)]
    backward = op.endswith("_backward")
    return [
        Provider("eager composition", partial(prepare_eager, backward=backward), why_no_eager, graphable=not backward),
        Provider(
            "SDPA, local only", partial(prepare_sdpa, backward=backward), _why_no_sdpa, computes="local",
            graphable=not backward,
        ),
    ]  # fmt: skip


# memory_attention


def local_attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> Tensor:
    """Causal softmax attention with every score written out; probabilities rounded to the inputs' dtype."""
    H, T, D = query.shape[1:]
    S = key.shape[2]
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.mT).float() * D**-0.5
    ahead = torch.arange(S, device=query.device) - torch.arange(S - T, S, device=query.device)[:, None]
    if slopes is not None:
        scores = scores + slopes[:, None, None] * ahead
    scores = scores.masked_fill(ahead > 0, float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value


def gathered_attention(query: Tensor, chunk_key: Tensor, chunk_value: Tensor) -> Tensor:
    """Attention of every query to its own keys and values [B, H, T, K*C, D]."""
    scores = (chunk_key @ query.unsqueeze(-1)).squeeze(-1).float() * query.shape[-1] ** -0.5
    return (scores.softmax(-1).to(query.dtype).unsqueeze(-2) @ chunk_value).squeeze(-2)


def gated(local: Tensor, memory: Tensor, gate: Tensor) -> Tensor:
    share = gate.sigmoid().to(local.dtype)[:, None, None]
    return (1 - share) * local + share * memory


def gather(stored: Tensor, ids: Tensor, shape: Shape) -> Tensor:
    """[B, H, T, K*C, D], the chunks `ids` [B, H, T, K] of stored [R, G, M, C, D]. All ids are taken to be valid."""
    rows = torch.arange(shape.B, device=ids.device)[:, None, None, None] // shape.rows_per_ring
    heads = (torch.arange(shape.H, device=ids.device) // (shape.H // shape.G))[:, None, None]
    return stored[rows, heads, ids].flatten(3, 4)


def eager(inputs: FusionInputs) -> Attend:
    """Gathers the chunks of every query, then two softmaxes and a gate: what one writes without a kernel."""
    ring, shape, slopes, ids = inputs.ring, inputs.shape, inputs.slopes, inputs.chunk_ids.long()

    def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        memory = gathered_attention(query, gather(ring.key, ids, shape), gather(ring.value, ids, shape))
        return gated(local_attention(query, key, value, slopes), memory, gate)

    return attend


def prepare_eager(inputs: FusionInputs, *, backward: bool) -> Prepared:
    return attention(inputs, eager(inputs), backward=backward)


def why_no_eager(shape: Shape, device: torch.device) -> str | None:
    return too_large(eager_bytes(shape), device)


def _why_no_sdpa(shape: Shape, device: torch.device) -> str | None:
    return None if shape.T in (1, shape.keys) else "its causal mask is aligned to the first key; needs T = 1 or T = S"


def prepare_sdpa(inputs: FusionInputs, *, backward: bool) -> Prepared:
    """PyTorch's own attention over the local keys, without ALiBi: what any fusion costs at least."""
    causal, shared = inputs.shape.T > 1, inputs.shape.H != inputs.shape.G

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=shared)

    return attention(inputs, attend, backward=backward, gated=False)


# chunk_topk


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Batched product in float32. Scores rounded to 16 bits would rank other chunks; the GPU can keep the products of
    16-bit inputs in float32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _blocks(query: Tensor, centroid: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Splits into as many heads at once as keep scores in `SCORE_BYTES`: queries [n, q, D] and centroids [n, D, M]."""
    block = max(1, SCORE_BYTES // (query.shape[1] * centroid.shape[1] * 4))
    return zip(query.split(block), centroid.mT.split(block), strict=True)


def _why_no_matmul_topk(shape: Shape, device: torch.device) -> str | None:
    scores = 4 * (shape.H // shape.G) * shape.rows_per_ring * shape.T * shape.M  # of one key head
    return too_large(2 * max(scores, SCORE_BYTES), device)


def prepare_matmul_topk(inputs: RetrievalInputs) -> Prepared:
    """Scores of as many heads at once as fit into a fixed buffer, then `topk`. Every chunk is taken to be stored."""
    shape = inputs.shape
    query, centroid = by_key_head(inputs)

    def run() -> list[Any]:
        return [multiply(left, right).topk(shape.K, dim=-1) for left, right in _blocks(query, centroid)]

    def collect(found: list[Any]) -> tuple[Tensor, ...]:
        ids, scores = torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])
        return by_query_head(ids, shape), by_query_head(scores, shape)

    return Prepared(run, collect)


# ring_write


def why_no_index_copy(shape: Shape, device: torch.device) -> str | None:
    return None if written(shape) < shape.M else "would write the same slot twice"


class EagerRing:
    """A ring kept without a kernel. All rings are in step, so that one index serves all of them; where the open chunk
    begins is counted on the host."""

    def __init__(self, ring: Ring, shape: Shape) -> None:
        self.ring, self.shape = copy_of(ring), shape
        self.open = int(ring.cursor[0]) % shape.C  # tokens in the open chunk

    def write(self, key: Tensor, value: Tensor) -> None:
        ring, shape = self.ring, self.shape
        tokens = torch.stack([by_ring(key, shape), by_ring(value, shape)], 2).to(ring.store.dtype)  # [R, G, 2, n, D]
        if self.open:
            tokens = torch.cat([ring.tail[:, :, :, : self.open], tokens], 3)
        whole, rest = divmod(tokens.shape[3], shape.C)
        if whole:
            chunks = tokens[:, :, :, : whole * shape.C].unflatten(3, (whole, shape.C)).transpose(2, 3)
            slots = (ring.cursor[0] // shape.C + torch.arange(whole, device=ring.cursor.device)) % ring.chunks
            ring.store.index_copy_(2, slots, chunks)
            means = chunks[:, :, :, 0].mean(-2, dtype=torch.float32)
            ring.centroid.index_copy_(2, slots, means.to(ring.centroid.dtype))
        if rest:
            ring.tail[:, :, :, :rest] = tokens[:, :, :, whole * shape.C :]
        self.open = rest
        ring.cursor.add_(shape.rows_per_ring * shape.T)


def _prepare_index_copy(inputs: WriteInputs) -> Prepared:
    ring = EagerRing(inputs.ring, inputs.shape)
    return Prepared(
        lambda: ring.write(inputs.key, inputs.value),
        lambda _: contents(ring.ring),
        graphable=in_whole_chunks(inputs.shape),
    )


def _prepare_copy(inputs: WriteInputs) -> Prepared:
    """The same keys and values into one flat buffer: the memory traffic and nothing else."""
    target = torch.empty(2, *inputs.key.shape, dtype=inputs.ring.store.dtype, device=inputs.key.device)

    def run() -> None:
        target[0].copy_(inputs.key)
        target[1].copy_(inputs.value)

    return Prepared(run, lambda _: (target,))


# memory_layer


def _why_no_layer(shape: Shape, device: torch.device) -> str | None:
    return why_no_index_copy(shape, device) or why_no_eager(shape, device)


def _prepare_layer(inputs: LayerInputs) -> Prepared:
    layer = TorchLayer(inputs)
    return Prepared(layer.step, layer.collect, layer=layer)


class TorchLayer:
    """Products and `topk` in blocks, gathered copies, eager attention, `index_copy`."""

    def __init__(self, inputs: LayerInputs) -> None:
        self.inputs = inputs
        self.memory = EagerRing(inputs.fusion.ring, inputs.shape)
        self.ring = self.memory.ring

    def step(self, span: Span = quiet) -> Tensor:
        write, shape, fusion = self.inputs.write, self.inputs.shape, self.inputs.fusion
        with torch.no_grad():
            ids = self._search(span)
            with span("gather"):
                chunk_key, chunk_value = (gather(stored, ids, shape) for stored in (self.ring.key, self.ring.value))
            with span("fuse"):
                local = local_attention(fusion.query, fusion.key, fusion.value, fusion.slopes)
                out = gated(local, gathered_attention(fusion.query, chunk_key, chunk_value), fusion.gate)
            with span("write"):
                self.memory.write(write.key, write.value)
        return out

    def _search(self, span: Span) -> Tensor:
        query, centroid = by_key_head(self.inputs.retrieval)[0], self.ring.centroid.flatten(0, 1)
        found = []
        for left, right in _blocks(query, centroid):
            with span("score"):
                scores = multiply(left, right)
            with span("select"):
                found.append(scores.topk(self.inputs.shape.K, dim=-1).indices)
        return by_query_head(torch.cat(found), self.inputs.shape)

    def collect(self, out: Tensor) -> tuple[Tensor, ...]:
        return out, *contents(self.ring)
