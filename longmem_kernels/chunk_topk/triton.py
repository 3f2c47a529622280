"""Exact chunk_topk in Triton: keep the best K groups of slots, then decide inside them.

A group is GROUP slots beside each other, as good as its best member. The K best chunks lie in the K best groups: groups
come in ascending order of slots, so that K groups before a group (a better best member, or an equal one in lower slots)
are K chunks before every chunk of it. The same holds for NaN, which counts only where a group holds nothing else.

`search` reduces each tile of scores to group maxima in registers and appends what reaches the bar, the K-th best so far,
to lists in memory. When a list is full, `_compact` drops what is not among the best and raises the bar: some
K * log(M / K) groups are ever written. `decide` scores the chunks of the K best groups again and puts them in order.

Tensor cores leave a thread columns 8i + 2j and 8i + 2j + 1 of a row, j = 0..3 being its lane. Centroids are loaded in the
order that makes these columns whole groups, and every lane of a row has its own list, a column of the list tensor, so
that neither maxima nor entries ever move between threads.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem_kernels._triton import dot, ring_of_row

# Scores as int32 in their order.
KEY_MISSING = tl.constexpr(-(2**31))
KEY_NAN = tl.constexpr(-(2**31) + 1)
KEY_LOWEST = tl.constexpr(-(2**31) + 0x7FFFFF)  # of -inf
LAST = tl.constexpr(2**31 - 1)
MISSING = tl.constexpr(-(2**63))  # a candidate whose key is KEY_MISSING

GROUP = 8  # slots
CAPACITY = 32  # entries of a list
# Compaction may leave this many groups more than K: a search for any number in a range ends sooner than for one.
SLACK = tl.constexpr(8)
# About two programs for each SM of the largest GPUs; below that, the slots are split among programs.
PROGRAMS_WANTED = 256
MERGE_WIDTH = 1024  # groups of all splits that `decide` orders at once


@triton.jit
def _key_of_score(score):
    """int32 in the order of the scores; -0 counts as +0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, KEY_NAN, key)


@triton.jit
def _score_of_key(key):
    score = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    score = tl.where(key == KEY_NAN, float("nan"), score)
    return tl.where(key == KEY_MISSING, float("-inf"), score)


# An entry is a score above the number of a group, as appended. A candidate is a key above an inverted number: comparing
# two of them gives the order of the op, higher score, lower number, numbers before NaN, NaN before nothing.


@triton.jit
def _entry(score_bits, number):
    return (score_bits.to(tl.int64) << 32) | number.to(tl.uint32).to(tl.int64)


