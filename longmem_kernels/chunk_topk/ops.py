"""Schemas, fakes and the Triton registration of the chunk_topk kernels; the C++ kernel registers itself."""

from __future__ import annotations

import torch
from torch import Tensor

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

    return chunk_topk_triton(query, centroid, count, ring_index, k)
