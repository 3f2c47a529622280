"""The shapes that are measured, declared once: a base per operation, for CPU and GPU, and sweeps around it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .architectures import ARCHITECTURES

SYMBOLS = {
    "chunk_topk": "B T H G D M K",
    "ring_write": "B T G D M C",
    "memory_layer": "B T H G D M C K",
    "train_step": "B T H G D M C K",
    "generate": "B T S H G D M C K",
}

MODELS = ("tiny", *ARCHITECTURES)
"""Backbones of the questions about whole models."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement.

    Attributes:
        B, T, S: rows, query tokens, local keys (0 means T). Of "generate": tokens generated, and tokens of the prompt.
        H, G, D: query heads, key/value heads, head dim.
        M, C, K: chunks a ring holds, tokens per chunk, chunks retrieved per query.
        R: rings: 0 gives every row its own, 1 lets all rows share one, as the official code does.
        dtype: of the inputs and of what the ring stores.
        model: of "generate" and "train_step", the backbone: one of `MODELS`; "tiny" is as wide as H and D say.
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
    R: int = 0
    dtype: torch.dtype = torch.float32
    model: str = ""

    @property
    def keys(self) -> int:
        return self.S or self.T

    @property
    def rings(self) -> int:
        return self.R or self.B

    @property
    def rows_per_ring(self) -> int:
        return self.B // self.rings

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def describe(self, op: str) -> str:
        """The sizes that matter to `op`: "B=1 T=1024 H=4 ..."."""
        sizes = {symbol: getattr(self, symbol) for symbol in SYMBOLS.get(op, "B T S H G D M C K").split()}
        if "S" in sizes:
            sizes["S"] = self.keys
        if self.rings != self.B:
            sizes["R"] = self.rings
        if self.model:
            sizes["model"] = self.model
        return " ".join(f"{symbol}={size}" for symbol, size in sizes.items())


SIZES = tuple(field.name for field in fields(Shape) if field.name not in ("dtype", "model"))


def change(shape: Shape, **sizes: int) -> Shape:
    """`shape` with other sizes; what they make impossible is an error.

    Raises:
        ValueError: an unknown size, one below 1, or sizes that do not go together.
    """
    for name, size in sizes.items():
        if name not in SIZES or size < (0 if name in ("S", "R") else 1):
            raise ValueError(f"shape: wanted one of {' '.join(SIZES)} and a size of at least 1, got {name}={size}")
    values: dict[str, Any] = dict(sizes)
    new = replace(shape, **values)
    # More heads than before would otherwise need G to be named as well.
    if "H" in sizes and "G" not in sizes and shape.H == shape.G:
        new = replace(new, G=new.H)
    if (
        new.H % new.G
        or (new.keys < new.T and not new.model)
        or new.rings not in (1, new.B)
        or new.K >= new.M
        or new.C > 64
        or new.K > 64
    ):
        raise ValueError(
            "shape: wanted H a multiple of G, S >= T, R of 1 or B, K < M, C and K of at most 64, got"
            f" {' '.join(f'{name}={getattr(new, name)}' for name in SIZES)}"
        )
    return new


RETRIEVAL_CPU = Shape(B=1, T=1024, H=4, G=4, D=64, M=16384)
FUSION_CPU = Shape(B=2, T=512, H=8, G=8, D=64, M=4096)
LAYER_CPU = Shape(B=2, T=256, H=8, G=8, D=64, M=8192, R=1)
MODEL_CPU = Shape(B=1, T=32, H=6, G=6, D=64, M=4096, S=16, model="tiny")
# The paper's model: width 1024 in 16 heads, segments of 1024 tokens, 64k tokens of memory, 64 of them per query.
PAPER = Shape(B=8, T=1024, H=16, G=16, D=64, M=16384, dtype=torch.bfloat16)


