"""Views and device functions shared by the Triton kernels.

Names inside kernels say by a prefix what they hold:

    p_  a pointer                         i_  an index of this program: i_b batch row, i_h head, i_g key/value head
    b_  a block of numbers, in registers  o_  offsets: a block of indices along an axis, or of distances in memory
    m_  a mask, which of a block count    s_  a stride

A view (`Rows`, or those of an op) has no prefix, nor has a size (B, H, G, T, S, R, M, K, C, D as everywhere). Tile
sizes begin with B: BT of the T axis, BD the next power of two of D.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Triton's interpreter keeps bfloat16 as bits: it multiplies them as integers and truncates where a GPU rounds. Two
# branches below exist for that and compile to nothing.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Rows(NamedTuple):
    """A tensor of four axes as a kernel sees it: a pointer and strides; the last axis is contiguous.
    The axes are named batch, head and token, whatever they are."""

    ptr: Any
    b: Any
    h: Any
    t: Any

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Rows:
        return cls(tensor, *tensor.stride()[:3])


@triton.jit
def of_head(rows, i_b, i_h):
    """The rows of one batch row and head (both int64)."""
    return Rows(rows.ptr + i_b * rows.b + i_h * rows.h, rows.b, rows.h, rows.t)


@triton.jit
def dot(a, b):
    """a [M, K] @ b [K, N] summed in float32: on tensor cores for equal 16-bit dtypes, in IEEE float32 otherwise."""
    if INTERPRETED or a.dtype != b.dtype:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:  # not after the if: both branches would be compiled
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Float32 `x` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def ring_of_row(p_ring_index, i_b, R, M):
    """Ring of batch row `i_b` (int64), and its M slots: as `ring_index` says, else the row's own, or the only one.

    A ring that does not exist is ring 0 without slots: nothing of it is read.
    """
    if p_ring_index is not None:
        i_r = tl.load(p_ring_index + i_b).to(tl.int64)
        exists = (i_r >= 0) & (i_r < R)
        return tl.where(exists, i_r, 0), tl.where(exists, M, 0)
    else:
        return tl.where(R == 1, 0, i_b), M
