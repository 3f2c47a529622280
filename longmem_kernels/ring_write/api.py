"""ring_write: append keys and values to the ring-buffer memory."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .._checks import (
    COMPUTE_DTYPES,
    QUANTISED_DTYPE,
    Sizes,
    check_device,
    check_dtype,
    check_frozen,
    check_last_axis_contiguous,
    check_range,
    check_ring_index,
    constant,
    packed,
)
from .._dispatch import choose
from .._plans import Plan, Plans
from ..ring import MAX_CHUNK_SIZE, MAX_CURSOR, Ring, token_dtype
from .reference import ring_write_reference

OP = "ring_write"


def ring_write(
    ring: Ring,
    key: Tensor,
    value: Tensor,
    *,
    ring_index: Tensor | None = None,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Append T tokens per row to the rows' rings, in place, on the ring's device, without a host sync.

    Every C tokens a chunk closes into slot `chunk_number % M`, overwriting the oldest; its centroid is the mean of its
    keys, rounded as the ring keeps tokens and summed in order in float32. Writing in pieces leaves exactly what writing
    at once leaves. Rows that share a ring are appended in row order. (LongMem, section 2: the cached memory bank is
    updated after each segment.)

    Args:
        ring: the memory, changed in place.
        key, value: [B, G, T, D] float32, bfloat16, float16 or float64, rounded to the dtype of `ring.tail`. No gradient
            flows. T = 0 writes nothing. The last axis must be contiguous; all other strides, and those of `ring_index`
            and `mask`, are free. They may be views of the ring.
        ring_index: [B] int32 in [0, R), the ring of each row. Left out: row b writes ring b when R == B, ring 0 when
            R == 1.
        mask: [B, T] bool, False drops a token (padding).
        impl: "auto", "cuda", "cpp" or "reference".

    Values are checked on CPU, and on CUDA with `debug_checks(True)`. Without, nothing outside of the ring is read or
    written either: a row whose ring does not exist is dropped; a cursor is taken modulo 2^48, and the content of its
    ring means nothing. Compiled CPU code raises RuntimeError for both.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was wanted and what came.
        RuntimeError: `impl` cannot run here; or, on CUDA, more than 2^30 tokens or 65,535 heads in one call.
    """
    check_is_ring(OP, ring)
    store, centroid, tail, cursor, scale = ring.store, ring.centroid, ring.tail, ring.cursor, ring.scale
    plan = _plans.find((store, centroid, tail, cursor, scale, key, value, ring_index, mask), (impl,))
    key, value = constant(key), constant(value)
    plan.run(
        lambda: _check_values(ring, key, ring_index),
        store, centroid, tail, cursor, scale, key, value, packed(ring_index), mask,
    )  # fmt: skip
    if plan.kernel is not _reference and not torch.compiler.is_compiling():
        # So that a backward pass that still needs the old content fails instead of reading the new one.
        written = (store, centroid) if scale is None else (store, centroid, scale)
        torch.autograd.graph.increment_version([part for part in written if not part.is_inference()])


def _plan(
    store: Tensor,
    centroid: Tensor,
    tail: Tensor,
    cursor: Tensor,
    scale: Tensor | None,
    key: Tensor,
    value: Tensor,
    ring_index: Tensor | None,
    mask: Tensor | None,
    impl: str,
) -> Plan:
    op, sizes = OP, Sizes(OP)
    check_ring(op, Ring(store, centroid, tail, cursor, scale), sizes)
    sizes.bind("key", key, "B G T D")
    sizes.bind("value", value, "B G T D")
    check_dtype(op, "key", key, COMPUTE_DTYPES)
    if value.dtype != key.dtype:
        raise TypeError(f"{op}: value must have the dtype of key, {key.dtype}, got {value.dtype}")
    check_device(op, store.device, key=key, value=value, ring_index=ring_index, mask=mask)
    check_last_axis_contiguous(op, key=key, value=value)
    check_ring_index(op, ring_index, sizes)
    if mask is not None:
        sizes.bind("mask", mask, "B T")
        check_dtype(op, "mask", mask, (torch.bool,))
    name = choose(op, impl, store.device, (key.dtype, store.dtype), sizes["D"])
    kernel = _reference if name == "reference" else getattr(torch.ops.longmem, f"{op}_{name}").default
    return Plan(kernel, name == "cpp")


