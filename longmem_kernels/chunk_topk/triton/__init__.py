"""Exact chunk_topk in Triton: a search that leaves a few dozen chunks per query, and a decision among them."""

from __future__ import annotations

import torch
from torch import Tensor

from longmem_kernels import _tiles
from longmem_kernels._triton import Rows

from .decide import chunk_topk_decide_kernel
from .lists import LANES
from .scores import COARSE, DIRECT, FINE
from .search import chunk_topk_norm_kernel, chunk_topk_search_kernel

WARPS = 16 * 132  # what the SMs of the largest GPUs should hold; the slots are split when queries are few
FEW = 16  # queries that one instruction of tensor cores multiplies
HOW = {"direct": DIRECT.value, "coarse": COARSE.value, "fine": FINE.value}
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
    use = search_tiles(query.device, how, rows, D, k)
    BT, BN, capacity, lanes = use["BT"], use["BN"], use["CAPACITY"], LANES.value
    blocks = _tiles.blocks(rows, BT)
    splits = _splits(B * G * blocks * use["num_warps"], _tiles.blocks(M, BN))
    lists = query.new_empty((B, G, blocks * BT, splits, lanes, capacity), dtype=torch.int64)
    lengths = query.new_empty(lists.shape[:-1], dtype=torch.int32)
    norms = None
    q, c = Rows.of(query), Rows.of(centroid)
    BK = max(2, _tiles.power_of_2(k))
    # A warp for each query, that asks no other warp; more of them with few queries, or where scores are computed anew.
    BW, warps = (
        min(_tiles.power_of_2(splits * lanes * capacity), DECIDED),
        1 if how == "direct" and B * H * T > WARPS // 4 else 4,
    )
    with torch.cuda.device_of(query):
        if how == "coarse":
            norms = query.new_empty((R, G, _tiles.blocks(M, BN)), dtype=torch.float32)
            BD = _tiles.power_of_2(D)
            chunk_topk_norm_kernel[(norms.numel(),)](c, count, norms, G, M, D=D, BD=BD, BN=BN, num_warps=4)
        chunk_topk_search_kernel[(B * G * blocks * splits,)](
            q, c, count, ring_index, norms, lists, lengths, H, G, T, R, M, k, splits, HOW=HOW[how], D=D, **use
        )
        chunk_topk_decide_kernel[(B * H * T,)](
            q, c, ring_index, lists, lengths, ids, scores,
            H, G, T, R, k, blocks * BT, splits * lanes,
            RESCORE=how != "direct", ONCE=splits * lanes * capacity <= BW, D=D, BD=16, BW=BW, BK=BK, CAPACITY=capacity,
            num_warps=warps,
        )  # fmt: skip
    return ids, scores


def how_to_score(query: torch.dtype, centroid: torch.dtype, rows: int) -> str:
    """A name in `HOW`, for `rows` queries that search the same centroids."""
    if query == centroid and query != torch.float32:
        return "direct"
    # A few queries wait for memory, not for products, and a band would read the centroids once more.
    return "fine" if rows <= FEW else "coarse"


def search_tiles(device: torch.device, how: str, rows: int, head_dim: int, k: int) -> _tiles.Use:
    """The row of the table of `_tiles`: BT queries by BN slots, NG groups that make the bar from every SAMPLE-th tile,
    lists of CAPACITY entries, head dims in pieces of PIECE, a pipeline of STAGES. `search.py` says what must hold."""
    kernel, capability = "chunk_topk_search_kernel", _tiles.capability(device)
    use = _tiles.choose(kernel, capability, how=how, rows=rows, D=head_dim, K=k)
    return {**use, "PIECE": min(use["PIECE"], _tiles.power_of_2(head_dim))}


def _splits(warps: int, tiles: int) -> int:
    """In how many parts the slots are searched: enough to occupy a GPU, not so many that a part is no work."""
    wanted = WARPS // warps
    return 1 << max(min(wanted, tiles // 4).bit_length() - 1, 0)
