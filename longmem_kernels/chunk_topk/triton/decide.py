"""The decision of chunk_topk: the best K of the few chunks that the search left over, in order."""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

import triton
import triton.language as tl

from longmem_kernels._triton import ring_of_row

from .keys import (
    KEY_MISSING,
    MISSING,
    candidate_of,
    key_of_candidate,
    score_of_entry,
    score_of_key,
    slot_of_candidate,
    slot_of_entry,
)


@triton.jit
def _best(candidate, K, BK: tl.constexpr):
    """The K largest of [W], in order: [BK], MISSING from K on. Candidates differ, missing ones apart."""
    o_k = tl.arange(0, BK)
    best = tl.full([BK], MISSING, tl.int64)
    for i in range(K):
        largest = tl.max(candidate, axis=0)
        best = tl.where(o_k == i, largest, best)
        candidate = tl.where(candidate == largest, MISSING, candidate)
    return best


@triton.jit
def _rescored(p_query, p_ring, s_slot, slot, m_slot, D: tl.constexpr, BD: tl.constexpr):
    """Scores [W] in float32 of the chunks `slot`, one product after the other."""
    score = tl.zeros(slot.shape, tl.float32)
    p_slot = p_ring + slot.to(tl.int64) * s_slot
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        b_query = tl.load(p_query + o_d).to(tl.float32)
        b_centroid = tl.load(p_slot[:, None] + o_d[None, :], mask=m_slot[:, None], other=0.0)
        score += tl.sum(b_query[None, :] * b_centroid.to(tl.float32), axis=1)
    return score


@triton.jit
def chunk_topk_decide_kernel(
    query, centroid, p_ring_index, p_list, p_length, p_ids, p_scores,
    H, G, T, R, K, padded_rows, lists,
    RESCORE: tl.constexpr, ONCE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Ids and scores [B, H, T, K] out of the lists of each query, [B, G, padded_rows, lists, CAPACITY].

    Args:
        query, centroid: Rows [B, H, T] and [R, G, M].
        lists: of a query, over all splits and lanes.
        ONCE: whether BW, the entries that are looked at together, is all of them.
        RESCORE: whether scores are computed anew, in float32; else those of the search are the result.
    """
    rows = H // G * T
    pid = tl.program_id(0).to(tl.int64)
    i_row = pid % rows
    i_g = pid // rows % G
    i_b = pid // rows // G
    i_r, _ = ring_of_row(p_ring_index, i_b, R, 0)
    p_query = query.ptr + i_b * query.b + (i_g * (H // G) + i_row // T) * query.h + i_row % T * query.t
    p_ring = centroid.ptr + i_r * centroid.b + i_g * centroid.h
    i_list = ((i_b * G + i_g) * padded_rows + i_row) * lists

    best = tl.full([BK], MISSING, tl.int64)
    for begin in range(0, lists * CAPACITY, BW):
        o_w = begin + tl.arange(0, BW)
        length = tl.load(p_length + i_list + o_w // CAPACITY, mask=o_w < lists * CAPACITY, other=0)
        there = o_w % CAPACITY < length
        entry = tl.load(p_list + i_list * CAPACITY + o_w, mask=there, other=0)
        slot, score = slot_of_entry(entry), score_of_entry(entry)
        if RESCORE:
            score = _rescored(p_query, p_ring, centroid.t, slot, there, D, BD)
        found = _best(tl.where(there, candidate_of(score, slot), MISSING), K, BK)
        if ONCE:  # noqa: SIM108  (decided by the compiler)
            best = found
        else:
            best = _best(tl.reshape(tl.join(best, found), [2 * BK]), K, BK)

    o_k = tl.arange(0, BK)
    key = key_of_candidate(best)
    p_out = ((i_b * H + i_g * (H // G)) * T + i_row) * K + o_k
    tl.store(p_ids + p_out, tl.where(key == KEY_MISSING, -1, slot_of_candidate(best)), mask=o_k < K)
    tl.store(p_scores + p_out, score_of_key(key), mask=o_k < K)
