"""FlashLib's `flash_knn`: fused exact search on the GPU, by squared distance alone.

Inner product is got from squared distance by making all centroids equally long: six more dimensions hold what a
centroid lacks to the largest length, each rounded down to the inputs' dtype, the next one taking up the rest, which
leaves less than 2^-30 of the squared length; the queries are zero there. FlashLib pads D to a power of two, so this
costs it half its products at D = 64. The second provider searches by squared distance at the same sizes: not our
operation, but what FlashLib is made for.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..inputs import RetrievalInputs, by_key_head, by_query_head
from ..provider import Prepared, Provider
from ..shapes import Shape

_PADDING, _USED = 16, 6  # dimensions added, and used: tensor cores want a multiple of 16


def providers() -> list[Provider]:
    return [
        Provider("flashlib flash_knn, inner product", _prepare_product, _why_not),
        Provider("flashlib flash_knn, distance", _prepare_distance, _why_not, computes="distance"),
    ]


def _why_not(shape: Shape, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if importlib.util.find_spec("flashlib") is None:
        return "FlashLib is not installed (pip install flashlib)"
    if shape.dtype == torch.float32:
        return "multiplies float32 in TF32, which ranks other chunks"
    return None


def equal_lengths(centroid: Tensor) -> tuple[Tensor, Tensor]:
    """centroid [n, M, D] with `_PADDING` more dimensions, and the squared length that all then have, [n, 1, 1]."""
    exact = centroid.double()
    squared = exact.square().sum(-1, keepdim=True)
    longest = squared.amax(1, keepdim=True) * (1 + 1e-6)
    missing, extra = longest - squared, []
    shrink = 1 - torch.finfo(centroid.dtype).eps  # more than rounding can add
    for _ in range(_USED):
        part = (missing.sqrt() * shrink).to(centroid.dtype)
        missing = missing - part.double().square()
        extra.append(part)
    padding = centroid.new_zeros(*centroid.shape[:-1], _PADDING - _USED)
    return torch.cat([centroid, *extra, padding], -1), longest


def _prepare_product(inputs: RetrievalInputs) -> Prepared:
    import flashlib

    shape = inputs.shape
    query, centroid = by_key_head(inputs)
    wide_query = torch.cat([query, query.new_zeros(*query.shape[:-1], _PADDING)], -1)
    wide, longest = equal_lengths(centroid)
    lengths = query.float().square().sum(-1, keepdim=True) + longest.float()

    def collect(found: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        distance, ids = found
        return by_query_head(ids, shape), by_query_head((lengths - distance) / 2, shape)

    return Prepared(lambda: flashlib.flash_knn(wide_query, wide, shape.K), collect)


def _prepare_distance(inputs: RetrievalInputs) -> Prepared:
    import flashlib

    shape = inputs.shape
    query, centroid = (part.contiguous() for part in by_key_head(inputs))

    def collect(found: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        distance, ids = found
        return by_query_head(ids, shape), by_query_head(distance, shape)

    return Prepared(lambda: flashlib.flash_knn(query, centroid, shape.K), collect)
