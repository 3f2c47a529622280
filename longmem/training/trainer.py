"""The training loop: consecutive segments of documents, one memory per row."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmem.data.stream import Batch, SegmentStream
from longmem.memory import MemoryBank
from longmem.model import LongMem
from longmem.precision import PRECISIONS, autocast, memory_dtype
from longmem.sidenet import MemoryRead
from longmem.states import StateSource

from .checkpoint import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class TrainConfig:
    """How to train; what is trained is `LongMemConfig`.

    Attributes:
        steps: optimiser steps. rows: B, documents side by side.
        learning_rate: peak, after `warmup` steps, then a cosine to a tenth of it.
        clip: largest gradient norm. weight_decay: decoupled (AdamW).
        save_every: steps between checkpoints (and one at the end).
        precision: of matrix products: "auto", "float32" or "bfloat16" (`longmem.precision`).
        seed: order of the documents and of everything random.
    """

    steps: int = 60
    rows: int = 4
    learning_rate: float = 2e-3
    warmup: int = 5
    clip: float = 1.0
    weight_decay: float = 0.0
    save_every: int = 20
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"TrainConfig: {name} must be above 0, got {getattr(self, name)}")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("TrainConfig: warmup and weight_decay must not be negative")
        if self.precision not in PRECISIONS:
            raise ValueError(f"TrainConfig: precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


class Trainer:
    """Trains `model` on `stream` and keeps everything in `folder`: checkpoint.safetensors, metrics.jsonl, the model.

    A run that was interrupted goes on from its last checkpoint, exactly where it was: weights, optimiser, position in
    the documents, memory, random state.

    Raises:
        ValueError: the folder holds the checkpoint of another run (configuration, texts or backbone differ).
        FloatingPointError: from `run`, when the loss is not finite; the last checkpoint is intact.
    """

    def __init__(
        self, model: LongMem, stream: SegmentStream, states: StateSource, config: TrainConfig, folder: str | Path
    ) -> None:
        self.model, self.stream, self.states, self.config, self.folder = model, stream, states, config, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.memory: MemoryBank = model.new_memory(
            stream.rows, dtype=memory_dtype(config.precision, model.backbone.device)
        )
        self.optimizer = torch.optim.AdamW(
            model.trainable().values(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        self.step = 0
        if self.checkpoint.exists():
            self._load()
        self._truncate_metrics()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def run(self, report: Callable[[dict[str, float]], None] | None = None) -> None:
        """Train to the last step, then save the model. `report` is told each step's metrics (see `_metrics`)."""
        batches = iter(self.stream)
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
            while self.step < self.config.steps:
                began = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    batches = iter(self.stream)
                    continue
                loss, norm = self._train(batch.to(self.model.backbone.device))
                self.step += 1
                metrics = self._metrics(batch, loss, norm, time.perf_counter() - began)
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                if report is not None:
                    report(metrics)
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    self._save()
        self.model.save_pretrained(self.folder)

    def _train(self, batch: Batch) -> tuple[float, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.memory.reset(batch.new_document)
        with autocast(self.config.precision, self.model.backbone.device):
            output = self.model.read_states(self.states(batch), self.memory, targets=batch.targets, mask=batch.mask)
        assert output.loss is not None
        loss = output.loss.item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"Trainer: the loss of step {self.step + 1} is {loss}; lower learning_rate, or clip, and run again:"
                f" training goes on from {self.checkpoint}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.trainable().values(), self.config.clip)
        self.optimizer.step()
        return loss, float(norm)

    def _metrics(self, batch: Batch, loss: float, norm: float, seconds: float) -> dict[str, float]:
        """loss in nats per token, speed, memory fill and retrieval (`MemoryBank.stats`), and the read's gates and
        temperatures, averaged over heads."""
        reads = [read for read in self.model.sidenet.reads.values() if isinstance(read, MemoryRead)]
        metrics = {
            "step": self.step,
            "loss": loss,
            "perplexity": math.exp(min(loss, 30.0)),
            "learning_rate": self.config.rate(self.step - 1),
            "gradient_norm": norm,
            "tokens": int(batch.mask.sum()),
            "tokens_per_second": int(batch.mask.sum()) / seconds,
            "temperature": torch.cat([read.log_temperature for read in reads]).exp().mean().item(),
        }
        gates: list[Tensor] = [read.gate for read in reads if read.gate is not None]
        if gates:
            metrics["gate"] = torch.cat(gates).sigmoid().mean().item()
        return metrics | {f"memory_{name}": value for name, value in self.memory.stats().items()}

    def _identity(self) -> dict[str, Any]:
        return {
            "train": asdict(self.config),
            "model": self.model.config.to_dict(),
            "fingerprint": self.model.fingerprint,
        }

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in self.model.trainable().items()}
        names = list(self.model.trainable())
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{names[index]}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        tensors |= {f"memory.{name}": tensor for name, tensor in self.memory.state_dict().items()}
        tensors["rng"] = torch.get_rng_state()
        about = {"step": self.step, "stream": self.stream.state_dict(), "identity": self._identity()}
        save_checkpoint(self.checkpoint, tensors, about)

    def _load(self) -> None:
        tensors, about = load_checkpoint(self.checkpoint, self._identity())
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "memory": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parts.setdefault(kind, {})[rest] = tensor
        with torch.no_grad():
            for name, parameter in self.model.trainable().items():
                parameter.copy_(parts["model"][name])
        self._load_optimizer(parts.get("optimizer", {}))
        self.memory.load_state_dict(
            {name: tensor.to(self.memory.ring.store.device) for name, tensor in parts["memory"].items()}
        )
        self.stream.load_state_dict(about["stream"])
        torch.set_rng_state(tensors["rng"])
        self.step = about["step"]

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state = self.optimizer.state_dict()
        for index, name in enumerate(self.model.trainable()):
            slots = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == name}
            if slots:
                state["state"][index] = slots
        self.optimizer.load_state_dict(state)

    def _truncate_metrics(self) -> None:
        """Steps after the checkpoint (all, where there is none) will be run again: their lines go."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
