"""The backward kernels of memory_attention: one for each gradient, none of which adds into memory another one writes.

With p the weight of a key in the output, both softmaxes and the fusion included, the gradient of its score is
`p * (grad . value + offset)`, where `offset = (gradient of the log-sum-exp) / w - grad . x`: w is the part's share of
the output, x the part's own output ("gated": two softmaxes) or the fused one ("joint": one softmax). FlashAttention
calls -offset delta; added, it starts the accumulator of the product before it. Dropout multiplies grad . value by 0 or
1 / (1 - dropout_p). The first kernel makes what depends on the row alone; the others recompute the scores.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

import triton
import triton.language as tl

from longmem_kernels._triton import dot, narrow, of_head

from .gather import load_tokens, retrieved, token_scales
from .local import Local
from .scores import (
    Visible,
    alibi_bias,
    alibi_rows,
    alibi_slope,
    any_not_finite,
    dropout_rows,
    finite_numbers,
    kept_by_dropout,
    load_rows,
    local_scores,
    not_finite_rows,
    seen_keys,
    seen_pairs,
)
from .softmax import LOG2E, fusion_share


@triton.jit
def _store_terms(terms, p_lse_grad, o_row, m_row, b_lse, b_share, b_dot):
    """Stores the `RowTerms` of rows of a part with `b_share` of the output.

    `score - base` is the log of p, in units of log 2. Rows that see no key have base +inf, so that p is 0.
    """
    m_found = b_lse != float("-inf")
    # A part whose share underflows may still have a gradient of its log-sum-exp: the divisor stays above 0.
    b_share = tl.maximum(b_share, 2.0**-64, propagate_nan=tl.PropagateNan.ALL)
    b_base = tl.where(m_found, b_lse * LOG2E - tl.log2(b_share), float("inf"))
    b_offset = tl.where(m_found, -b_dot, 0.0)
    if p_lse_grad is not None:
        b_offset += tl.where(m_found, tl.load(p_lse_grad + o_row, mask=m_row, other=0.0) / b_share, 0.0)
    tl.store(terms.base + o_row, b_base, mask=m_row)
    tl.store(terms.offset + o_row, b_offset, mask=m_row)


@triton.jit
def load_terms(terms, o_row, m_row):
    b_base = tl.load(terms.base + o_row, mask=m_row, other=float("inf"))
    return b_base, tl.load(terms.offset + o_row, mask=m_row, other=0.0)


@triton.jit
def memory_attention_offset_kernel(
    grad, p_local_lse_grad, p_memory_lse_grad, local, memory, p_gate, local_terms, memory_terms, p_gate_grad, H, T,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Base and offset of every row, local and memory, and the row's term of the gate gradient.

    Args:
        grad: Rows [B, H, T], of the output.
        p_local_lse_grad, p_memory_lse_grad: [B, H, T], or None; p_gate: [H], or None.
        local, memory: Part, results of the forward pass.
        local_terms, memory_terms: RowTerms, and p_gate_grad [B, H, T], are written.
    """
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
    b_grad = load_rows(of_head(grad, i_b, i_h), o_t, T, D, BD, True).to(tl.float32)
    b_local_dot = tl.sum(b_grad * tl.load(local.out + o_tile, mask=m_tile, other=0.0), axis=1)
    b_memory_dot = tl.sum(b_grad * tl.load(memory.out + o_tile, mask=m_tile, other=0.0), axis=1)
    b_local_lse = tl.load(local.lse + o_row, mask=m_t, other=float("-inf"))
    b_memory_lse = tl.load(memory.lse + o_row, mask=m_t, other=float("-inf"))

    b_share = fusion_share(b_local_lse, b_memory_lse, p_gate, i_h)
    if p_gate is not None:
        b_gate_grad = b_share * (1 - b_share) * (b_memory_dot - b_local_dot)
        b_gate_grad = tl.where(b_memory_lse != float("-inf"), b_gate_grad, 0.0)
        tl.store(p_gate_grad + o_row, b_gate_grad, mask=m_t)
    else:
        b_local_dot = (1 - b_share) * b_local_dot + b_share * b_memory_dot
        b_memory_dot = b_local_dot
    _store_terms(local_terms, p_local_lse_grad, o_row, m_t, b_local_lse, 1 - b_share, b_local_dot)
    _store_terms(memory_terms, p_memory_lse_grad, o_row, m_t, b_memory_lse, b_share, b_memory_dot)


