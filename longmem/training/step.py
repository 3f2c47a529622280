"""One segment of every row, from tokens to what is minimised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longmem.data.stream import Batch
from longmem.memory import MemoryBank
from longmem.model import LongMem
from longmem.states import StateSource

from .config import TrainConfig


@dataclass(frozen=True)
class Measured:
    """Sums measured on one segment, without gradients.

    Attributes:
        loss: mean negative log likelihood, nats per target.
        queries: how many queries there were, over tokens, heads and memory layers.
        found: how many of them found memory. share: its share of their attention, summed.
    """

    loss: Tensor
    queries: Tensor
    found: Tensor
    share: Tensor


class Step(nn.Module):
    """One training step on one segment per row. DDP and FSDP wrap this module."""

    def __init__(self, model: LongMem, states: StateSource, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.states, self.config = model, states, config

    def forward(self, batch: Batch, memory: MemoryBank, weight: float) -> tuple[Tensor, Measured]:
        """`weight` times the mean loss plus the usage penalty, to be minimised; and the measurements."""
        shares: list[Tensor] = []
        output = self.model.read_states(
            self.states(batch), memory, targets=batch.targets, mask=batch.mask, shares=shares
        )
        assert output.loss is not None
        share = torch.cat(shares, 1)  # [B, layers * H, T]
        found = (share > 0) & batch.mask[:, None]
        objective = output.loss * weight
        if self.config.usage_weight:
            penalty = usage_penalty(share, found, self.config.usage_target)
            objective = objective + penalty * (self.config.usage_weight / self.config.accumulate)
        total = (share.detach() * found).sum()
        return objective, Measured(output.loss.detach(), batch.mask.sum() * share.shape[1], found.sum(), total)


def loss_scale(model: LongMem) -> float:
    """The factor by which losses are multiplied, and gradients divided, so that small gradients survive a float16
    backbone. A power of two: nothing is rounded by it."""
    return 2.0**10 if model.backbone.dtype == torch.float16 else 1.0


def usage_penalty(share: Tensor, found: Tensor, target: float) -> Tensor:
    """How far the heads' mean memory share is below `target`, in nats, on average over heads.

    Of the mean, so that tokens may differ in how much memory they want. In logarithms, so that its gradient does not
    vanish with the share: a head that has given memory up can come back.

    Args:
        share: [B, H, T], the memory's share of each query's attention.
        found: [B, H, T] bool, the queries that count.
    """
    count = found.sum((0, 2))
    mean = (share * found).sum((0, 2)) / count.clamp(min=1)
    missing = math.log(target) - mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    return (missing.clamp(min=0) * (count > 0)).sum() / (count > 0).sum().clamp(min=1)
