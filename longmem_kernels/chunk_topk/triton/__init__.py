"""Exact chunk_topk in Triton: a search that leaves a few dozen chunks per query, and a decision among them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from longmem_kernels._triton import Rows, capability

from .decide import chunk_topk_decide_kernel
from .search import COARSE, DIRECT, LANES, chunk_topk_norm_kernel, chunk_topk_search_kernel
from .tiles import how_to_score, search_tiles

WARPS = 16 * 132  # what the SMs of the largest GPUs should hold; the slots are split when queries are few
DECIDED = 512  # entries that a program of the decision looks at together


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
    how = how_to_score(query.dtype, centroid.dtype, rows)
    tiles = search_tiles(how, rows, D, k, capability(query.device))
    lanes = LANES.value
    blocks = triton.cdiv(rows, tiles.BT)
    splits = _splits(B * G * blocks * tiles.num_warps, triton.cdiv(M, tiles.BN))
    lists = query.new_empty((B, G, blocks * tiles.BT, splits, lanes, tiles.capacity), dtype=torch.int64)
    lengths = query.new_empty(lists.shape[:-1], dtype=torch.int32)
    norms = None
    q, c = Rows.of(query), Rows.of(centroid)
    BD, BK = triton.next_power_of_2(D), max(2, triton.next_power_of_2(k))
    BW = min(triton.next_power_of_2(splits * lanes * tiles.capacity), DECIDED)
    BR = max(1, min(triton.next_power_of_2(rows), DECIDED // BW))
    options = {} if tiles.maxnreg is None else {"maxnreg": tiles.maxnreg}
    with torch.cuda.device_of(query):
        if how == COARSE.value:
            norms = query.new_empty((R, G, triton.cdiv(M, tiles.BN)), dtype=torch.float32)
            chunk_topk_norm_kernel[(norms.numel(),)](c, count, norms, G, M, D=D, BD=BD, BN=tiles.BN, num_warps=4)
        chunk_topk_search_kernel[(B * G * blocks * splits,)](
            q, c, count, ring_index, norms, lists, lengths,
            H, G, T, R, M, k, splits,
            HOW=how, D=D, BD=BD, PIECE=min(BD, tiles.piece), BT=tiles.BT, BN=tiles.BN, NG=tiles.NG, SAMPLE=tiles.sample,
            CAPACITY=tiles.capacity, STAGES=tiles.num_stages, num_warps=tiles.num_warps, **options,
        )  # fmt: skip
        chunk_topk_decide_kernel[(B * G * triton.cdiv(rows, BR),)](
            q, c, ring_index, lists, lengths, ids, scores,
            H, G, T, R, k, blocks * tiles.BT, splits * lanes,
            RESCORE=how != DIRECT.value, D=D, BD=16, BR=BR, BW=BW, BK=BK, CAPACITY=tiles.capacity, num_warps=4,
        )  # fmt: skip
    return ids, scores


def _splits(warps: int, tiles: int) -> int:
    """In how many parts the slots are searched: enough to occupy a GPU, not so many that a part is no work."""
    wanted = WARPS // warps
    return 1 << max(min(wanted, tiles // 4).bit_length() - 1, 0)
