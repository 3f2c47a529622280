"""Schemas and fakes of the ring_write kernels; the kernels themselves register from C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .._extension import library

_ARGUMENTS = (
    "(Tensor(a!) store, Tensor(b!) centroid, Tensor(c!) tail, Tensor(d!) cursor, Tensor(e!)? scale,"
    " Tensor key, Tensor value, Tensor? ring_index, Tensor? mask) -> ()"
)
library.define("ring_write_cpp" + _ARGUMENTS)
library.define("ring_write_cuda" + _ARGUMENTS)


@torch.library.register_fake("longmem::ring_write_cpp")
@torch.library.register_fake("longmem::ring_write_cuda")
def _fake(
    store: Tensor,
    centroid: Tensor,
    tail: Tensor,
    cursor: Tensor,
    scale: Tensor | None,
    key: Tensor,
    value: Tensor,
    ring_index: Tensor | None,
    mask: Tensor | None,
) -> None:
    return None
