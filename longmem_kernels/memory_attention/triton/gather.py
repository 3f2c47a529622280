"""Reading retrieved tokens from memory, and attention to them."""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longmem_kernels._triton import ring_of_row

from .softmax import State, online_softmax
from .views import Chunks, Ids


class Retrieved(NamedTuple):
    """Memory as a block of queries of one head reads it, inside a kernel.

    Attributes:
        o_t: [BT], the queries; those from T on do not exist.
        key, value: of the row's ring and the head, with M slots.
        o_scale: the offset of the scales of the same ring and head.
        ids: of the row and the head.
    """

    o_t: Any
    T: Any
    key: Chunks
    value: Chunks
    o_scale: Any
    M: Any
    ids: Ids


@triton.jit
def retrieved(bank, ids, i_b, i_h, o_t, H, G, T):
    """`Retrieved` of queries `o_t` of row `i_b` and head `i_h` (both int64)."""
    i_g = i_h // (H // G)
    i_r, M = ring_of_row(bank.ring_index, i_b, bank.R, bank.M)
    key = _of_head(bank.key, i_r, i_g)
    value = _of_head(bank.value, i_r, i_g)
    ids = Ids(ids.ptr + i_b * ids.b + i_h * ids.h, ids.b, ids.h, ids.t, ids.k)
    return Retrieved(o_t, T, key, value, (i_r * G + i_g) * M * 2, M, ids)


@triton.jit
def _of_head(chunks, i_r, i_g):
    return Chunks(chunks.ptr + i_r * chunks.r + i_g * chunks.g, chunks.r, chunks.g, chunks.m, chunks.c)


class Tokens(NamedTuple):
    """Retrieved tokens of a block, inside a kernel.

    Attributes:
        m_there: [BJ, BT], which tokens exist.
        b_slot: [BJ, BT], the slots of their chunks.
        b_key, b_value: [BJ, BT, BD] float32, zero where there is none; of float8, yet to be multiplied by scales.
    """

    m_there: Any
    b_slot: Any
    b_key: Any
    b_value: Any


@triton.jit
def load_tokens(
    task, start,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Tokens start ... start + BJ - 1 of each query's list of K * C, chunk by chunk."""
    o_j = start + tl.arange(0, BJ)
    m_id = (o_j < K * C)[:, None] & (task.o_t < task.T)[None, :]
    o_id = task.o_t.to(tl.int64)[None, :] * task.ids.t + (o_j // C)[:, None] * task.ids.k
    b_slot = tl.load(task.ids.ptr + o_id, mask=m_id, other=-1)
    m_there = (b_slot >= 0) & (b_slot < task.M)
    if WIDE:
        b_slot = b_slot.to(tl.int64)
    o_c = (o_j % C)[:, None]
    o_key = b_slot * task.key.m + o_c * task.key.c
    o_value = o_key
    if not SAME:
        o_value = b_slot * task.value.m + o_c * task.value.c
    b_key = _stored(task.key.ptr, o_key, m_there, D, BD)
    b_value = _stored(task.value.ptr, o_value, m_there, D, BD)
    return Tokens(m_there, b_slot, b_key, b_value)


@triton.jit
def token_scales(task, p_scale, tokens):
    """Scales [BJ, BT] of keys and values of tokens; `p_scale` points to those of the bank."""
    p_chunk = p_scale + task.o_scale + tokens.b_slot.to(tl.int64) * 2
    b_key_scale = tl.load(p_chunk, mask=tokens.m_there, other=0.0)
    b_value_scale = tl.load(p_chunk + 1, mask=tokens.m_there, other=0.0)
    if task.key.ptr.dtype.element_ty == tl.uint8:  # see _numbers
        return b_key_scale * 256.0, b_value_scale * 256.0
    else:
        return b_key_scale, b_value_scale


@triton.jit
def _stored(p_bank, o_token, m_there, D: tl.constexpr, BD: tl.constexpr):
    """Keys or values of tokens, float32 [BJ, BT, BD], 0 where there are none; of bytes, their 256th part."""
    o_d = tl.arange(0, BD)
    m_load = m_there[:, :, None]
    if D < BD:
        m_load = m_load & (o_d < D)[None, None, :]
    return _numbers(tl.load(p_bank + o_token[:, :, None] + o_d[None, None, :], mask=m_load, other=0.0))


@triton.jit
def _numbers(b_stored):
    """Float32 of what memory holds; of float8_e4m3fn given as bytes, the 256th part.

    Moved into place, the bits of a float8 are those of a float16 with another bias, also of subnormals.
    """
    if b_stored.dtype == tl.uint8:
        bits = b_stored.to(tl.uint16)
        moved = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        moved = tl.where((bits & 0x7F) == 0x7F, 0x7E00, moved).to(tl.uint16)  # NaN
        return moved.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return b_stored.to(tl.float32)


@triton.jit
def attend_tokens(
    state, task, p_scale, b_query, begin, end,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The softmax `state` after retrieved tokens begin ... end - 1; b_query is float32, scaled, in units of log 2.

    Every query has its own tokens, so nothing is shared for a matrix product: scores are sums over a [BJ, BT, BD] tile.
    The K * C tokens are one list, whatever C is.
    """
    for start in range(begin, end, BJ):
        tokens = load_tokens(task, start, K, C, D, BD, BJ, SAME, WIDE)
        b_score = tl.sum(b_query[None, :, :] * tokens.b_key, axis=2)  # [BJ, BT]
        if p_scale is not None:
            b_key_scale, b_value_scale = token_scales(task, p_scale, tokens)
            b_score *= b_key_scale
        b_score = tl.where(tokens.m_there, b_score, float("-inf"))
        state, b_weight = online_softmax(state, b_score, None, 0)
        if p_scale is not None:
            b_weight *= b_value_scale
        b_out = state.out + tl.sum(b_weight[:, :, None] * tokens.b_value, axis=0)
        state = State(state.max, state.sum, b_out)
    return state
