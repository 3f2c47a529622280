"""Tile sizes and launch options of the kernels of memory_attention, from the tables of `_tiles`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from longmem_kernels import _tiles


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the local kernels, T queries by S keys, and launch options, as the tables of `_tiles` say: the best
    without spills in a loop.

    Two blocks for each multiprocessor, where they fit, are worth more than a larger tile: one computes exponentials
    while the other multiplies matrices.
    """

    BT: int
    BS: int
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None


def _local_tiles(kernel: str, query: Tensor, **facts: int | bool) -> Tiles:
    dtype, D = _tiles.kind(query.dtype), query.shape[-1]
    return Tiles(**_tiles.choose(kernel, _tiles.capability(query.device), dtype=dtype, D=D, **facts))


def local_tiles(query: Tensor, dropout: bool) -> Tiles:
    """Tiles of the forward kernel."""
    return _local_tiles("memory_attention_local_kernel", query, dropout=dropout)


def query_grad_tiles(query: Tensor) -> Tiles:
    return _local_tiles("memory_attention_query_grad_kernel", query)


def key_value_grad_tiles(query: Tensor, dropout: bool) -> Tiles:
    """`dropout` needs the weights twice, whole and thinned."""
    return _local_tiles("memory_attention_key_value_grad_kernel", query, dropout=dropout)


@dataclass(frozen=True)
class DecodeTiles(Tiles):
    """Tiles of the kernel for few queries: also how many retrieved tokens a program reads at once, and how many
    programs are worth splitting keys and tokens for, about two for each SM of the largest GPUs."""

    BJ: int = 64
    programs: int = 256

    @property
    def launch(self) -> dict[str, Any]:
        """Options that the kernel is launched with."""
        return {name: value for name, value in vars(self).items() if name != "programs"}


def decode_tiles(query: Tensor, group: int, tokens: int) -> DecodeTiles:
    """BT rows are queries of all `group` heads that share keys; tl.dot needs 16. `tokens`: retrieved by a query."""
    dtype, (T, D) = _tiles.kind(query.dtype), query.shape[-2:]
    capability = _tiles.capability(query.device)
    use = _tiles.choose("memory_attention_decode_kernel", capability, dtype=dtype, D=D, rows=group * T, tokens=tokens)
    return DecodeTiles(**{**use, "BJ": min(use["BJ"], triton.next_power_of_2(tokens))})


def gather_tiles(kernel: str, memory_key: Tensor, tokens: int) -> dict[str, int]:
    """Tiles of a kernel that gathers `tokens` retrieved tokens for each query.

    A warp reads its queries' tokens, 16 bytes of a token per lane, BJ tokens one after another: the lanes of a query
    hold all of its tokens, and its softmax needs no other warp.
    """
    D, size = memory_key.shape[-1], memory_key.element_size()
    capability = _tiles.capability(memory_key.device)
    tiles = _tiles.choose(kernel, capability, bytes=size, D=D, tokens=tokens)
    rows = max(1, 32 * 16 // size // triton.next_power_of_2(D))
    return {**tiles, "BT": rows * tiles["num_warps"], "BJ": min(tiles["BJ"], triton.next_power_of_2(tokens))}
