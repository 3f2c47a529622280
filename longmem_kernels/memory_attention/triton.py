"""memory_attention in Triton, forward: a gathering kernel for the memory, then local flash attention that merges it.

Two kernels, because each half is bound by something else (L2 gathers, tensor cores) and runs at its own occupancy; what
passes between them is small. Few queries have kernels of their own (triton_decode.py); the backward pass is in
triton_backward.py.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem_kernels._triton import narrow, ring_of_row
from longmem_kernels.memory_attention._triton_common import (
    LN2,
    LOG2E,
    any_not_finite,
    attend,
    attend_tokens,
    bank_of,
    drop_threshold,
    dropout_rows,
    finish,
    fusion_share,
    gather_tiles,
    load_rows,
    local_tiles,
    seen_keys,
)
from longmem_kernels.memory_attention.triton_decode import decode_forward, few_queries


@triton.jit
def memory_attention_memory_kernel(
    p_query, p_key, p_value, p_ids, p_scale, p_ring_index, p_out, p_lse,
    s_query_b, s_query_h, s_query_t,
    s_key_r, s_key_g, s_key_m, s_key_c,
    s_value_r, s_value_g, s_value_m, s_value_c,
    s_ids_b, s_ids_h, s_ids_t, s_ids_k,
    B, H, G, T, R, M, scale,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attention of BT queries to the tokens of their chunks: out [B, H, T, D] float32 and log-sum-exp [B, H, T]."""
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    i_block = pid % blocks
    i_b = (pid // blocks % B).to(tl.int64)
    i_h = (pid // blocks // B).to(tl.int64)  # slowest: the bank of one head stays in L2 while all its queries read it
    i_g = i_h // (H // G)
    i_r, M = ring_of_row(p_ring_index, i_b, R, M)

    o_t = i_block * BT + tl.arange(0, BT)
    b_query = load_rows(p_query + i_b * s_query_b + i_h * s_query_h, o_t, s_query_t, T, D, BD, True)
    b_query = b_query.to(tl.float32) * (scale * LOG2E)  # [BT, BD]
    p_key += i_r * s_key_r + i_g * s_key_g
    p_value += i_r * s_value_r + i_g * s_value_g
    p_ids += i_b * s_ids_b + i_h * s_ids_h
    if p_scale is not None:
        p_scale += (i_r * G + i_g) * M * 2

    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_out = tl.zeros([BT, BD], tl.float32)
    b_max, b_sum, b_out = attend_tokens(
        b_query, b_max, b_sum, b_out, 0, K * C, p_key, p_value, p_ids, p_scale, o_t, T, M,
        s_ids_t, s_ids_k, s_key_m, s_key_c, s_value_m, s_value_c, K, C, D, BD, BJ, SAME, WIDE,
    )  # fmt: skip
    b_out, b_lse = finish(b_max, b_sum, b_out)
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    o_row = (i_b * H + i_h) * T + o_t
    tl.store(p_out + o_row[:, None] * D + o_d[None, :], b_out, mask=m_t[:, None] & (o_d < D)[None, :])
    tl.store(p_lse + o_row, b_lse * LN2, mask=m_t)


@triton.jit
def memory_attention_local_kernel(
    p_query, p_key, p_value, p_gate, p_slopes, p_key_mask, p_seed, p_memory_out, p_memory_lse,
    p_out, p_local_out, p_local_lse,
    s_query_b, s_query_h, s_query_t, s_key_b, s_key_g, s_key_s, s_value_b, s_value_g, s_value_s, s_mask_b, s_mask_s,
    H, G, T, S, scale, window, threshold, kept_scale,
    CAUSAL: tl.constexpr, RISING: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Flash attention of BT queries to the local keys, then the merge with what the memory kernel left.

    RISING: scale > 0. Scores between `all_begin` and `all_end`, most of them, need no masks.
    """
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    i_block = blocks - 1 - pid % blocks  # with causal=True the last block has most keys: start it first
    i_h = (pid // blocks % H).to(tl.int64)
    i_b = (pid // blocks // H).to(tl.int64)
    i_g = i_h // (H // G)

    o_t = i_block * BT + tl.arange(0, BT)
    b_query = load_rows(p_query + i_b * s_query_b + i_h * s_query_h, o_t, s_query_t, T, D, BD, True)
    p_key += i_b * s_key_b + i_g * s_key_g
    p_value += i_b * s_value_b + i_g * s_value_g
    if p_key_mask is not None:
        p_key_mask += i_b * s_mask_b
    slope = None
    if p_slopes is not None:
        slope = tl.load(p_slopes + i_h).to(tl.float32) * LOG2E
    b_row = None
    if p_seed is not None:
        b_row = dropout_rows(p_seed, (i_b * H + i_h) * T + o_t)

    first = S - T + i_block * BT  # position of the first query
    o_query = first + tl.arange(0, BT)
    begin, all_begin, all_end, end = seen_keys(first, first + BT - 1, S, CAUSAL, window, BS)
    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_out = tl.zeros([BT, BD], tl.float32)
    if window is not None:
        b_max, b_sum, b_out = attend(
            b_query, b_max, b_sum, b_out, begin, all_begin, p_key, p_value, s_key_s, s_value_s,
            o_query, first, S, scale, slope, p_key_mask, s_mask_s, window, b_row, p_seed, threshold,
            CAUSAL, True, RISING, False, D, BS, BD,
        )  # fmt: skip
    b_max, b_sum, b_out = attend(
        b_query, b_max, b_sum, b_out, all_begin, all_end, p_key, p_value, s_key_s, s_value_s,
        o_query, first, S, scale, slope, p_key_mask, s_mask_s, window, b_row, p_seed, threshold,
        CAUSAL, False, RISING, False, D, BS, BD,
    )  # fmt: skip
    b_max, b_sum, b_out = attend(
        b_query, b_max, b_sum, b_out, all_end, end, p_key, p_value, s_key_s, s_value_s,
        o_query, first, S, scale, slope, p_key_mask, s_mask_s, window, b_row, p_seed, threshold,
        CAUSAL, True, RISING, False, D, BS, BD,
    )  # fmt: skip

    if any_not_finite(b_out):
        b_max, b_sum, b_out = attend(
            b_query, tl.full([BT], float("-inf"), tl.float32), tl.zeros([BT], tl.float32),
            tl.zeros([BT, BD], tl.float32), begin, end, p_key, p_value, s_key_s, s_value_s,
            o_query, first, S, scale, slope, p_key_mask, s_mask_s, window, b_row, p_seed, threshold,
            CAUSAL, True, RISING, True, D, BS, BD,
        )  # fmt: skip

    b_out, b_lse = finish(b_max, b_sum, b_out)
    b_out *= kept_scale
    b_lse *= LN2
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    m_out = m_t[:, None] & (o_d < D)[None, :]
    first_row = (i_b * H + i_h) * T + i_block * BT
    o_row = tl.arange(0, BT)
    o_out = o_row[:, None] * D + o_d[None, :]
    b_memory_lse = tl.load(p_memory_lse + first_row + o_row, mask=m_t, other=float("-inf"))
    b_share = fusion_share(b_lse, b_memory_lse, p_gate, i_h)[:, None]
    b_memory = tl.load(p_memory_out + first_row * D + o_out, mask=m_out, other=0.0)
    tl.store(p_local_out + first_row * D + o_out, b_out, mask=m_out)
    tl.store(p_local_lse + first_row + o_row, b_lse, mask=m_t)
    tl.store(
        p_out + first_row * D + o_out,
        narrow((1 - b_share) * b_out + b_share * b_memory, p_out.dtype.element_ty),
        mask=m_out,
    )


def memory_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    chunk_ids: Tensor,
    memory_scale: Tensor | None,
    ring_index: Tensor | None,
    gate: Tensor | None,
    alibi_slopes: Tensor | None,
    key_mask: Tensor | None,
    dropout_seed: Tensor | None,
    fusion: str,
    scale: float,
    causal: bool,
    window: int | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `memory_attention`. Arguments as there, already checked, defaults filled in.

    Returns:
        out [B, H, T, D]; for the backward pass, in float32, local_out [B, H, T, D], local_lse [B, H, T], memory_out and
        memory_lse likewise (0 and -inf where no chunk was found).
    """
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    R, _, M = memory_key.shape[:3]
    K, C = chunk_ids.shape[3], memory_key.shape[3]
    out = query.new_empty((B, H, T, D))
    local_out, memory_out = (query.new_empty((B, H, T, D), dtype=torch.float32) for _ in range(2))
    local_lse, memory_lse = (query.new_empty((B, H, T), dtype=torch.float32) for _ in range(2))
    outputs = (out, local_out, local_lse, memory_out, memory_lse)
    if out.numel() == 0:
        return outputs

    bank = bank_of(memory_key, memory_value)
    mask_strides = (0, 0) if key_mask is None else key_mask.stride()
    local = {"CAUSAL": causal, "RISING": scale > 0, "D": D, "BD": bank.options["BD"]}
    dropout = (drop_threshold(dropout_p), 1 / (1 - dropout_p))
    with torch.cuda.device_of(query):
        if few_queries(T):
            decode_forward(
                query, key, value, memory_query, bank, chunk_ids, memory_scale, ring_index, gate, alibi_slopes,
                key_mask, dropout_seed, scale, causal, window, dropout_p, outputs,
            )  # fmt: skip
            return outputs
        gather = gather_tiles("memory_attention_memory_kernel", bank.key, K * C)
        memory_attention_memory_kernel[(triton.cdiv(T, gather["BT"]) * B * H,)](
            memory_query, bank.key, bank.value, chunk_ids, memory_scale, ring_index, memory_out, memory_lse,
            *memory_query.stride()[:3], *bank.strides, *chunk_ids.stride(),
            B, H, G, T, R, M, scale, K=K, **bank.options, **gather,
        )  # fmt: skip
        tiles = local_tiles(query, dropout_seed is not None)
        memory_attention_local_kernel[(triton.cdiv(T, tiles.BT) * H * B,)](
            query, key, value, gate, alibi_slopes, key_mask, dropout_seed, memory_out, memory_lse,
            out, local_out, local_lse,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides,
            H, G, T, S, scale, window, *dropout,
            **local, **vars(tiles),
        )  # fmt: skip
    return outputs
