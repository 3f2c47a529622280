"""Local attention of a block of queries: flash attention over a span of keys."""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longmem_kernels._triton import Rows, dot, narrow

from .scores import (
    Visible,
    alibi_bias,
    alibi_rows,
    finite_numbers,
    kept_by_dropout,
    load_rows,
    local_scores,
    mask_pointer,
)
from .softmax import LOG2E, State, online_softmax
from .views import Dropout


class Local(NamedTuple):
    """Local attention of BT queries, inside a kernel.

    Attributes:
        b_query: [BT, BD].
        o_query: [BT], their positions; `first`: that of the first.
        key, value: of the row and the head.
        scale: of scores.
        slope: ALiBi's, in units of log 2, a number or [BT, 1]; None without ALiBi.
        dropout: None without dropout; b_row: [BT], what `dropout_rows` says of the queries' rows, or None.
    """

    b_query: Any
    o_query: Any
    first: Any
    key: Rows
    value: Rows
    visible: Visible
    scale: Any
    slope: Any
    dropout: Dropout
    b_row: Any


@triton.jit
def attend(
    state, task, begin, end,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, RISING: tl.constexpr, CAREFUL: tl.constexpr,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The softmax `state` after keys begin ... end - 1.

    MASKED: some pairs may be hidden, else none but by the key mask. RISING: scale > 0. CAREFUL: see `add_not_finite`.
    """
    visible = task.visible
    slope = task.slope
    if slope is not None and not MASKED:
        state = State(state.max + alibi_rows(slope, task.o_query, task.first), state.sum, state.out)
    # Registers are for the loops that usually run; those of float32 products take more without stages.
    STAGES: tl.constexpr = 1 if CAREFUL and task.key.ptr.dtype.element_ty != tl.float32 else None
    for start in tl.range(begin, end, BS, num_stages=STAGES):
        o_key = start + tl.arange(0, BS)
        b_key = load_rows(task.key, o_key, visible.S, D, BD, MASKED)  # [BS, BD]
        b_value = load_rows(task.value, o_key, visible.S, D, BD, MASKED)
        if CAREFUL:
            b_value = finite_numbers(b_value)
        b_dot = dot(task.b_query, tl.trans(b_key))
        if MASKED or not RISING or slope is not None or visible.key_mask is not None:
            b_bias = None
            if slope is not None:
                b_bias = alibi_bias(slope, task.o_query, start, task.first, BS, MASKED)
            b_score = local_scores(
                b_dot, b_bias, task.o_query[:, None], o_key[None, :], task.scale, visible, CAUSAL, MASKED
            )
            state, b_weight = online_softmax(state, b_score, None, 1)
        else:
            state, b_weight = online_softmax(state, b_dot, task.scale * LOG2E, 1)
        if task.dropout is not None:
            b_weight = tl.where(kept_by_dropout(task.b_row[:, None], o_key[None, :], task.dropout), b_weight, 0.0)
        state = State(state.max, state.sum, state.out + dot(narrow(b_weight, b_value.dtype), b_value))
    if slope is not None and not MASKED:
        state = State(state.max - alibi_rows(slope, task.o_query, task.first), state.sum, state.out)
    if CAREFUL:
        state = State(state.max, state.sum, add_not_finite(state.out, task, begin, end, CAUSAL, D, BD))
    return state


@triton.jit
def add_not_finite(b_out, task, begin, end, CAUSAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """b_out [BT, BD] with the values of keys begin ... end - 1 that are not finite, whatever they weigh.

    A hidden key weighs zero, but zero times NaN or infinity is NaN. The loops over keys do not look for that: a program
    whose result is not finite computes it again, CAREFUL, with what is hidden left out.
    """
    visible = task.visible
    o_d = tl.arange(0, BD)
    for i_key in tl.range(begin, end, num_stages=1):
        b_value = tl.load(task.value.ptr + tl.cast(i_key, tl.int64) * task.value.t + o_d, mask=o_d < D, other=0.0)
        b_value = b_value.to(tl.float32)
        m_seen = task.o_query == task.o_query
        if CAUSAL:
            m_seen = i_key <= task.o_query
        if visible.window is not None:
            m_seen = m_seen & (task.o_query - i_key < visible.window)
        if visible.key_mask is not None:
            m_seen = m_seen & (tl.load(mask_pointer(visible, tl.cast(i_key, tl.int64))) != 0)
        b_value = tl.where(b_value * 0.0 != 0.0, b_value, 0.0)
        b_out += tl.where(m_seen[:, None], b_value[None, :], 0.0)
    return b_out
