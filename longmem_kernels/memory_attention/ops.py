"""Schemas, fakes, autograd and the Triton registration of the memory_attention kernels; C++ registers itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._checks import QUANTISED_DTYPE, STORAGE_DTYPES, KernelArguments
from .._dispatch import KERNEL_HEAD_DIMS
from .._extension import library

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor memory_query, Tensor memory_key, Tensor memory_value,"
    " Tensor chunk_ids, Tensor? memory_scale, Tensor? ring_index, Tensor? gate, Tensor? alibi_slopes,"
    " Tensor? key_mask, Tensor? dropout_seed"
)
_OPTIONS = "str fusion, float scale, bool causal, int? window, float dropout_p"
_INPUT_COUNT, _OPTION_COUNT, _GATE = 13, 5, 9  # how many there are, and the gate's place among the inputs
# out [B, H, T, D]; local_out, memory_out [B, H, T, D] and their log-sum-exps [B, H, T], all in float32, kept for
# backward: rounded to 16 bits they would make the gate's gradient, a small difference of long sums, inexact.
# Differentiable: out and the log-sum-exps.
KERNELS = ("triton", "cpp")
for _kernel in KERNELS:
    library.define(f"memory_attention_{_kernel}({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
    library.define(
        f"memory_attention_backward_{_kernel}(Tensor? grad, Tensor? local_lse_grad, Tensor? memory_lse_grad, {_INPUTS},"
        f" {_OPTIONS}, Tensor local_out, Tensor local_lse, Tensor memory_out, Tensor memory_lse)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


def _fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def part() -> Tensor:
        return query.new_empty(query.shape, dtype=torch.float32)

    def lse() -> Tensor:
        return query.new_empty(query.shape[:3], dtype=torch.float32)

    return query.new_empty(query.shape), part(), lse(), part(), lse()


def _fake_backward(
    grad: Tensor | None,
    local_lse_grad: Tensor | None,
    memory_lse_grad: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dquery, dmemory_query = query.new_empty(query.shape), query.new_empty(query.shape)
    dkey, dvalue = key.new_empty(key.shape), key.new_empty(key.shape)
    return dquery, dkey, dvalue, dmemory_query, query.new_empty(query.shape[1], dtype=torch.float32)


@torch.library.impl("longmem::memory_attention_triton", ("CUDA", "CPU"))
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .triton import Call, memory_attention_forward  # on first use, so that the package imports without Triton

    _check(*args[:_INPUT_COUNT], window=args[-2])
    return memory_attention_forward(Call.of(*args))


@torch.library.impl("longmem::memory_attention_backward_triton", ("CUDA", "CPU"))
def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .triton import Call, Part, memory_attention_backward

    grad, local_lse_grad, memory_lse_grad, *inputs = args[: 3 + _INPUT_COUNT]
    arguments = _check(*inputs, window=args[-6])
    query = inputs[0]
    arguments.expect("grad", grad, query.shape, query.dtype, any_strides=True)
    for lse_grad in (local_lse_grad, memory_lse_grad):
        arguments.expect("a log-sum-exp's gradient", lse_grad, query.shape[:3], torch.float32, any_strides=True)
    for out, lse in zip(args[-4::2], args[-3::2], strict=True):
        arguments.expect("local_out or memory_out", out, query.shape, torch.float32, whole=True)
        arguments.expect("local_lse or memory_lse", lse, query.shape[:3], torch.float32, whole=True)
    call, saved = Call.of(*args[3:-4]), args[-4:]
    return memory_attention_backward(call, grad, local_lse_grad, memory_lse_grad, Part(*saved[:2]), Part(*saved[2:]))


def _check(
    query: Tensor, key: Tensor, value: Tensor, memory_query: Tensor, memory_key: Tensor, memory_value: Tensor,
    chunk_ids: Tensor, memory_scale: Tensor | None, ring_index: Tensor | None, gate: Tensor | None,
    alibi_slopes: Tensor | None, key_mask: Tensor | None, dropout_seed: Tensor | None, *, window: int | None,
) -> KernelArguments:  # fmt: skip
    """Checks the arguments of the Triton kernels; the C++ kernels check their own."""
    arguments = KernelArguments("memory_attention", query)
    ranks = (query.dim(), key.dim(), memory_key.dim(), chunk_ids.dim())
    arguments.require(
        ranks == (4, 4, 5, 4), "query, key, memory_key and chunk_ids must have 4, 4, 5 and 4 axes", *ranks
    )
    (B, H, T, D), (_, G, S, _), (R, _, M, C, _) = query.shape, key.shape, memory_key.shape
    K, dtype, stored = chunk_ids.shape[3], query.dtype, memory_key.dtype
    arguments.heads(H, G, D, KERNEL_HEAD_DIMS)
    arguments.require(min(R, M, C, K) > 0 and M < 2**31, "R, M, C and K must be at least 1", R, M, C, K)
    arguments.require(S == 0 or S >= T, "S must be 0 or at least T", S, T)
    arguments.require(window is None or window > 0, "window must be at least 1", window)
    arguments.require(dtype in STORAGE_DTYPES, "query must be of 16 or 32 bits", dtype)
    arguments.require(stored in (*STORAGE_DTYPES, QUANTISED_DTYPE), "memory_key must be of 8, 16 or 32 bits", stored)
    arguments.require(
        (stored == QUANTISED_DTYPE) == (memory_scale is not None),
        "float8_e4m3fn memory needs memory_scale, others take none",
        stored,
    )
    for name, local in (("query", query), ("memory_query", memory_query)):
        arguments.expect(name, local, (B, H, T, D), dtype)
    for name, local in (("key", key), ("value", value)):
        arguments.expect(name, local, (B, G, S, D), dtype)
    for name, bank in (("memory_key", memory_key), ("memory_value", memory_value)):
        arguments.expect(name, bank, (R, G, M, C, D), stored)
    arguments.expect("chunk_ids", chunk_ids, (B, H, T, K), torch.int32, any_strides=True)
    arguments.expect("memory_scale", memory_scale, (R, G, M, 2), torch.float32, whole=True)
    for name, vector in (("gate", gate), ("alibi_slopes", alibi_slopes)):
        arguments.expect(name, vector, (H,), torch.float32, whole=True)
    arguments.expect("key_mask", key_mask, (B, S), torch.bool, any_strides=True)
    arguments.expect("dropout_seed", dropout_seed, (1,), torch.int64)
    arguments.ring_index(ring_index, B, R)
    return arguments


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, local_out, local_lse, memory_out, memory_lse = output
    ctx.mark_non_differentiable(local_out, memory_out)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-_OPTION_COUNT], local_out, local_lse, memory_out, memory_lse)
    ctx.options = inputs[-_OPTION_COUNT:]


def _differentiate(
    kernel: str,
    ctx: Any,
    grad: Tensor | None,
    _local_out: None,
    local_lse_grad: Tensor | None,
    _memory_out: None,
    memory_lse_grad: Tensor | None,
) -> tuple[Tensor | None, ...]:
    *inputs, local_out, local_lse, memory_out, memory_lse = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * (len(inputs) + _OPTION_COUNT)
    grads = (grad, local_lse_grad, memory_lse_grad)
    if any(given is not None for given in grads):
        backward = getattr(torch.ops.longmem, f"memory_attention_backward_{kernel}")
        *gradients[:4], dgate = backward(*grads, *inputs, *ctx.options, local_out, local_lse, memory_out, memory_lse)
        gradients[_GATE] = None if inputs[_GATE] is None else dgate
    return tuple(gradients)


def _refuse(kernel: str, ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        f"memory_attention: gradients of gradients (create_graph=True) are not implemented by impl={kernel!r};"
        ' ask for impl="reference", which is differentiable any number of times'
    )


for _kernel in KERNELS:
    torch.library.register_fake(f"longmem::memory_attention_{_kernel}", _fake)
    torch.library.register_fake(f"longmem::memory_attention_backward_{_kernel}", _fake_backward)
    torch.library.register_autograd(f"longmem::memory_attention_backward_{_kernel}", partial(_refuse, _kernel))
    torch.library.register_autograd(
        f"longmem::memory_attention_{_kernel}", partial(_differentiate, _kernel), setup_context=_save
    )
