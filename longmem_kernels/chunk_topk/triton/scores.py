"""Scores of a block of queries and a tile of slots, in three precisions."""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longmem_kernels._triton import INTERPRETED, dot

# How scores are computed. DIRECT: of equal 16-bit dtypes, exactly but for the order of summation. COARSE: of float32,
# by tensor cores that read the first 11 bits of each factor; an error band says how far off a score may be. FINE: of
# float32 in three such products, as close as a float32 sum of D terms.
DIRECT, COARSE, FINE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# |coarse - exact| <= COARSE_ERROR |query| |centroid|. Cutting a factor to 11 bits changes it by less than 2^-10 of
# itself, a product by less than 2^-9 + 2^-20, and by Cauchy and Schwarz the sum of all |q_i c_i| is at most |q| |c|.
# The rest of the constant, 2^-13.3, covers sums by tensor cores, which lose less than 2^-21 of the largest partial sum
# in each of at most 256 / 4 steps, norms that are rounded, and scores that a float32 sum rounds on its part.
COARSE_ERROR = tl.constexpr(2.0**-9 * 1.05)
TINY = tl.constexpr(2.0**-110)  # covers products below the smallest normal number


class Task(NamedTuple):
    """What a program searches, inside the kernel.

    Attributes:
        b_query: [BT, PIECE], the first piece of the head dim, zero where there is no query.
        p_rows, m_row: [BT], the queries in memory, and which there are.
        b_unit: [BT], a power of two that queries are multiplied by: tensor cores read no float32 below 2^-136.
        p_ring, s_slot: the ring's centroids of one head.
    """

    b_query: Any
    p_rows: Any
    m_row: Any
    b_unit: Any
    p_ring: Any
    s_slot: Any


@triton.jit
def load_query(p_rows, m_row, b_unit, d, HOW: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr):
    """[BT, PIECE] of the queries from dimension `d` on; float32 unless HOW is DIRECT."""
    o_d = d + tl.arange(0, PIECE)
    b_query = tl.load(p_rows[:, None] + o_d[None, :], mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    if HOW == DIRECT:
        return b_query
    else:
        return b_query.to(tl.float32) * b_unit[:, None]


@triton.jit
def units_of(p_rows, m_row, D: tl.constexpr, PIECE: tl.constexpr):
    """`Task.b_unit` [BT]: 1, but for queries so small that 2^90 times as large they cannot overflow any score."""
    largest = tl.zeros(p_rows.shape, tl.float32)
    for d in tl.range(0, D, PIECE, num_stages=1):
        largest = tl.maximum(largest, tl.max(tl.abs(load_query(p_rows, m_row, largest, d, DIRECT, D, PIECE)), axis=1))
    return tl.where(largest < 2.0**-100, 2.0**90, 1.0)


@triton.jit
def _cut(x):
    """What tensor cores read of a float32: for the interpreter, which multiplies all of it."""
    return (x.to(tl.int32, bitcast=True) & -(1 << 13)).to(tl.float32, bitcast=True)


@triton.jit
def _plain(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _products(a, b, HOW: tl.constexpr):
    """[BT, BD] @ [BD, BN] -> [BT, BN] float32."""
    if HOW == DIRECT:
        return dot(a, b)
    elif INTERPRETED:
        b = b.to(tl.float32)
        a_high, b_high = _cut(a), _cut(b)
        product = _plain(a_high, b_high)
        if HOW == FINE:
            a_low = tl.where(tl.abs(a) < float("inf"), _cut(a - a_high), 0.0)
            b_low = tl.where(tl.abs(b) < float("inf"), _cut(b - b_high), 0.0)
            low = _plain(a_high, b_low) + _plain(a_low, b_high)
            product += tl.where(low == low, low, 0.0)
        return product
    elif HOW == COARSE:
        return tl.dot(a, b.to(tl.float32), input_precision="tf32")
    else:
        return tl.dot(a, b.to(tl.float32), input_precision="tf32x3")


@triton.jit
def scores(task, first, end, HOW: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, BN: tl.constexpr):
    """Scores [BT, BN] of the slots from `first` on, in pieces of the head dim; zero from slot `end` on."""
    o_n = tl.arange(0, BN)[None, :]
    p_slots = task.p_ring + first * task.s_slot + o_n.to(tl.int64) * task.s_slot
    m_n = o_n < end - first
    o_d = tl.arange(0, PIECE)[:, None]
    if PIECE >= D:
        b_centroid = tl.load(p_slots + o_d, mask=m_n & (o_d < D), other=0.0)
        return _products(task.b_query, b_centroid, HOW)
    else:
        b_score = tl.zeros([task.p_rows.shape[0], BN], tl.float32)
        for d in tl.range(0, D, PIECE, num_stages=2):  # unrolled, it would hold all of the query in registers
            b_query = load_query(task.p_rows, task.m_row, task.b_unit, d, HOW, D, PIECE)
            b_centroid = tl.load(p_slots + d + o_d, mask=m_n & (d + o_d < D), other=0.0)
            b_score += _products(b_query, b_centroid, HOW)
        return b_score
