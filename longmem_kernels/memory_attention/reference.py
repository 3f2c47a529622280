"""Plain-PyTorch memory_attention: the specification of the op and the oracle its kernels are held against.

It materialises the scores and the gathered chunks, and autograd differentiates it; float64 inputs stay float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ring import rings_of_rows


def memory_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    chunk_ids: Tensor,
    ring_index: Tensor | None,
    gate: Tensor | None,
    alibi_slopes: Tensor | None,
    fusion: str,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """See `memory_attention`. Arguments as there, already checked, defaults filled in."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads = query.shape[1]
    local_scores = _local_scores(query.to(dtype), key.to(dtype), alibi_slopes, scale, causal, window)
    local_value = value.to(dtype).repeat_interleave(heads // value.shape[1], 1)

    chunk_key, valid = _gather(memory_key, chunk_ids, ring_index, dtype)
    chunk_value, _ = _gather(memory_value, chunk_ids, ring_index, dtype)
    scores = (memory_query.to(dtype)[..., None, :] @ chunk_key.mT).squeeze(-2) * scale  # [B, H, T, K*C]
    memory_scores = scores.masked_fill(~valid, -torch.inf)
    found = valid.any(-1, keepdim=True)

    if fusion == "joint":
        weight = torch.cat([local_scores, memory_scores], -1).softmax(-1)
        local_weight, memory_weight = weight.split([local_scores.shape[-1], scores.shape[-1]], -1)
    else:
        assert gate is not None
        share = torch.sigmoid(gate.to(dtype))[:, None, None] * found
        local_weight = (1 - share) * local_scores.softmax(-1)
        # A query without memory has no finite score; its softmax is replaced before it can produce NaN gradients.
        memory_weight = share * torch.where(found, memory_scores, 0.0).softmax(-1)
    out = local_weight @ local_value + (memory_weight[..., None, :] @ chunk_value).squeeze(-2)
    return out.to(query.dtype)


def _local_scores(
    query: Tensor, key: Tensor, alibi_slopes: Tensor | None, scale: float, causal: bool, window: int | None
) -> Tensor:
    """[B, H, T, S] scores of the local keys, -inf where a key may not be seen."""
    H, T, S = query.shape[1], query.shape[2], key.shape[2]
    scores = query @ key.repeat_interleave(H // key.shape[1], 1).mT * scale
    # The queries are the last T of S positions.
    distance = torch.arange(S - T, S, device=query.device)[:, None] - torch.arange(S, device=query.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * distance
    if causal:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    if window is not None:
        scores = scores.masked_fill(distance >= window, -torch.inf)
    return scores


def _gather(memory: Tensor, chunk_ids: Tensor, ring_index: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Chunks by id: [B, H, T, K*C, D], zero where the id is -1, and whether each token is there [B, H, T, K*C]."""
    B, H, _, _ = chunk_ids.shape
    R, G, _, C, _ = memory.shape
    device = chunk_ids.device
    ring = rings_of_rows(ring_index, R, B, device)
    head = torch.arange(H, device=device) // (H // G)
    there = chunk_ids >= 0
    chunks = memory[ring[:, None, None, None], head[:, None, None], chunk_ids.clamp(min=0).long()]
    # Zeroed, not only masked: a slot that was never written may hold NaN.
    chunks = torch.where(there[..., None, None], chunks, 0.0).to(dtype)
    return chunks.flatten(3, 4), there.repeat_interleave(C, -1)
