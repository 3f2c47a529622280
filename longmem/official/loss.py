"""Cross entropy of a frozen vocabulary head without the logits of more than a few tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TOKENS = 512  # whose logits exist at once


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *, ignore: int) -> Tensor:
    """Mean cross entropy of `hidden @ weight.T + bias` over targets that are not `ignore`; 0 without any.

    Args:
        hidden: [B, T, E]. Gradients flow here; where they flow to weight or bias, all logits are kept.
        weight, bias: [V, E], [V].
        targets: [B, T] int64.

    Raises:
        ValueError: targets of another shape.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"head_loss: targets must be {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}")
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad):
        logits = F.linear(hidden, weight, bias).float()
        total = F.cross_entropy(logits, targets, ignore_index=ignore, reduction="sum")
    else:
        total = _HeadLoss.apply(hidden, weight, bias, targets, ignore)
    return total / (targets != ignore).sum().clamp(min=1)


class _HeadLoss(torch.autograd.Function):
    """Sum of losses. The gradient is made in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, ignore: int) -> Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            # Once, and not again for every part.
            weight = weight.to(torch.get_autocast_dtype(hidden.device.type))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), _TOKENS):
            part = slice(start, start + _TOKENS)
            logits = F.linear(hidden[part].to(weight.dtype), weight, bias.to(weight.dtype)).float()
            counted = targets[part] != ignore
            target = targets[part].where(counted, 0)[:, None]
            highest = logits.amax(-1, keepdim=True)
            chosen = logits.gather(-1, target) - highest
            weights = logits.sub_(highest).exp_()
            normaliser = weights.sum(-1, keepdim=True)
            total += ((normaliser.log() - chosen).squeeze(-1) * counted).sum()
            if gradient is not None:
                weights.div_(normaliser).scatter_add_(-1, target, weights.new_full((len(target), 1), -1.0))
                gradient[part] = weights.mul_(counted[:, None]).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None
