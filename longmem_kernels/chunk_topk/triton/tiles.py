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
        capacity: entries of a list, K or more; a query has four.
    """

    BT: int
    BN: int
    NG: int
    sample: int
    capacity: int
    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None


def how_to_score(query: torch.dtype, centroid: torch.dtype, rows: int) -> int:
    """DIRECT, COARSE or FINE (search.py), for `rows` queries that search the same centroids."""
    if query == centroid and query != torch.float32:
        return DIRECT.value
    # A few queries wait for memory, not for products; a band would read the centroids once more.
    return FINE.value if rows <= 16 else COARSE.value


def search_tiles(how: int, rows: int, head_dim: int, k: int, capability: tuple[int, int]) -> SearchTiles:
    """The row of the table for this call."""
    if k <= 16:
        groups, capacity = 64, 32
    elif k <= 32:
        groups, capacity = 64, 32
    else:
        groups, capacity = 128, 64
    few = rows <= 16
    wide = head_dim > 128 or (how != DIRECT.value and head_dim > 64)
    if few:
        return SearchTiles(16, 64 if groups == 64 else 128, groups, 1, 16 if k <= 16 else capacity, 1, 2 if wide else 3)
    if capability < (9, 0):
        # Warps side by side would share rows.
        return SearchTiles(128, 32, 32, 1, capacity, 4)
    if k <= 16:
        return SearchTiles(128 if rows > 64 and not wide else 64, 64 if wide else 128, 64, 2, capacity, 8 if rows > 64 and not wide else 4)
    return SearchTiles(64, 128, groups, 1, capacity, 4, 2 if wide else 3)
