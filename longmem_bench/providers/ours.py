"""Every implementation of longmem_kernels, and the memory layer made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longmem_kernels import chunk_topk, memory_attention, ring_write
from longmem_kernels.info import implementations, why_not

from ..inputs import FusionInputs, LayerInputs, RetrievalInputs, WriteInputs, contents, copy_of
from ..peak_memory import eager_bytes, too_large
from ..provider import Prepared, Provider, Span, quiet
from ..shapes import Shape
from .attention import attention

_REFERENCE_SCORES = 2**26  # what the specification of chunk_topk sorts in some seconds


def providers(op: str) -> list[Provider]:
    """All implementations of `op`, those that cannot run here included."""
    return [_provider(op, impl) for impl in (("auto",) if op == "memory_layer" else implementations(_kernel(op)))]


def _kernel(op: str) -> str:
    return op.removesuffix("_backward")


def _provider(op: str, impl: str) -> Provider:
    def unavailable(shape: Shape, device: torch.device) -> str | None:
        if op == "memory_layer":
            return None
        if impl == "triton" and device.type == "cpu":
            return "Triton on CPU tensors is an interpreter, a debugger: needs a CUDA device"
        reason = why_not(_kernel(op), impl, device.type, shape.dtype, shape.D)
        if reason is not None or impl != "reference":
            return reason
        if op == "chunk_topk":
            scores = shape.B * shape.H * shape.T * shape.M
            if device.type == "cpu" and scores > _REFERENCE_SCORES:
                return f"a specification: sorts {scores:.2g} scores, for minutes"
            # Scores, a masked copy, and two stable sorts with 64-bit indices.
            return too_large(40 * scores, device)
        return too_large(eager_bytes(shape), device) if op.startswith("memory_attention") else None

    def prepare(inputs: Any) -> Prepared:
        if isinstance(inputs, RetrievalInputs):
            return _prepare_topk(inputs, impl)
        if isinstance(inputs, WriteInputs):
            return _prepare_write(inputs, impl)
        if isinstance(inputs, LayerInputs):
            layer = LongMemLayer(inputs, impl)
            return Prepared(layer.step, layer.collect, layer=layer)
        return _prepare_attention(inputs, impl, backward=op.endswith("_backward"))

    name = "longmem" if impl == "auto" else f"longmem {impl}"
    unswept = "a specification" if impl == "reference" else None
    graphable = impl in ("auto", "cuda", "triton") and not op.endswith("_backward")
    return Provider(name, prepare, unavailable, ours=True, unswept=unswept, graphable=graphable)


def _prepare_topk(inputs: RetrievalInputs, impl: str) -> Prepared:
    query, centroid, count, k = inputs.query, inputs.centroid, inputs.count, inputs.shape.K
    return Prepared(lambda: chunk_topk(query, centroid, k, count=count, impl=impl))


def _prepare_attention(inputs: FusionInputs, impl: str, *, backward: bool) -> Prepared:
    def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        ring = inputs.ring
        return memory_attention(
            query, key, value, ring.key, ring.value, inputs.chunk_ids,
            gate=gate, alibi_slopes=inputs.slopes, impl=impl,
        )  # fmt: skip

    return attention(inputs, attend, backward=backward)


def _prepare_write(inputs: WriteInputs, impl: str) -> Prepared:
    ring = copy_of(inputs.ring)
    return Prepared(lambda: ring_write(ring, inputs.key, inputs.value, impl=impl), lambda _: contents(ring))


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
