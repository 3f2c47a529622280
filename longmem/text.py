"""Text in and out as the model's own tokenizer and configuration have it: the special tokens that texts begin with, the
tokens that end them, and the text of new tokens as they come."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .memory import MemoryBank
    from .model import LongMem

# A byte that a SentencePiece vocabulary has no other token for.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# transformers' clean-up of spaces joins at most this many tokens: "n", "'" and "t" of "do n't" to the word before.
_CLEAN_UP_TOKENS = 4
# A decoder's output depends on this many tokens before, at most: the leading space of a first token, a character in
# bytes.
_CONTEXT = 32


def opening_tokens(tokenizer: Any) -> list[int]:
    """Returns the special tokens that a Hugging Face tokenizer puts before a text (BOS, for Gemma, Llama, Mistral).

    What it puts behind a text (the end token of a T5) is not among them: a text that goes on has no end.

    Raises:
        ValueError: it adds tokens, but has no other one to tell before from behind by.
    """
    added = set(_ids(tokenizer, ""))
    if not added:
        return []
    vocabulary = (tokenizer.decode([i]) for i in range(len(tokenizer)))
    for probe in chain(("a", "0"), islice(vocabulary, 1000)):
        plain, full = _ids(tokenizer, probe, add_special_tokens=False), _ids(tokenizer, probe)
        if plain and added.isdisjoint(plain):
            return full[: full.index(plain[0])]
    raise ValueError(
        f"opening_tokens: cannot tell what {type(tokenizer).__name__} puts before a text from what it puts behind it"
    )


def opened(ids: Sequence[int], opening: Sequence[int]) -> list[int]:
    """Returns `ids` behind the `opening` tokens, once: a text that has them already, as chat templates write them, gets
    no second ones."""
    opening = list(opening)
    return list(ids) if list(ids[: len(opening)]) == opening else [*opening, *ids]


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, **options)["input_ids"])


def stop_tokens(*sources: Any) -> set[int]:
    """Returns all tokens that end a text: `LongMem.generate(..., eos=stop_tokens(tokenizer, model.backbone))`.

    Args:
        sources: whatever has an `eos_token_id` or `eot_token_id`, one token, several or None: a tokenizer, a backbone,
            a model's configuration or generation configuration. Instruct models often name some in each.
    """
    found: set[int] = set()
    for name in ("eos_token_id", "eot_token_id"):
        for source in sources:
            ids = getattr(source, name, None)
            found.update([ids] if isinstance(ids, int) else ids or ())
    return found


def sampling_options(generation_config: Any, **chosen: float | None) -> dict[str, Any]:
    """Returns options of `LongMem.generate`: those `chosen` (not None), else those of a generation configuration.

    A configuration that does not sample (`do_sample`) says nothing of temperature, top_p and top_k. Options that
    nobody sets are left out.
    """
    sampled = ("temperature", "top_p", "top_k") if getattr(generation_config, "do_sample", None) else ()
    said = {name: getattr(generation_config, name, None) for name in (*sampled, "repetition_penalty")}
    options = said | {name: value for name, value in chosen.items() if value is not None}
    return {name: value for name, value in options.items() if value is not None}


class NewText:
    """The text of new tokens behind a prompt, given out as soon as no later token can change it.

    All pieces together are what the tokenizer's decoding of prompt and new tokens has more than that of the prompt
    alone: a first word keeps the space before it, and the prompt is never shown by what a tokenizer made of it. Special
    tokens are shown as they are. Bytes that are no character are U+FFFD, at the end too. (`TextStreamer` of
    `transformers` decodes the prompt along with the text, or without the prompt loses that space.)

    >>> text = NewText(tokenizer, prompt_ids)
    >>> for token in tokens:
    ...     print(text.put(token), end="", flush=True)
    >>> print(text.end())

    Args:
        prompt: the token ids before the new ones, without those of `opening_tokens`.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        if type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)).__name__ == "BPE":
            self._cleans_up = False  # some configurations ask for it all the same, and it would spoil their text
        self._ids = list(prompt[-_CONTEXT:])
        self._text = self._decode(self._ids)
        self._shown = len(self._text)

    def put(self, token: int) -> str:
        """Returns the text that is certain now; may be empty."""
        self._ids.append(token)
        self._text = self._decode(self._ids)
        unsure = self._unsure_tokens()
        sure = self._decode(self._ids[:-unsure]) if unsure else self._text
        if not self._text.startswith(sure):
            return ""
        piece = sure.removesuffix("\ufffd")[self._shown :]  # the first bytes of a character, perhaps
        self._shown += len(piece)
        if unsure < _CONTEXT and len(self._ids) >= 4 * _CONTEXT:
            self._forget()
        return piece

    def end(self) -> str:
        """Returns the text that is left."""
        piece = self._text[self._shown :]
        self._shown = len(self._text)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=self._cleans_up) if ids else ""

    def _unsure_tokens(self) -> int:
        """The number of tokens at the end whose text may still change."""
        # One byte that does not fit makes a whole run of byte tokens unreadable.
        names = self.tokenizer.convert_ids_to_tokens(self._ids[::-1])
        run = next((i for i, name in enumerate(names) if not _BYTE_TOKEN.fullmatch(str(name))), len(names))
        return max(run, _CLEAN_UP_TOKENS if self._cleans_up else 0)

    def _forget(self) -> None:
        """Drop tokens that later ones do not depend on: decoding all of them for each new one would take long."""
        ids = self._ids[-_CONTEXT:]
        text, left = self._decode(ids), self._text[self._shown :]
        if text.endswith(left):
            self._ids, self._text, self._shown = ids, text, len(text) - len(left)


