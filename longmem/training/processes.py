"""The processes of a training run: one, or those that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Processes:
    """The processes that take part, and what they exchange outside of the model.

    Attributes:
        distributed: whether there is a process group (a group of one counts).
        rank, count: this process and how many there are.
    """

    def __init__(self) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if self.distributed else (0, 1)

    @property
    def first(self) -> bool:
        """True for the process that prints and writes."""
        return self.rank == 0

    def share_of(self, documents: Sequence[T]) -> list[T]:
        """This process's documents: every `count`-th.

        Raises:
            ValueError: there are fewer documents than processes.
        """
        if len(documents) < self.count:
            raise ValueError(f"training: wanted a document for each of {self.count} processes, got {len(documents)}")
        return list(documents[self.rank :: self.count])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device())
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: float) -> float:
        """Largest of a value over all processes."""
        if self.count == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self._device())
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return box.item()

    def together(self, action: Callable[[], None], kind: type[Exception], what: str) -> None:
        """Do something that may raise `kind`, and raise it in all processes where one of them does: the others would
        wait for it for ever."""
        problem = None
        try:
            action()
        except kind as error:
            problem = error
        (failed,) = self.sum([problem is not None])
        if problem is not None:
            raise problem
        if failed:
            raise kind(f"{what}: {failed:.0f} other process{'es' * (failed > 1)} failed")

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def broadcast(self, value: T) -> T:
        """The first process's value."""
        if self.count == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def _device(self) -> str:
        """Numbers travel through a backend for the CPU where there is one: that takes no GPU sync."""
        return "cuda" if dist.get_backend() == "nccl" else "cpu"


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Joins the group that torchrun's environment describes, where there is one and nobody has joined yet."""
    joins = dist.is_available() and "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if joins:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes()
    finally:
        if joins:
            dist.destroy_process_group()


@contextlib.contextmanager
def quiet(silent: bool) -> Iterator[None]:
    """Hides what is printed inside when `silent`; exceptions pass."""
    with contextlib.ExitStack() as stack:
        if silent:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have cut into pieces, put together: all processes take part."""
    full = getattr(tensor, "full_tensor", None)
    result: Tensor = tensor if full is None else full()
    return result