def _check_values(ring: Ring, key: Tensor, ring_index: Tensor | None) -> None:
    check_range(OP, "ring_index", ring_index, 0, ring.rings)
    check_range(OP, "ring.cursor", ring.cursor, 0, MAX_CURSOR - key.shape[0] * key.shape[2])
    check_no_overlap(OP, ring)


def _reference(
    store: Tensor,
    centroid: Tensor,
    tail: Tensor,
    cursor: Tensor,
    scale: Tensor | None,
    key: Tensor,
    value: Tensor,
    ring_index: Tensor | None,
    mask: Tensor | None,
) -> None:
    """The reference, with its arguments as the ops take theirs."""
    ring = Ring(store, centroid, tail, cursor, scale)
    ring_write_reference(ring, _apart(ring, key), _apart(ring, value), ring_index, mask)


_plans = Plans(_plan)


def _apart(ring: Ring, tokens: Tensor) -> Tensor:
    """`tokens`, copied when they lie in the memory that is about to be written."""
    if torch.compiler.is_compiling() or tokens.is_meta:
        return tokens
    written = {part.untyped_storage().data_ptr() for part in _parts(ring).values()}
    return tokens.clone() if tokens.untyped_storage().data_ptr() in written else tokens


def _parts(ring: Ring) -> dict[str, Tensor]:
    names = ("store", "centroid", "tail", "cursor", *(() if ring.scale is None else ("scale",)))
    return {f"ring.{name}": getattr(ring, name) for name in names}


def check_is_ring(op: str, ring: Ring) -> None:
    if not isinstance(ring, Ring):
        raise TypeError(f"{op}: ring must be a longmem_kernels.Ring, got {type(ring).__name__}")


def check_ring(op: str, ring: Ring, sizes: Sizes) -> None:
    """Kernels write through bare pointers into all its tensors: each must have the size and dtype they count on."""
    sizes.bind("ring.store", ring.store, "R G M 2 C D")
    sizes.bind("ring.centroid", ring.centroid, "R G M D")
    sizes.bind("ring.tail", ring.tail, "R G 2 C D")
    sizes.bind("ring.cursor", ring.cursor, "R")
    sizes.positive("R", "G", "M", "C", "D")
    if sizes["C"] > MAX_CHUNK_SIZE:
        raise ValueError(f"{op}: chunks of ring.store must have at most {MAX_CHUNK_SIZE} tokens, got C = {sizes['C']}")
    quantised = ring.store.dtype == QUANTISED_DTYPE
    if quantised != (ring.scale is not None):
        wanted = "a tensor [R, G, M, 2]" if quantised else "None"
        got = "None" if ring.scale is None else "a tensor"
        raise ValueError(f"{op}: ring.scale must be {wanted} beside a {ring.store.dtype} ring.store, got {got}")
    if ring.scale is not None:
        sizes.bind("ring.scale", ring.scale, "R G M 2")
        check_dtype(op, "ring.scale", ring.scale, (torch.float32,))
    check_dtype(op, "ring.store", ring.store, (*COMPUTE_DTYPES, QUANTISED_DTYPE))
    check_dtype(op, "ring.centroid", ring.centroid, (token_dtype(ring.store.dtype),))
    check_dtype(op, "ring.tail", ring.tail, (token_dtype(ring.store.dtype),))
    check_dtype(op, "ring.cursor", ring.cursor, (torch.int64,))
    parts = _parts(ring)
    check_frozen(op, "it is written in place", **parts)
    for name, tensor in parts.items():
        if tensor.device != ring.store.device:
            raise ValueError(f"{op}: {name} must be on {ring.store.device} like ring.store, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {tuple(tensor.stride())}")


def check_no_overlap(op: str, ring: Ring) -> None:
    """Refuses parts of a ring that overlap: what is written to one must not appear in another."""
    parts = _parts(ring)
    if torch.compiler.is_compiling() or any(part.is_meta for part in parts.values()):
        return
    begins = sorted((part.data_ptr(), part.nbytes, name) for name, part in parts.items())
    for (begin, size, name), (next_begin, _, next_name) in pairwise(begins):
        if next_begin < begin + size:
            raise ValueError(f"{op}: the parts of ring must not overlap in memory, got {name} and {next_name} that do")
