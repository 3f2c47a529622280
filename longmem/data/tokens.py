"""Token ids of texts of any length: tokenised in overlapping pieces that are joined where they agree.

A fast tokenizer keeps some hundred bytes a token beside the ids, so that a whole book collection at once takes more
memory than any machine has. Pieces give the same ids as the whole because what a tokenizer does depends on a text's
neighbourhood alone: two pieces that overlap by thousands of characters differ at the overlap's ends, where one of them
is cut, and agree between. They are joined in the middle of a stretch where both have the same tokens at the same
places, with a quarter of the overlap on either side of it left for what the cuts disturb. Where they disagree (a word
as long as the overlap, a rule that counts from the text's beginning) the pieces become one, in the worst case the whole
text.

Tokenizers that score whole words (Unigram, WordPiece) are joined between words only: the score of a word is summed from
its beginning, and ties are decided by the last bit of the sum. Byte-pair merges have no such memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from longmem.data.sources import Text, Unreadable

AGREEING = 16  # tokens that two pieces must have in common, at the least, to be joined among them


@dataclass(frozen=True)
class Sizes:
    """Characters of a piece, of what two pieces share, and of the pieces that are tokenised at once (by all cores)."""

    piece: int = 1 << 18
    overlap: int = 1 << 12
    at_once: int = 1 << 20


SIZES = Sizes()
T = TypeVar("T", bound=Text)
_Token = tuple[int, int, int]  # id and place in the text: from where to where


def tokenize_texts(
    texts: Iterable[T], tokenizer: Any, *, enough: int | None = None, sizes: Sizes = SIZES
) -> Iterator[tuple[T, Tensor | Unreadable]]:
    """Each text with its token ids, [n] int32, in order, by a Hugging Face tokenizer; without special tokens.

    Only fast tokenizers take texts in pieces; others get them whole. Texts are read while they are tokenised; one that
    turns out not to be readable comes with the reason instead.

    Args:
        enough: of each text no more is tokenised than gives so many tokens: its first ones, perhaps some more.
    """
    encode = _Encoder(tokenizer)
    if not encode.splits:
        sizes = Sizes(piece=1 << 62, overlap=0, at_once=sizes.at_once)
    waiting: list[_Window[T]] = []
    characters = 0
    for window in _all_windows(texts, enough, sizes, encode):
        waiting.append(window)
        characters += len(window.text)
        if characters >= sizes.at_once:
            yield from _joined(waiting, encode)
            waiting, characters = [], 0
    yield from _joined(waiting, encode)


class _Encoder:
    """Texts -> encodings (of a fast tokenizer, which know where each token stands) or lists of ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend: Any = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
        self.splits = backend is not None
        self.between_words = self.splits and type(backend.model).__name__ != "BPE"

    def __call__(self, texts: list[str]) -> list[Any]:
        # Not verbose: a document longer than the model's window is the point here, nothing to be warned about.
        encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        found: list[Any] = encoded.encodings if self.splits else encoded["input_ids"]
        return found


@dataclass
class _Window(Generic[T]):
    """A piece of a text that is to be tokenised. `failed`: why nothing more of the text can be read."""

    joiner: _Joiner[T]
    start: int
    text: str
    last: bool
    failed: Unreadable | None = None


def _all_windows(texts: Iterable[T], enough: int | None, sizes: Sizes, encode: _Encoder) -> Iterator[_Window[T]]:
    first = sizes.piece
    if enough is not None:  # words of six characters and more a token are rare
        first = min(first, max(6 * enough, 4 * sizes.overlap))
    for text in texts:
        joiner = _Joiner(text, encode, sizes.overlap, enough)
        buffer, start, failed = "", 0, None
        try:
            for piece in text.pieces():
                buffer += piece
                while len(buffer) > first and not joiner.done:
                    yield _Window(joiner, start, buffer[:first], last=False)
                    start += first - sizes.overlap
                    buffer = buffer[first - sizes.overlap :]
                if joiner.done:
                    break
        except Unreadable as error:
            failed = error
        if not joiner.done:
            yield _Window(joiner, start, buffer, last=True, failed=failed)


def _joined(windows: list[_Window[T]], encode: _Encoder) -> Iterator[tuple[T, Tensor | Unreadable]]:
    encodings = encode([window.text for window in windows]) if windows else []
    for window, encoding in zip(windows, encodings, strict=True):
        joiner = window.joiner
        if joiner.done:
            continue
        if window.failed is not None:
            joiner.done = True
            yield joiner.text, window.failed
            continue
        joiner.blank = joiner.blank and window.text.isspace()
        try:
            joiner.add(_Piece(window.start, window.text, encoding), window.last)
        except Unreadable as error:
            joiner.done = True
            yield joiner.text, error
        else:
            if joiner.done:
                yield joiner.text, Unreadable("empty") if joiner.blank else joiner.ids()


