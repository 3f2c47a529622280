"""The forward kernels of memory_attention: one gathers memory, the other attends to local keys and merges both.

Two kernels, because each half is bound by something else (L2 gathers, tensor cores) and runs at its own occupancy; what
passes between them is small.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

import triton
import triton.language as tl

from longmem_kernels._triton import narrow, of_head

from .gather import attend_tokens, retrieved
from .local import Local, attend
from .scores import Visible, alibi_slope, any_not_finite, dropout_rows, load_rows, seen_keys
from .softmax import LN2, LOG2E, empty_state, finish, fusion_share


@triton.jit
def memory_attention_memory_kernel(
    query, bank, ids, memory, B, H, G, T, scale,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attention of BT queries to the tokens of their chunks.

    Args:
        query: Rows [B, H, T], the memory queries.
        bank, ids: Bank, Ids.
        memory: Part, written.
    """
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    i_block = pid % blocks
    i_b = (pid // blocks % B).to(tl.int64)
    i_h = (pid // blocks // B).to(tl.int64)  # slowest: the bank of one head stays in L2 while all its queries read it

    o_t = i_block * BT + tl.arange(0, BT)
    b_query = load_rows(of_head(query, i_b, i_h), o_t, T, D, BD, True)
    b_query = b_query.to(tl.float32) * (scale * LOG2E)  # [BT, BD]
    task = retrieved(bank, ids, i_b, i_h, o_t, H, G, T)
    state = attend_tokens(empty_state(BT, BD), task, bank.scale, b_query, 0, K * C, K, C, D, BD, BJ, SAME, WIDE)
    b_out, b_lse = finish(state)

    o_d = tl.arange(0, BD)
    m_t = o_t < T
    o_row = (i_b * H + i_h) * T + o_t
    tl.store(memory.out + o_row[:, None] * D + o_d[None, :], b_out, mask=m_t[:, None] & (o_d < D)[None, :])
    tl.store(memory.lse + o_row, b_lse * LN2, mask=m_t)


@triton.jit
def memory_attention_local_kernel(
    query, key, value, p_gate, p_slopes, key_mask, dropout, memory, p_out, local, sizes, scale, window,
    CAUSAL: tl.constexpr, RISING: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Flash attention of BT queries to the local keys, then the merge with what the memory kernel left.

    RISING: scale > 0. Scores between `all_begin` and `all_end`, most of them, need no masks.

    Args:
        query, key, value: Rows [B, H, T] and [B, G, S].
        p_gate, p_slopes: [H], or None.
        key_mask, dropout: Mask, Dropout, or None.
        memory: Part, read; p_out [B, H, T, D] and local, a Part, are written.
    """
    H, G, T, S = sizes
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    i_block = blocks - 1 - pid % blocks  # with causal=True the last block has most keys: start it first
    i_h = (pid // blocks % H).to(tl.int64)
    i_b = (pid // blocks // H).to(tl.int64)
    i_g = i_h // (H // G)

    o_t = i_block * BT + tl.arange(0, BT)
    first = S - T + i_block * BT  # position of the first query
    slope = None
    if p_slopes is not None:
        slope = alibi_slope(p_slopes, i_h)
    b_row = None
    if dropout is not None:
        b_row = dropout_rows(dropout, (i_b * H + i_h) * T + o_t)
    b_query = load_rows(of_head(query, i_b, i_h), o_t, T, D, BD, True)
    task = Local(
        b_query, first + tl.arange(0, BT), first, of_head(key, i_b, i_g), of_head(value, i_b, i_g),
        Visible(S, key_mask, window, i_b), scale, slope, dropout, b_row,
    )  # fmt: skip
    begin, all_begin, all_end, end = seen_keys(first, first + BT - 1, S, window, CAUSAL, BS)
    state = empty_state(BT, BD)
    if window is not None:
        state = attend(state, task, begin, all_begin, CAUSAL, True, RISING, False, D, BS, BD)
    state = attend(state, task, all_begin, all_end, CAUSAL, False, RISING, False, D, BS, BD)
    state = attend(state, task, all_end, end, CAUSAL, True, RISING, False, D, BS, BD)
    if any_not_finite(state.out):
        state = attend(empty_state(BT, BD), task, begin, end, CAUSAL, True, RISING, True, D, BS, BD)

    b_out, b_lse = finish(state)
    if dropout is not None:
        b_out *= dropout.kept_scale
    b_lse *= LN2
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    m_out = m_t[:, None] & (o_d < D)[None, :]
    first_row = (i_b * H + i_h) * T + i_block * BT
    o_row = tl.arange(0, BT)
    o_out = o_row[:, None] * D + o_d[None, :]
    b_memory_lse = tl.load(memory.lse + first_row + o_row, mask=m_t, other=float("-inf"))
    b_share = fusion_share(b_lse, b_memory_lse, p_gate, i_h)[:, None]
    b_memory = tl.load(memory.out + first_row * D + o_out, mask=m_out, other=0.0)
    b_fused = narrow((1 - b_share) * b_out + b_share * b_memory, p_out.dtype.element_ty)
    tl.store(local.out + first_row * D + o_out, b_out, mask=m_out)
    tl.store(local.lse + first_row + o_row, b_lse, mask=m_t)
    tl.store(p_out + first_row * D + o_out, b_fused, mask=m_out)
