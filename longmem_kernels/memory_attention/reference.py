"""Plain-PyTorch memory_attention: the specification of the op and the oracle its kernels are held against.

It materialises the scores and the gathered chunks, and autograd differentiates it; float64 inputs stay float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ring import rings_of_rows
from .visible_products import visible_scores, visible_sum


def memory_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    chunk_ids: Tensor,
    memory_scale: Tensor | None,
    ring_index: Tensor | None,
    gate: Tensor | None,
    alibi_slopes: Tensor | None,
    key_mask: Tensor | None,
    dropout_seed: Tensor | None,
    fusion: str,
    scale: float,
    causal: bool,
    window: int | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `memory_attention`. Arguments as there, already checked, defaults filled in; out, local_lse, memory_lse."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    (B, H, T, _), (_, G, S, _) = query.shape, key.shape
    chunk_ids = _existing(chunk_ids, ring_index, memory_key.shape[0], memory_key.shape[2])
    # The queries are the last T of S positions.
    distance = torch.arange(S - T, S, device=query.device)[:, None] - torch.arange(S, device=query.device)
    visible = _visible(distance, causal, window, key_mask).expand(B, H, T, S)
    scores = visible_scores(query.to(dtype), key.to(dtype).repeat_interleave(H // G, 1), visible) * scale
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance
    weight, local_lse = _softmax(scores, visible)
    if dropout_seed is not None:
        weight = weight * dropout_keep(dropout_seed, (B, H, T, S), dropout_p) / (1 - dropout_p)
    local_out = visible_sum(weight, value.to(dtype).repeat_interleave(H // G, 1), visible)

    key_scale, value_scale = (None, None) if memory_scale is None else memory_scale.unbind(-1)
    chunk_key = _gather(memory_key, key_scale, chunk_ids, ring_index, dtype)
    chunk_value = _gather(memory_value, value_scale, chunk_ids, ring_index, dtype)
    scores = (memory_query.to(dtype)[..., None, :] @ chunk_key.mT).squeeze(-2) * scale  # [B, H, T, K*C]
    weight, memory_lse = _softmax(scores, (chunk_ids >= 0).repeat_interleave(memory_key.shape[3], -1))
    memory_out = (weight[..., None, :] @ chunk_value).squeeze(-2)

    share = memory_share(local_lse, memory_lse, gate)[..., None]
    return ((1 - share) * local_out + share * memory_out).to(query.dtype), local_lse, memory_lse


def memory_share(local_lse: Tensor, memory_lse: Tensor, gate: Tensor | None) -> Tensor:
    """[B, H, T], the memory's share of the output: both fusions are `(1 - share) * local + share * memory`.

    Gated: sigmoid(gate). Joint, without a gate: one softmax over both parts gives each its part of the sum of
    exponentials. 0 where no memory was found.
    """
    found = memory_lse != -torch.inf
    if gate is not None:
        # Hidden before and after: where nothing was found, no gate and no gradient of it, whatever they are.
        return torch.where(found, torch.sigmoid(torch.where(found, gate.to(local_lse.dtype)[:, None], 0.0)), 0.0)
    return torch.sigmoid(torch.where(found, memory_lse, -torch.inf) - torch.where(found, local_lse, 0.0))


def dropout_keep(seed: Tensor, shape: tuple[int, int, int, int], p: float) -> Tensor:
    """Bool [B, H, T, S], False with probability `p`: a hash of `seed` int64 [1] and of the position.

    32 bits for every local weight, in wrapping arithmetic: with `mix` as below,
    `mix(mix(mix(low(row) ^ mix(low(seed))) ^ mix(high(seed) ^ 0x9E3779B9) ^ high(row)) ^ s * 0x9E3779B1)` where row is
    (b * H + h) * T + t, and `low` and `high` are the halves of 64 bits. Kept when at least p * 2^32, rounded down.
    """
    B, H, T, S = shape

    def mix(x: Tensor) -> Tensor:
        """A 32-bit hash by C. Wellons ("lowbias32"), on int64."""
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x ^ (x >> 16)

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        return x & 0xFFFFFFFF, (x >> 32) & 0xFFFFFFFF

    seed_low, seed_high = halves(seed)
    row_low, row_high = halves(torch.arange(B * H * T, device=seed.device))
    row = mix(mix(row_low ^ mix(seed_low)) ^ mix(seed_high ^ 0x9E3779B9) ^ row_high)
    column = (torch.arange(S, device=seed.device) * 0x9E3779B1) & 0xFFFFFFFF
    return (mix(row[:, None] ^ column) >= int(p * 2**32)).view(shape)


def _visible(distance: Tensor, causal: bool, window: int | None, key_mask: Tensor | None) -> Tensor:
    """Mask of the keys that a query may see: bool, broadcasts to [B, H, T, S]. `distance` [T, S] from key to query."""
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        visible = visible & (distance < window)
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def _softmax(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the visible scores, zero when there are none above -inf, and their log-sum-exp."""
    scores = scores.masked_fill(~visible, -torch.inf)
    found = (scores != -torch.inf).any(-1, keepdim=True)
    # Infinity minus infinity is no number: as the kernels have it, also in the log-sum-exp.
    scores = scores + torch.where(scores == torch.inf, torch.nan, 0.0)
    # A row without such scores is replaced before its softmax can make NaN gradients.
    scores = torch.where(found, scores, 0.0)
    lse = torch.where(found, scores.logsumexp(-1, keepdim=True), -torch.inf).squeeze(-1)
    # A visible NaN makes the softmax of its row NaN: of what is visible there, and of nothing else.
    return torch.where(visible & found, scores.softmax(-1), 0.0), lse


def _existing(chunk_ids: Tensor, ring_index: Tensor | None, R: int, M: int) -> Tensor:
    """`chunk_ids`, -1 for those that are no slot of a ring."""
    exists = (chunk_ids >= 0) & (chunk_ids < M)
    if ring_index is not None:
        exists &= ((ring_index >= 0) & (ring_index < R))[:, None, None, None]
    return torch.where(exists, chunk_ids, -1)


def _gather(
    memory: Tensor, scale: Tensor | None, chunk_ids: Tensor, ring_index: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Chunks by id, times their `scale` [R, G, M]: [B, H, T, K*C, D], zero where the id is -1."""
    B, H, _, _ = chunk_ids.shape
    R, G = memory.shape[:2]
    device = chunk_ids.device
    ring = rings_of_rows(ring_index, R, B, device).clamp(min=0)
    head = torch.arange(H, device=device) // (H // G)
    place = (ring[:, None, None, None], head[:, None, None], chunk_ids.clamp(min=0).long())
    chunks = memory[place].to(dtype)
    if scale is not None:
        chunks = chunks * scale[place].to(dtype)[..., None, None]
    # Zeroed, not only masked: a slot that was never written may hold NaN.
    return torch.where((chunk_ids >= 0)[..., None, None], chunks, 0.0).flatten(3, 4)
