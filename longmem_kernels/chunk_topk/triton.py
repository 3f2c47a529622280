"""Exact chunk_topk in Triton: stream tiles of centroids, keep the best K of every query in registers.

A candidate is one int64: the score mapped to an int32 that sorts like it, above the inverted slot. One integer
comparison then gives the order of the op: higher score, lower slot, numbers before NaN, NaN before nothing. Two
kernels: `search` finds the K best of one split of the slots for a block of queries, unordered; `merge` orders those of
all splits.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem_kernels._triton import dot, ring_of_row

# Below the key of -inf, -2139095041.
KEY_MISSING = tl.constexpr(-(2**31))
KEY_NAN = tl.constexpr(-(2**31) + 1)
LAST_SLOT = tl.constexpr(2**31 - 1)
MISSING = tl.constexpr(-(2**63))  # a candidate whose key is KEY_MISSING

# About two programs for each SM of the largest GPUs; below that, the slots are split among programs.
PROGRAMS_WANTED = 256
MERGE_WIDTH = 1024


@triton.jit
def _key_of_score(score):
    """int32 in the order of the scores; -0 counts as +0."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, KEY_NAN, key)


@triton.jit
def _score_of_key(key):
    score = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    score = tl.where(key == KEY_NAN, float("nan"), score)
    return tl.where(key == KEY_MISSING, float("-inf"), score)


@triton.jit
def _pack(key, slot):
    return (key.to(tl.int64) << 32) + (slot ^ LAST_SLOT).to(tl.int64)


@triton.jit
def _key_of(candidate):
    return (candidate >> 32).to(tl.int32)


@triton.jit
def _slot_of(candidate):
    return (candidate & LAST_SLOT).to(tl.int32) ^ LAST_SLOT


