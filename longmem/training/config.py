"""How a LongMem is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from longmem.config import PRECISIONS, Precision

Parallel = Literal["ddp", "fsdp"]
Reset = Literal["document", "never"]

PARALLEL: tuple[str, ...] = get_args(Parallel)
RESETS: tuple[str, ...] = get_args(Reset)
# What a run that was saved may change when it goes on. How the work is done and kept:
HARMLESS = frozenset({"save_every", "checkpoint_activations", "compile"})
# How the steps that are left to make are made:
CHANGEABLE = HARMLESS | {
    "steps", "learning_rate", "head_rate", "warmup", "clip", "weight_decay", "usage_weight", "usage_target",
    "precision",
}  # fmt: skip

_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}


def _one_of(choices: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in choices), f"be one of {', '.join(choices)}"


# Bounded: what is larger overflows somewhere else, under another name.
_COUNT = (lambda value: 1 <= value < 2**31), "be at least 1 and below 2**31"
_POSITIVE = (lambda value: 0 < value < 1e30), "be above 0 and below 1e30"
_NOT_NEGATIVE = (lambda value: 0 <= value < 1e30), "not be negative, and below 1e30"
# field -> whether a value is in its range, and the range in words
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("steps", "rows", "accumulate", "save_every"), _COUNT),
    **dict.fromkeys(("learning_rate", "head_rate", "clip"), _POSITIVE),
    **dict.fromkeys(("warmup", "weight_decay", "usage_weight"), _NOT_NEGATIVE),
    "usage_target": ((lambda value: 0 < value < 1), "lie in (0, 1)"),
    "seed": ((lambda value: 0 <= value < 2**32), "lie in [0, 2**32)"),
    "precision": _one_of(PRECISIONS),
    "parallel": _one_of(PARALLEL),
    "reset": _one_of(RESETS),
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train; what is trained is `LongMemConfig`.

    Attributes:
        steps: optimiser steps. rows: B, documents side by side, per process.
        accumulate: segments of every row that go into one optimiser step, one after another.
        learning_rate: peak, after `warmup` steps, then a cosine to a tenth of it.
        head_rate: temperatures and gates, one number per head, learn so many times as fast: they have far to go.
        clip: largest gradient norm. weight_decay: decoupled (AdamW).
        usage_weight, usage_target: a penalty that keeps memory attended: `usage_weight` times how far, in nats, each
            head's mean memory share is below `usage_target`. 0: none.
        reset: "document": a row's memory is emptied where its next document begins (a shared memory where all rows
            begin one at once). "never": it goes on.
        save_every: steps between checkpoints (and one at the end).
        precision: of matrix products: "auto", "float32" or "bfloat16" (`longmem.precision`).
        checkpoint_activations: compute those of layers that read no memory again in the backward pass.
        compile: run layers that read no memory through `torch.compile`.
        parallel: how several processes share the work: "ddp" (each has all weights) or "fsdp" (each has a part).
        shard_memory: one memory over all processes (`ShardedMemoryBank`) instead of one in each.
        seed: order of the documents and of everything random, below 2**32.

    A run that was saved goes on with other values of `CHANGEABLE` fields. The schedule of learning rates belongs to
    `steps`: with more of them the rate rises again to where the longer schedule has it at that step.

    Raises:
        TypeError, ValueError: a field of another type, or out of its range; names it.
    """

    steps: int = 60
    rows: int = 4
    accumulate: int = 1
    learning_rate: float = 2e-3
    head_rate: float = 10.0
    warmup: int = 5
    clip: float = 1.0
    weight_decay: float = 0.0
    usage_weight: float = 0.0
    usage_target: float = 0.1
    reset: Reset = "document"
    save_every: int = 20
    precision: Precision = "auto"
    checkpoint_activations: bool = False
    compile: bool = False
    parallel: Parallel = "ddp"
    shard_memory: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, value = type(field.default), getattr(self, field.name)
            # An int is as good as a float, and a bool is no number.
            if isinstance(value, bool) != (kind is bool) or not isinstance(
                value, (kind, int) if kind is float else kind
            ):
                raise TypeError(f"TrainConfig: {field.name} must be {_KINDS[kind]}, got {value!r}")
        for name, (fits, wanted) in _RANGES.items():
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"TrainConfig: {name} must {wanted}, got {value!r}")

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))
