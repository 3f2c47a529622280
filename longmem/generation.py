"""Generation: decoding token by token with caches and memory, and choosing the tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longmem_kernels._checks import check_integer, check_number

from .backbones.base import BackboneCache
from .backbones.layers import LayerCache
from .memory import MemoryBank
from .padding import fill_padding

if TYPE_CHECKING:
    from .model import LongMem


# What is beyond overflows logits.
MIN_PENALTY, MAX_PENALTY = 1e-3, 1e3


class SegmentDecoder:
    """Feeds tokens a few at a time. A row's segment that is full goes to memory, and its local context starts anew.

    What memory stores is computed when a segment is full, for all of its tokens at once: token by token the encoder
    need not go beyond where the SideNet starts, above which its layers would run beside the SideNet's.

    Rows may stand at different places of their segments: their tokens share columns of the caches, and each row's
    segment begins at a column of its own (`BackboneCache`).
    """

    def __init__(self, model: LongMem, memory: MemoryBank | None, rows: int) -> None:
        self.model, self.memory, self.rows = model, memory, rows
        self.cache = BackboneCache(starts=[0] * rows)
        self.upper = [LayerCache() for _ in model.sidenet.stack]
        # the tokens in the cache's columns
        self.text = torch.empty(rows, 0, dtype=torch.int64, device=model.backbone.device)

    def prompt(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Begin with tokens [B, n], n >= 1, with padding on the left where `mask` [B, n] is zero.

        Returns the logits [B, vocabulary] after the last token.
        """
        n, segment = tokens.shape[1], self.model.config.segment
        lengths = [n] * self.rows
        if mask is not None:
            lengths = _unpadded_lengths(tokens, mask)
            tokens = fill_padding(tokens, mask.bool(), [n - length for length in lengths])
        # Later segments see earlier ones through memory alone, and what they write there does not depend on what they
        # read: all but a row's last one need no more than the encoder, up to the memory layer.
        whole = [(length - 1) // segment for length in lengths]
        if self.memory is not None and any(whole):
            before = torch.tensor([n - length for length in lengths], device=tokens.device)[:, None]
            stop = before + segment * torch.tensor(whole, device=tokens.device)[:, None]
            columns = torch.arange(n, device=tokens.device)
            self.model.remember(tokens, self.memory, (before <= columns) & (columns < stop))
        rest = [length - segment * count for length, count in zip(lengths, whole, strict=True)]
        self.cache.starts = [max(rest) - length for length in rest]
        return self.feed(tokens[:, n - max(rest) :])

    def feed(self, tokens: Tensor, finished: Collection[int] = ()) -> Tensor:
        """Go on with tokens [B, n], n >= 1; what `finished` rows are given is forgotten, and never written.

        Returns the logits [B, vocabulary] after the last token.
        """
        model, cache, segment = self.model, self.cache, self.model.config.segment
        assert cache.starts is not None
        while tokens.shape[1]:
            for row in finished:
                cache.starts[row] = cache.length
            room = min(segment - (cache.length - start) for start in cache.starts)
            piece, tokens = tokens[:, :room], tokens[:, room:]
            states = model.backbone.encode(piece, (), model.sidenet.depths, cache)
            hidden = model.sidenet(states, self.memory, caches=self.upper)
            self.text = torch.cat([self.text, piece], 1)
            full = [row for row, start in enumerate(cache.starts) if cache.length - start == segment]
            if full:
                ended = [row for row in full if row not in finished]
                if self.memory is not None and ended:
                    model.remember(self.text[ended, -segment:], self.memory, rows=ended)
                for row in full:
                    cache.starts[row] = cache.length
                self._forget(min(cache.starts))
        return model.logits(hidden[:, -1])

    def _forget(self, columns: int) -> None:
        self.cache.forget(columns)
        self.text = self.text[:, columns:]
        for cache in self.upper:
            cache.forget(columns)


def _unpadded_lengths(tokens: Tensor, mask: Tensor) -> list[int]:
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"generate: mask must have the shape of tokens, {tuple(tokens.shape)}, got {got}")
    mask = mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ValueError("generate: padding must be on the left, and every row must hold a token; mask says otherwise")
    return mask.sum(1).tolist()


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen; see `LongMem.generate`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            check_number("generate", name, getattr(self, name))
        check_integer("generate", "top_k", self.top_k, 0)
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"generate: wanted temperature >= 0 and 0 < top_p <= 1, got {self.temperature} and {self.top_p}"
            )
        if not MIN_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            wanted = f"lie in [{MIN_PENALTY}, {MAX_PENALTY}]"
            raise ValueError(f"generate: repetition_penalty must {wanted}, got {self.repetition_penalty}")

    def __call__(self, logits: Tensor, history: History) -> Tensor:
        """Next tokens [B] from logits [B, vocabulary]."""
        # transformers takes seconds to import, and only models from there, and sampling, need it.
        if self.repetition_penalty != 1:
            from transformers import RepetitionPenaltyLogitsProcessor

            logits = RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty))(history.unpadded, logits)
        if self.logits_processor is not None:
            logits = self.logits_processor(history.ids, logits)
        # Minus infinity is what a processor forbids tokens by.
        if not bool(logits.amax(-1).isfinite().all()):
            of = "the model" if self.logits_processor is None else "the model or of logits_processor"
            raise FloatingPointError(f"generate: the logits of {of} are not finite: no token can be chosen by them")
        if self.temperature == 0:
            return logits.argmax(-1)
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        # Below 1e-30 logits would overflow, and the likeliest token has all the probability already.
        logits = logits.float() / max(self.temperature, 1e-30)
        if self.top_k:
            logits = TopKLogitsWarper(self.top_k)(history.ids, logits)
        probability = TopPLogitsWarper(self.top_p)(history.ids, logits).softmax(-1)
        return torch.multinomial(probability, 1, generator=self.generator).squeeze(-1)


