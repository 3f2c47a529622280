"""memory_attention in Triton, forward: a gathering kernel for the memory, then local flash attention that merges it.

Two kernels, because each half is bound by something else (L2 gathers, tensor cores) and runs at its own occupancy; what
passes between them is small. The backward pass is in triton_backward.py.
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
    local_scores,
    local_tiles,
    memory_tiles,
    retrieved_tokens,
    seen_keys,
)


@triton.jit
def memory_attention_memory_kernel(
    p_query, p_key, p_value, p_ids, p_ring_index, p_out, p_lse,
    s_query_b, s_query_h, s_query_t,
    s_key_r, s_key_g, s_key_m, s_key_c,
    s_value_r, s_value_g, s_value_m, s_value_c,
    s_ids_b, s_ids_h, s_ids_t, s_ids_k,
    B, H, G, T, R, M, scale,
    D: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Attention of BT queries to the tokens of their chunks: out [B, H, T, D] and log-sum-exp [B, H, T].

    Every query gathers its own tokens, so nothing is shared for a matrix product: scores are sums over a
    [BT, BJ, BD] tile. The K * C tokens are one list, whatever C is.
    """
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0).to(tl.int64)
    i_block = (pid % blocks).to(tl.int32)
    i_b = pid // blocks % B
    i_h = pid // blocks // B  # slowest: the bank of one head stays in L2 while all its queries read it
    i_g = i_h // (H // G)
    i_r = ring_of_row(p_ring_index, i_b, R)

    o_t = i_block * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_out = (o_t < T)[:, None] & m_d[None, :]
    p_query += i_b * s_query_b + i_h * s_query_h
    b_query = tl.load(p_query + o_t.to(tl.int64)[:, None] * s_query_t + o_d[None, :], mask=m_out, other=0.0)
    b_query = b_query.to(tl.float32) * scale  # [BT, BD]
    p_key += i_r * s_key_r + i_g * s_key_g
    p_value += i_r * s_value_r + i_g * s_value_g
    p_ids += i_b * s_ids_b + i_h * s_ids_h

    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_out = tl.zeros([BT, BD], tl.float32)
    for start in range(0, K * C, BJ):
        o_j = start + tl.arange(0, BJ)
        b_slot, o_c, m_there = retrieved_tokens(p_ids, o_t, o_j, T, M, s_ids_t, s_ids_k, K, C)
        m_load = m_there[:, :, None] & m_d[None, None, :]
        o_key = b_slot * s_key_m + (o_c * s_key_c)[None, :]  # [BT, BJ]
        o_value = b_slot * s_value_m + (o_c * s_value_c)[None, :]
        b_key = tl.load(p_key + o_key[:, :, None] + o_d[None, None, :], mask=m_load, other=0.0)
        b_value = tl.load(p_value + o_value[:, :, None] + o_d[None, None, :], mask=m_load, other=0.0)

        b_score = tl.sum(b_query[:, None, :] * b_key.to(tl.float32), axis=2)
        b_score = tl.where(m_there, b_score, float("-inf"))  # [BT, BJ]
        b_new_max = tl.maximum(b_max, tl.max(b_score, axis=1))
        b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # nothing found yet: exp(-inf - 0), not NaN
        b_shrink = tl.exp(b_max - b_base)
        b_weight = tl.exp(b_score - b_base[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_weight, axis=1)
        b_out = b_out * b_shrink[:, None] + tl.sum(b_weight[:, :, None] * b_value.to(tl.float32), axis=1)
        b_max = b_new_max

    m_none = b_sum == 0.0
    b_out = b_out / tl.where(m_none, 1.0, b_sum)[:, None]
    b_lse = tl.where(m_none, float("-inf"), b_max + tl.log(tl.where(m_none, 1.0, b_sum)))
    o_row = (i_b * H + i_h) * T + o_t
    tl.store(p_out + o_row[:, None] * D + o_d[None, :], narrow(b_out, p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_row, b_lse, mask=o_t < T)


@triton.jit
def memory_attention_local_kernel(
    p_query, p_key, p_value, p_gate, p_slopes, p_memory_out, p_memory_lse, p_out, p_local_out, p_local_lse,
    s_query_b, s_query_h, s_query_t, s_key_b, s_key_g, s_key_s, s_value_b, s_value_g, s_value_s,
    H, G, T, S, scale, window,
    CAUSAL: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Flash attention of BT queries to the local keys, then the merge with what the memory kernel left."""
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0).to(tl.int64)
    i_block = (blocks - 1 - pid % blocks).to(tl.int32)  # with causal=True the last block has most keys: start it first
    i_h = pid // blocks % H
    i_b = pid // blocks // H
    i_g = i_h // (H // G)

    o_t = i_block * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_out = (o_t < T)[:, None] & m_d[None, :]
    p_query += i_b * s_query_b + i_h * s_query_h
    b_query = tl.load(p_query + o_t.to(tl.int64)[:, None] * s_query_t + o_d[None, :], mask=m_out, other=0.0)
    p_key += i_b * s_key_b + i_g * s_key_g
    p_value += i_b * s_value_b + i_g * s_value_g

    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_out = tl.zeros([BT, BD], tl.float32)
    begin, end = seen_keys(i_block * BT, T, S, CAUSAL, window, BT, BS)
    for start in range(begin, end, BS):
        o_s = start + tl.arange(0, BS)
        o_s64 = o_s.to(tl.int64)[:, None]
        m_load = (o_s < S)[:, None] & m_d[None, :]
        b_key = tl.load(p_key + o_s64 * s_key_s + o_d[None, :], mask=m_load, other=0.0)  # [BS, BD]
        b_value = tl.load(p_value + o_s64 * s_value_s + o_d[None, :], mask=m_load, other=0.0)

        b_score = local_scores(b_query, b_key, p_slopes, i_h, o_t, o_s, T, S, scale, CAUSAL, window)
        b_new_max = tl.maximum(b_max, tl.max(b_score, axis=1))
        b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_shrink = tl.exp(b_max - b_base)
        b_weight = tl.exp(b_score - b_base[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_weight, axis=1)
        b_out = b_out * b_shrink[:, None] + dot(narrow(b_weight, b_value.dtype), b_value)
        b_max = b_new_max

    m_none = b_sum == 0.0
    b_out = b_out / tl.where(m_none, 1.0, b_sum)[:, None]
    b_lse = tl.where(m_none, float("-inf"), b_max + tl.log(tl.where(m_none, 1.0, b_sum)))

    o_row = (i_b * H + i_h) * T + o_t
    o_out = o_row[:, None] * D + o_d[None, :]
    b_memory_lse = tl.load(p_memory_lse + o_row, mask=o_t < T, other=float("-inf"))
    b_share = fusion_share(b_lse, b_memory_lse, p_gate, i_h)[:, None]
    b_memory = tl.load(p_memory_out + o_out, mask=m_out, other=0.0).to(tl.float32)
    dtype = p_out.dtype.element_ty
    tl.store(p_local_out + o_out, narrow(b_out, dtype), mask=m_out)
    tl.store(p_local_lse + o_row, b_lse, mask=o_t < T)
    tl.store(p_out + o_out, narrow((1 - b_share) * b_out + b_share * b_memory, dtype), mask=m_out)


def memory_attention_forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `memory_attention`. Arguments as there, already checked, defaults filled in.

    Returns:
        out [B, H, T, D]; for the backward pass local_out [B, H, T, D], local_lse [B, H, T] float32, memory_out and
        memory_lse likewise (0 and -inf where no chunk was found).
    """
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    R, _, M, C, _ = memory_key.shape
    K = chunk_ids.shape[3]
    out, local_out, memory_out = (query.new_empty((B, H, T, D)) for _ in range(3))
    local_lse, memory_lse = (query.new_empty((B, H, T), dtype=torch.float32) for _ in range(2))
    if out.numel() == 0:
        return out, local_out, local_lse, memory_out, memory_lse

    BD = triton.next_power_of_2(D)
    with torch.cuda.device_of(query):
        BT, BJ = memory_tiles(K * C, D)
        memory_attention_memory_kernel[(triton.cdiv(T, BT) * B * H,)](
            memory_query, memory_key, memory_value, chunk_ids, ring_index, memory_out, memory_lse,
            *memory_query.stride()[:3], *memory_key.stride()[:4], *memory_value.stride()[:4], *chunk_ids.stride(),
            B, H, G, T, R, M, scale,
            D=D, K=K, C=C, BT=BT, BJ=BJ, BD=BD, num_warps=4,
        )  # fmt: skip
        tiles = local_tiles(query.dtype, D)
        memory_attention_local_kernel[(triton.cdiv(T, tiles.BT) * H * B,)](
            query, key, value, gate, alibi_slopes, memory_out, memory_lse, out, local_out, local_lse,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            H, G, T, S, scale, window,
            CAUSAL=causal, D=D, BT=tiles.BT, BS=tiles.BS, BD=BD, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out, local_out, local_lse, memory_out, memory_lse
