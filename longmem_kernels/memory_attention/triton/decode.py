"""The kernels of memory_attention for few queries, as in decoding: keys and retrieved tokens are split among programs.

The first kernel does local attention and memory attention in one launch, each program a split of the keys of a few rows
or a split of a row's retrieved tokens; the second merges the splits. All sizes that matter to either are known on the
host, nothing is counted in memory: the launches can be captured in a CUDA graph and sums have a fixed order.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longmem_kernels._triton import narrow, of_head

from .gather import attend_tokens, retrieved
from .local import Local, attend
from .scores import Visible, alibi_slope, any_not_finite, dropout_rows, load_rows
from .softmax import LN2, LOG2E, State, empty_state, finish, fusion_share, online_softmax
from .views import Part


class Splits(NamedTuple):
    """How keys, from `first_key` on, and retrieved tokens are divided: for each row, `local` splits of `keys` keys,
    then `memory` splits of `tokens` tokens. The first `local_programs` programs attend to keys."""

    first_key: Any
    keys: Any
    tokens: Any
    local: Any
    memory: Any
    local_programs: Any


@triton.jit
def _store_split(splits, part, o_row, i_split, state, m_row, D: tl.constexpr, BD: tl.constexpr):
    b_out, b_lse = finish(state)
    o_split = o_row * (splits.local + splits.memory) + i_split
    o_d = tl.arange(0, BD)
    tl.store(part.out + o_split[:, None] * D + o_d[None, :], b_out, mask=m_row[:, None] & (o_d < D)[None, :])
    tl.store(part.lse + o_split, b_lse, mask=m_row)


@triton.jit
def _local_split(
    pid, query, key, value, p_slopes, key_mask, dropout, part, sizes, scale, window, splits,
    CAUSAL: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Local attention of BT rows to a split of the keys. A group's rows are one list of H/G * T, head by head."""
    H, G, T, S = sizes
    rows = H // G * T
    blocks = tl.cdiv(rows, BT)
    i_split = pid % splits.local
    i_g = (pid // splits.local // blocks % G).to(tl.int64)
    i_b = (pid // splits.local // blocks // G).to(tl.int64)
    o_list = pid // splits.local % blocks * BT + tl.arange(0, BT)
    m_row = o_list < rows
    o_list = tl.minimum(o_list, rows - 1)
    o_h = i_g * (H // G) + o_list // T
    o_t = o_list % T
    o_row = (i_b * H + o_h) * T + o_t

    o_d = tl.arange(0, BD)
    p_rows = query.ptr + i_b * query.b + o_h * query.h + o_t.to(tl.int64) * query.t
    b_query = tl.load(p_rows[:, None] + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
    slope = None
    if p_slopes is not None:
        slope = alibi_slope(p_slopes, o_h)[:, None]
    b_row = None
    if dropout is not None:
        b_row = dropout_rows(dropout, o_row)
    task = Local(
        b_query, S - T + o_t, 0, of_head(key, i_b, i_g), of_head(value, i_b, i_g),
        Visible(S, key_mask, window, i_b), scale, slope, dropout, b_row,
    )  # fmt: skip
    begin = splits.first_key + i_split * splits.keys
    end = tl.minimum(begin + splits.keys, S)
    state = attend(empty_state(BT, BD), task, begin, end, CAUSAL, True, False, False, D, BS, BD)
    if any_not_finite(state.out):
        state = attend(empty_state(BT, BD), task, begin, end, CAUSAL, True, False, True, D, BS, BD)
    _store_split(splits, part, o_row, i_split, state, m_row, D, BD)


@triton.jit
def _memory_split(
    pid, query, bank, ids, part, sizes, scale, splits,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attention of one row to a split of its retrieved tokens."""
    H, G, T, _ = sizes
    i_split = pid % splits.memory
    i_row = (pid // splits.memory).to(tl.int64)
    i_h = i_row // T % H
    i_b = i_row // T // H
    o_t = (i_row % T).to(tl.int32) + tl.arange(0, 1)
    b_query = load_rows(of_head(query, i_b, i_h), o_t, T, D, BD, False).to(tl.float32) * (scale * LOG2E)
    task = retrieved(bank, ids, i_b, i_h, o_t, H, G, T)
    begin = i_split * splits.tokens
    end = tl.minimum(begin + splits.tokens, K * C)
    state = attend_tokens(empty_state(1, BD), task, bank.scale, b_query, begin, end, K, C, D, BD, BJ, SAME, WIDE)
    o_row = i_row + tl.arange(0, 1)
    _store_split(splits, part, o_row, splits.local + i_split, state, o_t < T, D, BD)


@triton.jit
def memory_attention_decode_kernel(
    query, key, value, p_slopes, key_mask, dropout, memory_query, bank, ids, part, sizes, scale, window, splits,
    CAUSAL: tl.constexpr, K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BJ: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exps, in units of log 2, of all splits.

    Args:
        query, key, value, memory_query: Rows [B, H, T] and [B, G, S].
        p_slopes: [H], or None.
        key_mask, dropout: Mask, Dropout, or None.
        bank, ids, sizes, splits: Bank, Ids, Sizes, Splits.
        part: Part, written; out [B, H, T, splits, D] and log-sum-exp [B, H, T, splits], local splits first.
    """
    pid = tl.program_id(0)
    if pid < splits.local_programs:
        _local_split(
            pid, query, key, value, p_slopes, key_mask, dropout, part, sizes, scale, window, splits,
            CAUSAL, D, BT, BS, BD,
        )  # fmt: skip
    else:
        _memory_split(
            pid - splits.local_programs, memory_query, bank, ids, part, sizes, scale, splits,
            K, C, D, BD, BJ, SAME, WIDE,
        )  # fmt: skip


@triton.jit
def _merged(part, begin, end, D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """Output [1, BD] and log-sum-exp [1], in units of log 2, of splits begin ... end - 1 of a row."""
    o_d = tl.arange(0, BD)
    state = empty_state(1, BD)
    for start in range(begin, end, BP):
        o_split = start + tl.arange(0, BP)
        m_split = o_split < end
        b_lse = tl.load(part.lse + o_split, mask=m_split, other=float("-inf"))[:, None]  # [BP, 1]
        m_tile = m_split[:, None] & (o_d < D)[None, :]
        b_part = tl.load(part.out + o_split[:, None] * D + o_d[None, :], mask=m_tile, other=0.0)
        state, b_weight = online_softmax(state, b_lse, None, 0)
        state = State(state.max, state.sum, state.out + tl.sum(b_weight * b_part, axis=0)[None, :])
    return finish(state)


@triton.jit
def memory_attention_decode_merge_kernel(
    part, p_gate, p_out, local, memory, H, T, local_splits, splits, kept_scale,
    D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All results of a row from its splits.

    Args:
        part: Part that the decode kernel wrote.
        p_gate: [H], or None.
        p_out: [B, H, T, D], and local, memory: Part, all written.
        local_splits, splits: how many, and how many in all.
    """
    i_row = tl.program_id(0).to(tl.int64)
    row = Part(part.out + i_row * splits * D, part.lse + i_row * splits)
    b_local, b_local_lse = _merged(row, 0, local_splits, D, BP, BD)
    b_memory, b_memory_lse = _merged(row, local_splits, splits, D, BP, BD)
    b_local *= kept_scale
    b_local_lse *= LN2
    b_memory_lse *= LN2
    b_share = fusion_share(b_local_lse, b_memory_lse, p_gate, i_row // T % H)[:, None]

    o_row = i_row + tl.arange(0, 1)
    o_d = tl.arange(0, BD)
    o_out = o_row[:, None] * D + o_d[None, :]
    m_out = (o_d < D)[None, :]
    tl.store(p_out + o_out, narrow((1 - b_share) * b_local + b_share * b_memory, p_out.dtype.element_ty), mask=m_out)
    tl.store(local.out + o_out, b_local, mask=m_out)
    tl.store(memory.out + o_out, b_memory, mask=m_out)
    tl.store(local.lse + o_row, b_local_lse)
    tl.store(memory.lse + o_row, b_memory_lse)
