"""Exact search without a kernel: scores of a whole block by `torch.matmul`, then `topk`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..inputs import RetrievalInputs
from ..providers import Prepared, too_large
from ..shapes import Shape

SCORE_BYTES = 2**30  # how much of the score matrix the matmul baseline holds at once


def by_key_head(inputs: RetrievalInputs) -> tuple[Tensor, Tensor]:
    """Queries [R * G, n, D] and centroids [R * G, M, D]: all queries of one key head together, row by row.

    Query heads that share a key head, and rows that share a ring, are more queries of the same centroids.
    """
    shape = inputs.shape
    query = inputs.query.view(shape.rings, shape.rows_per_ring, shape.G, shape.H // shape.G, shape.T, shape.D)
    return query.transpose(1, 2).reshape(shape.rings * shape.G, -1, shape.D), inputs.centroid.flatten(0, 1)


def by_query_head(found: Tensor, shape: Shape) -> Tensor:
    """[R * G, n, K] of `by_key_head`'s queries as [B, H, T, K]."""
    split = found.view(shape.rings, shape.G, shape.rows_per_ring, shape.H // shape.G, shape.T, shape.K)
    return split.transpose(1, 2).reshape(shape.B, shape.H, shape.T, shape.K)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Batched product in float32. Scores rounded to 16 bits would rank other chunks; the GPU can keep the products of
    16-bit inputs in float32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def why_no_matmul_topk(shape: Shape, device: torch.device) -> str | None:
    scores = 4 * (shape.H // shape.G) * shape.rows_per_ring * shape.T * shape.M  # of one key head
    return too_large(2 * max(scores, SCORE_BYTES), device)


def prepare_matmul_topk(inputs: RetrievalInputs) -> Prepared:
    """Scores of as many heads at once as fit into a fixed buffer, then `topk`. Every chunk is taken to be stored."""
    shape = inputs.shape
    query, centroid = by_key_head(inputs)
    centroid = centroid.mT
    block = max(1, SCORE_BYTES // (query.shape[1] * shape.M * 4))

    def run() -> list[Any]:
        parts = zip(query.split(block), centroid.split(block), strict=True)
        return [multiply(left, right).topk(shape.K, dim=-1) for left, right in parts]

    def collect(found: list[Any]) -> tuple[Tensor, ...]:
        ids, scores = torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])
        return by_query_head(ids, shape), by_query_head(scores, shape)

    return Prepared(run, collect)
