"""Held-out perplexity with the right memory, an empty one, another document's, and without LongMem at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longmem.backbones import States
from longmem.data.stream import IGNORE, Batch
from longmem.memory import MemoryBank
from longmem.model import LongMem
from longmem.precision import autocast, memory_dtype
from longmem.states import StateSource

CONDITIONS = ("backbone", "empty memory", "memory", "other memory")
LONG_CONTEXT = "backbone, long context"


@dataclass(frozen=True)
class Estimate:
    """A mean over segments of `segment` scores, and its standard error (segments taken as independent)."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return cls(float(values.mean()), error)

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    @property
    def perplexity_error(self) -> float:
        return self.perplexity * self.error


@dataclass(frozen=True)
class PerplexityReport:
    """nll: condition -> [segments] float64, mean negative log likelihood per token (nats) of each scored segment."""

    nll: dict[str, Tensor]
    tokens: int

    def estimate(self, condition: str) -> Estimate:
        return Estimate.of(self.nll[condition])

    def difference(self, condition: str, baseline: str) -> Estimate:
        """Paired by segment: what `condition` adds to the score of `baseline`, in nats per token."""
        return Estimate.of(self.nll[condition] - self.nll[baseline])

    def rows(self) -> list[tuple[str, Estimate, Estimate]]:
        """(condition, score, difference from the backbone)."""
        return [(name, self.estimate(name), self.difference(name, "backbone")) for name in self.nll]

    def table(self) -> str:
        lines = [f"{'held-out text, ' + str(self.tokens) + ' tokens':<34} {'perplexity':>16} {'nats vs backbone':>20}"]
        for name, score, gain in self.rows():
            label = {"backbone": "backbone alone", LONG_CONTEXT: LONG_CONTEXT}.get(name, f"LongMem, {name}")
            perplexity = f"{score.perplexity:.2f} ± {score.perplexity_error:.2f}"
            change = "" if name == "backbone" else f"{gain.mean:+.4f} ± {gain.error:.4f}"
            lines.append(f"{label:<34} {perplexity:>16} {change:>20}")
        for title, baseline in (("memory - empty memory", "empty memory"), ("memory - other memory", "other memory")):
            gain = self.difference("memory", baseline)
            lines.append(f"{title:<34} {'':>16} {f'{gain.mean:+.4f} ± {gain.error:.4f}':>20}")
        return "\n".join(lines)


@torch.no_grad()
def perplexity(
    model: LongMem,
    states: StateSource,
    documents: Sequence[Tensor],
    *,
    score_from: int = 0,
    full_context: int | None = None,
    precision: str = "auto",
    progress: Callable[[int], object] | None = None,
) -> PerplexityReport:
    """Score documents segment by segment with the same weights and four different memories.

    "memory" holds the document's own past, "other memory" as much of the next document's, "empty memory" nothing;
    "backbone" is the frozen model with the same local context.

    Args:
        documents: at least two, [n] int32 or int64 token ids, each longer than `score_from` + one segment. All are cut
            to the shortest, so that memories hold equally much.
        score_from: tokens of each document that fill the memory before scoring begins, rounded down to segments.
        full_context: also score the frozen model with up to so many tokens of context, the goal of any memory:
            "backbone, long context". It reads windows of this length and scores the last quarter of each, so a token
            has three quarters of it or more before it, as far as the document goes back.
        precision: of matrix products, see `longmem.precision`.
        progress: told the number of tokens after each segment.

    Raises:
        ValueError: fewer than two documents, one that is too short, one that is the same as the next, or a
            `full_context` of less than four segments, or more than the backbone has positions for.
    """
    segment = model.config.segment
    first = score_from // segment
    segments = min((len(tokens) - 1) // segment for tokens in documents) if documents else 0
    if len(documents) < 2 or segments <= first:
        raise ValueError(
            f"perplexity: wanted two documents or more, each longer than {(first + 1) * segment} tokens, got"
            f" {len(documents)} of {[len(tokens) for tokens in documents]} tokens"
        )
    documents = [tokens[: segments * segment + 1].long() for tokens in documents]
    for index in range(len(documents)):
        if torch.equal(documents[index], documents[(index + 1) % len(documents)]):
            raise ValueError(
                f"perplexity: documents {index} and {(index + 1) % len(documents)} are the same text: wanted different"
                " ones, since the memory of the next one is the control"
            )
    longest = model.backbone.max_segment
    if full_context is not None and (full_context < 4 * segment or (longest is not None and full_context > longest)):
        limit = "" if longest is None else f" and at most {longest}, the backbone's positions"
        raise ValueError(f"perplexity: full_context must be at least four segments{limit}, got {full_context}")
    was_training = model.training
    model.eval()
    device, weights = model.backbone.device, model.backbone.dtype
    dtype = memory_dtype(precision, device, weights)
    scores: dict[str, list[Tensor]] = {name: [] for name in CONDITIONS}
    for index in range(len(documents)):
        other = (index + 1) % len(documents)
        own_memory, other_memory, empty = (model.new_memory(1, dtype=dtype) for _ in range(3))
        for position in range(segments):
            batch = _segment(documents, index, position * segment, segment)
            batch = batch.to(device)
            with autocast(precision, device, weights):
                found = states(batch)
                elsewhere = states(_segment(documents, other, position * segment, segment).to(device))
                if position >= first:
                    for name, memory in zip(CONDITIONS, (None, empty, own_memory, other_memory), strict=True):
                        scores[name].append(_score(model, found, memory, batch.targets, name == "backbone"))
            own_memory.write(found.key, found.value)
            other_memory.write(elsewhere.key, elsewhere.value)
            if progress is not None:
                progress(segment)
        if full_context is not None:
            with autocast(precision, device, weights):
                scored = range(first * segment, segments * segment)
                long_scores = _score_windows(model, documents[index], scored, full_context)
            scores.setdefault(LONG_CONTEXT, []).extend(long_scores)
    model.train(was_training)
    nll = {name: torch.stack(values).double().cpu() for name, values in scores.items()}
    return PerplexityReport(nll, tokens=len(nll["memory"]) * segment)


def _score(model: LongMem, states: States, memory: MemoryBank | None, targets: Tensor, backbone: bool) -> Tensor:
    if backbone:
        depth = max(states.hidden)
        logits = model.backbone.logits(model.backbone.resume(states.hidden[depth], depth))
    else:
        logits = model.read_states(states, memory, write=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)


def _score_windows(model: LongMem, tokens: Tensor, scored: range, context: int) -> Iterator[Tensor]:
    """The backbone's scores of the segments in `scored`, each within a window of up to `context` tokens."""
    segment, backbone = model.config.segment, model.backbone
    tokens = tokens.to(backbone.device)
    depth = len(backbone.layers)
    for start in range(scored.start, scored.stop, stride := context // 4 // segment * segment):
        stop = min(start + stride, scored.stop)
        first = max(0, stop - context)
        states = backbone.encode(tokens[None, first:stop], model.config.memory_layers, (depth,))
        for at in range(start, stop, segment):
            logits = backbone.logits(states.hidden[depth][:, at - first : at - first + segment])
            yield F.cross_entropy(logits.flatten(0, 1).float(), tokens[at + 1 : at + segment + 1])


def _segment(documents: Sequence[Tensor], index: int, start: int, length: int) -> Batch:
    tokens = documents[index]
    return Batch(
        tokens=tokens[None, start : start + length],
        targets=tokens[None, start + 1 : start + length + 1],
        new_document=torch.tensor([start == 0]),
        mask=torch.ones(1, length, dtype=torch.bool),
        document=torch.tensor([index]),
        start=torch.tensor([start]),
    )
