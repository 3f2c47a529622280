"""Types that a measurement is made of: what is timed, who provides it, and why it may not be."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .shapes import Shape

KERNEL_OPS = ("chunk_topk", "memory_attention", "memory_attention_backward", "ring_write", "memory_layer")
MODEL_OPS = ("generate", "train_step")
OPS = (*KERNEL_OPS, *MODEL_OPS)
"""Questions that can be measured. "memory_attention_backward" is forward and backward together, "memory_layer" a
search, a read and a write, "generate" greedy generation and "train_step" a step of training with a LongMem model."""

Span = Callable[[str], AbstractContextManager[Any]]


class Unavailable(RuntimeError):
    """A provider cannot run this case; the message says why."""


class WrongResult(AssertionError):
    """A provider's result is not the operation's result; it must not be timed. `detail`: what is wrong, in short."""

    def __init__(self, detail: str, message: str | None = None) -> None:
        super().__init__(message or detail)
        self.detail = detail


def quiet(name: str) -> AbstractContextManager[None]:
    """A span that measures nothing."""
    return nullcontext()


class Layer(Protocol):
    """A memory layer with a memory of its own."""

    def step(self, span: Span = quiet) -> Tensor:
        """One step on the inputs' segment: [B, H, T, D], the fused attention. Parts run inside `span(name)`."""

    def collect(self, out: Tensor) -> tuple[Tensor, ...]:
        """The output, and the memory's contents as `inputs.contents` gives those of a ring."""


@dataclass(frozen=True)
class Prepared:
    """A provider with its inputs laid out as it wants them.

    Attributes:
        run: the timed call. On CUDA it may return before the device is done; the timer synchronises.
        collect: turns what `run` returned into the tensors that are verified; not timed.
        repeat: operations that one `run` does; times are divided by it.
        note: what a reader of the number must know.
        graphable: every run launches the same kernels on the same memory (if the provider can be captured at all).
        layer: of "memory_layer", what the profiler looks into.
    """

    run: Callable[[], Any]
    collect: Callable[[Any], tuple[Tensor, ...]] = lambda result: tuple(result)
    repeat: int = 1
    note: str | None = None
    graphable: bool = True
    layer: Layer | None = None


@dataclass(frozen=True)
class Provider:
    """One row of a table.

    Attributes:
        name: what the row is called.
        prepare: from the op's inputs to a callable; index building and copies belong here, outside the timer.
        unavailable: from shape and device to the reason why it cannot run there, or None.
        computes: "op", or what is computed instead, a lower bound of it or a near relation: "local" (attention without
            memory), "copy", "distance" (nearest by squared distance), "backbone" (no memory).
        ours: an implementation of longmem_kernels.
        own_memory: allocates device memory that PyTorch does not see, so its peak on CUDA is not measured.
        unswept: why sweeps leave it out unless it is asked for by name; None where they do not.
        graphable: its launches can be captured in a CUDA graph.
    """

    name: str
    prepare: Callable[[Any], Prepared]
    unavailable: Callable[[Shape, torch.device], str | None] = lambda shape, device: None
    computes: str = "op"
    ours: bool = False
    own_memory: bool = False
    unswept: str | None = None
    graphable: bool = False


def matches(provider: Provider, word: str) -> bool:
    """True when the provider's name holds `word`, or matches it as a pattern with `*`; case does not matter."""
    pattern = word.lower() if "*" in word else f"*{word.lower()}*"
    return fnmatch.fnmatchcase(provider.name.lower(), pattern)