@triton.jit
def chunk_topk_search_kernel(
    p_query, p_centroid, p_count, p_ring_index, p_candidate,
    s_query_b, s_query_h, s_query_t, s_centroid_r, s_centroid_g, s_centroid_m,
    H, G, T, R, M, splits,
    D: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Candidates [B, H, T, splits, BK] int64: the best of each split, in no order.

    The query heads of a group search the same centroids, so their queries are one list of H/G * T rows.
    """
    rows = H // G * T
    blocks = tl.cdiv(rows, BT)
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % blocks  # fastest: programs that run together read the same centroids
    i_split = (pid // blocks % splits).to(tl.int32)
    i_g = pid // blocks // splits % G
    i_b = pid // blocks // splits // G
    i_r = ring_of_row(p_ring_index, i_b, R)

    o_row = i_block * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    o_m = tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_row = o_row < rows
    m_d = o_d < D
    o_h = i_g * (H // G) + o_row // T
    p_rows = p_query + i_b * s_query_b + o_h * s_query_h + o_row % T * s_query_t
    b_query = tl.load(p_rows[:, None] + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)  # [BT, BD]
    p_tile = p_centroid + i_r * s_centroid_r + i_g * s_centroid_g + o_d[:, None]

    count = tl.minimum(tl.load(p_count + i_r), M)
    per_split = tl.cdiv(tl.cdiv(count, BM), splits) * BM
    begin = i_split * per_split
    end = tl.minimum(begin + per_split, count)

    # The running best, all missing at first, each different so that exactly one of them is replaced at a time.
    b_kept = tl.zeros([BT, BK], tl.int64) + _pack(tl.full([BK], KEY_MISSING, tl.int32), o_k)[None, :]
    b_worst = tl.min(b_kept, axis=1)  # [BT]
    for start in range(begin, end, BM):
        o_slot = start + o_m
        m_slot = o_slot < end
        b_centroid = tl.load(
            p_tile + o_slot.to(tl.int64)[None, :] * s_centroid_m, mask=m_d[:, None] & m_slot[None, :], other=0.0
        )  # [BD, BM]
        b_key = _key_of_score(dot(b_query, b_centroid))  # [BT, BM]
        b_key = tl.where(m_row[:, None] & m_slot[None, :], b_key, KEY_MISSING)

        # Each round moves the best of the tile into the list, in every row where it beats the worst kept. An equal key
        # does not: slots come in ascending order. Most tiles of a long memory need no round at all.
        b_best, b_at = tl.max(b_key, axis=1, return_indices=True)
        m_better = b_best > _key_of(b_worst)
        while tl.max(m_better.to(tl.int32), axis=0) > 0:
            b_new = _pack(b_best, start + b_at)
            b_kept = tl.where(m_better[:, None] & (b_kept == b_worst[:, None]), b_new[:, None], b_kept)
            b_worst = tl.min(b_kept, axis=1)
            b_key = tl.where(o_m[None, :] == b_at[:, None], KEY_MISSING, b_key)
            b_best, b_at = tl.max(b_key, axis=1, return_indices=True)
            m_better = b_best > _key_of(b_worst)

    o_out = ((i_b * G + i_g) * rows + o_row) * splits + i_split
    tl.store(p_candidate + o_out[:, None] * BK + o_k[None, :], b_kept, mask=m_row[:, None])


@triton.jit
def chunk_topk_merge_kernel(
    p_candidate, p_ids, p_scores, rows, K, BT: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """The best K of BW candidates per row, in order; ids and scores [rows, K]."""
    o_row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_row = o_row < rows
    o_w = tl.arange(0, BW)
    o_k = tl.arange(0, BK)
    b_candidate = tl.load(p_candidate + o_row[:, None] * BW + o_w[None, :], mask=m_row[:, None], other=0)
    b_sorted = tl.zeros([BT, BK], tl.int64)
    for i in range(K):
        b_best = tl.max(b_candidate, axis=1)
        b_sorted = tl.where(o_k[None, :] == i, b_best[:, None], b_sorted)
        b_candidate = tl.where(b_candidate == b_best[:, None], MISSING, b_candidate)

    b_key = _key_of(b_sorted)
    b_id = tl.where(b_key == KEY_MISSING, -1, _slot_of(b_sorted))
    o_out = o_row[:, None] * K + o_k[None, :]
    m_out = m_row[:, None] & (o_k < K)[None, :]
    tl.store(p_ids + o_out, b_id, mask=m_out)
    tl.store(p_scores + o_out, _score_of_key(b_key), mask=m_out)


def search_tiles(dtype: torch.dtype) -> tuple[int, int, int]:
    """BT queries, BM slots and warps of the search kernel for scores computed in `dtype`: without register spills."""
    if dtype == torch.float32:
        return 32, 32, 4
    return 64, 64, 8


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

    BT, BM, num_warps = search_tiles(query.dtype if query.dtype == centroid.dtype else torch.float32)
    BT = min(BT, max(16, triton.next_power_of_2(H // G * T)))  # tl.dot needs 16 rows
    BK = max(2, triton.next_power_of_2(k))
    blocks = B * G * triton.cdiv(H // G * T, BT)
    most = min(max(PROGRAMS_WANTED // blocks, 1), triton.cdiv(M, BM), MERGE_WIDTH // BK)
    splits = 1 << (most.bit_length() - 1)
    candidate = query.new_empty((B, H, T, splits, BK), dtype=torch.int64)
    BR = max(1, MERGE_WIDTH // (splits * BK))
    with torch.cuda.device_of(query):
        chunk_topk_search_kernel[(blocks * splits,)](
            query, centroid, count, ring_index, candidate, *query.stride()[:3], *centroid.stride()[:3],
            H, G, T, R, M, splits,
            D=D, BT=BT, BM=BM, BD=triton.next_power_of_2(D), BK=BK, num_warps=num_warps,
        )  # fmt: skip
        chunk_topk_merge_kernel[(triton.cdiv(B * H * T, BR),)](
            candidate, ids, scores, B * H * T, k, BT=BR, BW=splits * BK, BK=BK, num_warps=4
        )
    return ids, scores
