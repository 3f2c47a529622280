"""The backward kernel of memory_attention for local keys and values. See backward.py for what it computes."""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longmem_kernels._triton import Rows, dot, narrow, of_head

from .backward import load_terms
from .scores import (
    Visible,
    alibi_rows,
    alibi_slope,
    any_not_finite,
    dropout_rows,
    finite_numbers,
    kept_by_dropout,
    load_rows,
    local_scores,
    not_finite_rows,
    seen_pairs,
)
from .views import Dropout, RowTerms, Sizes


class Keys(NamedTuple):
    """A block of keys whose gradients are computed, inside a kernel.

    Attributes:
        b_key, b_value: [BS, BD].
        o_key: [BS], their positions; `last`: that of the last.
        query, grad: Rows of all heads and rows; terms: of the local part.
        visible: in the row.
    """

    b_key: Any
    b_value: Any
    o_key: Any
    last: Any
    query: Rows
    grad: Rows
    terms: RowTerms
    p_slopes: Any
    dropout: Dropout
    visible: Visible
    sizes: Sizes
    scale: Any


@triton.jit
def _add_key_value_grad(
    b_key_grad, b_value_grad, task, begin, end, i_h,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Both gradients with what queries begin ... end - 1 of a head add. Scores are transposed: [BS, BT]."""
    H, _, T, S = task.sizes
    slope = None
    if task.p_slopes is not None:
        slope = alibi_slope(task.p_slopes, i_h)
    query = of_head(task.query, task.visible.i_b, i_h)
    grad = of_head(task.grad, task.visible.i_b, i_h)
    first_row = (task.visible.i_b * H + i_h) * T
    o_key = task.o_key[:, None]
    STAGES: tl.constexpr = 1 if CAREFUL and query.ptr.dtype.element_ty != tl.float32 else None
    for start in tl.range(begin, end, BT, num_stages=STAGES):
        o_t = start + tl.arange(0, BT)
        o_query = S - T + o_t
        o_row = first_row + o_t
        b_query = load_rows(query, o_t, T, D, BD, True)  # [BT, BD]
        b_grad = load_rows(grad, o_t, T, D, BD, True)
        b_base, b_offset = load_terms(task.terms, o_row, o_t < T)
        b_bias = None
        if slope is not None and MASKED:
            b_bias = slope * (o_key.to(tl.float32) - o_query.to(tl.float32)[None, :])
        elif slope is not None:  # as in `alibi_bias`
            b_bias = slope * (o_key - task.last).to(tl.float32)
            b_base += alibi_rows(slope, o_query, task.last)
        b_dot = dot(task.b_key, tl.trans(b_query))
        b_score = local_scores(b_dot, b_bias, o_query[None, :], o_key, task.scale, task.visible, CAUSAL, MASKED)
        b_weight = tl.exp2(b_score - b_base[None, :])
        b_value_dot = dot(task.b_value, tl.trans(b_grad))
        if CAREFUL:  # as in `_add_query_grad` of backward.py
            m_seen = seen_pairs(b_score, o_query[None, :], o_key, task.scale, task.visible, CAUSAL)
            m_bad = not_finite_rows(b_query) | not_finite_rows(b_grad)
            b_weight = tl.where(m_seen, tl.where(m_bad[None, :], float("nan"), b_weight), 0.0)
            b_query = finite_numbers(b_query)
            b_grad = finite_numbers(b_grad)
        if task.dropout is not None:
            m_kept = kept_by_dropout(dropout_rows(task.dropout, o_row)[None, :], o_key, task.dropout)
            b_kept = tl.where(m_kept, b_weight * task.dropout.kept_scale, 0.0)
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
    grad, query, key, value, p_slopes, key_mask, dropout, terms, p_key_grad, p_value_grad, sizes, scale, window,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dkey, dvalue [B, G, S, D] of BS keys: all heads of the group and all queries that see them, one after another.

    GROUP: H / G. Arguments as of memory_attention_query_grad_kernel; both gradients are written.
    """
    _, G, T, S = sizes
    blocks = tl.cdiv(S, BS)
    pid = tl.program_id(0)
    i_block = pid % blocks
    i_g = (pid // blocks % G).to(tl.int64)
    i_b = (pid // blocks // G).to(tl.int64)

    o_key = i_block * BS + tl.arange(0, BS)
    last = i_block * BS + (BS - 1)
    keys, values = of_head(key, i_b, i_g), of_head(value, i_b, i_g)
    visible = Visible(S, key_mask, window, i_b)
    b_key = load_rows(keys, o_key, S, D, BD, True)
    b_value = load_rows(values, o_key, S, D, BD, True)
    task = Keys(b_key, b_value, o_key, last, query, grad, terms, p_slopes, dropout, visible, sizes, scale)
    # Queries begin ... all_begin - 1 see some of the keys, those from all_begin on see all. A window: all see some.
    begin = 0
    all_begin = 0
    if CAUSAL:
        begin = tl.maximum(0, i_block * BS - (S - T)) // BT * BT
        all_begin = tl.minimum(tl.cdiv(tl.maximum(0, last - (S - T)), BT) * BT, T)
    if window is not None:
        all_begin = tl.minimum(T, last + window - (S - T))

    b_key_grad = tl.zeros([BS, BD], tl.float32)
    b_value_grad = tl.zeros([BS, BD], tl.float32)
    for i_head in range(GROUP):
        i_h = i_g * GROUP + i_head
        if CAUSAL:
            b_key_grad, b_value_grad = _add_key_value_grad(
                b_key_grad, b_value_grad, task, begin, all_begin, i_h, CAUSAL, True, False, D, BT, BD
            )
        if window is None:
            b_key_grad, b_value_grad = _add_key_value_grad(
                b_key_grad, b_value_grad, task, all_begin, T, i_h, CAUSAL, False, False, D, BT, BD
            )
    if any_not_finite(b_key_grad + b_value_grad):
        b_key_grad = tl.zeros([BS, BD], tl.float32)
        b_value_grad = tl.zeros([BS, BD], tl.float32)
        SMALLER: tl.constexpr = BT // 2 if BT > 16 else BT
        end = T
        if window is not None:
            end = all_begin
        again = task
        if query.ptr.dtype.element_ty == tl.float32:  # as in backward.py
            b_key = load_rows(keys, o_key, S, D, BD, True)
            b_value = load_rows(values, o_key, S, D, BD, True)
            again = Keys(b_key, b_value, o_key, last, query, grad, terms, p_slopes, dropout, visible, sizes, scale)
        for i_head in range(GROUP):
            b_key_grad, b_value_grad = _add_key_value_grad(
                b_key_grad, b_value_grad, again, begin, end, i_g * GROUP + i_head, CAUSAL, True, True, D, SMALLER, BD
            )

    o_d = tl.arange(0, BD)
    m_key = (o_key < S)[:, None] & (o_d < D)[None, :]
    o_out = ((i_b * G + i_g) * S + o_key)[:, None] * D + o_d[None, :]
    dtype = p_key_grad.dtype.element_ty
    tl.store(p_key_grad + o_out, narrow(b_key_grad * scale, dtype), mask=m_key)
    tl.store(p_value_grad + o_out, narrow(b_value_grad, dtype), mask=m_key)
