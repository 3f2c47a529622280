"""The shapes that are measured, declared once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement; every row has its own ring, as in training.

    Attributes:
        B, T, S: rows, query tokens, local keys (0 means T).
        H, G, D: query heads, key/value heads, head dim.
        M, C, K: chunks a ring holds, tokens per chunk, chunks retrieved per query.
        dtype: of the inputs and of what the ring stores.
    """

    B: int
    T: int
    H: int
    G: int
    D: int
    M: int
    C: int = 4
    K: int = 16
    S: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def keys(self) -> int:
        return self.S or self.T

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def describe(self, op: str) -> str:
        """The sizes that matter to `op`: "B=1 T=1024 H=4 ..."."""
        symbols = {"chunk_topk": "B T H G D M K", "ring_write": "B T G D M C"}.get(op, "B T S H G D M C K")
        sizes = {symbol: getattr(self, symbol) for symbol in symbols.split()}
        if "S" in sizes:
            sizes["S"] = self.keys
        return " ".join(f"{symbol}={size}" for symbol, size in sizes.items())


RETRIEVAL_CPU = Shape(B=1, T=1024, H=4, G=4, D=64, M=16384)
FUSION_CPU = Shape(B=2, T=512, H=8, G=8, D=64, M=4096)
# The paper's model: width 1024 in 16 heads, segments of 1024 tokens, 64k tokens of memory, 64 of them per query.
PAPER = Shape(B=8, T=1024, H=16, G=16, D=64, M=16384, dtype=torch.bfloat16)


def decoding(shape: Shape) -> Shape:
    """One new token per row, the whole segment before it in the local cache."""
    return replace(shape, T=1, S=shape.keys)


def shapes_for(op: str, *, paper: bool) -> list[Shape]:
    """What `pytest benchmarks/` measures for `op`."""
    small = RETRIEVAL_CPU if op == "chunk_topk" else FUSION_CPU
    base = PAPER if paper else small
    # Nothing is trained one token at a time.
    return [base] if op == "memory_attention_backward" else [base, decoding(base)]
