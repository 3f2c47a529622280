"""Scores of local keys: what is visible, ALiBi, dropout, and numbers that are not finite."""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longmem_kernels._triton import narrow

from .softmax import LOG2E


class Visible(NamedTuple):
    """Visibility of the S keys to queries of batch row `i_b`, inside a kernel; `key_mask` and `window` may be None."""

    S: Any
    key_mask: Any
    window: Any
    i_b: Any


@triton.jit
def mask_pointer(visible, o_key):
    """Pointers to the key mask's entries of keys `o_key` (int64)."""
    return visible.key_mask.ptr + visible.i_b * visible.key_mask.b + o_key * visible.key_mask.s


@triton.jit
def load_rows(rows, o_row, end, D: tl.constexpr, BD: tl.constexpr, CHECKED: tl.constexpr):
    """Rows `o_row` of a head (a `Rows`) as a tile [rows, BD], zero beyond D. With CHECKED, rows from `end` on are zero
    too; without, the caller guarantees that there are none."""
    o_d = tl.arange(0, BD)
    p_tile = rows.ptr + o_row.to(tl.int64)[:, None] * rows.t + o_d[None, :]
    if CHECKED:
        return tl.load(p_tile, mask=(o_row < end)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D < BD:
        return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def any_not_finite(b_tile):
    """True if a tile [rows, columns] of float32 holds NaN or infinity."""
    return tl.max(tl.max((b_tile * 0.0 != 0.0).to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def not_finite_rows(b_rows):
    """Rows of a tile [rows, BD] that hold NaN or infinity, as a mask."""
    return tl.max((b_rows.to(tl.float32) * 0.0 != 0.0).to(tl.int32), axis=1) > 0


@triton.jit
def finite_numbers(b_rows):
    """A tile with zeros for NaN and infinity."""
    b_number = b_rows.to(tl.float32)
    return narrow(tl.where(b_number * 0.0 == 0.0, b_number, 0.0), b_rows.dtype)


@triton.jit
def alibi_slope(p_slopes, o_h):
    """ALiBi slopes of heads `o_h`, in units of log 2."""
    return tl.load(p_slopes + o_h).to(tl.float32) * LOG2E


@triton.jit
def alibi_bias(slope, o_query, start, first, BS: tl.constexpr, MASKED: tl.constexpr):
    """ALiBi's term of the scores of keys start ... start + BS - 1, to broadcast to [BT, BS].

    When not MASKED, the queries' own part of the distance is left out (see `alibi_rows`): one number per key. No term
    of it is larger than the distance, so that nothing is lost to rounding.
    """
    if MASKED:
        o_key = (start + tl.arange(0, BS)).to(tl.float32)
        return slope * (o_key[None, :] - o_query.to(tl.float32)[:, None])
    else:
        b_key = slope * (tl.arange(0, BS) - (BS - 1)).to(tl.float32)
        return (b_key + slope * (start + (BS - 1) - first).to(tl.float32))[None, :]


@triton.jit
def alibi_rows(slope, o_query, first):
    """The part of the queries' distance, from position `first`, that `alibi_bias` leaves out."""
    return slope * (o_query - first).to(tl.float32)


@triton.jit
def seen_keys(first, last, S, window, CAUSAL: tl.constexpr, BS: tl.constexpr):
    """Keys that queries at positions first ... last see: some of them begin ... end - 1, all all_begin ... all_end - 1.

    All four are multiples of BS, but for `end`: before all_begin and from all_end on scores need masks.
    """
    begin = 0
    all_begin = 0
    all_end = S // BS * BS
    end = S
    if CAUSAL:
        all_end = (first + 1) // BS * BS
        end = tl.minimum(S, last + 1)
    if window is not None:
        begin = tl.maximum(0, first - window + 1) // BS * BS
        all_begin = tl.minimum(tl.cdiv(tl.maximum(0, last - window + 1), BS) * BS, tl.cdiv(end, BS) * BS)
        all_end = tl.maximum(all_begin, all_end)
    return begin, all_begin, all_end, end


@triton.jit
def local_scores(b_dot, b_bias, o_query, o_key, scale, visible, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """Scores in units of log 2 of the products b_dot; -inf where a key may not be seen.

    b_bias (None without ALiBi) and the positions o_query and o_key are shaped to broadcast to b_dot. Not MASKED: all
    see all, but for the key mask.
    """
    b_score = b_dot * (scale * LOG2E)
    if b_bias is not None:
        b_score += b_bias
    if MASKED:
        m_seen = o_key < visible.S
        if CAUSAL:
            m_seen = m_seen & (o_key <= o_query)
        if visible.window is not None:
            m_seen = m_seen & (o_query - o_key < visible.window)
        b_score = tl.where(m_seen, b_score, float("-inf"))
    if visible.key_mask is not None:
        p_mask = mask_pointer(visible, o_key.to(tl.int64))
        m_key = tl.load(p_mask, mask=o_key < visible.S, other=0) if MASKED else tl.load(p_mask)
        b_score = tl.where(m_key != 0, b_score, float("-inf"))
    return b_score


@triton.jit
def seen_pairs(b_score, o_query, o_key, scale, visible, CAUSAL: tl.constexpr):
    """Visible pairs of a block shaped as `b_score`, as a mask."""
    return local_scores(tl.zeros_like(b_score), None, o_query, o_key, scale, visible, CAUSAL, True) == 0.0


@triton.jit
def _mix(x):
    """32 bits hashed into 32 ("lowbias32", C. Wellons)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_rows(dropout, o_row):
    """The hash of the seed and of row numbers `o_row` (int64): where the hash of a weight starts."""
    seed = tl.load(dropout.seed)
    low = o_row.to(tl.uint32) ^ _mix(seed.to(tl.uint32))
    high = (o_row >> 32).to(tl.uint32) ^ _mix((seed >> 32).to(tl.uint32) ^ 0x9E3779B9)
    return _mix(_mix(low) ^ high)


@triton.jit
def kept_by_dropout(b_row, o_key, dropout):
    """Weights that stay, as a mask (see `dropout_keep` of the reference). Rows and positions of keys broadcast."""
    return _mix(b_row ^ (o_key.to(tl.uint32) * 0x9E3779B1)) >= tl.cast(dropout.threshold, tl.uint32)