@triton.jit
def _key_of_entry(entry):
    return _key_of_score((entry >> 32).to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _candidate(key, number):
    return (key.to(tl.int64) << 32) | (number ^ LAST).to(tl.int64)


@triton.jit
def _key_of(candidate):
    return (candidate >> 32).to(tl.int32)


@triton.jit
def _number_of(candidate):
    return (candidate & LAST).to(tl.int32) ^ LAST


@triton.jit
def _per_row(x, combine: tl.constexpr, LANES: tl.constexpr):
    """[rows * LANES] -> [rows]: "min", "max" or "sum" over the lanes of a row."""
    x = tl.reshape(x, [x.shape[0] // LANES, LANES])
    if combine == "min":
        return tl.min(x, axis=1)
    elif combine == "max":
        return tl.max(x, axis=1)
    else:
        return tl.sum(x, axis=1)


@triton.jit
def _per_lane(x, LANES: tl.constexpr):
    """[rows] -> [1, rows * LANES]"""
    wide = tl.broadcast_to(x[:, None], [x.shape[0], LANES])
    return tl.reshape(wide, [1, x.shape[0] * LANES])


@triton.jit
def _columns(N: tl.constexpr):
    """0..N-1, a column for a thread: claiming that no two are neighbours keeps loads from giving a thread two."""
    return tl.max_contiguous(tl.arange(0, N), 1)


@triton.jit(noinline=True)
def _compact(
    p_list, p_length, p_found, p_bar, K, most,
    COLUMNS: tl.constexpr, BC: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Leave each row between K and `most` of its best entries, dealt out to its lists in turn.

    A function of its own, called: barriers inside a loop would keep the loop's loads from being pipelined.

    Args:
        p_list: [CAPACITY, COLUMNS] entries, of which the first `p_length` [COLUMNS] of each column are read.
        p_found: [rows] receives how many entries are left.
        p_bar: [rows] receives the lowest score that beats the K-th best entry or an entry even below it.
    """
    tl.debug_barrier()  # what other threads appended is there
    for first in range(0, COLUMNS, BC):
        o_column = first + _columns(BC)
        o_row = first // LANES + tl.arange(0, BC // LANES)
        o_entry = tl.arange(0, CAPACITY)[:, None]
        length = tl.load(p_length + o_column)
        p_entry = p_list + o_entry * COLUMNS + o_column[None, :]
        entry = tl.load(p_entry, mask=o_entry < length[None, :], other=-1)
        key = tl.where(entry.to(tl.int32) < 0, KEY_MISSING, _key_of_entry(entry))
        low = _per_row(tl.min(tl.where(key == KEY_MISSING, LAST, key), axis=0), "min", LANES)
        high = _per_row(tl.max(key, axis=0), "max", LANES)

        # Bisect for a key that K to `most` entries reach. At least K reach `low` (or all do), fewer `high` + 1.
        found = _per_row(length, "sum", LANES)
        m_search = (found > most) & (low < high)
        while tl.max(m_search.to(tl.int32), axis=0) > 0:
            middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
            reach = _per_row(tl.sum((key >= _per_lane(middle, LANES)).to(tl.int32), axis=0), "sum", LANES)
            m_enough = m_search & (reach >= K)
            high = tl.where(m_search & (reach < K), middle - 1, high)
            low = tl.where(m_enough, middle, low)
            found = tl.where(m_enough, reach, found)
            m_search = (found > most) & (low < high)

        # What is still too many is equal: bisect for the last group to stay.
        if tl.max(found, axis=0) > most:
            group = tl.load(p_entry, mask=o_entry < length[None, :], other=-1).to(tl.int32)
            after = tl.full([BC // LANES], -1, tl.int32)  # fewer than K stay if this group is the last
            last = tl.full([BC // LANES], LAST // 2, tl.int32)
            m_above = key > _per_lane(low, LANES)
            m_equal = key == _per_lane(low, LANES)
            while tl.max(found, axis=0) > most:
                middle = (after + last) >> 1
                m_stay = m_above | (m_equal & (group <= _per_lane(middle, LANES)))
                reach = _per_row(tl.sum(m_stay.to(tl.int32), axis=0), "sum", LANES)
                m_search = found > most
                last = tl.where(m_search & (reach >= K), middle, last)
                after = tl.where(m_search & (reach < K), middle, after)
                found = tl.where(m_search & (reach >= K), reach, found)
            key = tl.where(m_equal & (group > _per_lane(last, LANES)), KEY_MISSING, key)

        entry = tl.load(p_entry, mask=o_entry < length[None, :], other=-1)  # again, not to hold it all the time
        stays = ((key >= _per_lane(low, LANES)) & (key > KEY_MISSING)).to(tl.int32)
        in_lanes = tl.reshape(tl.sum(stays, axis=0), [BC // LANES, LANES])
        before = tl.reshape(tl.cumsum(in_lanes, axis=1) - in_lanes, [1, BC])
        place = tl.where(stays > 0, before + tl.cumsum(stays, axis=0) - 1, -1)
        tl.debug_barrier()  # every thread has read what others overwrite now
        o_place = (place.to(tl.uint32) // LANES) * COLUMNS + place.to(tl.uint32) % LANES
        tl.store(p_list + (o_column // LANES * LANES)[None, :] + o_place, entry, mask=place >= 0)
        tl.store(p_found + o_row, found)
        tl.store(p_bar + o_row, _score_of_key(tl.maximum(low + 1, KEY_LOWEST)))
    tl.debug_barrier()


@triton.jit
def chunk_topk_search_kernel(
    p_query, p_centroid, p_count, p_ring_index, p_list, p_length, p_found, p_bar,
    s_query_b, s_query_h, s_query_t, s_centroid_r, s_centroid_g, s_centroid_m,
    H, G, T, R, M, K, splits,
    D: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The K best groups of each split, in no order: entries in p_list [programs, CAPACITY, BT * LANES], how many there
    are in p_found [programs, BT]; p_length [programs, BT * LANES] and p_bar [programs, BT] are scratch.

    The query heads of a group search the same centroids, so their queries are one list of H/G * T rows.
    """
    COLUMNS: tl.constexpr = BT * LANES
    IN_TILE: tl.constexpr = BM // GROUP // LANES  # groups of one tile in a column
    rows = H // G * T
    blocks = tl.cdiv(rows, BT)
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % blocks  # fastest: programs that run together read the same centroids
    i_split = (pid // blocks % splits).to(tl.int32)
    i_g = pid // blocks // splits % G
    i_b = pid // blocks // splits // G
    i_r = ring_of_row(p_ring_index, i_b, R)
    p_list += pid * (CAPACITY * COLUMNS)
    p_length += pid * COLUMNS
    p_found += pid * BT
    p_bar += pid * BT

    # A warp has 16 rows of a tile, a thread rows t and t + 8 of them. In this order a thread has queries q and q + BT / 2
    # of the block, and four threads and their lists follow each other in memory.
    o_t = tl.arange(0, BT)
    o_row = i_block * BT + (o_t // 8 % 2) * (BT // 2) + o_t // 16 * 8 + o_t % 8
    o_d = tl.arange(0, BD)
    m_row = o_row < rows
    m_d = o_d < D
    o_h = i_g * (H // G) + o_row // T
    p_rows = p_query + i_b * s_query_b + o_h * s_query_h + o_row % T * s_query_t
    b_query = tl.load(p_rows[:, None] + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)  # [BT, BD]

    # Tile column ((part * IN_TILE + i) * LANES + lane) * 2 + e holds member part * 2 + e of group i * LANES + lane.
    o_c = tl.arange(0, BM)
    o_group = o_c // (2 * LANES) % IN_TILE * LANES + o_c // 2 % LANES
    o_slot = o_group * GROUP + o_c // (2 * LANES * IN_TILE) * 2 + o_c % 2
    count = tl.minimum(tl.load(p_count + i_r), M)
    per_split = tl.cdiv(tl.cdiv(count, BM), splits)
    first_tile = tl.minimum(i_split * per_split, tl.cdiv(count, BM))
    end_tile = tl.minimum(first_tile + per_split, tl.cdiv(count, BM))
    p_tiles = p_centroid + i_r * s_centroid_r + i_g * s_centroid_g + o_d[:, None]

    o_column = _columns(COLUMNS)
    o_i = tl.arange(0, IN_TILE)
    o_first = o_i[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    length = tl.zeros([COLUMNS], tl.int32)
    bar = tl.zeros([COLUMNS], tl.float32)
    everything = True  # is appended until there is a bar
    for tile in tl.range(first_tile, end_tile):
        # Past the end the last slot is scored again, which changes no maximum of its group.
        left = count - tile * BM  # not tile * BM + slot < count: it may pass 2^31
        p_tile = p_tiles + tl.cast(tile, tl.int64) * BM * s_centroid_m
        p_tile += tl.minimum(o_slot, left - 1).to(tl.int64)[None, :] * s_centroid_m
        b_centroid = tl.load(p_tile, mask=m_d[:, None], other=0.0)  # [BD, BM]
        b_score = dot(b_query, b_centroid)
        b_score = tl.reshape(b_score, [BT, GROUP // 2, IN_TILE, LANES, 2])
        b_best = tl.max(tl.max(b_score, axis=4), axis=1)  # [BT, IN_TILE, LANES]; a number if there is one
        if left < BM:  # groups that hold no slot; NaN is taken while everything is, and comes after all that exist
            b_best = tl.where(o_first * GROUP < left, b_best, float("nan"))
        b_best = tl.reshape(b_best, [BT // 16, 2, 8, IN_TILE, LANES]).trans(1, 0, 2, 4, 3)
        b_bits = tl.reshape(b_best, [COLUMNS, IN_TILE]).to(tl.int32, bitcast=True)

        o_number = tile * (BM // GROUP) + o_column % LANES
        for i in tl.static_range(IN_TILE):
            bits = tl.sum(tl.where(o_i[None, :] == i, b_bits, 0), axis=1)  # column i: no work, it lies in registers
            m_append = (bits.to(tl.float32, bitcast=True) >= bar) | everything
            p_entry = p_list + o_column + length.to(tl.uint32) * COLUMNS
            tl.store(p_entry, _entry(bits, o_number + i * LANES), mask=m_append)
            length += m_append.to(tl.int32)

        if tl.max(length, axis=0) > CAPACITY - IN_TILE:
            tl.store(p_length + o_column, length)
            _compact(p_list, p_length, p_found, p_bar, K, K + SLACK, COLUMNS, BC, LANES, CAPACITY)
            bar = tl.load(p_bar + o_column // LANES)
            length = (tl.load(p_found + o_column // LANES) - o_column % LANES + LANES - 1) // LANES
            everything = False

    tl.store(p_length + o_column, length)
    _compact(p_list, p_length, p_found, p_bar, K, K, COLUMNS, BC, LANES, CAPACITY)


@triton.jit
def _best(candidate, K, BK: tl.constexpr):
    """The K largest of each row, in order: [rows, BK], MISSING from K on. Candidates differ, missing ones apart."""
    o_k = tl.arange(0, BK)
    best = tl.full([candidate.shape[0], BK], MISSING, tl.int64)
    for i in range(K):
        largest = tl.max(candidate, axis=1)[:, None]
        best = tl.where(o_k[None, :] == i, largest, best)
        candidate = tl.where(candidate == largest, MISSING, candidate)
    return best


@triton.jit
def chunk_topk_decide_kernel(
    p_query, p_centroid, p_count, p_ring_index, p_list, p_found, p_ids, p_scores,
    s_query_b, s_query_h, s_query_t, s_centroid_r, s_centroid_g, s_centroid_m,
    H, G, T, R, M, K, splits,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
    CAPACITY: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The best K chunks of the K best groups per query, in order: ids and scores [B, H, T, K]. BW = splits * BK."""
    rows = H // G * T
    blocks = tl.cdiv(rows, BT)
    row_blocks = tl.cdiv(rows, BR)
    pid = tl.program_id(0).to(tl.int64)
    o_row = pid % row_blocks * BR + tl.arange(0, BR)
    i_g = pid // row_blocks % G
    i_b = pid // row_blocks // G
    i_r = ring_of_row(p_ring_index, i_b, R)
    m_row = o_row < rows
    o_k = tl.arange(0, BK)

    # The groups that `search` found: entry w is number w % BK of split w // BK.
    o_w = tl.arange(0, BW)
    o_program = ((i_b * G + i_g) * splits + o_w[None, :] // BK) * blocks + o_row[:, None] // BT
    o_place = o_w % BK
    found = tl.load(p_found + o_program * BT + o_row[:, None] % BT, mask=m_row[:, None], other=0)
    m_entry = o_place[None, :] < found
    o_list = (o_program * CAPACITY + o_place // LANES) * (BT * LANES) + o_row[:, None] % BT * LANES + o_place % LANES
    entry = tl.load(p_list + o_list, mask=m_entry, other=0)
    b_group = tl.where(m_entry, _candidate(_key_of_entry(entry), entry.to(tl.int32)), MISSING)
    if BW > BK:
        b_group = _best(b_group, K, BK)

    # Their chunks.
    o_slot = _number_of(b_group).to(tl.int64)[:, :, None] * GROUP + tl.arange(0, GROUP)
    m_slot = (b_group != MISSING)[:, :, None] & (o_slot < tl.load(p_count + i_r))
    o_slot = tl.reshape(o_slot, [BR, BK * GROUP])
    m_slot = tl.reshape(m_slot, [BR, BK * GROUP])
    p_slot = p_centroid + i_r * s_centroid_r + i_g * s_centroid_g + o_slot * s_centroid_m
    o_h = i_g * (H // G) + o_row // T
    p_rows = p_query + i_b * s_query_b + o_h * s_query_h + o_row % T * s_query_t
    b_score = tl.zeros([BR, BK * GROUP], tl.float32)
    for d in tl.static_range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        b_query = tl.load(p_rows[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0).to(tl.float32)
        b_centroid = tl.load(p_slot[:, :, None] + o_d[None, None, :], mask=m_slot[:, :, None], other=0.0)
        b_score += tl.sum(b_query[:, None, :] * b_centroid.to(tl.float32), axis=2)

    b_chunk = tl.where(m_slot, _candidate(_key_of_score(b_score), o_slot.to(tl.int32)), MISSING)
    b_chunk = _best(b_chunk, K, BK)
    b_key = _key_of(b_chunk)
    b_id = tl.where(b_key == KEY_MISSING, -1, _number_of(b_chunk))
    o_out = (i_b * H * T + i_g * rows + o_row[:, None]) * K + o_k[None, :]
    m_out = m_row[:, None] & (o_k < K)[None, :]
    tl.store(p_ids + o_out, b_id, mask=m_out)
    tl.store(p_scores + o_out, _score_of_key(b_key), mask=m_out)


import os
EXTRA = eval(os.environ.get('EXTRA','{}'))

class Tiles(NamedTuple):
    """Tile sizes of `search`: BT queries, BM slots."""

    BT: int
    BM: int
    lanes: int
    num_warps: int


def search_tiles(dtype: torch.dtype, rows: int) -> Tiles:
    """For scores computed in `dtype` and `rows` queries that search the same centroids."""
    if dtype == torch.float32:
        return Tiles(BT=32 if rows > 16 else 16, BM=32, lanes=1, num_warps=4)
    if rows > 64:
        return Tiles(BT=128, BM=128, lanes=4, num_warps=8)
    if rows > 16:
        return Tiles(BT=64, BM=128, lanes=4, num_warps=4)
    return Tiles(BT=16, BM=128, lanes=4, num_warps=4)  # tl.dot needs 16 rows


def chunk_topk_triton(
    query: Tensor, centroid: Tensor, count: Tensor, ring_index: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """See `chunk_topk`. Arguments as there, already checked; returns chunk_ids [B, H, T, K] int32, scores float32."""
    B, H, T, D = query.shape
    R, G, M, _ = centroid.shape
    ids = query.new_empty((B, H, T, k), dtype=torch.int32)
    scores = query.new_empty((B, H, T, k), dtype=torch.float32)
    if ids.numel() == 0:
        return ids, scores

    rows = H // G * T
    BT, BM, lanes, num_warps = search_tiles(query.dtype if query.dtype == centroid.dtype else torch.float32, rows)
    BK = max(2, triton.next_power_of_2(k))
    capacity = CAPACITY * 4 // lanes
    blocks = triton.cdiv(rows, BT)
    most = min(max(PROGRAMS_WANTED // (B * G * blocks), 1), triton.cdiv(M, BM), MERGE_WIDTH // BK)
    splits = 1 << (most.bit_length() - 1)
    programs = B * G * splits * blocks
    entries = query.new_empty((programs, capacity, BT * lanes), dtype=torch.int64)
    length = query.new_empty((programs, BT * lanes), dtype=torch.int32)
    found = query.new_empty((programs, BT), dtype=torch.int32)
    bar = query.new_empty((programs, BT), dtype=torch.float32)
    strides = (*query.stride()[:3], *centroid.stride()[:3])
    BR = max(1, min(triton.next_power_of_2(rows), 512 // max(splits * BK, BK * GROUP)))
    with torch.cuda.device_of(query):
        chunk_topk_search_kernel[(programs,)](
            query, centroid, count, ring_index, entries, length, found, bar, *strides,
            H, G, T, R, M, k, splits,
            D=D, BT=BT, BM=BM, BD=triton.next_power_of_2(D), GROUP=GROUP, LANES=lanes, CAPACITY=capacity,
            BC=min(BT * lanes, 32 * num_warps), num_warps=num_warps, num_stages=3, **EXTRA,
        )  # fmt: skip
        chunk_topk_decide_kernel[(B * G * triton.cdiv(rows, BR),)](
            query, centroid, count, ring_index, entries, found, ids, scores, *strides,
            H, G, T, R, M, k, splits,
            D=D, BT=BT, BD=16, GROUP=GROUP, LANES=lanes, CAPACITY=capacity, BR=BR, BW=splits * BK, BK=BK, num_warps=4,
        )  # fmt: skip
    return ids, scores
