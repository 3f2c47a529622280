"""Exchanging rows between the ranks of a process group, differentiably and in a fixed order of summation."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The name since PyTorch 2.13, and the one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """The ranks of `group` (default: all), each with rows of its own or, `replicated`, all with the same rows.

    Attributes:
        rank, world: this rank, and how many there are.
        sources: how many ranks bring rows of their own: `world`, or 1 when replicated.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, replicated: bool = False) -> None:
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed is not initialised: call init_process_group, or start with torchrun")
        self.group, self.replicated = group, replicated
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the group")
        self.sources = 1 if replicated else self.world

    def gather(self, x: Tensor) -> Tensor:
        """[B, ...] of this rank -> [N, ...], the rows of all ranks, N = sources * B."""
        result: Tensor = _Exchange.apply(x, self, "_gather")
        return result

    def give_back(self, x: Tensor) -> Tensor:
        """[N, ...], this rank's part of the results for all rows -> [W, B, ...], all ranks' parts for its own rows."""
        result: Tensor = _Exchange.apply(x, self, "_give_back")
        return result

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] -> [W, ...]"""
        return self._collect(x, (self.world, *x.shape), _all_gather)

    def all_to_all(self, x: Tensor) -> Tensor:
        """[W, ...] -> [W, ...]: piece i goes to rank i."""
        return self._collect(x, x.shape, dist.all_to_all_single)

    def by_rank(self, x: Tensor) -> Tensor:
        """[N, ...] -> [W, B, ...]"""
        return x.unflatten(0, (self.world, x.shape[0] // self.world))

    def _gather(self, x: Tensor) -> Tensor:
        return x.view_as(x) if self.replicated else self.all_gather(x).flatten(0, 1)

    def _gather_gradient(self, grad: Tensor) -> Tensor:
        """Every rank has a part of the gradient of every row."""
        return (self.all_gather(grad) if self.replicated else self.all_to_all(self.by_rank(grad))).sum(0)

    def _give_back(self, x: Tensor) -> Tensor:
        return self.all_gather(x) if self.replicated else self.all_to_all(self.by_rank(x))

    def _give_back_gradient(self, grad: Tensor) -> Tensor:
        """A part's gradient is with the rank whose rows it was for; when replicated, with all, the same."""
        return grad[self.rank].clone() if self.replicated else self.all_to_all(grad).flatten(0, 1)

    def _collect(self, x: Tensor, shape: tuple[int, ...], collective: Any) -> Tensor:
        received = x.new_empty(shape)
        if x.numel():
            # As bytes: not every backend knows every dtype.
            sent = x.detach().contiguous().view(-1).view(torch.uint8)
            collective(received.view(-1).view(torch.uint8), sent, group=self.group)
        return received


# Linear exchanges, and that by which the gradient of each is exchanged.
_ADJOINT = {
    "_gather": "_gather_gradient",
    "_gather_gradient": "_gather",
    "_give_back": "_give_back_gradient",
    "_give_back_gradient": "_give_back",
}


class _Exchange(torch.autograd.Function):
    """One of `Ranks`' exchanges, by name; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, name: str) -> Tensor:
        ctx.ranks, ctx.adjoint = ranks, _ADJOINT[name]
        result: Tensor = getattr(ranks, name)(x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(grad, ctx.ranks, ctx.adjoint), None, None