def decoding(shape: Shape) -> Shape:
    """One new token per row, the whole segment before it in the local cache."""
    return replace(shape, T=1, S=shape.keys)


def base(op: str, *, paper: bool) -> Shape:
    """The shape that `op` is measured at first."""
    if op == "generate":
        return replace(MODEL_CPU, H=16, G=16, M=16384, dtype=torch.bfloat16) if paper else MODEL_CPU
    if op == "train_step":
        tokens = 1024 if paper else 256
        return replace(base("generate", paper=paper), B=2, T=tokens, S=0)
    if op == "memory_layer":
        return replace(PAPER, R=1) if paper else LAYER_CPU
    if paper:
        return PAPER
    return RETRIEVAL_CPU if op == "chunk_topk" else FUSION_CPU


def shapes_for(op: str, *, paper: bool) -> list[Shape]:
    """Shapes that `pytest benchmarks/` and `longmem-bench` without a sweep measure for `op`."""
    shape = base(op, paper=paper)
    # Nothing is trained one token at a time.
    if op in ("memory_attention_backward", "generate", "train_step"):
        return [shape]
    # One token among few chunks: what the call itself costs decides.
    small = [replace(decoding(shape), M=1024)] if op == "chunk_topk" else []
    return [shape, decoding(shape), *small]


def default_sweeps(op: str, *, paper: bool) -> dict[str, list[Shape]]:
    """Sweeps that answer what `op` costs as one size grows, by name; each starts from a shape that fits its largest."""
    shape = base(op, paper=paper)
    one = decoding(shape)
    if op == "chunk_topk":
        few = shape if paper else replace(shape, T=128)
        return {
            "M": vary(replace(few, R=1), M=[4096, 16384, 65536, 262144, 1048576]),
            "K": vary(few, K=[8, 16, 32, 64]),
            "D": vary(few, D=[64, 128]),
            "M decoding": vary(one, M=[256, 1024, 4096, 16384, 65536, 262144]),
            "T": vary(shape, T=[1, 4, 16, 64, 128, 1024]),
            "T of a small memory": vary(replace(shape, M=256), T=[1, 4, 8, 16, 128]),
            "G": vary(few, G=[size for size in (1, 4, 16) if shape.H % size == 0]),
            "R": vary(replace(few, B=8 if paper else 2), R=[0, 1]),
            "B decoding": vary(replace(one, R=1), B=[1, 8, 64]),
        }
    if op == "ring_write":
        return {
            "T": vary(shape, T=[1, 16, 128, 512, 2048]),
            "C": vary(shape, C=[1, 4, 16, 64]),
            "B decoding": vary(replace(one, M=256), B=[1, 8, 64]),  # the cost does not depend on M, the memory does
        }
    few = shape if paper else replace(shape, B=1)
    if op == "memory_attention":
        return {
            "T": vary(few, T=[512, 1024, 2048, 4096] if paper else [128, 512, 1024, 2048]),
            "K": vary(few, K=[8, 16, 32, 64]),
            "C": [replace(few, C=size, K=64 // size) for size in (1, 4, 16, 64)],  # 64 tokens however they are cut
            "D": vary(few, D=[64, 128]),
            "G": vary(few, G=[size for size in (1, 4, shape.H) if shape.H % size == 0]),
            "R": vary(shape, R=[0, 1]),
            "S decoding": vary(one, S=[512, 2048, 8192]),
            "B decoding": vary(replace(one, R=1), B=[1, 8, 64]),
        }
    if op == "memory_attention_backward":
        return {"T": vary(few, T=[128, 512, 1024]), "K": vary(few, K=[8, 16, 32])}
    if op == "memory_layer":
        return {"M": vary(shape, M=[4096, 16384, 65536])}
    return {}


def vary(shape: Shape, **sizes: list[int]) -> list[Shape]:
    """`shape` once for every size in the one list given."""
    ((name, values),) = sizes.items()
    return [change(shape, **{name: value}) for value in values]
