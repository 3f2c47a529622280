"""The published fusion of local and retrieved attention, on [B, H, T, D] tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory_attention import memory_attention
from .memory import Retrieved

_OPEN = 100.0  # a gate logit whose sigmoid is 1 in float32: memory alone
_MAX_CHUNK = 64  # tokens per chunk that the kernels take


def alibi_slopes(heads: int) -> Tensor:
    """[heads] float32 slopes of ALiBi (Press et al. 2022), with its rule for head counts that are not powers of two."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 / power * (i + 1)) for i in range(power)]
    slopes += [2 ** (-4 / power * (2 * i + 1)) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    slopes: Tensor | None = None,
    causal: bool = True,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention without memory, [B, H, T, D]. Arguments as in `retrieved_attention`."""
    if bias is not None:
        return F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), dropout_p)
    H, D = query.shape[1], query.shape[3]
    nothing = query.new_zeros(1, H, 1, 1, D)
    none = torch.full((), -1, dtype=torch.int32, device=query.device).expand(*query.shape[:3], 1)
    gate = query.new_zeros(H, dtype=torch.float32)
    return memory_attention(
        query, key, value, nothing, nothing, none, gate=gate, alibi_slopes=slopes, causal=causal, **_dropout(dropout_p)
    )


def retrieved_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    retrieved: Mapping[str, Tensor],
    gate: Tensor,
    *,
    slopes: Tensor | None = None,
    causal: bool = True,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`(1 - g) * local + g * memory` with `g = sigmoid(gate)` (LongMem, section 2.3), [B, H, T, D].

    Args:
        query: [B, H, T, D]. key, value: [B, H, S, D]; fused, the queries are the last T of the S positions.
        retrieved: "k" and "v" [B * H, T, k, D]; a `Retrieved` is read from its bank instead.
        gate: [H] logits.
        slopes: [H], ALiBi on the local scores.
        causal: local scores see no later key.
        bias: broadcasts to [B, H, T, S]; takes the place of `slopes` and `causal`, and of the fused kernel.
        dropout_p: of the local probabilities.
    """
    if isinstance(retrieved, Retrieved):
        bank, slots = retrieved.bank, retrieved.slots
        memory = (bank[:, :, :, 0], bank[:, :, :, 1], slots)
    else:
        gathered = [retrieved[name].to(query.device).type(query.dtype) for name in ("k", "v")]
        if any(part.requires_grad for part in gathered):
            # The kernels have no gradient for a bank.
            local = local_attention(query, key, value, slopes=slopes, causal=causal, bias=bias, dropout_p=dropout_p)
            return _mix(local, _gathered_attention(query, *gathered), gate)
        memory = _as_bank(query, *gathered)
    if bias is None:
        return memory_attention(
            query, key, value, *memory, gate=gate, alibi_slopes=slopes, causal=causal, **_dropout(dropout_p)
        )
    open_gate = torch.full_like(gate, _OPEN, requires_grad=False)
    return _mix(
        local_attention(query, key, value, bias=bias, dropout_p=dropout_p),
        memory_attention(query, key, value, *memory, gate=open_gate),
        gate,
    )


def _dropout(dropout_p: float) -> dict[str, Any]:
    return {"dropout_p": dropout_p} if dropout_p > 0 else {}


def _mix(local: Tensor, memory: Tensor, gate: Tensor) -> Tensor:
    share = torch.sigmoid(gate)[:, None, None].to(local.dtype)
    return (1 - share) * local + share * memory


def _gathered_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of every query to its own keys and values [B * H, T, k, D]."""
    key, value = key.unflatten(0, query.shape[:2]), value.unflatten(0, query.shape[:2])
    weight = (query[..., None, :] @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return (weight @ value).squeeze(-2)


def _as_bank(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gathered keys and values as rings, one per row, in which query t's chunks follow each other from t * K on."""
    B, H, T, _ = query.shape
    size = next(size for size in range(_MAX_CHUNK, 0, -1) if key.shape[2] % size == 0)
    pieces = key.shape[2] // size

    def bank(part: Tensor) -> Tensor:
        part = part.unflatten(0, (B, H)).unflatten(3, (pieces, size)).flatten(2, 3)
        return part if part.stride(-1) == 1 else part.contiguous()

    slots = torch.arange(T * pieces, dtype=torch.int32, device=query.device).view(T, pieces)
    return bank(key), bank(value), slots.expand(B, H, T, pieces)
