"""How a LongMem is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longmem.config import check_types
from longmem.precision import PRECISIONS

PARALLEL = ("ddp", "fsdp")
RESETS = ("document", "never")


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
        seed: order of the documents and of everything random.
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
    reset: str = "document"
    save_every: int = 20
    precision: str = "auto"
    checkpoint_activations: bool = False
    compile: bool = False
    parallel: str = "ddp"
    shard_memory: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "rows", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "head_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"TrainConfig: {name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "usage_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"TrainConfig: {name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.usage_target < 1:
            raise ValueError(f"TrainConfig: usage_target must lie in (0, 1), got {self.usage_target}")
        for name, allowed in (("precision", PRECISIONS), ("parallel", PARALLEL), ("reset", RESETS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"TrainConfig: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))
