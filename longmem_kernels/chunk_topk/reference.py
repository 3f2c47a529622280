"""Plain-PyTorch chunk_topk: the specification of the op and the oracle its kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ring import rings_of_rows


def chunk_topk_reference(
    query: Tensor, centroid: Tensor, count: Tensor, ring_index: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """See `chunk_topk`. Scores every chunk (float64 inputs in float64, others in float32) and sorts them all.

    Arguments as in `chunk_topk`, already checked. Scores come back in the dtype they were computed in.
    """
    H, (G, M) = query.shape[1], centroid.shape[1:3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if ring_index is not None:
        rows = rings_of_rows(ring_index, centroid.shape[0], query.shape[0], query.device)
        centroid, count = centroid[rows.clamp(min=0)], torch.where(rows >= 0, count[rows.clamp(min=0)], 0)
    slot = torch.arange(M, device=query.device)
    stored = (slot < count[:, None])[:, None, None, None]  # [R or B, 1, 1, 1, M]

    scores = query.to(dtype).unflatten(1, (G, H // G)) @ centroid.to(dtype)[:, :, None].mT  # [B, G, H/G, T, M]
    # Three classes in this order: numbers (descending), NaN, slots that hold nothing. Stable sorts keep lower slots
    # first.
    nan = scores.isnan()
    order = scores.masked_fill(nan, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    group = torch.where(stored, nan.to(torch.uint8), 2).expand_as(scores).gather(-1, order)
    ids = order.gather(-1, group.sort(dim=-1, stable=True).indices)[..., :k]
    scores = scores.gather(-1, ids)
    missing = ~stored.expand(*nan.shape).gather(-1, ids)
    ids = ids.masked_fill(missing, -1)
    scores = scores.masked_fill(missing, -torch.inf)
    if k > M:
        ids = torch.nn.functional.pad(ids, (0, k - M), value=-1)
        scores = torch.nn.functional.pad(scores, (0, k - M), value=-torch.inf)
    return ids.flatten(1, 2).to(torch.int32), scores.flatten(1, 2)
