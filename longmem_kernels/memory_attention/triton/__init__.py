"""memory_attention in Triton.

Local attention and memory attention are two softmaxes, each with its output and log-sum-exp. Both fusions are
`out = (1 - share) * local + share * memory`: "gated" has share = sigmoid(gate), "joint" the memory's share of the sum
of exponentials; share = 0 where no memory was found. So the kernels of either part never see the other.

    views.py    pointers and strides in named tuples    softmax.py   online softmax, fusion
    tiles.py    tile sizes                              scores.py    masks, ALiBi, dropout
    local.py    attention to local keys                 gather.py    attention to retrieved tokens
    forward.py, decode.py, backward.py, backward_keys.py    the kernels

Prefixes of names inside kernels: see `longmem_kernels/_triton.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longmem_kernels import _tiles
from longmem_kernels._tiles import blocks
from longmem_kernels._triton import Rows

from .backward import (
    memory_attention_memory_query_grad_kernel,
    memory_attention_offset_kernel,
    memory_attention_query_grad_kernel,
)
from .backward_keys import memory_attention_key_value_grad_kernel
from .decode import Splits, memory_attention_decode_kernel, memory_attention_decode_merge_kernel
from .forward import memory_attention_local_kernel, memory_attention_memory_kernel
from .tiles import Options, decode_plan, gather_tiles, local_tiles, splits_of
from .views import Call, Part, RowTerms

DECODE_QUERIES = 16  # of a head, at most


def few_queries(T: int) -> bool:
    """True if a call is for the kernels of decode.py: whatever else it asks for, they can do it."""
    return T <= DECODE_QUERIES


def memory_attention_forward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `memory_attention`.

    Returns:
        out [B, H, T, D]; for the backward pass, in float32, local_out [B, H, T, D], local_lse [B, H, T], memory_out and
        memory_lse likewise (0 and -inf where no chunk was found).
    """
    query = call.query.ptr
    out = query.new_empty(query.shape)
    local, memory = (
        Part(query.new_empty(query.shape, dtype=torch.float32), query.new_empty(query.shape[:3], dtype=torch.float32))
        for _ in range(2)
    )
    if out.numel() > 0:
        launch = _decode if few_queries(call.sizes.T) else _prefill
        with torch.cuda.device_of(query):
            launch(call, out, local, memory)
    return out, *local, *memory


def _prefill(call: Call, out: Tensor, local: Part, memory: Part) -> None:
    (B, H, T, D), G, constants = out.shape, call.sizes.G, call.constants
    gather = _gather_tiles("memory_attention_memory_kernel", call)
    memory_attention_memory_kernel[(blocks(T, gather["BT"]) * B * H,)](
        call.memory_query, call.bank, call.ids, memory, B, H, G, T, call.scale, **constants, **gather
    )
    tiles = _local_tiles("memory_attention_local_kernel", call, dropout=call.dropout is not None)
    memory_attention_local_kernel[(blocks(T, tiles["BT"]) * H * B,)](
        call.query, call.key, call.value, call.gate, call.slopes, call.key_mask, call.dropout, memory, out, local,
        call.sizes, call.scale, call.window,
        CAUSAL=call.causal, RISING=call.scale > 0, D=D, BD=constants["BD"], **tiles,
    )  # fmt: skip


def _decode(call: Call, out: Tensor, local: Part, memory: Part) -> None:
    (B, H, T, D), (_, G, _, S), constants = out.shape, call.sizes, call.constants
    plan = decode_plan(
        _tiles.capability(out.device), _tiles.kind(out.dtype), B, H, G, T, D, constants["K"] * constants["C"]
    )
    first_key = 0 if call.window is None else max(0, S - T - call.window + 1) // plan.BS * plan.BS
    keys, local_splits = splits_of(S - first_key, plan.BS, plan.blocks, plan.programs)
    rows, local_programs, splits = B * H * T, plan.blocks * local_splits, local_splits + plan.memory_splits
    part = Part(
        out.new_empty((rows, splits, D), dtype=torch.float32), out.new_empty((rows, splits), dtype=torch.float32)
    )
    memory_attention_decode_kernel[(local_programs + rows * plan.memory_splits,)](
        call.query, call.key, call.value, call.slopes, call.key_mask, call.dropout,
        call.memory_query, call.bank, call.ids, part, call.sizes, call.scale, call.window,
        Splits(first_key, keys, plan.tokens, local_splits, plan.memory_splits, local_programs),
        CAUSAL=call.causal, **constants, **plan.decode,
    )  # fmt: skip
    memory_attention_decode_merge_kernel[(rows,)](
        part, call.gate, out, local, memory, H, T, local_splits, splits,
        1.0 if call.dropout is None else call.dropout.kept_scale, **plan.merge,
    )  # fmt: skip


