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
    """The K largest of each row, in order: [rows, BK], MISSING from K on. Candidates differ, missing ones apart."""
    o_k = tl.arange(0, BK)
    best = tl.full([candidate.shape[0], BK], MISSING, tl.int64)
    for i in range(K):
        largest = tl.max(candidate, axis=1)[:, None]
        best = tl.where(o_k[None, :] == i, largest, best)
        candidate = tl.where(candidate == largest, MISSING, candidate)
    return best


@triton.jit
def _rescored(p_rows, p_ring, s_m, slot, m_slot, D: tl.constexpr, BD: tl.constexpr):
    """Scores [BR, W] in float32 of the chunks `slot`, one product after the other."""
    score = tl.zeros(slot.shape, tl.float32)
    p_slot = p_ring + slot.to(tl.int64) * s_m
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        b_query = tl.load(p_rows[:, None] + o_d[None, :]).to(tl.float32)
        b_centroid = tl.load(p_slot[:, :, None] + o_d[None, None, :], mask=m_slot[:, :, None], other=0.0)
        score += tl.sum(b_query[:, None, :] * b_centroid.to(tl.float32), axis=2)
    return score


@triton.jit
def chunk_topk_decide_kernel(
    query, centroid, p_ring_index, p_list, p_length, p_ids, p_scores,
    H, G, T, R, K, padded_rows, lists,
    RESCORE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Ids and scores [B, H, T, K] out of the lists of a query, [B, G, padded_rows, lists, CAPACITY].

    Args:
        lists: of a query, over all splits and lanes; BW entries of them are looked at together.
        RESCORE: whether scores are computed anew, in float32; else those of the search are the result.
    """
    rows = H // G * T
    row_blocks = tl.cdiv(rows, BR)
    pid = tl.program_id(0).to(tl.int64)
    o_row = pid % row_blocks * BR + tl.arange(0, BR)
    i_g = pid // row_blocks % G
    i_b = pid // row_blocks // G
    m_row = o_row < rows
    o_read = tl.minimum(o_row, rows - 1)
    o_list = ((i_b * G + i_g) * padded_rows + o_read) * lists
    p_rows = query.ptr + i_b * query.b + (i_g * (H // G) + o_read // T) * query.h + o_read % T * query.t
    i_r, _ = ring_of_row(p_ring_index, i_b, R, 0)
    p_ring = centroid.ptr + i_r * centroid.b + i_g * centroid.h

    total = lists * CAPACITY
    best = tl.full([BR, BK], MISSING, tl.int64)
    for begin in range(0, total, BW):
        o_w = begin + tl.arange(0, BW)[None, :]
        length = tl.load(p_length + o_list[:, None] + o_w // CAPACITY, mask=o_w < total, other=0)
        there = o_w % CAPACITY < length
        entry = tl.load(p_list + o_list[:, None] * CAPACITY + o_w, mask=there, other=0)
        slot, score = slot_of_entry(entry), score_of_entry(entry)
        if RESCORE:
            score = _rescored(p_rows, p_ring, centroid.t, slot, there, D, BD)
        found = _best(tl.where(there, candidate_of(score, slot), MISSING), K, BK)
        if begin == 0:  # noqa: SIM108  (a branch of the kernel)
            best = found
        else:
            best = _best(tl.reshape(tl.join(best, found), [BR, 2 * BK]), K, BK)

    o_k = tl.arange(0, BK)
    key = key_of_candidate(best)
    o_out = (i_b * H * T + i_g * rows + o_row[:, None]) * K + o_k[None, :]
    mask = m_row[:, None] & (o_k < K)[None, :]
    tl.store(p_ids + o_out, tl.where(key == KEY_MISSING, -1, slot_of_candidate(best)), mask=mask)
    tl.store(p_scores + o_out, score_of_key(key), mask=mask)
