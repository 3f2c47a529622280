"""memory_attention: local attention fused with attention to retrieved memory chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import (
    COMPUTE_DTYPES,
    Sizes,
    check_device,
    check_dtype,
    check_last_axis_contiguous,
    check_range,
    check_ring_index,
    packed,
)
from .._dispatch import choose
from .reference import memory_attention_reference

FUSIONS = ("gated", "joint")


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    chunk_ids: Tensor,
    *,
    memory_query: Tensor | None = None,
    ring_index: Tensor | None = None,
    gate: Tensor | None = None,
    fusion: str = "gated",
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Each query attends to its local keys and to the C tokens of each of its K chunks, read from the bank by id.

    "gated" (LongMem, section 2.3): two softmaxes, `out = (1 - g) * local + g * memory` with `g = sigmoid(gate[h])`; the
    official code's `memory_bias` is this `gate`. "joint": one softmax over local and memory scores. A query all of
    whose ids are -1 gets pure local attention, without the gate. Kernels never materialise the gathered chunks, and
    their gradients are deterministic.

    Args:
        query: [B, H, T, D] float32, bfloat16, float16 (float64 in the reference).
        key, value: [B, G, S, D], S >= T and H % G == 0; the queries are the last T of the S positions.
        memory_key, memory_value: [R, G, M, C, D], any strides with a contiguous last axis (`Ring.key`, `Ring.value`).
            Not differentiable: memory comes from a frozen encoder.
        chunk_ids: [B, H, T, K] int32, slots in [0, M), or -1 for none (`chunk_topk`). On CUDA, ids outside [-1, M) are
            treated as -1 unless `debug_checks(True)` makes them an error, as they always are on CPU.
        memory_query: [B, H, T, D], what meets the memory keys; default `query`. With rotary positions memory holds
            unrotated keys, and this is the unrotated query.
        ring_index: [B] int32 in [0, R). Left out: row b reads ring b when R == B, ring 0 when R == 1.
        gate: [H] logits, used in float32; needed by "gated", refused by "joint".
        scale: multiplies the scores, local and memory; default D^-0.5.
        alibi_slopes: [H], used in float32; local scores get `-slope * distance` (Press et al. 2022), memory
            scores nothing.
        causal: a query sees no later key.
        window: a query sees only the last `window` positions, itself included; needs `causal`.
        impl: "auto", "triton", "cpp" or "reference".

    Returns:
        [B, H, T, D] in the dtype of `query`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was wanted and what came.
        RuntimeError: `impl` cannot run here.
    """
    op = "memory_attention"
    sizes = Sizes(op)
    sizes.bind("query", query, "B H T D")
    sizes.bind("key", key, "B G S D")
    sizes.bind("value", value, "B G S D")
    sizes.bind("memory_key", memory_key, "R G M C D")
    sizes.bind("memory_value", memory_value, "R G M C D")
    sizes.bind("chunk_ids", chunk_ids, "B H T K")
    sizes.positive("H", "D", "R", "M", "C", "K")
    sizes.grouped()
    if memory_query is None:
        memory_query = query
    sizes.bind("memory_query", memory_query, "B H T D")
    if sizes["S"] < sizes["T"]:
        raise ValueError(f"{op}: S must be at least T, got S={sizes['S']} keys for T={sizes['T']} queries")
    if gate is not None:
        sizes.bind("gate", gate, "H")
        check_dtype(op, "gate", gate, COMPUTE_DTYPES)
    if alibi_slopes is not None:
        sizes.bind("alibi_slopes", alibi_slopes, "H")
        check_dtype(op, "alibi_slopes", alibi_slopes, COMPUTE_DTYPES)
    check_ring_index(op, ring_index, sizes)
    check_dtype(op, "chunk_ids", chunk_ids, (torch.int32,))
    check_range(op, "chunk_ids", chunk_ids, -1, sizes["M"])
    _check_options(op, fusion, gate, causal, window)
    _check_tensors(op, query, key, value, memory_query, memory_key, memory_value)
    check_device(op, query.device, chunk_ids=chunk_ids, ring_index=ring_index, gate=gate, alibi_slopes=alibi_slopes)
    scale = sizes["D"] ** -0.5 if scale is None else float(scale)
    ring_index, gate, alibi_slopes = packed(ring_index), packed(gate), packed(alibi_slopes)

    name = choose(op, impl, query.device, (query.dtype, memory_key.dtype), sizes["D"])
    tensors = (query, key, value, memory_query, memory_key, memory_value, chunk_ids, ring_index)
    options = (fusion, scale, causal, window)
    if name == "reference":
        return memory_attention_reference(*tensors, gate, alibi_slopes, *options)
    gate, alibi_slopes = _float32(gate), _float32(alibi_slopes)
    return getattr(torch.ops.longmem, f"memory_attention_{name}")(*tensors, gate, alibi_slopes, *options)[0]


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32)


def _check_options(op: str, fusion: str, gate: Tensor | None, causal: bool, window: int | None) -> None:
    if fusion not in FUSIONS:
        raise ValueError(f"{op}: fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
    if (gate is not None) != (fusion == "gated"):
        wanted = "needs gate [H]" if fusion == "gated" else "takes no gate"
        raise ValueError(f"{op}: fusion={fusion!r} {wanted}, got {'none' if gate is None else 'one'}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"{op}: window must be at least 1 and needs causal=True, got window={window}, causal={causal}")


def _check_tensors(
    op: str, query: Tensor, key: Tensor, value: Tensor, memory_query: Tensor, memory_key: Tensor, memory_value: Tensor
) -> None:
    check_dtype(op, "query", query, COMPUTE_DTYPES)
    check_dtype(op, "memory_key", memory_key, COMPUTE_DTYPES)
    for name, tensor in (("key", key), ("value", value), ("memory_query", memory_query)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
    if memory_value.dtype != memory_key.dtype:
        raise TypeError(
            f"{op}: memory_value must have the dtype of memory_key, {memory_key.dtype}, got {memory_value.dtype}"
        )
    for name, tensor in (("memory_key", memory_key), ("memory_value", memory_value)):
        if tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} must not require grad: the memory bank comes from a frozen encoder and is not"
                " differentiable; pass a detached tensor"
            )
    check_device(op, query.device, key=key, value=value, memory_query=memory_query)
    check_device(op, query.device, memory_key=memory_key, memory_value=memory_value)
    check_last_axis_contiguous(op, query=query, key=key, value=value, memory_query=memory_query)
    check_last_axis_contiguous(op, memory_key=memory_key, memory_value=memory_value)