def _local_tiles(kernel: str, call: Call, **facts: bool) -> Options:
    query = call.query.ptr
    return local_tiles(kernel, _tiles.capability(query.device), _tiles.kind(query.dtype), query.shape[-1], **facts)


def _gather_tiles(kernel: str, call: Call) -> Options:
    key, constants = call.bank.key.ptr, call.constants
    tokens = constants["K"] * constants["C"]
    return gather_tiles(kernel, _tiles.capability(key.device), key.element_size(), constants["D"], tokens)


def memory_attention_backward(
    call: Call,
    grad: Tensor | None,
    local_lse_grad: Tensor | None,
    memory_lse_grad: Tensor | None,
    local: Part,
    memory: Part,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `memory_attention_forward`: dquery, dkey, dvalue, dmemory_query, and dgate [H] float32.

    Of its outputs, the result and the log-sum-exps have gradients; None stands for zeros. dquery is the part through
    the local scores, dmemory_query the part through the memory scores; when one tensor is both, autograd adds them.
    dgate is zero for "joint". Bit-equal from run to run.
    """
    query, key = call.query.ptr, call.key.ptr
    query_grad, memory_query_grad = query.new_empty(query.shape), query.new_empty(query.shape)
    key_grad, value_grad = key.new_empty(key.shape), key.new_empty(key.shape)
    gate_grad = torch.zeros(query.shape[:3], dtype=torch.float32, device=query.device)
    if query.numel() == 0:
        return query_grad, key_grad.zero_(), value_grad.zero_(), memory_query_grad, gate_grad.sum((0, 2))

    if grad is None:
        grad = query.new_zeros(query.shape[-1]).expand(query.shape)
    elif grad.stride(-1) != 1:  # as of out.sum().backward(): one number, expanded
        grad = grad.contiguous()
    lse_grads = (None if x is None else x.contiguous() for x in (local_lse_grad, memory_lse_grad))
    local_terms, memory_terms = (RowTerms(torch.empty_like(gate_grad), torch.empty_like(gate_grad)) for _ in range(2))
    rows, constants = Rows.of(grad), call.constants
    (B, H, T, D), G, S, BD = query.shape, call.sizes.G, call.sizes.S, constants["BD"]
    local_arguments = (call.query, call.key, call.value, call.slopes, call.key_mask, call.dropout, local_terms)
    with torch.cuda.device_of(query):
        BT = max(1, 2048 // BD)
        memory_attention_offset_kernel[(blocks(T, BT) * H * B,)](
            rows, *lse_grads, local, memory, call.gate, local_terms, memory_terms, gate_grad, H, T,
            D=D, BT=BT, BD=BD, num_warps=4,
        )  # fmt: skip
        gather = _gather_tiles("memory_attention_memory_query_grad_kernel", call)
        memory_attention_memory_query_grad_kernel[(blocks(T, gather["BT"]) * B * H,)](
            rows, call.memory_query, call.bank, call.ids, memory_terms, memory_query_grad, B, H, G, T, call.scale,
            **constants, **gather,
        )  # fmt: skip
        tiles = _local_tiles("memory_attention_query_grad_kernel", call)
        memory_attention_query_grad_kernel[(blocks(T, tiles["BT"]) * H * B,)](
            rows, *local_arguments, query_grad, call.sizes, call.scale, call.window,
            CAUSAL=call.causal, D=D, BD=BD, **tiles,
        )  # fmt: skip
        tiles = _local_tiles("memory_attention_key_value_grad_kernel", call, dropout=call.dropout is not None)
        memory_attention_key_value_grad_kernel[(blocks(S, tiles["BS"]) * G * B,)](
            rows, *local_arguments, key_grad, value_grad, call.sizes, call.scale, call.window,
            GROUP=H // G, CAUSAL=call.causal, D=D, BD=BD, **tiles,
        )  # fmt: skip
    return query_grad, key_grad, value_grad, memory_query_grad, gate_grad.sum((0, 2))
