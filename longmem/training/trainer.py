"""The training loop: consecutive segments of documents, one memory per row."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longmem.data.stream import IGNORE, Batch, SegmentStream
from longmem.files import naming, short
from longmem.memory import MemoryBank
from longmem.model import LongMem
from longmem.precision import autocast, memory_dtype
from longmem.sidenet import MemoryRead
from longmem.states import StateSource

from .checkpoint import Checkpoints, Content
from .config import CHANGEABLE, HARMLESS, TrainConfig
from .interruption import Interruption
from .metrics import MetricsLog
from .parallel import prepare
from .processes import Processes, whole
from .step import Measured, Step, loss_scale

logger = logging.getLogger(__name__)

# After so many steps in which no query found anything in memory, something is wrong.
EMPTY_STEPS = 10


class Trainer:
    """Trains `model` on `stream` and keeps everything in `folder`: checkpoint, metrics.jsonl, the model.

    A run that was interrupted goes on from its last checkpoint, exactly where it was: weights, optimiser, position in
    the documents, memory, random state. So does a finished one that is given more steps. What of its configuration may
    differ then is `CHANGEABLE`; `changed` lists what does.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP, to any process of the run, are obeyed after the step that is under way, when a
    checkpoint has been saved; a second Ctrl-C at once.

    In a process group of torch.distributed every process makes its own Trainer, with the same arguments but for
    `stream`, which walks its share of the documents (`Processes.share_of`), and `states`. Every token of all processes
    counts the same. The first process writes.

    Args:
        tensorboard: log for TensorBoard too, in `folder`/tensorboard.
        exact: refuse to go on with a run unless it ends in the same weights as without the interruption.

    Attributes:
        changed: of a run that goes on, what differs from before: "train.steps" -> (saved, now).

    Raises:
        ValueError: the folder holds the checkpoint of another run (configuration, texts, backbone or number of
            processes differ), or of one that has made more steps; TensorBoard is asked for and not installed.
        FloatingPointError: from `run`, when the loss or its gradient is not finite; the last checkpoint is intact.
        OSError: from `run`, when a checkpoint cannot be written; the one before is intact.
    """

    def __init__(
        self,
        model: LongMem,
        stream: SegmentStream,
        states: StateSource,
        config: TrainConfig,
        folder: str | Path,
        *,
        tensorboard: bool = False,
        exact: bool = False,
    ) -> None:
        self.model, self.stream, self.config, self.folder = model, stream, config, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes = Processes()
        identity = {
            "train": asdict(config),
            "model": model.config.to_dict(),
            "fingerprint": model.fingerprint,
            "processes": self.processes.count,
        }
        self.memory: MemoryBank = model.new_memory(
            stream.rows,
            dtype=memory_dtype(config.precision, model.backbone.device, model.backbone.dtype),
            sharded=config.shard_memory,
        )
        self._run_step = prepare(Step(model, states, config), config)
        per_head = {id(number) for read in self._reads() for number in read.per_head()}
        groups: list[dict[str, Any]] = [{"params": [], "factor": 1.0}, {"params": [], "factor": config.head_rate}]
        for parameter in model.trainable().values():
            groups[id(parameter) in per_head]["params"].append(parameter)
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        # AdamW's moments, which it would make at its first step: a checkpoint is loaded into them.
        for parameter in model.trainable().values():
            moments = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0, dtype=torch.float32), **moments}
        if self.processes.count > 1:
            torch.manual_seed(config.seed * self.processes.count + self.processes.rank)
        self.step = 0
        self._found_memory = False
        self.checkpoints = Checkpoints(
            self.folder, self.processes, identity, lambda step: self._may_change(step, exact)
        )
        self._load()
        self.changed = self.checkpoints.changed
        self._log = MetricsLog(self.folder, self.step, tensorboard) if self.processes.first else None

    def _may_change(self, step: int, exact: bool) -> set[str]:
        """Fields that may differ in a run that was saved after so many steps. A finished one keeps what it was."""
        fields = HARMLESS
        if not exact:
            fields = CHANGEABLE if step < self.config.steps else HARMLESS | {"steps"}
        return {f"train.{name}" for name in fields}

    def run(self, report: Callable[[dict[str, float]], None] | None = None) -> None:
        """Train to the last step, then save the model. `report` is told each step's metrics (see `_metrics`)."""
        batches = self._batches()
        try:
            with Interruption() as interruption:
                self._run(batches, report, interruption)
        finally:
            if self._log is not None:
                self._log.close()
        weights = {name: whole(tensor) for name, tensor in self.model.sidenet.state_dict().items()}
        if self.processes.first:
            self.model.save_pretrained(self.folder, weights)
        self.processes.barrier()

    def _run(
        self,
        batches: Iterator[Batch],
        report: Callable[[dict[str, float]], None] | None,
        interruption: Interruption,
    ) -> None:
        while self.step < self.config.steps:
            began = time.perf_counter()
            segments = [next(batches) for _ in range(self.config.accumulate)]
            metrics = self._train(segments)
            metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - began)
            self._warn_if_empty(metrics)
            if self._log is not None:
                self._log.write(metrics)
            if report is not None:
                report(metrics)
            signal = int(self.processes.largest(interruption.number))
            if signal or self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self._save()
            if signal:
                self._end(interruption, signal)

    def _save(self) -> None:
        try:
            self.checkpoints.save(self.step, self._content())
        except OSError as error:
            raise OSError(
                f"Trainer: the checkpoint of step {self.step} could not be written, the one before is as it was:"
                f" {error}"
            ) from error

    def _end(self, interruption: Interruption, signal: int) -> None:
        """Obey a signal, and say what is kept to whoever sees the exception, or a process that ends without one."""
        words = (
            f"stopped after step {self.step} of {self.config.steps}; {self.folder} has its checkpoint, and the same run"
            " goes on from there"
        )
        if interruption.is_fatal(signal):
            logger.warning(words)
        try:
            interruption.obey(signal)
        except KeyboardInterrupt as error:
            error.args = error.args or (words,)
            raise

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield from self.stream

    def _train(self, segments: list[Batch]) -> dict[str, float]:
        """One optimiser step over consecutive segments of every row."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step) * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        targets = [int((batch.targets != IGNORE).sum()) for batch in segments]
        (all_targets,) = self.processes.sum([sum(targets)])
        measured, scale = [], loss_scale(self.model)
        device = self.model.backbone.device
        for i, batch in enumerate(segments):
            self._reset_memory(batch)
            # Every token counts the same, wherever it is: averaging over processes divides by their number.
            weight = targets[i] / max(all_targets, 1) * self.processes.count
            last = i == len(segments) - 1
            with autocast(self.config.precision, device, self.model.backbone.dtype):
                objective, numbers = self._run_step(batch.to(device), self.memory, weight, last=last)
            (objective * scale).backward()
            measured.append(numbers)
        loss = sum(numbers.loss.item() * n / max(all_targets, 1) for numbers, n in zip(measured, targets, strict=True))
        (loss,) = self.processes.sum([loss])
        self._check_finite("loss", loss)
        if scale != 1:
            for parameter in self.model.trainable().values():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        norm = whole(nn.utils.clip_grad_norm_(self.model.trainable().values(), self.config.clip)).item()
        self._check_finite("gradient norm", norm)
        self.optimizer.step()
        self.step += 1
        return {"step": self.step, "loss": loss, "gradient_norm": norm, **self._metrics(segments, measured, loss)}

    def _reset_memory(self, batch: Batch) -> None:
        new = batch.new_document
        if self.config.reset == "never":
            return
        if self.memory.scope == "row":
            self.memory.reset(new.to(self.model.backbone.device))
            return
        # All rows are one memory; of all processes, when it is one over them.
        begun = int(new.sum()) / len(new)
        if self.config.shard_memory:
            begun = self.processes.sum([begun])[0] / self.processes.count
        if begun == 1:
            self.memory.reset()

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            remedy = "lower learning_rate, or clip, and run again"
            if self.model.backbone.dtype == torch.float16:
                remedy += " (or train around the backbone in bfloat16 or float32: float16 ends at 65,504)"
            raise FloatingPointError(
                f"Trainer: the {what} of step {self.step + 1} is {value}; {remedy}: training goes on from the last"
                f" checkpoint in {self.folder}"
            )

    def _metrics(self, segments: list[Batch], measured: list[Measured], loss: float) -> dict[str, float]:
        """Over all processes: perplexity, tokens, memory fill and retrieval (`MemoryBank.stats`), the share of queries
        that found memory and its mean share of their attention, and the read's gates and temperatures, averaged over
        heads."""
        stats = self.memory.stats()
        counts = [float(sum(batch.mask.sum() for batch in segments))]
        counts += [float(sum(getattr(numbers, name) for numbers in measured)) for name in ("queries", "found", "share")]
        totals = self.processes.sum([*counts, *stats.values()])
        tokens, queries, found, share = totals[:4]
        metrics = {
            "perplexity": math.exp(min(loss, 30.0)),
            "learning_rate": self.config.rate(self.step - 1),
            "tokens": tokens,
            "memory_found": found / max(queries, 1),
            "memory_share": share / max(found, 1),
        }
        metrics |= {f"memory_{name}": v / self.processes.count for name, v in zip(stats, totals[4:], strict=True)}
        reads = self._reads()
        metrics["temperature"] = _mean([read.log_temperature.exp() for read in reads])
        gates = [read.gate.sigmoid() for read in reads if read.gate is not None]
        return metrics | ({"gate": _mean(gates)} if gates else {})

    def _reads(self) -> list[MemoryRead]:
        return [read for read in self.model.sidenet.reads.values() if isinstance(read, MemoryRead)]

    def _warn_if_empty(self, metrics: dict[str, float]) -> None:
        self._found_memory = self._found_memory or metrics["memory_found"] > 0
        if self.step == EMPTY_STEPS and not self._found_memory and self.processes.first:
            warnings.warn(
                f"Trainer: in {EMPTY_STEPS} steps no token has found anything in memory. It is empty whenever it is"
                " read: are the documents longer than one segment?",
                RuntimeWarning,
                stacklevel=3,
            )

    def _content(self) -> Content:
        common: dict[str, Tensor] = {}
        for name, parameter in self.model.trainable().items():
            common[f"model.{name}"] = parameter.detach()
            common |= {f"optimizer.{name}.{slot}": value for slot, value in self.optimizer.state[parameter].items()}
        own = {f"memory.{name}": tensor for name, tensor in self.memory.state_dict().items()}
        own["rng"] = torch.get_rng_state()
        if torch.cuda.is_available():
            own["cuda_rng"] = torch.cuda.get_rng_state()
        return Content(common, own, {"stream": self.stream.state_dict(), "found_memory": self._found_memory})

    def _load(self) -> None:
        content = self._content()
        about: dict[str, Any] | None = self.checkpoints.load(content)
        if about is None:
            return
        memory = {name.removeprefix("memory."): x for name, x in content.own.items() if name.startswith("memory.")}
        with naming(f"the checkpoint in {self.folder}"):
            self.memory.load_state_dict(memory)
            self.stream.load_state_dict(about["stream"])
            _set_random_state(content.own)
        self.step, self._found_memory = about["step"], about["found_memory"]
        if self.step > self.config.steps:
            raise ValueError(
                f"Trainer: the run in {self.folder} has made {self.step} steps already: wanted steps={self.step} or"
                f" more, got {self.config.steps}"
            )


def _set_random_state(own: dict[str, Tensor]) -> None:
    try:
        torch.set_rng_state(own["rng"])
        if "cuda_rng" in own:
            torch.cuda.set_rng_state(own["cuda_rng"])
    except RuntimeError as error:
        raise ValueError(f"its random state is none ({short(error)})") from None


def _mean(parts: list[Tensor]) -> float:
    return torch.cat([whole(part.detach()) for part in parts]).mean().item()
