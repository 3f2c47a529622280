"""memory_attention in Triton, backward: a kernel for each gradient, none of which adds into memory another one writes.

With p the weight of a key in the output, both softmaxes and the fusion included, the gradient of its score is
`p * (grad . value + offset)`, where `offset = (gradient of the log-sum-exp) / w - grad . x`: w is its part of the
output (see _triton_common), x the part's own output ("gated": two softmaxes) or the fused one ("joint": one softmax).
Dropout multiplies grad . value by 0 or 1 / (1 - dropout_p). The first kernel makes what depends on the row alone; the
others recompute the scores.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem_kernels._triton import dot, narrow, ring_of_row
from longmem_kernels.memory_attention._triton_common import (
    LOG2E,
    alibi_bias,
    alibi_rows,
    any_not_finite,
    bank_of,
    drop_threshold,
    dropout_rows,
    finite_numbers,
    fusion_share,
    kept_by_dropout,
    key_value_grad_tiles,
    load_rows,
    load_tokens,
    local_scores,
    query_grad_tiles,
    retrieved_tokens,
    seen_keys,
    token_scales,
)


@triton.jit
def _base_and_offset(p_lse_grad, o_row, m_row, b_lse, b_part, b_dot):
    """Of rows of one part: `score - base` is the log of p, in units of log 2. No weight at all: base is +inf."""
    m_found = b_lse != float("-inf")
    # A part that has become 0 by rounding has gradients of its log-sum-exp.
    b_part = tl.maximum(b_part, 2.0**-64, propagate_nan=tl.PropagateNan.ALL)
    b_base = tl.where(m_found, b_lse * LOG2E - tl.log2(b_part), float("inf"))
    b_offset = tl.where(m_found, -b_dot, 0.0)
    if p_lse_grad is not None:
        b_offset += tl.where(m_found, tl.load(p_lse_grad + o_row, mask=m_row, other=0.0) / b_part, 0.0)
    return b_base, b_offset


@triton.jit
def memory_attention_offset_kernel(
    p_grad, p_local_lse_grad, p_memory_lse_grad, p_local_out, p_local_lse, p_memory_out, p_memory_lse, p_gate,
    p_local_base, p_local_offset, p_memory_base, p_memory_offset, p_gate_grad,
    s_grad_b, s_grad_h, s_grad_t, H, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Base and offset of every row, local and memory, and the row's term of the gate gradient."""
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    i_h = (pid // blocks % H).to(tl.int64)
    i_b = (pid // blocks // H).to(tl.int64)
    o_t = pid % blocks * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    m_tile = m_t[:, None] & (o_d < D)[None, :]
    o_row = (i_b * H + i_h) * T + o_t
    o_tile = o_row[:, None] * D + o_d[None, :]
    b_grad = load_rows(p_grad + i_b * s_grad_b + i_h * s_grad_h, o_t, s_grad_t, T, D, BD, True).to(tl.float32)
    b_local_dot = tl.sum(b_grad * tl.load(p_local_out + o_tile, mask=m_tile, other=0.0), axis=1)
    b_memory_dot = tl.sum(b_grad * tl.load(p_memory_out + o_tile, mask=m_tile, other=0.0), axis=1)
    b_local_lse = tl.load(p_local_lse + o_row, mask=m_t, other=float("-inf"))
    b_memory_lse = tl.load(p_memory_lse + o_row, mask=m_t, other=float("-inf"))

    b_share = fusion_share(b_local_lse, b_memory_lse, p_gate, i_h)
    if p_gate is not None:
        b_gate_grad = b_share * (1 - b_share) * (b_memory_dot - b_local_dot)
        b_gate_grad = tl.where(b_memory_lse != float("-inf"), b_gate_grad, 0.0)
        tl.store(p_gate_grad + o_row, b_gate_grad, mask=m_t)
    else:
        b_local_dot = (1 - b_share) * b_local_dot + b_share * b_memory_dot
        b_memory_dot = b_local_dot
    b_base, b_offset = _base_and_offset(p_local_lse_grad, o_row, m_t, b_local_lse, 1 - b_share, b_local_dot)
    tl.store(p_local_base + o_row, b_base, mask=m_t)
    tl.store(p_local_offset + o_row, b_offset, mask=m_t)
    b_base, b_offset = _base_and_offset(p_memory_lse_grad, o_row, m_t, b_memory_lse, b_share, b_memory_dot)
    tl.store(p_memory_base + o_row, b_base, mask=m_t)
    tl.store(p_memory_offset + o_row, b_offset, mask=m_t)


@triton.jit
def memory_attention_memory_query_grad_kernel(
    p_grad, p_query, p_key, p_value, p_ids, p_scale, p_ring_index, p_base, p_offset, p_query_grad,
    s_grad_b, s_grad_h, s_grad_t, s_query_b, s_query_h, s_query_t,
    s_key_r, s_key_g, s_key_m, s_key_c,
    s_value_r, s_value_g, s_value_m, s_value_c,
    s_ids_b, s_ids_h, s_ids_t, s_ids_k,
    B, H, G, T, R, M, scale,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dmemory_query [B, H, T, D]: gathers the tokens again, as memory_attention_memory_kernel does."""
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    i_block = pid % blocks
    i_b = (pid // blocks % B).to(tl.int64)
    i_h = (pid // blocks // B).to(tl.int64)
    i_g = i_h // (H // G)
    i_r, M = ring_of_row(p_ring_index, i_b, R, M)

    o_t = i_block * BT + tl.arange(0, BT)
    m_t = o_t < T
    b_query = load_rows(p_query + i_b * s_query_b + i_h * s_query_h, o_t, s_query_t, T, D, BD, True)
    b_query = b_query.to(tl.float32) * (scale * LOG2E)
    o_row = (i_b * H + i_h) * T + o_t
    b_base = tl.load(p_base + o_row, mask=m_t, other=float("inf"))
    b_offset = tl.load(p_offset + o_row, mask=m_t, other=0.0)
    b_grad = load_rows(p_grad + i_b * s_grad_b + i_h * s_grad_h, o_t, s_grad_t, T, D, BD, True)
    b_grad = b_grad.to(tl.float32)
    p_key += i_r * s_key_r + i_g * s_key_g
    p_value += i_r * s_value_r + i_g * s_value_g
    p_ids += i_b * s_ids_b + i_h * s_ids_h
    if p_scale is not None:
        p_scale += (i_r * G + i_g) * M * 2

    b_query_grad = tl.zeros([BT, BD], tl.float32)
    for start in range(0, K * C, BJ):
        b_slot, o_key, o_value, m_there = retrieved_tokens(
            p_ids, o_t, start + tl.arange(0, BJ), T, M, s_ids_t, s_ids_k, s_key_m, s_key_c, s_value_m, s_value_c,
            K, C, SAME, WIDE,
        )  # fmt: skip
        b_key = load_tokens(p_key, o_key, m_there, D, BD)
        b_value = load_tokens(p_value, o_value, m_there, D, BD)
        b_score = tl.sum(b_query[None, :, :] * b_key, axis=2)  # [BJ, BT]
        b_value_dot = tl.sum(b_grad[None, :, :] * b_value, axis=2)
        if p_scale is not None:
            b_key_scale, b_value_scale = token_scales(p_scale, p_key, b_slot, m_there)
            b_score *= b_key_scale
            b_value_dot *= b_value_scale
        b_weight = tl.exp2(tl.where(m_there, b_score - b_base[None, :], float("-inf")))
        b_score_grad = tl.where(m_there, b_weight * (b_value_dot + b_offset[None, :]), 0.0)
        if p_scale is not None:
            b_score_grad *= b_key_scale
        b_query_grad += tl.sum(b_score_grad[:, :, None] * b_key, axis=0)

    o_d = tl.arange(0, BD)
    p_query_grad += o_row[:, None] * D + o_d[None, :]
    b_query_grad = narrow(b_query_grad * scale, p_query_grad.dtype.element_ty)
    tl.store(p_query_grad, b_query_grad, mask=m_t[:, None] & (o_d < D)[None, :])


@triton.jit
def not_finite_rows(b_rows):
    """Which rows of a tile [rows, BD] hold NaN or infinity."""
    return tl.max((b_rows.to(tl.float32) * 0.0 != 0.0).to(tl.int32), axis=1) > 0


@triton.jit
def _query_grad(
    b_query_grad, begin, end, b_query, b_grad, p_key, p_value, s_key_s, s_value_s,
    b_base, b_offset, o_query, first, S, scale, slope, p_key_mask, s_mask_s, window,
    b_row, p_seed, threshold, kept_scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """b_query_grad with what keys begin ... end - 1 add, not yet scaled."""
    if slope is not None and not MASKED:
        b_base += alibi_rows(slope, o_query, first)
    STAGES: tl.constexpr = 1 if CAREFUL and BS > 16 else None
    for start in tl.range(begin, end, BS, num_stages=STAGES):
        o_key = start + tl.arange(0, BS)
        b_key = load_rows(p_key, o_key, s_key_s, S, D, BD, MASKED)  # [BS, BD]
        b_value = load_rows(p_value, o_key, s_value_s, S, D, BD, MASKED)
        b_bias = None
        if slope is not None:
            b_bias = alibi_bias(slope, o_query, start, first, BS, MASKED)
        b_score = local_scores(
            dot(b_query, tl.trans(b_key)), b_bias, o_query[:, None], o_key[None, :], S, scale,
            p_key_mask, s_mask_s, window, CAUSAL, MASKED,
        )  # fmt: skip
        b_weight = tl.exp2(b_score - b_base[:, None])
        b_value_dot = dot(b_grad, tl.trans(b_value))
        if p_seed is not None:
            m_kept = kept_by_dropout(b_row[:, None], o_key[None, :], threshold)
            b_value_dot = tl.where(m_kept, b_value_dot * kept_scale, 0.0)
        b_score_grad = b_weight * (b_value_dot + b_offset[:, None])
        if CAREFUL:  # what is multiplied by NaN becomes NaN before, where it is seen
            m_seen = local_scores(
                tl.zeros_like(b_score), None, o_query[:, None], o_key[None, :], S, scale,
                p_key_mask, s_mask_s, window, CAUSAL, MASKED,
            ) == 0.0  # fmt: skip
            b_score_grad = tl.where(m_seen, b_score_grad, 0.0)
            b_score_grad = tl.where(m_seen & not_finite_rows(b_key)[None, :], float("nan"), b_score_grad)
            b_key = finite_numbers(b_key)
        b_query_grad += dot(narrow(b_score_grad, b_key.dtype), b_key)
    return b_query_grad


@triton.jit
def memory_attention_query_grad_kernel(
    p_grad, p_query, p_key, p_value, p_slopes, p_key_mask, p_seed, p_base, p_offset, p_query_grad,
    s_grad_b, s_grad_h, s_grad_t, s_query_b, s_query_h, s_query_t,
    s_key_b, s_key_g, s_key_s, s_value_b, s_value_g, s_value_s, s_mask_b, s_mask_s,
    H, G, T, S, scale, window, threshold, kept_scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dquery [B, H, T, D], the part that comes through the local scores."""
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    i_block = blocks - 1 - pid % blocks
    i_h = (pid // blocks % H).to(tl.int64)
    i_b = (pid // blocks // H).to(tl.int64)
    i_g = i_h // (H // G)

    o_t = i_block * BT + tl.arange(0, BT)
    m_t = o_t < T
    o_row = (i_b * H + i_h) * T + o_t
    first = S - T + i_block * BT  # position of the first query
    o_query = first + tl.arange(0, BT)
    slope = None
    if p_slopes is not None:
        slope = tl.load(p_slopes + i_h).to(tl.float32) * LOG2E
    b_query = load_rows(p_query + i_b * s_query_b + i_h * s_query_h, o_t, s_query_t, T, D, BD, True)
    b_grad = load_rows(p_grad + i_b * s_grad_b + i_h * s_grad_h, o_t, s_grad_t, T, D, BD, True)
    b_base = tl.load(p_base + o_row, mask=m_t, other=float("inf"))
    b_offset = tl.load(p_offset + o_row, mask=m_t, other=0.0)
    p_key += i_b * s_key_b + i_g * s_key_g
    p_value += i_b * s_value_b + i_g * s_value_g
    if p_key_mask is not None:
        p_key_mask += i_b * s_mask_b
    b_row = None
    if p_seed is not None:
        b_row = dropout_rows(p_seed, o_row)

    b_query_grad = tl.zeros([BT, BD], tl.float32)
    begin, all_begin, all_end, end = seen_keys(first, first + BT - 1, S, CAUSAL, window, BS)
    if window is not None:
        b_query_grad = _query_grad(
            b_query_grad, begin, all_begin, b_query, b_grad, p_key, p_value, s_key_s, s_value_s,
            b_base, b_offset, o_query, first, S, scale, slope, p_key_mask, s_mask_s, window,
            b_row, p_seed, threshold, kept_scale, CAUSAL, True, False, D, BS, BD,
        )  # fmt: skip
    b_query_grad = _query_grad(
        b_query_grad, all_begin, all_end, b_query, b_grad, p_key, p_value, s_key_s, s_value_s,
        b_base, b_offset, o_query, first, S, scale, slope, p_key_mask, s_mask_s, window,
        b_row, p_seed, threshold, kept_scale, CAUSAL, False, False, D, BS, BD,
    )  # fmt: skip
    b_query_grad = _query_grad(
        b_query_grad, all_end, end, b_query, b_grad, p_key, p_value, s_key_s, s_value_s,
        b_base, b_offset, o_query, first, S, scale, slope, p_key_mask, s_mask_s, window,
        b_row, p_seed, threshold, kept_scale, CAUSAL, True, False, D, BS, BD,
    )  # fmt: skip

    if any_not_finite(b_query_grad):
        SMALLER: tl.constexpr = BS // 2 if BS > 16 else BS  # in registers beside what the loops above take
        # Loaded once more, because what is kept for here takes registers from the loops above.
        b_query = load_rows(p_query + i_b * s_query_b + i_h * s_query_h, o_t, s_query_t, T, D, BD, True)
        b_grad = load_rows(p_grad + i_b * s_grad_b + i_h * s_grad_h, o_t, s_grad_t, T, D, BD, True)
        b_query_grad = _query_grad(
            tl.zeros([BT, BD], tl.float32), begin, end, b_query, b_grad, p_key, p_value, s_key_s, s_value_s,
            b_base, b_offset, o_query, first, S, scale, slope, p_key_mask, s_mask_s, window,
            b_row, p_seed, threshold, kept_scale, CAUSAL, True, True, D, SMALLER, BD,
        )  # fmt: skip

    o_d = tl.arange(0, BD)
    p_query_grad += o_row[:, None] * D + o_d[None, :]
    b_query_grad = narrow(b_query_grad * scale, p_query_grad.dtype.element_ty)
    tl.store(p_query_grad, b_query_grad, mask=m_t[:, None] & (o_d < D)[None, :])


@triton.jit
def _key_value_grad(
    b_key_grad, b_value_grad, begin, end, b_key, b_value, p_query, p_grad, p_slopes, p_base, p_offset,
    i_b, i_h, s_grad_h, s_grad_t, s_query_h, s_query_t, o_key, last, H, T, S, scale,
    p_key_mask, s_mask_s, window, p_seed, threshold, kept_scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Both gradients with what queries begin ... end - 1 of a head add. Scores are transposed: [BS, BT]."""
    slope = None
    if p_slopes is not None:
        slope = tl.load(p_slopes + i_h).to(tl.float32) * LOG2E
    p_query += i_h * s_query_h
    p_grad += i_h * s_grad_h
    first_row = (i_b * H + i_h) * T
    STAGES: tl.constexpr = 1 if CAREFUL and p_query.dtype.element_ty != tl.float32 else None
    for start in tl.range(begin, end, BT, num_stages=STAGES):
        o_t = start + tl.arange(0, BT)
        m_t = o_t < T
        o_query = S - T + o_t
        o_row = first_row + o_t
        b_query = load_rows(p_query, o_t, s_query_t, T, D, BD, True)  # [BT, BD]
        b_grad = load_rows(p_grad, o_t, s_grad_t, T, D, BD, True)
        b_base = tl.load(p_base + o_row, mask=m_t, other=float("inf"))
        b_offset = tl.load(p_offset + o_row, mask=m_t, other=0.0)
        b_bias = None
        if slope is not None and MASKED:
            b_bias = slope * (o_key.to(tl.float32)[:, None] - o_query.to(tl.float32)[None, :])
        elif slope is not None:  # as in `alibi_bias`
            b_bias = (slope * (o_key - last).to(tl.float32))[:, None]
            b_base += alibi_rows(slope, o_query, last)
        b_score = local_scores(
            dot(b_key, tl.trans(b_query)), b_bias, o_query[None, :], o_key[:, None], S, scale,
            p_key_mask, s_mask_s, window, CAUSAL, MASKED,
        )  # fmt: skip
        b_weight = tl.exp2(b_score - b_base[None, :])
        b_value_dot = dot(b_value, tl.trans(b_grad))
        if CAREFUL:  # as in _query_grad
            m_seen = local_scores(
                tl.zeros_like(b_score), None, o_query[None, :], o_key[:, None], S, scale,
                p_key_mask, s_mask_s, window, CAUSAL, MASKED,
            ) == 0.0  # fmt: skip
            m_bad = not_finite_rows(b_query) | not_finite_rows(b_grad)
            b_weight = tl.where(m_seen, tl.where(m_bad[None, :], float("nan"), b_weight), 0.0)
            b_query = finite_numbers(b_query)
            b_grad = finite_numbers(b_grad)
        if p_seed is not None:
            m_kept = kept_by_dropout(dropout_rows(p_seed, o_row)[None, :], o_key[:, None], threshold)
            b_kept = tl.where(m_kept, b_weight * kept_scale, 0.0)
            b_value_grad += dot(narrow(b_kept, b_grad.dtype), b_grad)
            b_score_grad = b_kept * b_value_dot + b_weight * b_offset[None, :]
        else:
            b_value_grad += dot(narrow(b_weight, b_grad.dtype), b_grad)
            b_score_grad = b_weight * (b_value_dot + b_offset[None, :])
        if CAREFUL:
            b_score_grad = tl.where(m_seen, b_score_grad, 0.0)
        b_key_grad += dot(narrow(b_score_grad, b_query.dtype), b_query)
    return b_key_grad, b_value_grad


@triton.jit
def memory_attention_key_value_grad_kernel(
    p_grad, p_query, p_key, p_value, p_slopes, p_key_mask, p_seed, p_base, p_offset, p_key_grad, p_value_grad,
    s_grad_b, s_grad_h, s_grad_t, s_query_b, s_query_h, s_query_t,
    s_key_b, s_key_g, s_key_s, s_value_b, s_value_g, s_value_s, s_mask_b, s_mask_s,
    H, G, T, S, scale, window, threshold, kept_scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dkey, dvalue [B, G, S, D] of BS keys: all heads of the group and all queries that see them, one after another."""
    blocks = tl.cdiv(S, BS)
    pid = tl.program_id(0)
    i_block = pid % blocks
    i_g = (pid // blocks % G).to(tl.int64)
    i_b = (pid // blocks // G).to(tl.int64)

    o_key = i_block * BS + tl.arange(0, BS)
    last = i_block * BS + (BS - 1)
    b_key = load_rows(p_key + i_b * s_key_b + i_g * s_key_g, o_key, s_key_s, S, D, BD, True)  # [BS, BD]
    b_value = load_rows(p_value + i_b * s_value_b + i_g * s_value_g, o_key, s_value_s, S, D, BD, True)
    if p_key_mask is not None:
        p_key_mask += i_b * s_mask_b
    # Queries begin ... all_begin - 1 see some of the keys, those from all_begin on see all. A window: all see some.
    begin = 0
    all_begin = 0
    if CAUSAL:
        begin = tl.maximum(0, i_block * BS - (S - T)) // BT * BT
        all_begin = tl.minimum(tl.cdiv(tl.maximum(0, last - (S - T)), BT) * BT, T)
    if window is not None:
        all_begin = tl.minimum(T, last + window - (S - T))

    p_query += i_b * s_query_b
    p_grad += i_b * s_grad_b

    b_key_grad = tl.zeros([BS, BD], tl.float32)
    b_value_grad = tl.zeros([BS, BD], tl.float32)
    for i_head in range(GROUP):
        if CAUSAL:
            b_key_grad, b_value_grad = _key_value_grad(
                b_key_grad, b_value_grad, begin, all_begin, b_key, b_value, p_query, p_grad, p_slopes, p_base, p_offset,
                i_b, i_g * GROUP + i_head, s_grad_h, s_grad_t, s_query_h, s_query_t, o_key, last, H, T, S, scale,
                p_key_mask, s_mask_s, window, p_seed, threshold, kept_scale, CAUSAL, True, False, D, BT, BD,
            )  # fmt: skip
        if window is None:
            b_key_grad, b_value_grad = _key_value_grad(
                b_key_grad, b_value_grad, all_begin, T, b_key, b_value, p_query, p_grad, p_slopes, p_base, p_offset,
                i_b, i_g * GROUP + i_head, s_grad_h, s_grad_t, s_query_h, s_query_t, o_key, last, H, T, S, scale,
                p_key_mask, s_mask_s, window, p_seed, threshold, kept_scale, CAUSAL, False, False, D, BT, BD,
            )  # fmt: skip
    if any_not_finite(b_key_grad + b_value_grad):
        b_key_grad = tl.zeros([BS, BD], tl.float32)
        b_value_grad = tl.zeros([BS, BD], tl.float32)
        SMALLER: tl.constexpr = BT // 2 if BT > 16 else BT
        end = T
        if window is not None:
            end = all_begin
        if p_key.dtype.element_ty == tl.float32:  # as above
            b_key = load_rows(p_key + i_b * s_key_b + i_g * s_key_g, o_key, s_key_s, S, D, BD, True)
            b_value = load_rows(p_value + i_b * s_value_b + i_g * s_value_g, o_key, s_value_s, S, D, BD, True)
        for i_head in range(GROUP):
            b_key_grad, b_value_grad = _key_value_grad(
                b_key_grad, b_value_grad, begin, end, b_key, b_value, p_query, p_grad, p_slopes, p_base, p_offset,
                i_b, i_g * GROUP + i_head, s_grad_h, s_grad_t, s_query_h, s_query_t, o_key, last, H, T, S, scale,
                p_key_mask, s_mask_s, window, p_seed, threshold, kept_scale, CAUSAL, True, True, D, SMALLER, BD,
            )  # fmt: skip

    o_d = tl.arange(0, BD)
    m_key = (o_key < S)[:, None] & (o_d < D)[None, :]
    o_out = ((i_b * G + i_g) * S + o_key)[:, None] * D + o_d[None, :]
    dtype = p_key_grad.dtype.element_ty
    tl.store(p_key_grad + o_out, narrow(b_key_grad * scale, dtype), mask=m_key)
    tl.store(p_value_grad + o_out, narrow(b_value_grad, dtype), mask=m_key)


def memory_attention_backward(
    grad: Tensor | None,
    local_lse_grad: Tensor | None,
    memory_lse_grad: Tensor | None,
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
    local_out: Tensor,
    local_lse: Tensor,
    memory_out: Tensor,
    memory_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `memory_attention_forward`: dquery, dkey, dvalue, dmemory_query, and dgate [H] float32.

    Of its outputs, the result and the log-sum-exps have gradients; None stands for zeros. dquery is the part through
    the local scores, dmemory_query the part through the memory scores; when one tensor is both, autograd adds them.
    dgate is zero for "joint". Bit-equal from run to run.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    R, _, M = memory_key.shape[:3]
    K, C = chunk_ids.shape[3], memory_key.shape[3]
    query_grad, memory_query_grad = (query.new_empty((B, H, T, D)) for _ in range(2))
    key_grad, value_grad = (key.new_empty((B, G, S, D)) for _ in range(2))
    gate_grad = torch.zeros((B, H, T), dtype=torch.float32, device=query.device)
    if query.numel() == 0:
        return query_grad, key_grad.zero_(), value_grad.zero_(), memory_query_grad, gate_grad.sum((0, 2))

    if grad is None:
        grad = query.new_zeros(D).expand(query.shape)
    elif grad.stride(-1) != 1:  # as of out.sum().backward(): one number, expanded
        grad = grad.contiguous()
    local_lse_grad = None if local_lse_grad is None else local_lse_grad.contiguous()
    memory_lse_grad = None if memory_lse_grad is None else memory_lse_grad.contiguous()
    local_rows, memory_rows = (tuple(torch.empty_like(gate_grad) for _ in range(2)) for _ in range(2))
    bank = bank_of(memory_key, memory_value, K * C)
    BD = bank.options["BD"]
    grad_strides = grad.stride()[:3]
    mask_strides = (0, 0) if key_mask is None else key_mask.stride()
    local = (
        *grad_strides, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides,
        H, G, T, S, scale, window, drop_threshold(dropout_p), 1 / (1 - dropout_p),
    )  # fmt: skip
    with torch.cuda.device_of(query):
        BT = max(1, 2048 // BD)
        memory_attention_offset_kernel[(triton.cdiv(T, BT) * H * B,)](
            grad, local_lse_grad, memory_lse_grad, local_out, local_lse, memory_out, memory_lse, gate,
            *local_rows, *memory_rows, gate_grad, *grad_strides, H, T, D=D, BT=BT, BD=BD, num_warps=4,
        )  # fmt: skip
        memory_attention_memory_query_grad_kernel[(triton.cdiv(T, bank.options["BT"]) * B * H,)](
            grad, memory_query, bank.key, bank.value, chunk_ids, memory_scale, ring_index, *memory_rows,
            memory_query_grad, *grad_strides, *memory_query.stride()[:3], *bank.strides,
            *chunk_ids.stride(), B, H, G, T, R, M, scale, K=K, **bank.options, num_warps=1,
        )  # fmt: skip
        tiles = query_grad_tiles(query)
        memory_attention_query_grad_kernel[(triton.cdiv(T, tiles.BT) * H * B,)](
            grad, query, key, value, alibi_slopes, key_mask, dropout_seed, *local_rows, query_grad,
            *local, CAUSAL=causal, D=D, BD=BD, **vars(tiles),
        )  # fmt: skip
        tiles = key_value_grad_tiles(query, dropout_seed is not None)
        memory_attention_key_value_grad_kernel[(triton.cdiv(S, tiles.BS) * G * B,)](
            grad, query, key, value, alibi_slopes, key_mask, dropout_seed, *local_rows,
            key_grad, value_grad, *local, GROUP=H // G, CAUSAL=causal, D=D, BD=BD, **vars(tiles),
        )  # fmt: skip
    return query_grad, key_grad, value_grad, memory_query_grad, gate_grad.sum((0, 2))
