"""memory_attention: local attention fused with attention to retrieved memory chunks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .._checks import (
    COMPUTE_DTYPES,
    QUANTISED_DTYPE,
    Sizes,
    check_device,
    check_differentiation,
    check_dtype,
    check_frozen,
    check_integer,
    check_last_axis_contiguous,
    check_number,
    check_range,
    check_ring_index,
    check_truth,
    packed,
    packed_last_axis,
)
from .._dispatch import choose
from .._plans import Plan, Plans, without_autograd
from .reference import memory_attention_reference, memory_share

OP = "memory_attention"
FUSIONS = ("gated", "joint")
AUTOCAST_DEVICES = ("cpu", "cuda")


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    chunk_ids: Tensor,
    *,
    memory_query: Tensor | None = None,
    memory_scale: Tensor | None = None,
    ring_index: Tensor | None = None,
    gate: Tensor | None = None,
    fusion: str = "gated",
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    return_lse: bool = False,
    return_memory_share: bool = False,
    impl: str = "auto",
) -> Any:
    """Each query attends to its local keys and to the C tokens of each of its K chunks, read from the bank by id.

    "gated" (LongMem, section 2.3): two softmaxes, `out = (1 - g) * local + g * memory` with `g = sigmoid(gate[h])`; the
    official code's `memory_bias` is this `gate`. "joint": one softmax over local and memory scores. A query all of
    whose ids are -1 gets pure local attention, without the gate. Kernels never materialise the gathered chunks, and
    their gradients are deterministic. Under autocast, float32 queries, keys and values are cast as PyTorch casts those
    of `scaled_dot_product_attention`; memory stays as it is stored.

    Args:
        query: [B, H, T, D] float32, bfloat16, float16 (float64 in the reference). Its last axis, and those of `key`,
            `value`, `memory_query` and the memory, must be contiguous; all other strides are free, also of gradients.
        key, value: [B, G, S, D], S >= T and H % G == 0; the queries are the last T of the S positions. S = 0 is memory
            alone: no query sees a local key.
        memory_key, memory_value: [R, G, M, C, D] (`Ring.key`, `Ring.value`). Not differentiable: memory comes from a
            frozen encoder.
        chunk_ids: [B, H, T, K] int32, slots in [0, M), or -1 for none (`chunk_topk`). On CUDA, ids outside [-1, M), and
            all ids of a row whose ring does not exist, are treated as -1 unless `debug_checks(True)` makes them an
            error, as they always are on CPU: a ValueError, of compiled code a RuntimeError.
        memory_query: [B, H, T, D], what meets the memory keys; default `query`. With rotary positions memory holds
            unrotated keys, and this is the unrotated query.
        memory_scale: [R, G, M, 2] float32, with float8_e4m3fn memory alone: what the stored keys (0) and values (1) of
            a chunk are multiplied by (`Ring.scale`).
        ring_index: [B] int32 in [0, R). Left out: row b reads ring b when R == B, ring 0 when R == 1.
        gate: [H] logits, used in float32; needed by "gated", refused by "joint".
        scale: multiplies the scores, local and memory; default D^-0.5.
        alibi_slopes: [H], used in float32; local scores get `-slope * distance` (Press et al. 2022), memory
            scores nothing. Not differentiable.
        causal: a query sees no later key.
        window: a query sees only the last `window` positions, itself included; needs `causal`.
        key_mask: [B, S] bool, False for local keys that no query may see (padding). A query that sees no local key has
            local output 0.
        dropout_p: probability in [0, 1) with which a local attention weight becomes 0, the others being divided by
            1 - p; memory weights are kept. (As in LongMem's published training code.)
        dropout_seed: an integer, or int64 [1] on the device of `query`, that fixes which weights are dropped, the same
            ones in every implementation; default: drawn from PyTorch's generator of that device.
        return_lse: also return both log-sum-exps.
        return_memory_share: also return the memory's share of the output.
        impl: "auto", "triton", "cpp" or "reference".

    Returns:
        out [B, H, T, D] in the dtype of `query`; when asked for, a tuple of it and, in this order,
        local_lse, memory_lse: [B, H, T] float32 (float64 for float64 inputs), natural logarithm of the sum of the
            exponentials of the scaled scores, -inf where nothing was seen; dropout has no part in them.
        memory_share: [B, H, T] float32, the weight that memory has in `out`: sigmoid(gate) or, joint, the memory's part
            of the softmax; 0 where no memory was found.
        All of them are differentiable: any number of times and in forward mode by the reference, once and in reverse
        mode by kernels, which refuse the rest. What a query does not see has no part in its results nor in gradients
        that come from it, be it NaN or infinite; what it sees is computed with, and NaN stays NaN.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was wanted and what came.
        RuntimeError: `impl` cannot run here.
        NotImplementedError: differentiated as kernels are not, there or in the backward pass.
    """
    query, key, value, memory_query = _autocast(query, key, value, memory_query)
    tensors = (
        query, key, value, memory_key, memory_value, chunk_ids, memory_query, memory_scale, ring_index, gate,
        alibi_slopes, key_mask,
    )  # fmt: skip
    options = (fusion, scale, causal, window, dropout_p, return_lse, return_memory_share, impl)
    plan = _plans.find(tensors, options)
    seed = None if plan.dropout_p == 0 and dropout_seed is None else _seed(plan.dropout_p, dropout_seed, query.device)
    gate, alibi_slopes = packed(gate), packed(alibi_slopes)
    if plan.float32_vectors:
        gate, alibi_slopes = _float32(gate), _float32(alibi_slopes)
    out, _, local_lse, _, memory_lse = plan.run(
        lambda: _check_values(memory_key, chunk_ids, ring_index),
        query, key, value, query if memory_query is None else memory_query, memory_key, memory_value,
        packed_last_axis(chunk_ids), packed(memory_scale), packed(ring_index), gate, alibi_slopes, key_mask, seed,
        fusion, plan.scale, causal, plan.window, plan.dropout_p,
    )  # fmt: skip
    extra: tuple[Tensor, ...] = (local_lse, memory_lse) if return_lse else ()
    if return_memory_share:
        extra += (memory_share(local_lse, memory_lse, gate),)
    return (out, *extra) if extra else out


@dataclass(frozen=True)
class _Plan(Plan):
    """
    Attributes:
        scale, window, dropout_p: as the kernels take them.
        float32_vectors: the kernel wants `gate` and `alibi_slopes` in float32.
    """

    scale: float
    window: int | None
    dropout_p: float
    float32_vectors: bool


def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    chunk_ids: Tensor,
    memory_query: Tensor | None,
    memory_scale: Tensor | None,
    ring_index: Tensor | None,
    gate: Tensor | None,
    alibi_slopes: Tensor | None,
    key_mask: Tensor | None,
    fusion: str,
    scale: float | None,
    causal: bool,
    window: int | None,
    dropout_p: float,
    return_lse: bool,
    return_memory_share: bool,
    impl: str,
) -> _Plan:
    op, sizes = OP, Sizes(OP)
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
    if 0 < sizes["S"] < sizes["T"]:
        raise ValueError(f"{op}: S must be 0 or at least T, got S={sizes['S']} keys for T={sizes['T']} queries")
    _check_vectors(op, sizes, gate=gate, alibi_slopes=alibi_slopes)
    if key_mask is not None:
        sizes.bind("key_mask", key_mask, "B S")
        check_dtype(op, "key_mask", key_mask, (torch.bool,))
    check_ring_index(op, ring_index, sizes)
    check_dtype(op, "chunk_ids", chunk_ids, (torch.int32,))
    window = _check_options(op, fusion, gate, causal, window)
    check_truth(op, "return_lse", return_lse)
    check_truth(op, "return_memory_share", return_memory_share)
    scale = sizes["D"] ** -0.5 if scale is None else check_number(op, "scale", scale)
    _check_tensors(op, query, key, value, memory_query, memory_key, memory_value)
    _check_scale(op, sizes, memory_key, memory_scale)
    check_frozen(op, "it is not differentiable", memory_scale=memory_scale, alibi_slopes=alibi_slopes)
    device = query.device
    check_device(op, device, chunk_ids=chunk_ids, ring_index=ring_index, gate=gate, alibi_slopes=alibi_slopes)
    check_device(op, device, memory_scale=memory_scale, key_mask=key_mask)
    dropout_p = check_number(op, "dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must lie in [0, 1), got {dropout_p}")
    name = choose(op, impl, device, (query.dtype, memory_key.dtype), sizes["D"])
    if name == "reference":
        return _Plan(_reference, False, scale, window, dropout_p, False)
    check_differentiation(op, name, query, key, value, memory_query, memory_key, memory_value, gate, alibi_slopes)
    kernel = getattr(torch.ops.longmem, f"{op}_{name}").default
    if not any(x is not None and x.requires_grad for x in (query, key, value, memory_query, gate)):
        kernel = without_autograd(kernel)
    return _Plan(kernel, name == "cpp", scale, window, dropout_p, True)


def _check_values(memory_key: Tensor, chunk_ids: Tensor, ring_index: Tensor | None) -> None:
    check_range(OP, "ring_index", ring_index, 0, memory_key.shape[0])
    check_range(OP, "chunk_ids", chunk_ids, -1, memory_key.shape[2])


def _reference(*arguments: Any) -> tuple[Tensor, None, Tensor, None, Tensor]:
    """The reference, with its results as the ops return theirs."""
    with _no_autocast(arguments[0].device.type):  # which would cast its matrix products once more
        out, local_lse, memory_lse = memory_attention_reference(*arguments)
    return out, None, local_lse, None, memory_lse


_plans = Plans(_plan)


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32)


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts float32 to autocast's dtype, as autocast does for PyTorch's own attention."""
    device = next((tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)), "")
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in tensors)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if device in AUTOCAST_DEVICES else nullcontext()


