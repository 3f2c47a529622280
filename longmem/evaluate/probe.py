"""Search for the layer that makes the most of a memory: a short training of the read in each candidate, measured.

A read trained anywhere lowers the loss, because it adapts the model to the texts. What tells layers apart is the gain
of a document's own memory over another document's, with the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmem.backbones import Backbone
from longmem.config import LongMemConfig
from longmem.data.stream import SegmentStream
from longmem.model import LongMem
from longmem.precision import HALF
from longmem.states import StateCache, fill_together
from longmem.training.trainer import TrainConfig, Trainer

from .perplexity import Estimate, PerplexityReport, perplexity


@dataclass(frozen=True)
class ProbeReport:
    """reports: candidate layer -> what was measured with memory in that layer, on the same segments."""

    reports: dict[int, PerplexityReport]

    def gain(self, layer: int) -> Estimate:
        """Own memory minus another document's, in nats per token: below zero where the memory is read."""
        return self.reports[layer].difference("memory", "other memory")

    @property
    def ranking(self) -> list[int]:
        """Layers, the best first."""
        return sorted(self.reports, key=lambda layer: self.gain(layer).mean)

    @property
    def winner(self) -> int:
        return self.ranking[0]

    @property
    def lead(self) -> Estimate:
        """Lead of the winner over the second, paired by segment; not a number where there is no second."""
        if len(self.reports) < 2:
            return Estimate(math.nan, math.nan)
        first, second = (
            self.reports[layer].nll["memory"] - self.reports[layer].nll["other memory"] for layer in self.ranking[:2]
        )
        return Estimate.of(first - second)

    def verdict(self) -> str:
        """The winner, and how sure that is, as a sentence."""
        gain, lead = self.gain(self.winner), self.lead
        if not gain.mean < -2 * gain.error:
            return (
                f"no layer reads its memory: the best gain, of layer {self.winner}, is within two standard errors of"
                " zero; more steps or texts may show one"
            )
        sure = "" if math.isnan(lead.mean) else f", {_signed(lead)} nats ahead of layer {self.ranking[1]}"
        return f"best: --memory-layer {self.winner}{sure}"

    def table(self) -> str:
        header = ("layer", "own - other memory", "own - empty", "own - backbone", "perplexity")
        lines = ["".join(f"{title:>20}" for title in header)]
        for layer in self.ranking:
            report = self.reports[layer]
            gains = [report.difference("memory", other) for other in ("other memory", "empty memory", "backbone")]
            cells = [str(layer), *map(_signed, gains), f"{report.estimate('memory').perplexity:.2f}"]
            lines.append("".join(f"{cell:>20}" for cell in cells))
        tokens = self.reports[self.winner].tokens
        backbone = self.reports[self.winner].estimate("backbone").perplexity
        lines.append(f"nats per token over {tokens:,} held-out tokens; backbone alone: perplexity {backbone:.2f}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the ranking, and of each layer the differences and scores."""
        layers = {}
        for layer in self.ranking:
            report = self.reports[layer]
            others = ("other memory", "empty memory", "backbone")
            layers[str(layer)] = {f"memory - {name}": asdict(report.difference("memory", name)) for name in others} | {
                "nats": {name: asdict(report.estimate(name)) for name in report.nll}
            }
        tokens = self.reports[self.winner].tokens
        return {"winner": self.winner, "lead": asdict(self.lead), "tokens": tokens, "layers": layers}


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.4f} ± {estimate.error:.4f}"


def default_candidates(depth: int, count: int = 10) -> list[int]:
    """Up to `count` layers, evenly from a third of the depth to the last but one."""
    low, high = depth // 3, max(depth - 2, depth // 3)
    return sorted({round(low + (high - low) * i / (count - 1)) for i in range(count)})


@dataclass(frozen=True)
class ProbePlan:
    """Settings that are the same for every candidate.

    Attributes:
        config: of the LongMem; its memory layers are the candidate, it has no SideNet and trains the read alone.
        train: of each short training.
        score_from: see `perplexity`.
        folder: states, encoded once for all candidates, and one run for each; what is there is not done again.
    """

    config: LongMemConfig
    train: TrainConfig
    score_from: int
    folder: Path


def probe_layers(
    backbone: Backbone,
    candidates: Sequence[int],
    training: Sequence[Tensor],
    held_out: Sequence[Tensor],
    plan: ProbePlan,
    *,
    encoded: Callable[[int], object] | None = None,
    progress: Callable[[int, str], object] | None = None,
) -> ProbeReport:
    """Train and measure a read in each candidate layer.

    Args:
        training, held_out: documents, token ids [n] int64; at least two held out.
        encoded: told the number of tokens after each step of the encoder.
        progress: told the layer, and what was just done to it: "step" or "segment".

    Raises:
        ValueError: no candidate, one that the backbone does not have, or documents that are too short.
    """
    if not candidates or len(set(candidates)) < len(candidates):
        raise ValueError(f"probe_layers: wanted different candidate layers, at least one, got {list(candidates)}")
    precision = plan.train.precision
    models = {
        layer: LongMem(backbone, replace(plan.config, memory_layers=(layer,), sidenet="none", trainable="read"))
        for layer in sorted(candidates)
    }

    def caches(documents: Sequence[Tensor]) -> dict[int, StateCache]:
        folder = plan.folder / "states"
        # A backbone in half precision has states of half the size already.
        kept = None if backbone.dtype in HALF else torch.bfloat16
        options: dict[str, Any] = {"precision": precision, "dtype": kept}
        found = {layer: StateCache(model, documents, folder, **options) for layer, model in models.items()}
        fill_together(list(found.values()), encoded)
        return found

    def told(layer: int, what: str) -> None:
        if progress is not None:
            progress(layer, what)

    train_states, test_states = caches(training), caches(held_out)
    reports = {}
    for layer, model in models.items():
        stream = SegmentStream(
            training, rows=plan.train.rows, segment=plan.config.segment, seed=plan.train.seed, repeat=True
        )
        # Exact: layers are compared, so that all must have been trained alike.
        trainer = Trainer(
            model, stream, train_states.pop(layer), plan.train, plan.folder / f"layer-{layer}", exact=True
        )
        trainer.run(lambda _, layer=layer: told(layer, "step"))  # type: ignore[misc]
        reports[layer] = perplexity(
            model,
            test_states.pop(layer),
            held_out,
            score_from=plan.score_from,
            precision=precision,
            progress=lambda _, layer=layer: told(layer, "segment"),  # type: ignore[misc]
        )
    return ProbeReport(reports)
