"""Plain-PyTorch ring_write: the specification of the op, on any device, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import QUANTISED_DTYPE
from ..ring import MAX_CURSOR, Ring, rings_of_rows


def ring_write_reference(
    ring: Ring, key: Tensor, value: Tensor, ring_index: Tensor | None, mask: Tensor | None
) -> None:
    """See `ring_write`. Gathers every chunk this call touches, from tail and input, and stores it whole.

    Arguments as in `ring_write`, already checked.
    """
    R, M, C = ring.rings, ring.chunks, ring.chunk_size
    B, _, T, _ = key.shape
    device = key.device
    if B * T == 0:
        return
    per_ring = T if ring_index is None and R == B else B * T

    # Token stream of each ring: kept tokens in row-major order, located by `source[first[r] + n]`.
    ring_of_token = rings_of_rows(ring_index, R, B, device)[:, None].expand(B, T).reshape(-1)
    keep = ring_of_token >= 0 if mask is None else (ring_of_token >= 0) & mask.reshape(-1)
    ring_of_token = torch.where(keep, ring_of_token, R)  # ring R takes what is dropped
    source = torch.sort(ring_of_token, dim=0, stable=True).indices
    tokens = torch.zeros(R + 1, dtype=torch.int64, device=device).index_add_(
        0, ring_of_token, torch.ones_like(ring_of_token)
    )
    first = (tokens.cumsum(0) - tokens)[:R]
    begin = ring.cursor.remainder(MAX_CURSOR)
    end = begin + tokens[:R]

    # Chunks closed by this call, newest first, at most one lap of the ring; then the chunk left open.
    laps = min(M, per_ring // C + 1)
    closed = (end // C)[:, None] - 1 - torch.arange(laps, device=device)  # [R, laps]
    chunk = torch.cat([closed, (end // C)[:, None]], 1)  # [R, W]
    position = chunk[..., None] * C + torch.arange(C, device=device)  # [R, W, C]
    written_now = (position >= begin[:, None, None]) & (position < end[:, None, None])
    index = (first[:, None, None] + position - begin[:, None, None]).clamp(0, B * T - 1)
    token = source[index]  # [R, W, C]

    incoming = torch.stack([key, value]).permute(1, 3, 2, 0, 4).reshape(B * T, ring.kv_heads, 2, ring.head_dim)
    fresh = incoming[token].to(ring.tail.dtype).permute(0, 3, 1, 4, 2, 5)  # [R, G, W, 2, C, D]
    content = torch.where(written_now[:, None, :, None, :, None], fresh, ring.tail[:, :, None])

    slot = closed.remainder(M)
    fits = closed >= begin[:, None] // C
    whole = content[:, :, :-1]  # [R, G, laps, 2, C, D]
    if ring.scale is not None:
        quantised, scale = quantise(whole)
        _put(ring.store.view(torch.uint8), slot, fits, quantised.view(torch.uint8))
        _put(ring.scale, slot, fits, scale)
    else:
        _put(ring.store, slot, fits, whole)
    _put(ring.centroid, slot, fits, _mean_key(whole))
    ring.tail.copy_(content[:, :, -1])
    ring.cursor.copy_(end.remainder(MAX_CURSOR))


def quantise(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [..., C, D] as float8_e4m3fn, and their scale [...] in float32: see `Ring`."""
    exact = tokens.float()
    largest = exact.abs().amax((-2, -1), keepdim=True)  # NaN if any is
    # Divided by tensors: on CUDA, division by a number is a product with its rounded reciprocal.
    scale = (largest / torch.full_like(largest, 448.0)).clamp(min=2.0**-126)
    return (exact / scale).to(QUANTISED_DTYPE), scale[..., 0, 0]


def _mean_key(chunks: Tensor) -> Tensor:
    """[R, G, W, D] of chunks [R, G, W, 2, C, D]."""
    total = torch.zeros_like(chunks[..., 0, 0, :], dtype=torch.promote_types(torch.float32, chunks.dtype))
    for offset in range(chunks.shape[4]):  # in order, so that every implementation rounds alike
        total = total + chunks[..., 0, offset, :].to(total.dtype)
    return (total / torch.full_like(total, chunks.shape[4])).to(chunks.dtype)


def _put(part: Tensor, slot: Tensor, fits: Tensor, content: Tensor) -> None:
    """Write `content` [R, G, W, ...] to the slots [R, W] of `part` [R, G, M, ...] where `fits` [R, W]."""
    rows = torch.arange(part.shape[0], device=part.device)[:, None]
    keep = fits.view(*fits.shape, *[1] * (part.dim() - 2))
    part[rows, :, slot] = torch.where(keep, content.transpose(1, 2), part[rows, :, slot])  # [R, W, G, ...]
