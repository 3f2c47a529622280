"""Exact chunk_topk in Triton: keep the best K groups of slots, then decide inside them.

A group is GROUP slots beside each other, as good as its best member. The K best chunks lie in the K best groups: groups
come in ascending order of slots, so that K groups before a group (a better best member, or an equal one in lower slots)
are K chunks before every chunk of it. The same holds for NaN, which counts only where a group holds nothing else.

`search` reduces each tile of scores to group maxima in registers and appends what reaches the bar, the K-th best so
far, to lists in memory. When a list is full, what is not among the best is dropped and the bar raised: some
K * log(M / K) groups are ever written. `decide` scores the chunks of the K best groups again and puts them in order.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem_kernels import _tiles
from longmem_kernels._triton import ring_of_row

from .triton_search import (
    CHUNK,
    KEY_MISSING,
    LAST,
    NO_ENTRY,
    SLACK,
    chunk_topk_search_kernel,
    key_of_score,
    score_of_entry,
    score_of_key,
    slots_in_use,
)

MISSING = tl.constexpr(-(2**63))  # a candidate whose key is KEY_MISSING

GROUP = 8  # slots
WARPS = 16 * 132  # what the SMs of the largest GPUs hold; the slots are split among them when queries are few
MERGE_WIDTH = 1024  # groups of all splits that `decide` orders at once

# A candidate is the key of a score above an inverted number. Comparing two gives the order of the op: higher score,
# lower number, numbers before NaN, NaN before nothing.


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
    p_query, p_centroid, p_count, p_ring_index, p_group, p_ids, p_scores,
    s_query_b, s_query_h, s_query_t, s_centroid_r, s_centroid_g, s_centroid_m,
    H, G, T, R, M, K,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The best K chunks of the K best groups per query, in order: ids and scores [B, H, T, K]. BW = splits * BK."""
    rows = H // G * T
    row_blocks = tl.cdiv(rows, BR)
    pid = tl.program_id(0).to(tl.int64)
    o_row = pid % row_blocks * BR + tl.arange(0, BR)
    i_g = pid // row_blocks % G
    i_b = pid // row_blocks // G
    i_r, M = ring_of_row(p_ring_index, i_b, R, M)
    m_row = o_row < rows
    o_k = tl.arange(0, BK)

    o_w = tl.arange(0, BW)
    p_entry = p_group + ((i_b * G + i_g) * rows + o_row[:, None]) * BW + o_w[None, :]
    entry = tl.load(p_entry, mask=m_row[:, None], other=NO_ENTRY)
    number = entry.to(tl.int32)
    b_group = tl.where(number < 0, MISSING, _candidate(key_of_score(score_of_entry(entry)), number))
    if BW > BK:
        b_group = _best(b_group, K, BK)

    # Their chunks.
    o_slot = _number_of(b_group).to(tl.int64)[:, :, None] * GROUP + tl.arange(0, GROUP)
    m_slot = (b_group != MISSING)[:, :, None] & (o_slot < slots_in_use(p_count, i_r, M))
    o_slot = tl.reshape(o_slot, [BR, BK * GROUP])
    m_slot = tl.reshape(m_slot, [BR, BK * GROUP])
    p_slot = p_centroid + i_r * s_centroid_r + i_g * s_centroid_g + o_slot * s_centroid_m
    o_h = i_g * (H // G) + o_row // T
    p_rows = p_query + i_b * s_query_b + o_h * s_query_h + o_row % T * s_query_t
    b_score = tl.zeros([BR, BK * GROUP], tl.float32)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        b_query = tl.load(p_rows[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0).to(tl.float32)
        b_centroid = tl.load(p_slot[:, :, None] + o_d[None, None, :], mask=m_slot[:, :, None], other=0.0)
        b_score += tl.sum(b_query[:, None, :] * b_centroid.to(tl.float32), axis=2)

    b_chunk = tl.where(m_slot, _candidate(key_of_score(b_score), o_slot.to(tl.int32)), MISSING)
    b_chunk = _best(b_chunk, K, BK)
    b_key = _key_of(b_chunk)
    b_id = tl.where(b_key == KEY_MISSING, -1, _number_of(b_chunk))
    o_out = (i_b * H * T + i_g * rows + o_row[:, None]) * K + o_k[None, :]
    m_out = m_row[:, None] & (o_k < K)[None, :]
    tl.store(p_ids + o_out, b_id, mask=m_out)
    tl.store(p_scores + o_out, score_of_key(b_key), mask=m_out)


class Tiles(NamedTuple):
    """Tile sizes of `search`: BT queries, BM slots, lists of a query."""

    BT: int
    BM: int
    lanes: int
    num_warps: int


def search_tiles(device: torch.device, dtype: torch.dtype, rows: int, head_dim: int) -> Tiles:
    """For scores computed in `dtype` and `rows` queries that search the same centroids, as the tables of `_tiles` say:
    no register is spilled."""
    kernel, capability = "chunk_topk_search_kernel", _tiles.capability(device)
    return Tiles(**_tiles.choose(kernel, capability, dtype=_tiles.kind(dtype), rows=rows, D=head_dim))


def largest_power_of_2(up_to: int) -> int:
    return 1 << (up_to.bit_length() - 1)


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
    BT, BM, lanes, num_warps = search_tiles(
        query.device, query.dtype if query.dtype == centroid.dtype else torch.float32, rows, D
    )
    BK = max(2, triton.next_power_of_2(k))
    # A list must hold K + SLACK entries and what one more tile appends.
    capacity = triton.cdiv(k + SLACK.value + BM // GROUP // lanes, CHUNK.value) * CHUNK.value
    tasks = B * G * triton.cdiv(rows, BT)
    programs = max(WARPS // num_warps, 1)
    splits = largest_power_of_2(min(max(programs // tasks, 1), triton.cdiv(M, BM), MERGE_WIDTH // BK))
    tasks *= splits
    programs = min(programs, tasks)
    lists = query.new_empty((programs, capacity + 1, BT * lanes), dtype=torch.int64)
    groups = query.new_empty((B, H, T, splits, BK), dtype=torch.int64)
    strides = (*query.stride()[:3], *centroid.stride()[:3])
    BR = max(1, min(triton.next_power_of_2(rows), 512 // max(splits * BK, BK * GROUP)))
    with torch.cuda.device_of(query):
        chunk_topk_search_kernel[(programs,)](
            query, centroid, count, ring_index, lists, groups, *strides,
            H, G, T, R, M, k, splits, tasks,
            D=D, BT=BT, BM=BM, BD=triton.next_power_of_2(D), BK=BK, GROUP=GROUP, LANES=lanes, CAPACITY=capacity,
            num_warps=num_warps,
        )  # fmt: skip
        chunk_topk_decide_kernel[(B * G * triton.cdiv(rows, BR),)](
            query, centroid, count, ring_index, groups, ids, scores, *strides,
            H, G, T, R, M, k,
            D=D, BR=BR, BD=16, BW=splits * BK, BK=BK, GROUP=GROUP, num_warps=4,
        )  # fmt: skip
    return ids, scores
