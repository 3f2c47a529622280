"""The search kernel of chunk_topk: every chunk that may be among the best K of a query, in a few short lists.

Two passes over the centroids, nothing compacted, no list read. The first keeps the largest score of each of NG disjoint
groups of slots; the K-th largest of these, the bar, is reached by at least K chunks. The second computes the same
scores again and appends what reaches the bar: with NG = 4 K some 1.15 K chunks, and so many times more where the first
pass looks at a sample of the tiles.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

import triton
import triton.language as tl

from longmem_kernels._triton import ring_of_row

from .exact import exact
from .keys import key_of_score, score_of_key
from .lists import LANES, append_tile
from .scores import COARSE, COARSE_ERROR, DIRECT, FINE, TINY, Task, load_query, scores, units_of

BISECTIONS = tl.constexpr(16)  # of the groups' maxima: a bar too low by 2^-16 of their range costs nothing


@triton.jit
def _group_maxima(b_score, NG: tl.constexpr):
    """[BT, BN] -> [BT, NG / LANES, LANES]: the largest number of each group, NaN where there is none. In one thread."""
    BT: tl.constexpr = b_score.shape[0]
    BN: tl.constexpr = b_score.shape[1]
    MEMBERS: tl.constexpr = BN // NG  # 1, or an even number: pairs of columns
    if MEMBERS == 1:
        pairs = tl.permute(tl.reshape(b_score, [BT, BN // 8, LANES, 2]), (0, 1, 3, 2))
        return tl.reshape(pairs, [BT, BN // LANES, LANES])
    else:
        parts = tl.reshape(b_score, [BT, NG // LANES, MEMBERS // 2, LANES, 2])
        return tl.max(tl.max(parts, axis=4), axis=2)


@triton.jit
def _bar(b_best, K):
    """The K-th largest of each row [BT, NG], or a little less: [BT]."""
    key = key_of_score(b_best)
    low, high = tl.min(key, axis=1), tl.max(key, axis=1)  # K or more reach `low`
    for _ in range(BISECTIONS):
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        enough = tl.sum((key >= middle[:, None]).to(tl.int32), axis=1) >= K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, tl.maximum(middle - 1, low))
    return score_of_key(low)


@triton.jit
def chunk_topk_search_kernel(
    query, centroid, p_count, p_ring_index, p_norm, p_list, p_length,
    H, G, T, R, M, K, splits,
    HOW: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    NG: tl.constexpr, SAMPLE: tl.constexpr, CAPACITY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Lists of entries [B, G, blocks * BT, splits, LANES, CAPACITY], and their lengths, which lack the last axis.

    The query heads of a group search the same centroids, so their queries are one list of H/G * T rows. A program takes
    BT of them and one split of the slots.

    Args:
        query, centroid: Rows [B, H, T] and [R, G, M].
        p_norm: [R, G, tiles of BN slots], the largest norm of a tile's centroids, for HOW = COARSE.
        K: at most CAPACITY and NG; CAPACITY at least BN / LANES.
    """
    rows = H // G * T
    blocks = tl.cdiv(rows, BT)
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % blocks  # fastest: programs that run together read the same centroids
    i_split = (pid // blocks % splits).to(tl.int32)
    i_g = pid // blocks // splits % G
    i_b = pid // blocks // splits // G
    i_r, slots = ring_of_row(p_ring_index, i_b, R, M)

    o_row = i_block * BT + tl.arange(0, BT)
    m_row = o_row < rows
    p_rows = query.ptr + i_b * query.b + (i_g * (H // G) + o_row // T) * query.h + o_row % T * query.t
    p_ring = centroid.ptr + i_r * centroid.b + i_g * centroid.h
    b_unit = tl.full([BT], 1.0, tl.float32)
    if HOW != DIRECT:
        b_unit = units_of(p_rows, m_row, D, PIECE)
    b_query = load_query(p_rows, m_row, b_unit, 0, HOW, D, PIECE)
    task = Task(b_query, p_rows, m_row, b_unit, p_ring, tl.cast(centroid.t, tl.int64))
    if HOW == COARSE:
        b_norm = tl.zeros([BT], tl.float32)
        for d in tl.range(0, D, PIECE, num_stages=1):
            b_part = load_query(p_rows, m_row, b_unit, d, HOW, D, PIECE)
            b_norm += tl.sum(b_part * b_part, axis=1)
        b_norm = tl.sqrt(b_norm) * COARSE_ERROR
        p_norm += (i_r * G + i_g) * tl.cdiv(M, BN)

    count = tl.minimum(tl.maximum(tl.load(p_count + i_r), 0), slots)
    tiles = count // BN + tl.minimum(count % BN, 1)  # not cdiv: count + BN may pass 2^31
    per_split = tl.cdiv(tiles, splits)
    first = tl.minimum(i_split * per_split, tiles)
    last = tl.minimum(first + per_split, tiles)
    end = tl.where(last == tiles, count, last * BN)

    # The bar, from whole tiles, for what a tile holds beyond the last chunk must not count. A sample of them only where
    # it leaves enough to look at.
    full = tl.minimum(last, count // BN)
    step = tl.where(full - first >= 16 * SAMPLE, SAMPLE, 1)
    PART: tl.constexpr = NG if NG <= BN else BN
    TURNS: tl.constexpr = NG // PART  # tiles in turn have groups of their own
    b_best = tl.full([BT, PART // LANES, LANES], float("-inf"), tl.float32)
    b_second, b_third, b_fourth = b_best, b_best, b_best
    for tile in tl.range(first, full, step, num_stages=STAGES):
        b_most = _group_maxima(scores(task, tile * BN, full * BN, HOW, D, PIECE, BN), PART)
        if HOW == COARSE:
            b_most -= (b_norm * tl.load(p_norm + tile) + TINY)[:, None, None]
        b_most = tl.maximum(b_best, b_most)
        if TURNS == 1:
            b_best = b_most
        elif TURNS == 2:
            b_best, b_second = b_second, b_most
        else:
            tl.static_assert(TURNS == 4)
            b_best, b_second, b_third, b_fourth = b_second, b_third, b_fourth, b_most
    if TURNS == 4:
        b_best, b_second = tl.join(b_best, b_third), tl.join(b_second, b_fourth)
    if TURNS > 1:
        b_best = tl.join(b_best, b_second)
    b_bar = _bar(tl.reshape(b_best, [BT, NG]), K)

    # What reaches it.
    o_list = ((i_b * G + i_g) * blocks * BT + o_row) * splits + i_split
    o_list = o_list[:, None] * LANES + tl.arange(0, LANES)[None, :]
    p_mine = p_list + o_list * CAPACITY
    o_lane = tl.broadcast_to(tl.arange(0, LANES)[None, :] * 2, [BT, LANES])
    b_bars = tl.broadcast_to(tl.where(m_row, b_bar, float("inf"))[:, None], [BT, LANES])
    b_low = b_bars
    length = tl.zeros([BT, LANES], tl.int32)
    for tile in tl.range(first, last, num_stages=STAGES):
        b_score = scores(task, tile * BN, end, HOW, D, PIECE, BN)
        if HOW == COARSE:
            b_low = _lowered(b_bars, b_norm, tl.load(p_norm + tile), m_row)
        length = append_tile(length, b_low, p_mine, tile * BN + o_lane, end, b_score, CAPACITY)

    SHORT: tl.constexpr = 16 if HOW == COARSE else PIECE  # FINE takes three times the registers
    # A list that is full; or fewer found than there are, so that NaN is among the best.
    lacking = tl.sum(length, axis=1) < tl.minimum(end - first * BN, K)
    undecided = m_row & ((tl.max(length, axis=1) > CAPACITY) | lacking)
    if tl.max(undecided.to(tl.int32), axis=0) > 0:
        tl.debug_barrier()  # what follows writes to the same lists, perhaps from other threads
        length = exact(
            task, first * BN, end, b_bar, p_mine, K,
            FINE if HOW == COARSE else HOW, D, SHORT, 32, CAPACITY,
        )  # fmt: skip
    tl.store(p_length + o_list, length)


@triton.jit
def _lowered(b_bars, b_norm, norm, m_row):
    """The bar less a tile's error band; no bar where that is not a number."""
    band = b_norm * norm + TINY
    low = tl.where((band < float("inf"))[:, None], b_bars - band[:, None], float("-inf"))
    return tl.where(m_row[:, None], low, float("inf"))


@triton.jit
def chunk_topk_norm_kernel(centroid, p_count, p_norm, G, M, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """The largest norm of each tile of BN centroids, rounded upwards: [R, G, tiles]."""
    tiles = tl.cdiv(M, BN)
    pid = tl.program_id(0).to(tl.int64)
    tile, i_g, i_r = pid % tiles, pid // tiles % G, pid // tiles // G
    o_n = tile * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    mask = (o_n < tl.load(p_count + i_r))[:, None] & (o_d < D)[None, :]
    p_rows = centroid.ptr + i_r * centroid.b + i_g * centroid.h + o_n * centroid.t
    x = tl.load(p_rows[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    square = tl.sum(x * x, axis=1)
    tl.store(p_norm + pid, tl.sqrt(tl.max(square, axis=0)) * (1 + 2.0**-10))
