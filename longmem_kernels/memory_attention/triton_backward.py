"""memory_attention in Triton, backward: a kernel for each gradient, none of which adds into memory another one writes.

With p a softmax weight of its own part, and w that part's share of the output (see _triton_common), the gradient of
its score is `p * (w * (grad . value) - delta)`, where `delta = w * grad . x`, and x is the part's own output ("gated":
two softmaxes) or the fused output ("joint": one softmax). The first kernel makes w and the deltas, one number per row;
the others recompute the scores.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem_kernels._triton import dot, narrow, ring_of_row
from longmem_kernels.memory_attention._triton_common import (
    fusion_share,
    local_backward_tiles,
    local_scores,
    memory_tiles,
    retrieved_tokens,
    seen_keys,
)


@triton.jit
def memory_attention_delta_kernel(
    p_grad, p_local_out, p_local_lse, p_memory_out, p_memory_lse, p_gate,
    p_share, p_local_delta, p_memory_delta, p_gate_grad,
    s_grad_b, s_grad_h, s_grad_t, H, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Per row: the memory's share of the output, the deltas of both parts, and the row's term of the gate gradient."""
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0).to(tl.int64)
    i_block = (pid % blocks).to(tl.int32)
    i_h = pid // blocks % H
    i_b = pid // blocks // H
    o_t = i_block * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    m_tile = m_t[:, None] & (o_d < D)[None, :]
    o_row = (i_b * H + i_h) * T + o_t
    o_tile = o_row[:, None] * D + o_d[None, :]
    p_grad += i_b * s_grad_b + i_h * s_grad_h
    b_grad = tl.load(p_grad + o_t.to(tl.int64)[:, None] * s_grad_t + o_d[None, :], mask=m_tile, other=0.0)
    b_local = tl.load(p_local_out + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_memory = tl.load(p_memory_out + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_local_lse = tl.load(p_local_lse + o_row, mask=m_t, other=0.0)
    b_memory_lse = tl.load(p_memory_lse + o_row, mask=m_t, other=float("-inf"))

    b_share = fusion_share(b_local_lse, b_memory_lse, p_gate, i_h)
    b_local_dot = tl.sum(b_grad.to(tl.float32) * b_local, axis=1)
    b_memory_dot = tl.sum(b_grad.to(tl.float32) * b_memory, axis=1)
    if p_gate is not None:
        gate_grad = b_share * (1 - b_share) * (b_memory_dot - b_local_dot)  # share is 0 where nothing was found
        tl.store(p_gate_grad + o_row, gate_grad, mask=m_t)
    else:
        b_out_dot = (1 - b_share) * b_local_dot + b_share * b_memory_dot
        b_local_dot = b_out_dot
        b_memory_dot = b_out_dot
    tl.store(p_share + o_row, b_share, mask=m_t)
    tl.store(p_local_delta + o_row, (1 - b_share) * b_local_dot, mask=m_t)
    tl.store(p_memory_delta + o_row, b_share * b_memory_dot, mask=m_t)


@triton.jit
def memory_attention_memory_query_grad_kernel(
    p_grad, p_query, p_key, p_value, p_ids, p_ring_index, p_lse, p_share, p_delta, p_query_grad,
    s_grad_b, s_grad_h, s_grad_t, s_query_b, s_query_h, s_query_t,
    s_key_r, s_key_g, s_key_m, s_key_c,
    s_value_r, s_value_g, s_value_m, s_value_c,
    s_ids_b, s_ids_h, s_ids_t, s_ids_k,
    B, H, G, T, R, M, scale,
    D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dmemory_query [B, H, T, D]: gathers the tokens again, as memory_attention_memory_kernel does."""
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0).to(tl.int64)
    i_block = (pid % blocks).to(tl.int32)
    i_b = pid // blocks % B
    i_h = pid // blocks // B
    i_g = i_h // (H // G)
    i_r = ring_of_row(p_ring_index, i_b, R)

    o_t = i_block * BT + tl.arange(0, BT)
    o_t64 = o_t.to(tl.int64)[:, None]
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    m_d = o_d < D
    m_tile = m_t[:, None] & m_d[None, :]
    p_query += i_b * s_query_b + i_h * s_query_h
    p_grad += i_b * s_grad_b + i_h * s_grad_h
    b_query = tl.load(p_query + o_t64 * s_query_t + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32) * scale
    b_grad = tl.load(p_grad + o_t64 * s_grad_t + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
    o_row = (i_b * H + i_h) * T + o_t
    b_lse = tl.load(p_lse + o_row, mask=m_t, other=0.0)[:, None]
    b_share = tl.load(p_share + o_row, mask=m_t, other=0.0)[:, None]
    b_delta = tl.load(p_delta + o_row, mask=m_t, other=0.0)[:, None]
    p_key += i_r * s_key_r + i_g * s_key_g
    p_value += i_r * s_value_r + i_g * s_value_g
    p_ids += i_b * s_ids_b + i_h * s_ids_h

    b_query_grad = tl.zeros([BT, BD], tl.float32)
    for start in range(0, K * C, BJ):
        o_j = start + tl.arange(0, BJ)
        b_slot, o_c, m_there = retrieved_tokens(p_ids, o_t, o_j, T, M, s_ids_t, s_ids_k, K, C)
        m_load = m_there[:, :, None] & m_d[None, None, :]
        o_key = b_slot * s_key_m + (o_c * s_key_c)[None, :]  # [BT, BJ]
        o_value = b_slot * s_value_m + (o_c * s_value_c)[None, :]
        b_key = tl.load(p_key + o_key[:, :, None] + o_d[None, None, :], mask=m_load, other=0.0).to(tl.float32)
        b_value = tl.load(p_value + o_value[:, :, None] + o_d[None, None, :], mask=m_load, other=0.0).to(tl.float32)

        b_score = tl.sum(b_query[:, None, :] * b_key, axis=2)  # [BT, BJ]
        b_weight = tl.exp(tl.where(m_there, b_score - b_lse, float("-inf")))
        b_value_dot = tl.sum(b_grad[:, None, :] * b_value, axis=2)
        b_score_grad = b_weight * (b_share * b_value_dot - b_delta)
        b_query_grad += tl.sum(b_score_grad[:, :, None] * b_key, axis=1)

    p_query_grad += o_row[:, None] * D + o_d[None, :]
    tl.store(p_query_grad, narrow(b_query_grad * scale, p_query_grad.dtype.element_ty), mask=m_tile)


@triton.jit
def _local_score_grad(b_score, b_value_dot, b_lse, b_share, b_delta):
    """Softmax weights and score gradients [BT, BS]; zero where a key is not seen, also in rows that see none."""
    b_weight = tl.where(b_score == float("-inf"), 0.0, tl.exp(b_score - b_lse[:, None]))
    return b_weight, b_weight * ((1 - b_share)[:, None] * b_value_dot - b_delta[:, None])


@triton.jit
def memory_attention_query_grad_kernel(
    p_grad, p_query, p_key, p_value, p_slopes, p_lse, p_share, p_delta, p_query_grad,
    s_grad_b, s_grad_h, s_grad_t, s_query_b, s_query_h, s_query_t,
    s_key_b, s_key_g, s_key_s, s_value_b, s_value_g, s_value_s,
    H, G, T, S, scale, window,
    CAUSAL: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dquery [B, H, T, D], the part that comes through the local scores."""
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0).to(tl.int64)
    i_block = (blocks - 1 - pid % blocks).to(tl.int32)
    i_h = pid // blocks % H
    i_b = pid // blocks // H
    i_g = i_h // (H // G)

    o_t = i_block * BT + tl.arange(0, BT)
    o_t64 = o_t.to(tl.int64)[:, None]
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    m_d = o_d < D
    m_tile = m_t[:, None] & m_d[None, :]
    p_query += i_b * s_query_b + i_h * s_query_h
    p_grad += i_b * s_grad_b + i_h * s_grad_h
    b_query = tl.load(p_query + o_t64 * s_query_t + o_d[None, :], mask=m_tile, other=0.0)
    b_grad = tl.load(p_grad + o_t64 * s_grad_t + o_d[None, :], mask=m_tile, other=0.0)
    o_row = (i_b * H + i_h) * T + o_t
    b_lse = tl.load(p_lse + o_row, mask=m_t, other=0.0)
    b_share = tl.load(p_share + o_row, mask=m_t, other=0.0)
    b_delta = tl.load(p_delta + o_row, mask=m_t, other=0.0)
    p_key += i_b * s_key_b + i_g * s_key_g
    p_value += i_b * s_value_b + i_g * s_value_g

    b_query_grad = tl.zeros([BT, BD], tl.float32)
    begin, end = seen_keys(i_block * BT, T, S, CAUSAL, window, BT, BS)
    for start in range(begin, end, BS):
        o_s = start + tl.arange(0, BS)
        o_s64 = o_s.to(tl.int64)[:, None]
        m_load = (o_s < S)[:, None] & m_d[None, :]
        b_key = tl.load(p_key + o_s64 * s_key_s + o_d[None, :], mask=m_load, other=0.0)  # [BS, BD]
        b_value = tl.load(p_value + o_s64 * s_value_s + o_d[None, :], mask=m_load, other=0.0)
        b_score = local_scores(b_query, b_key, p_slopes, i_h, o_t, o_s, T, S, scale, CAUSAL, window)
        b_value_dot = dot(b_grad, tl.trans(b_value))
        _, b_score_grad = _local_score_grad(b_score, b_value_dot, b_lse, b_share, b_delta)
        b_query_grad += dot(narrow(b_score_grad, b_key.dtype), b_key)

    p_query_grad += o_row[:, None] * D + o_d[None, :]
    tl.store(p_query_grad, narrow(b_query_grad * scale, p_query_grad.dtype.element_ty), mask=m_tile)


@triton.jit
def memory_attention_key_value_grad_kernel(
    p_grad, p_query, p_key, p_value, p_slopes, p_lse, p_share, p_delta, p_key_grad, p_value_grad,
    s_grad_b, s_grad_h, s_grad_t, s_query_b, s_query_h, s_query_t,
    s_key_b, s_key_g, s_key_s, s_value_b, s_value_g, s_value_s,
    H, G, T, S, scale, window,
    CAUSAL: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dkey, dvalue [B, G, S, D] of BS keys: all heads of the group and all queries that see them, one after another."""
    blocks = tl.cdiv(S, BS)
    pid = tl.program_id(0).to(tl.int64)
    i_block = (pid % blocks).to(tl.int32)
    i_g = pid // blocks % G
    i_b = pid // blocks // G

    o_s = i_block * BS + tl.arange(0, BS)
    o_s64 = o_s.to(tl.int64)[:, None]
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_key = (o_s < S)[:, None] & m_d[None, :]
    p_key += i_b * s_key_b + i_g * s_key_g
    p_value += i_b * s_value_b + i_g * s_value_g
    b_key = tl.load(p_key + o_s64 * s_key_s + o_d[None, :], mask=m_key, other=0.0)  # [BS, BD]
    b_value = tl.load(p_value + o_s64 * s_value_s + o_d[None, :], mask=m_key, other=0.0)

    # The queries that see a key of this block: position S - T + t from the first key to window - 1 after the last.
    begin = 0
    end = T
    if CAUSAL:
        begin = tl.maximum(0, i_block * BS - (S - T)) // BT * BT
    if window is not None:
        end = tl.minimum(T, i_block * BS + BS - 1 + window - (S - T))

    b_key_grad = tl.zeros([BS, BD], tl.float32)
    b_value_grad = tl.zeros([BS, BD], tl.float32)
    for i_head in range(H // G):
        i_h = i_g * (H // G) + i_head
        for start in range(begin, end, BT):
            o_t = start + tl.arange(0, BT)
            o_t64 = o_t.to(tl.int64)[:, None]
            m_t = o_t < T
            m_load = m_t[:, None] & m_d[None, :]
            p_rows = p_query + i_b * s_query_b + i_h * s_query_h + o_t64 * s_query_t
            b_query = tl.load(p_rows + o_d[None, :], mask=m_load, other=0.0)  # [BT, BD]
            p_rows = p_grad + i_b * s_grad_b + i_h * s_grad_h + o_t64 * s_grad_t
            b_grad = tl.load(p_rows + o_d[None, :], mask=m_load, other=0.0)
            o_row = (i_b * H + i_h) * T + o_t
            b_lse = tl.load(p_lse + o_row, mask=m_t, other=0.0)
            b_share = tl.load(p_share + o_row, mask=m_t, other=0.0)
            b_delta = tl.load(p_delta + o_row, mask=m_t, other=0.0)

            b_score = local_scores(b_query, b_key, p_slopes, i_h, o_t, o_s, T, S, scale, CAUSAL, window)
            b_value_dot = dot(b_grad, tl.trans(b_value))
            b_weight, b_score_grad = _local_score_grad(b_score, b_value_dot, b_lse, b_share, b_delta)
            b_weight = b_weight * (1 - b_share)[:, None]
            b_value_grad += dot(tl.trans(narrow(b_weight, b_grad.dtype)), b_grad)
            b_key_grad += dot(tl.trans(narrow(b_score_grad, b_query.dtype)), b_query)

    o_out = ((i_b * G + i_g) * S + o_s64) * D + o_d[None, :]
    dtype = p_key_grad.dtype.element_ty
    tl.store(p_key_grad + o_out, narrow(b_key_grad * scale, dtype), mask=m_key)
    tl.store(p_value_grad + o_out, narrow(b_value_grad, dtype), mask=m_key)


def memory_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    chunk_ids: Tensor,
    ring_index: Tensor | None,
    gate: Tensor | None,
    alibi_slopes: Tensor | None,
    fusion: str,
    scale: float,
    causal: bool,
    window: int | None,
    local_out: Tensor,
    local_lse: Tensor,
    memory_out: Tensor,
    memory_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `memory_attention_forward`: dquery, dkey, dvalue, dmemory_query, and dgate [H] float32.

    dquery is the part through the local scores, dmemory_query the part through the memory scores; when one tensor is
    both, autograd adds them. dgate is zero for "joint". Bit-equal from run to run.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    R, _, M, C, _ = memory_key.shape
    K = chunk_ids.shape[3]
    query_grad, memory_query_grad = (query.new_empty((B, H, T, D)) for _ in range(2))
    key_grad, value_grad = (key.new_empty((B, G, S, D)) for _ in range(2))
    gate_grad = torch.zeros((B, H, T), dtype=torch.float32, device=query.device)
    if query.numel() == 0:
        return query_grad, key_grad.zero_(), value_grad.zero_(), memory_query_grad, gate_grad.sum((0, 2))

    if grad.stride(-1) != 1:  # as of out.sum().backward(): one number, expanded
        grad = grad.contiguous()
    BD = triton.next_power_of_2(D)
    share, local_delta, memory_delta = (torch.empty_like(gate_grad) for _ in range(3))
    local_strides = (*grad.stride()[:3], *query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    with torch.cuda.device_of(query):
        BT = max(1, 4096 // BD)
        memory_attention_delta_kernel[(triton.cdiv(T, BT) * H * B,)](
            grad, local_out, local_lse, memory_out, memory_lse, gate, share, local_delta, memory_delta, gate_grad,
            *grad.stride()[:3], H, T, D=D, BT=BT, BD=BD, num_warps=4,
        )  # fmt: skip
        BT, BJ = memory_tiles(K * C, D)
        memory_attention_memory_query_grad_kernel[(triton.cdiv(T, BT) * B * H,)](
            grad, memory_query, memory_key, memory_value, chunk_ids, ring_index, memory_lse, share, memory_delta,
            memory_query_grad, *grad.stride()[:3], *memory_query.stride()[:3],
            *memory_key.stride()[:4], *memory_value.stride()[:4], *chunk_ids.stride(),
            B, H, G, T, R, M, scale, D=D, K=K, C=C, BT=BT, BJ=BJ, BD=BD, num_warps=4,
        )  # fmt: skip
        tiles = local_backward_tiles(query.dtype, D)
        options = {"CAUSAL": causal, "D": D, "BT": tiles.BT, "BS": tiles.BS, "BD": BD}
        options |= {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        memory_attention_query_grad_kernel[(triton.cdiv(T, tiles.BT) * H * B,)](
            grad, query, key, value, alibi_slopes, local_lse, share, local_delta, query_grad,
            *local_strides, H, G, T, S, scale, window, **options,
        )  # fmt: skip
        memory_attention_key_value_grad_kernel[(triton.cdiv(S, tiles.BS) * G * B,)](
            grad, query, key, value, alibi_slopes, local_lse, share, local_delta, key_grad, value_grad,
            *local_strides, H, G, T, S, scale, window, **options,
        )  # fmt: skip
    return query_grad, key_grad, value_grad, memory_query_grad, gate_grad.sum((0, 2))
