"""Timing of one attention function, forward or forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..inputs import FusionInputs
from ..provider import Prepared


def attention(inputs: FusionInputs, attend: Callable[..., Tensor], *, backward: bool, gated: bool = True) -> Prepared:
    """Forward, or forward and backward, of `attend(query, key, value[, gate])`."""
    leaves = [inputs.query, inputs.key, inputs.value, *([inputs.gate] if gated else [])]
    leaves = [leaf.detach().clone().requires_grad_(backward) for leaf in leaves]

    def forward() -> tuple[Tensor]:
        with torch.no_grad():
            return (attend(*leaves),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad)

    return Prepared(forward_backward if backward else forward)
