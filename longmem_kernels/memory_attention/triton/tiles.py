"""Tile sizes and launch options of the kernels of memory_attention, from the tables of `_tiles`.

Every function here is of the facts of a launch alone, and its results are kept: calls that differ from earlier ones in
their numbers, or in the number of local keys, compute nothing here. All ask for the GPU's `capability`, for `dtype`,
the query's as `_tiles.kind` names it, and for the head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from longmem_kernels import _tiles

Options: TypeAlias = dict[str, Any]
"""Keyword arguments of a launch, not to be changed: tile sizes, and `num_warps`, `num_stages`, `maxnreg`."""

MERGED = 16  # splits that the merging kernel of decode.py adds at once


@_tiles.planned
def local_tiles(kernel: str, capability: tuple[int, int], dtype: str, D: int, dropout: bool | None = None) -> Options:
    """Tiles of a local kernel, T queries by S keys: the best without spills in a loop.

    Two blocks for each multiprocessor, where they fit, are worth more than a larger tile: one computes exponentials
    while the other multiplies matrices. `dropout`, for the kernels whose tables ask: weights need registers twice.
    """
    facts = {} if dropout is None else {"dropout": dropout}
    use = _tiles.choose(kernel, capability, dtype=dtype, D=D, **facts)
    return {"num_warps": 4, "num_stages": 3, "maxnreg": None, **use}


@_tiles.planned
def gather_tiles(kernel: str, capability: tuple[int, int], size: int, D: int, tokens: int) -> Options:
    """Tiles of a kernel that gathers `tokens` retrieved tokens, of numbers of `size` bytes, for each query.

    A warp reads its queries' tokens, 16 bytes of a token per lane, BJ tokens one after another: the lanes of a query
    hold all of its tokens, and its softmax needs no other warp.
    """
    use = _tiles.choose(kernel, capability, bytes=size, D=D, tokens=tokens)
    rows = max(1, 32 * 16 // size // _tiles.power_of_2(D))
    return {**use, "BT": rows * use["num_warps"], "BJ": min(use["BJ"], _tiles.power_of_2(tokens))}


class DecodePlan(NamedTuple):
    """A launch of the kernels for few queries, whatever the number of local keys.

    Attributes:
        BS: keys that a program reads at once.
        programs: how many programs keys and tokens are worth splitting for, about two for each SM of the largest GPUs.
        blocks: of BT rows, each with all its keys, which are split in as many programs as there are splits.
        tokens, memory_splits: retrieved tokens of a split, and splits of a row.
        decode, merge: options of the two kernels.
    """

    BS: int
    programs: int
    blocks: int
    tokens: int
    memory_splits: int
    decode: Options
    merge: Options


@_tiles.planned
def decode_plan(
    capability: tuple[int, int], dtype: str, B: int, H: int, G: int, T: int, D: int, tokens: int
) -> DecodePlan:
    """Plan for `tokens` retrieved tokens a query. BT rows are queries of all heads that share keys; tl.dot needs 16."""
    rows = H // G * T
    use = _tiles.choose("memory_attention_decode_kernel", capability, dtype=dtype, D=D, rows=rows, tokens=tokens)
    use = {"maxnreg": None, **use, "BJ": min(use["BJ"], _tiles.power_of_2(tokens))}
    programs = use.pop("programs")
    per_split, memory_splits = splits_of(tokens, use["BJ"], B * H * T, programs)
    merge = {"D": D, "BP": MERGED, "BD": _tiles.power_of_2(D), "num_warps": 1}
    return DecodePlan(use["BS"], programs, B * G * _tiles.blocks(rows, use["BT"]), per_split, memory_splits, use, merge)


def splits_of(length: int, tile: int, programs: int, wanted: int) -> tuple[int, int]:
    """Length of a split, a multiple of `tile`, and how many splits: each for `programs` programs, together `wanted`."""
    tiles = max(1, _tiles.blocks(length, tile))
    per_split = _tiles.blocks(tiles, max(1, min(tiles, wanted // programs)))
    return per_split * tile, _tiles.blocks(tiles, per_split)
