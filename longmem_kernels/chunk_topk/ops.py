"""Schemas, fakes and the Triton registration of the chunk_topk kernels; the C++ kernel registers itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import STORAGE_DTYPES, KernelArguments
from .._dispatch import KERNEL_HEAD_DIMS
from .._extension import library

_ARGUMENTS = "(Tensor query, Tensor centroid, Tensor count, Tensor? ring_index, int k) -> (Tensor, Tensor)"
library.define("chunk_topk_cpp" + _ARGUMENTS)
library.define("chunk_topk_triton" + _ARGUMENTS)


@torch.library.register_fake("longmem::chunk_topk_cpp")
@torch.library.register_fake("longmem::chunk_topk_triton")
def _fake(query: Tensor, centroid: Tensor, count: Tensor, ring_index: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:3], k)
    return query.new_empty(shape, dtype=torch.int32), query.new_empty(shape, dtype=torch.float32)


@torch.library.impl("longmem::chunk_topk_triton", ("CUDA", "CPU"))
def _triton(query: Tensor, centroid: Tensor, count: Tensor, ring_index: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    from .triton import chunk_topk_triton  # on first use, so that the package imports without Triton

    _check(query, centroid, count, ring_index, k)
    return chunk_topk_triton(query, centroid, count, ring_index, k)


def _check(query: Tensor, centroid: Tensor, count: Tensor, ring_index: Tensor | None, k: int) -> None:
    arguments = KernelArguments("chunk_topk", query)
    arguments.require(
        query.dim() == 4 and centroid.dim() == 4, "query and centroid must have 4 axes", query.dim(), centroid.dim()
    )
    (B, H, T, D), (R, G, M, _) = query.shape, centroid.shape
    arguments.heads(H, G, D, KERNEL_HEAD_DIMS)
    arguments.require(
        min(R, M) > 0 and M < 2**31 and 1 <= k <= 64, "R and M must be at least 1, and k lie in [1, 64]", R, M, k
    )
    dtypes = query.dtype, centroid.dtype
    arguments.require(set(dtypes) <= set(STORAGE_DTYPES), "query and centroid must be of 16 or 32 bits", *dtypes)
    arguments.expect("query", query, (B, H, T, D), query.dtype)
    arguments.expect("centroid", centroid, (R, G, M, D), centroid.dtype)
    arguments.expect("count", count, (R,), torch.int32, whole=True)
    arguments.ring_index(ring_index, B, R)