@triton.jit
def memory_attention_memory_query_grad_kernel(
    grad, query, bank, ids, terms, p_query_grad, B, H, G, T, scale,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dmemory_query [B, H, T, D]: gathers the tokens again, as memory_attention_memory_kernel does.

    Args:
        grad, query: Rows [B, H, T], the output's gradient and the memory queries.
        bank, ids: Bank, Ids.
        terms: RowTerms of the memory.
    """
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    i_block = pid % blocks
    i_b = (pid // blocks % B).to(tl.int64)
    i_h = (pid // blocks // B).to(tl.int64)

    o_t = i_block * BT + tl.arange(0, BT)
    m_t = o_t < T
    o_row = (i_b * H + i_h) * T + o_t
    b_query = load_rows(of_head(query, i_b, i_h), o_t, T, D, BD, True)
    b_query = b_query.to(tl.float32) * (scale * LOG2E)
    b_base, b_offset = load_terms(terms, o_row, m_t)
    b_grad = load_rows(of_head(grad, i_b, i_h), o_t, T, D, BD, True).to(tl.float32)
    task = retrieved(bank, ids, i_b, i_h, o_t, H, G, T)

    b_query_grad = tl.zeros([BT, BD], tl.float32)
    for start in range(0, K * C, BJ):
        tokens = load_tokens(task, start, K, C, D, BD, BJ, SAME, WIDE)
        b_score = tl.sum(b_query[None, :, :] * tokens.b_key, axis=2)  # [BJ, BT]
        b_value_dot = tl.sum(b_grad[None, :, :] * tokens.b_value, axis=2)
        if bank.scale is not None:
            b_key_scale, b_value_scale = token_scales(task, bank.scale, tokens)
            b_score *= b_key_scale
            b_value_dot *= b_value_scale
        b_weight = tl.exp2(tl.where(tokens.m_there, b_score - b_base[None, :], float("-inf")))
        b_score_grad = tl.where(tokens.m_there, b_weight * (b_value_dot + b_offset[None, :]), 0.0)
        if bank.scale is not None:
            b_score_grad *= b_key_scale
        b_query_grad += tl.sum(b_score_grad[:, :, None] * tokens.b_key, axis=0)

    o_d = tl.arange(0, BD)
    p_query_grad += o_row[:, None] * D + o_d[None, :]
    b_query_grad = narrow(b_query_grad * scale, p_query_grad.dtype.element_ty)
    tl.store(p_query_grad, b_query_grad, mask=m_t[:, None] & (o_d < D)[None, :])


@triton.jit
def _add_query_grad(
    b_query_grad, task, begin, end, b_grad, b_base, b_offset,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """b_query_grad with what keys begin ... end - 1 add, not yet scaled; `task` is a `Local`."""
    visible = task.visible
    if task.slope is not None and not MASKED:
        b_base += alibi_rows(task.slope, task.o_query, task.first)
    o_query = task.o_query[:, None]
    STAGES: tl.constexpr = 1 if CAREFUL and BS > 16 else None
    for start in tl.range(begin, end, BS, num_stages=STAGES):
        o_key = start + tl.arange(0, BS)
        b_key = load_rows(task.key, o_key, visible.S, D, BD, MASKED)  # [BS, BD]
        b_value = load_rows(task.value, o_key, visible.S, D, BD, MASKED)
        b_bias = None
        if task.slope is not None:
            b_bias = alibi_bias(task.slope, task.o_query, start, task.first, BS, MASKED)
        b_dot = dot(task.b_query, tl.trans(b_key))
        b_score = local_scores(b_dot, b_bias, o_query, o_key[None, :], task.scale, visible, CAUSAL, MASKED)
        b_weight = tl.exp2(b_score - b_base[:, None])
        b_value_dot = dot(b_grad, tl.trans(b_value))
        if task.dropout is not None:
            m_kept = kept_by_dropout(task.b_row[:, None], o_key[None, :], task.dropout)
            b_value_dot = tl.where(m_kept, b_value_dot * task.dropout.kept_scale, 0.0)
        b_score_grad = b_weight * (b_value_dot + b_offset[:, None])
        if CAREFUL:  # what is multiplied by NaN becomes NaN before, where it is seen
            m_seen = seen_pairs(b_score, o_query, o_key[None, :], task.scale, visible, CAUSAL)
            b_score_grad = tl.where(m_seen, b_score_grad, 0.0)
            b_score_grad = tl.where(m_seen & not_finite_rows(b_key)[None, :], float("nan"), b_score_grad)
            b_key = finite_numbers(b_key)
        b_query_grad += dot(narrow(b_score_grad, b_key.dtype), b_key)
    return b_query_grad


@triton.jit
def memory_attention_query_grad_kernel(
    grad, query, key, value, p_slopes, key_mask, dropout, terms, p_query_grad, sizes, scale, window,
    CAUSAL: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dquery [B, H, T, D], the part that comes through the local scores.

    Args:
        grad, query, key, value: Rows [B, H, T] and [B, G, S], `grad` of the output.
        p_slopes: [H], or None.
        key_mask, dropout: Mask, Dropout, or None.
        terms: RowTerms of the local part.
        sizes: Sizes.
    """
    H, G, T, S = sizes
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
        slope = alibi_slope(p_slopes, i_h)
    b_row = None
    if dropout is not None:
        b_row = dropout_rows(dropout, o_row)
    keys, values = of_head(key, i_b, i_g), of_head(value, i_b, i_g)
    visible = Visible(S, key_mask, window, i_b)
    b_query = load_rows(of_head(query, i_b, i_h), o_t, T, D, BD, True)
    task = Local(b_query, o_query, first, keys, values, visible, scale, slope, dropout, b_row)
    b_grad = load_rows(of_head(grad, i_b, i_h), o_t, T, D, BD, True)
    b_base, b_offset = load_terms(terms, o_row, m_t)

    b_query_grad = tl.zeros([BT, BD], tl.float32)
    begin, all_begin, all_end, end = seen_keys(first, first + BT - 1, S, window, CAUSAL, BS)
    if window is not None:
        b_query_grad = _add_query_grad(
            b_query_grad, task, begin, all_begin, b_grad, b_base, b_offset, CAUSAL, True, False, D, BS, BD
        )
    b_query_grad = _add_query_grad(
        b_query_grad, task, all_begin, all_end, b_grad, b_base, b_offset, CAUSAL, False, False, D, BS, BD
    )
    b_query_grad = _add_query_grad(
        b_query_grad, task, all_end, end, b_grad, b_base, b_offset, CAUSAL, True, False, D, BS, BD
    )
    if any_not_finite(b_query_grad):
        SMALLER: tl.constexpr = BS // 2 if BS > 16 else BS  # in registers beside what the loops above take
        # Loaded once more, because what is kept for here takes registers from the loops above.
        b_query = load_rows(of_head(query, i_b, i_h), o_t, T, D, BD, True)
        again = Local(b_query, o_query, first, keys, values, visible, scale, slope, dropout, b_row)
        b_grad = load_rows(of_head(grad, i_b, i_h), o_t, T, D, BD, True)
        b_query_grad = tl.zeros([BT, BD], tl.float32)
        b_query_grad = _add_query_grad(
            b_query_grad, again, begin, end, b_grad, b_base, b_offset, CAUSAL, True, True, D, SMALLER, BD
        )

    o_d = tl.arange(0, BD)
    p_query_grad += o_row[:, None] * D + o_d[None, :]
    b_query_grad = narrow(b_query_grad * scale, p_query_grad.dtype.element_ty)
    tl.store(p_query_grad, b_query_grad, mask=m_t[:, None] & (o_d < D)[None, :])