class _Piece:
    """An encoded piece of a text. `first`: its first token that is not the piece's before."""

    def __init__(self, start: int, text: str, encoding: Any) -> None:
        self.start, self.text, self.encoding = start, text, encoding
        self.stop = start + len(text)
        self.first = 0

    def ids(self, begin: int, end: int | None = None) -> np.ndarray:
        ids = self.encoding if isinstance(self.encoding, Sequence) else self.encoding.ids
        return np.asarray(ids[begin:end], dtype=np.int32)

    def token(self, index: int) -> _Token:
        begin, end = self.encoding.token_to_chars(index)
        return self._id_list()[index], self.start + begin, self.start + end

    def within(self, low: int, high: int) -> tuple[int, list[_Token]]:
        """The tokens that lie between two places of the text, and the index of the first of them."""
        index = begin = self._first_from(low)
        tokens = []
        while index < len(self.encoding) and (token := self.token(index))[2] <= high:
            tokens.append(token)
            index += 1
        return begin, tokens

    def begins_word(self, index: int) -> bool:
        return bool(self.encoding.token_to_word(index) != self.encoding.token_to_word(index - 1))

    def _first_from(self, place: int) -> int:
        low, high = 0, len(self.encoding)
        while low < high:
            middle = (low + high) // 2
            if self.token(middle)[1] < place:
                low = middle + 1
            else:
                high = middle
        return low

    def _id_list(self) -> list[int]:
        if not hasattr(self, "_ids"):
            self._ids: list[int] = self.encoding.ids
        return self._ids


class _Joiner(Generic[T]):
    """Puts the pieces of one text together as they come."""

    def __init__(self, text: T, encode: _Encoder, overlap: int, enough: int | None) -> None:
        self.text, self.done, self.blank = text, False, True
        self._encode, self._margin, self._enough = encode, overlap // 4, enough
        self._settled: list[np.ndarray] = []
        self._count = 0
        self._open: _Piece | None = None  # the last one, whose end is not certain yet
        self._held: list[_Piece] = []  # those behind it that could not be joined to it
        self._seam: list[_Token] = []  # the first tokens of the open one that are its own

    def add(self, piece: _Piece, last: bool) -> None:
        if self._open is None:
            self._open = piece
        elif self._held:
            self._held.append(piece)
        elif not self._join(piece):
            self._held = [piece]
        # A text that never agrees is tokenised anew as often as it doubles, not with every piece.
        if self._held and (last or self._held[-1].stop - self._open.start >= 2 * len(self._open.text)):
            self._merge()
        if last and not self.done:
            self._settle(self._open.ids(self._open.first))
        self.done = self.done or last or (self._enough is not None and self._count >= self._enough)

    def ids(self) -> Tensor:
        return torch.from_numpy(np.concatenate(self._settled)) if self._settled else torch.empty(0, dtype=torch.int32)

    def _settle(self, ids: np.ndarray) -> None:
        self._settled.append(ids)
        self._count += len(ids)

    def _join(self, piece: _Piece) -> bool:
        before = self._open
        assert before is not None
        low, high = piece.start + self._margin, before.stop - self._margin
        (i, tokens), (j, others) = before.within(low, high), piece.within(low, high)
        if len(tokens) < AGREEING or tokens != others:
            return False
        step = self._place(before, piece, i, j, tokens)
        if step is None or i + step < before.first:
            return False
        self._settle(before.ids(before.first, i + step))
        piece.first = j + step
        self._open, self._seam = piece, others[step : step + AGREEING // 2]
        return True

    def _place(self, before: _Piece, piece: _Piece, i: int, j: int, tokens: list[_Token]) -> int | None:
        """Place among the tokens that both have at which to go over from one to the other: near their middle."""
        middle = len(tokens) // 2
        steps = sorted(range(AGREEING // 2, len(tokens) - AGREEING // 2 + 1), key=lambda n: abs(n - middle))
        for step in steps:
            if before.begins_word(i + step) and piece.begins_word(j + step):
                return step
        if self._encode.between_words:
            return None
        # Not between the bytes of one character, which all stand at the same place.
        return next((step for step in steps if tokens[step - 1][2] <= tokens[step][1]), None)

    def _merge(self) -> None:
        """Makes one piece of the open one and those that could not be joined to it."""
        assert self._open is not None
        before, text = self._open, self._open.text
        for piece in self._held:
            text += piece.text[before.start + len(text) - piece.start :]
        (encoding,) = self._encode([text])
        merged = _Piece(before.start, text, encoding)
        if self._seam:
            merged.first, tokens = merged.within(self._seam[0][1], self._seam[-1][2])
            if tokens[: len(self._seam)] != self._seam:
                self._whole()
                return
        self._open, self._held = merged, []

    def _whole(self) -> None:
        """Takes the text at once: a piece that was settled turned out otherwise when more of the text was known."""
        (encoding,) = self._encode(["".join(self.text.pieces())])
        self._settled = []
        self._settle(_Piece(0, "", encoding).ids(0))
        self.done = True