def _seed(dropout_p: float, dropout_seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    """int64 [1] on the device; None without dropout."""
    op = OP
    if dropout_seed is None:
        return torch.randint(2**63 - 1, (1,), device=device) if dropout_p else None
    if isinstance(dropout_seed, Tensor):
        Sizes(op).bind("dropout_seed", dropout_seed, "1")
        if dropout_seed.dtype != torch.int64 or dropout_seed.device != device:
            raise ValueError(
                f"{op}: dropout_seed must be an integer or int64 [1] on {device}, got {dropout_seed.dtype}"
                f" on {dropout_seed.device}"
            )
        return dropout_seed if dropout_p else None
    if not isinstance(dropout_seed, Integral) or isinstance(dropout_seed, bool):
        raise TypeError(
            f"{op}: dropout_seed must be an integer or int64 [1] on {device}, got {type(dropout_seed).__name__}"
        )
    if not -(2**63) <= dropout_seed < 2**63:
        raise ValueError(f"{op}: dropout_seed must fit into 64 bits, got {dropout_seed}")
    return torch.tensor([int(dropout_seed)], device=device) if dropout_p else None


def _check_vectors(op: str, sizes: Sizes, **vectors: Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is not None:
            sizes.bind(name, vector, "H")
            check_dtype(op, name, vector, COMPUTE_DTYPES)


def _check_scale(op: str, sizes: Sizes, memory_key: Tensor, memory_scale: Tensor | None) -> None:
    if (memory_key.dtype == QUANTISED_DTYPE) != (memory_scale is not None):
        wanted = "needs memory_scale [R, G, M, 2]" if memory_scale is None else "takes no memory_scale"
        raise ValueError(
            f"{op}: {memory_key.dtype} memory {wanted}, got {'none' if memory_scale is None else 'one'} (`Ring.scale`)"
        )
    if memory_scale is not None:
        sizes.bind("memory_scale", memory_scale, "R G M 2")
        check_dtype(op, "memory_scale", memory_scale, (torch.float32,))


def _check_options(op: str, fusion: str, gate: Tensor | None, causal: bool, window: int | None) -> int | None:
    if fusion not in FUSIONS:
        raise ValueError(f"{op}: fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
    if (gate is not None) != (fusion == "gated"):
        wanted = "needs gate [H]" if fusion == "gated" else "takes no gate"
        raise ValueError(f"{op}: fusion={fusion!r} {wanted}, got {'none' if gate is None else 'one'}")
    check_truth(op, "causal", causal)
    if window is None:
        return None
    if not causal:
        raise ValueError(f"{op}: window needs causal=True, got window={window!r}, causal={causal}")
    return check_integer(op, "window", window, 1)


def _check_tensors(
    op: str, query: Tensor, key: Tensor, value: Tensor, memory_query: Tensor, memory_key: Tensor, memory_value: Tensor
) -> None:
    check_dtype(op, "query", query, COMPUTE_DTYPES)
    check_dtype(op, "memory_key", memory_key, (*COMPUTE_DTYPES, QUANTISED_DTYPE))
    for name, tensor in (("key", key), ("value", value), ("memory_query", memory_query)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
    if memory_value.dtype != memory_key.dtype:
        raise TypeError(
            f"{op}: memory_value must have the dtype of memory_key, {memory_key.dtype}, got {memory_value.dtype}"
        )
    why = "the memory bank comes from a frozen encoder and is not differentiable"
    check_frozen(op, why, memory_key=memory_key, memory_value=memory_value)
    check_device(op, query.device, key=key, value=value, memory_query=memory_query)
    check_device(op, query.device, memory_key=memory_key, memory_value=memory_value)
    check_last_axis_contiguous(op, query=query, key=key, value=value, memory_query=memory_query)
    check_last_axis_contiguous(op, memory_key=memory_key, memory_value=memory_value)