@dataclass(frozen=True)
class Stop:
    """Tokens and criteria that end a row, and the token it yields from then on; see `LongMem.generate`."""

    eos: tuple[int, ...] = ()
    pad: int = 0
    criteria: Callable[[Tensor, Tensor], Tensor | bool] | None = None

    @classmethod
    def at(
        cls,
        eos: int | Collection[int] | None,
        pad: int | None,
        criteria: Callable[[Tensor, Tensor], Tensor | bool] | None,
    ) -> Stop:
        several = () if eos is None else eos if isinstance(eos, Collection) else (eos,)
        ends = tuple(sorted(check_integer("generate", "eos", token) for token in several))
        return cls(ends, pad if pad is not None else ends[0] if ends else 0, criteria)

    def __call__(self, chosen: Tensor, logits: Tensor, history: History) -> list[int]:
        """The rows that `chosen` [B] ends."""
        if not self.eos and self.criteria is None:
            return []
        done = torch.isin(chosen, chosen.new_tensor(self.eos))
        if self.criteria is not None:
            done = done | torch.as_tensor(self.criteria(history.ids, logits), device=done.device)
        return done.nonzero().flatten().tolist()


class History:
    """The rows' tokens so far."""

    def __init__(self, tokens: Tensor, mask: Tensor | None) -> None:
        self.ids = tokens  # [B, n + generated], padding included
        # The same with a token that the row has had in place of its padding.
        self.unpadded = tokens if mask is None else torch.where(mask.bool(), tokens, tokens[:, -1:])

    def append(self, chosen: Tensor) -> None:
        self.ids, self.unpadded = (torch.cat([ids, chosen[:, None]], 1) for ids in (self.ids, self.unpadded))


@torch.no_grad()
def decode(
    model: LongMem,
    tokens: Tensor,
    memory: MemoryBank | None,
    mask: Tensor | None,
    max_new_tokens: int,
    sampler: Sampler,
    stop: Stop,
) -> Iterator[Tensor]:
    """The loop of `LongMem.generate`."""
    decoder = SegmentDecoder(model, memory, len(tokens))
    finished: set[int] = set()
    logits = decoder.prompt(tokens, mask)
    history = History(tokens, mask)
    for remaining in range(max_new_tokens, 0, -1):
        chosen = sampler(logits, history)
        if finished:
            chosen[list(finished)] = stop.pad
        history.append(chosen)
        finished.update(stop(chosen, logits, history))
        yield chosen
        if remaining == 1 or len(finished) == len(tokens):
            return
        logits = decoder.feed(chosen[:, None], finished)