def check_request(prompt: str, stop: Sequence[str] = ()) -> None:
    """Raises ValueError where `generate_text` refuses these whatever the model is."""
    if "" in stop:
        raise ValueError("generate_text: a stop string must not be empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # a command line of other bytes
        raise ValueError(f"generate_text: the prompt is not UTF-8, from character {error.start} on") from None


def generate_text(
    model: LongMem,
    tokenizer: Any,
    prompt: str,
    memory: MemoryBank | None = None,
    *,
    ends: Iterable[int] = (),
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[str]:
    """Returns the text that continues `prompt`, in pieces as they come, without the prompt.

    The prompt begins as the model's texts do (`LongMemConfig.special_tokens`).

    Args:
        ends: tokens that end the text, see `stop_tokens`; they are not part of it.
        stop: strings that end the text, nor are they.
        options: see `LongMem.generate`.

    Raises:
        ValueError: a prompt without a token or that is not UTF-8, an empty `stop`, or options that `LongMem.generate`
            refuses.
    """
    check_request(prompt, stop)
    opening = opening_tokens(tokenizer) if model.config.special_tokens == "auto" else []
    plain = _ids(tokenizer, prompt, add_special_tokens=False)
    ids = opened(plain, opening)
    if not ids:
        raise ValueError(f"generate_text: the prompt {prompt!r} holds no token")
    ends = frozenset(ends)
    steps = model.generate(torch.tensor([ids], device=model.backbone.device), memory, eos=ends or None, **options)
    return _until(_pieces(NewText(tokenizer, plain), steps, ends), stop)


def _pieces(text: NewText, steps: Iterator[Tensor], ends: frozenset[int]) -> Iterator[str]:
    for step in steps:
        if (token := int(step)) in ends:
            break
        yield text.put(token)
    yield text.end()


def _until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The text before the first of `stop`: what may be the beginning of one waits."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [held.index(text) for text in stop if text in held]:
            held = held[: min(found)]
            break
        wait = max((n for text in stop for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        yield held[: len(held) - wait]
        held = held[len(held) - wait :]
    yield held
