"""Who is measured: every implementation of ours, and the baselines, per operation."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longmem_kernels import Ring, chunk_topk, memory_attention, ring_write
from longmem_kernels.info import implementations, why_not

if TYPE_CHECKING:
    from .layer import Layer

from .inputs import FusionInputs, LayerInputs, RetrievalInputs, WriteInputs
from .shapes import Shape

KERNEL_OPS = ("chunk_topk", "memory_attention", "memory_attention_backward", "ring_write", "memory_layer")
MODEL_OPS = ("generate", "train_step")
OPS = (*KERNEL_OPS, *MODEL_OPS)
"""Questions that can be measured. "memory_attention_backward" is forward and backward together, "memory_layer" a
search, a read and a write, "generate" greedy generation and "train_step" a step of training with a LongMem model."""


@dataclass(frozen=True)
class Prepared:
    """A provider with its inputs laid out as it wants them.

    Attributes:
        run: what is timed. On CUDA it may return before the device is done; the timer synchronises.
        collect: turns what `run` returned into the tensors that the gate compares; not timed.
        repeat: operations that one `run` does; times are divided by it.
        note: what a reader of the number must know.
        graphable: every run launches the same kernels on the same memory (if the provider can be captured at all).
        layer: of "memory_layer", what the profiler looks into.
    """

    run: Callable[[], Any]
    collect: Callable[[Any], tuple[Tensor, ...]] = lambda result: tuple(result)
    repeat: int = 1
    note: str | None = None
    graphable: bool = True
    layer: Layer | None = None


@dataclass(frozen=True)
class Provider:
    """One row of a table.

    Attributes:
        name: what the row is called.
        prepare: from the op's inputs to a callable; index building and copies belong here, outside the timer.
        unavailable: from shape and device to the reason why it cannot run there, or None.
        computes: "op", or what is computed instead, a lower bound of it or a near relation: "local" (attention without
            memory), "copy", "distance" (nearest by squared distance), "backbone" (no memory).
        ours: an implementation of longmem_kernels.
        own_memory: allocates device memory that PyTorch does not see, so its peak on CUDA is not measured.
        unswept: why sweeps leave it out unless it is asked for by name; None where they do not.
        graphable: its launches can be captured in a CUDA graph.
    """

    name: str
    prepare: Callable[[Any], Prepared]
    unavailable: Callable[[Shape, torch.device], str | None] = lambda shape, device: None
    computes: str = "op"
    ours: bool = False
    own_memory: bool = False
    unswept: str | None = None
    graphable: bool = False


def providers(op: str) -> list[Provider]:
    """All providers of `op`, those that cannot run here included; of a kernel's ours first.

    Raises:
        ValueError: there is no such op.
    """
    from . import baselines

    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if op in MODEL_OPS:
        from . import models  # needs transformers

        return models.providers(op)
    own = ("auto",) if op == "memory_layer" else implementations(_kernel(op))
    return [_ours(op, impl) for impl in own] + baselines.of(op)


def matches(provider: Provider, word: str) -> bool:
    """Whether the provider's name holds `word`, or matches it as a pattern with `*`; case does not matter."""
    pattern = word.lower() if "*" in word else f"*{word.lower()}*"
    return fnmatch.fnmatchcase(provider.name.lower(), pattern)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on `device`, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def too_large(bytes_needed: int, device: torch.device) -> str | None:
    """The reason not to start something that needs about this much memory; None when it fits."""
    free = free_bytes(device)
    if free is None or bytes_needed <= 0.9 * free:
        return None
    return f"needs about {bytes_needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def _kernel(op: str) -> str:
    return op.removesuffix("_backward")


_REFERENCE_SCORES = 2**26  # what the specification of chunk_topk sorts in some seconds


def _ours(op: str, impl: str) -> Provider:
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
            return _prepare_layer(inputs, impl)
        return _prepare_attention(inputs, impl, backward=op.endswith("_backward"))

    name = "longmem" if impl == "auto" else f"longmem {impl}"
    unswept = "a specification" if impl == "reference" else None
    graphable = impl in ("auto", "cuda", "triton") and not op.endswith("_backward")
    return Provider(name, prepare, unavailable, ours=True, unswept=unswept, graphable=graphable)


def eager_bytes(shape: Shape) -> int:
    """What a composition that gathers chunks and writes out scores needs at most, roughly."""
    gathered = shape.B * shape.H * shape.T * shape.K * shape.C * shape.D * shape.dtype.itemsize
    scores = shape.B * shape.H * shape.T * shape.keys * 4
    return 4 * gathered + 4 * scores


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


def attention(inputs: FusionInputs, attend: Callable[..., Tensor], *, backward: bool, gated: bool = True) -> Prepared:
    """Forward, or forward and backward, of `attend(query, key, value[, gate])`."""
    leaves = [inputs.query, inputs.key, inputs.value, *([inputs.gate] if gated else [])]
    leaves = [leaf.detach().clone().requires_grad_(backward) for leaf in leaves]

    def forward() -> tuple[Tensor]:
        with torch.no_grad():
            return (attend(*leaves),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)

    return Prepared(forward_backward if backward else forward)


def copy_of(ring: Ring) -> Ring:
    scale = None if ring.scale is None else ring.scale.clone()
    return Ring(ring.store.clone(), ring.centroid.clone(), ring.tail.clone(), ring.cursor.clone(), scale)


def contents(ring: Ring) -> tuple[Tensor, ...]:
    """What a ring holds: the unwritten part of the open chunk blanked, for it means nothing."""
    written = torch.arange(ring.chunk_size, device=ring.cursor.device) < (ring.cursor % ring.chunk_size)[:, None]
    tail = torch.where(written[:, None, None, :, None], ring.tail, 0.0)
    return ring.store, ring.centroid, tail, ring.cursor, *(() if ring.scale is None else (ring.scale,))


def _prepare_write(inputs: WriteInputs, impl: str) -> Prepared:
    ring = copy_of(inputs.ring)
    return Prepared(lambda: ring_write(ring, inputs.key, inputs.value, impl=impl), lambda _: contents(ring))


def _prepare_layer(inputs: LayerInputs, impl: str) -> Prepared:
    from .layer import LongMemLayer

    layer = LongMemLayer(inputs, impl)
    return Prepared(layer.step, layer.collect, layer=layer)
