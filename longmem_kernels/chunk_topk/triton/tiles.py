"""Tile sizes of the search kernel: rows of a table, one for each kind of call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .search import COARSE, DIRECT, FINE


class SearchTiles(NamedTuple):
    """How one call is searched.

    Attributes:
        BT, BN: queries and slots of a tile.
        NG: groups of slots whose maxima make the bar, K or more: the more, the closer the bar comes to the K-th score.
        sample: the bar is made from every `sample`-th tile.
        capacity: entries of a list, K or more and BN / 4 or more; a query has four.
        piece: dimensions of a head that are multiplied at once.
    """

    BT: int
    BN: int
    NG: int
    sample: int
    capacity: int
    num_warps: int
    num_stages: int = 3
    piece: int = 256
    maxnreg: int | None = None


def how_to_score(query: torch.dtype, centroid: torch.dtype, rows: int) -> int:
    """DIRECT, COARSE or FINE (search.py), for `rows` queries that search the same centroids."""
    if query == centroid and query != torch.float32:
        return DIRECT.value
    # A few queries wait for memory, not for products; a band would read the centroids once more.
    return FINE.value if rows <= 16 else COARSE.value


def search_tiles(how: int, rows: int, head_dim: int, k: int, capability: tuple[int, int]) -> SearchTiles:
    """The row of the table for this call."""
    capacity = 32 if k <= 32 else 64
    NG = 64 if k <= 32 else 128
    sample = 2 if k <= 16 else 1
    if rows <= 16:
        BN = 64 if how == DIRECT.value and head_dim <= 128 else 32
        return SearchTiles(16, BN, NG, 1, max(capacity // 2, k), 1, 2, piece=128 if how == DIRECT.value else 64)
    if capability < (9, 0):  # in other shapes, warps side by side would share rows
        return SearchTiles(128, 32, NG, sample, capacity, 4, 2 if head_dim > 64 else 3, piece=128 if how == DIRECT.value else 64)
    if how == COARSE.value or head_dim > 128:
        return SearchTiles(64, 64, NG, sample, capacity, 4, 2 if head_dim > 128 else 3)
    return SearchTiles(128, 128 if k <= 32 else 64, NG, sample, capacity, 8, maxnreg=128)
