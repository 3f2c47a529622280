"""Documents as batches of consecutive segments: the order that a memory needs."""

from __future__ import annotations

import hashlib
import random
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from longmem.data.documents import Document, Skipped, TextFile, nothing_left
from longmem.data.sources import Unreadable
from longmem.data.tokens import tokenize_texts
from longmem.files import Whole, check_fields, show
from longmem.text import opened, opening_tokens

_STATE = {"shape": dict, "epoch": Whole(), "taken": Whole(), "lane_document": [Whole(-1)], "lane_offset": [Whole()]}
IGNORE = -100  # what torch's cross entropy leaves out
IDS = (torch.int32, torch.int64)  # what documents may be; int32 is kept, int64 is what models take


@dataclass(frozen=True)
class Batch:
    """One step of B lanes. A lane without a document is all padding: document -1, new_document False."""

    tokens: Tensor  # [B, T] int64, 0 where there is padding
    targets: Tensor  # [B, T] int64, the token after each, IGNORE where there is none
    new_document: Tensor  # [B] bool, this segment is the first of its document
    mask: Tensor  # [B, T] bool, False where there is padding
    document: Tensor  # [B] int64, index into the stream's documents
    start: Tensor  # [B] int64, position of the segment's first token in its document

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(*(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self)))


def tokenize_documents(
    documents: Iterable[Document | TextFile | Skipped],
    tokenizer: Any,
    min_tokens: int = 1,
    *,
    add_special_tokens: bool = True,
    cut: int | None = None,
    distinct: bool = False,
) -> tuple[list[Tensor], list[Skipped]]:
    """Token ids [n] int32 of each document, in order, by a Hugging Face tokenizer.

    Each begins with the special tokens that the tokenizer puts before a text (`opening_tokens`), unless
    `add_special_tokens` is off. Documents may come one after another from a generator (`iter_documents`): each is
    tokenised and let go, large ones in pieces, to the same ids (`longmem.data.tokens`).

    Args:
        cut: tokens of a document that are kept at the most; it is tokenised no further than needed.
        distinct: leave out documents whose kept tokens are those of one before.

    Returns them and what was left out: what came as `Skipped`, documents that cannot be read to their end or are empty,
    and those that have fewer than `min_tokens` tokens.

    Raises:
        ValueError: no document is long enough.
    """
    opening = opening_tokens(tokenizer) if add_special_tokens else []
    kept: list[Tensor] = []
    skipped: list[Skipped] = []
    names: dict[bytes, str] = {}
    shortest = max(min_tokens, 1)
    texts = _passing(documents, skipped)
    for item, ids in tokenize_texts(texts, tokenizer, enough=None if cut is None else max(cut, shortest)):
        if isinstance(ids, Unreadable):
            skipped.append(Skipped(item.name, str(ids)))
            continue
        if len(ids) and opened(begin := ids[: len(opening)].tolist(), opening) != begin:
            ids = torch.cat([torch.tensor(opening, dtype=ids.dtype), ids])
        if len(ids) < shortest:
            skipped.append(Skipped(item.name, f"{len(ids)} tokens, wanted at least {shortest}"))
            continue
        ids = ids[:cut].clone() if cut is not None and cut < len(ids) else ids
        if distinct:
            digest = hashlib.blake2b(ids.numpy().data, digest_size=16).digest()
            if (first := names.setdefault(digest, item.name)) is not item.name:
                skipped.append(Skipped(item.name, f"the same text as {first}"))
                continue
        kept.append(ids)
    if not kept:
        raise nothing_left("tokenize_documents", skipped)
    return kept, skipped


def _passing(
    documents: Iterable[Document | TextFile | Skipped], skipped: list[Skipped]
) -> Iterator[Document | TextFile]:
    for item in documents:
        if isinstance(item, Skipped):
            skipped.append(item)
        else:
            yield item


class SegmentStream:
    """Batches in which every row ("lane") walks one document after another, front to back, `segment` tokens a step.

    A lane that has finished its document takes the next one that nobody has taken, in natural order or, with a
    `seed`, in an order shuffled anew each epoch. The last segment of a document is padded on the right. Iterating
    runs to the end of the epoch, lanes with nothing left giving padding meanwhile; the next `iter()` starts the next
    epoch. With `repeat` it never ends: a free lane goes on with the next epoch, so no row is ever empty, and two
    lanes may be in different epochs.

    With `repeat` and fewer documents than rows, lanes would read the same text at the same time at many times the cost:
    that is warned about, and `useful_rows` says how many lanes have a document of their own.

    For several processes give each its own share of the documents, as in documents[rank::world_size].

    `dropped_tokens` counts, per epoch, what `drop_last_short` leaves out (0 without it).

    Args:
        documents: token ids of each document, [n] int32 or int64, n > 0. Batches are int64.
        rows: lanes, B.
        segment: tokens a step, T.
        seed: None for the order of `documents`.
        drop_last_short: leave out a document's last segment where it is shorter than T.
        repeat: go on for ever.

    Raises:
        ValueError, TypeError: no documents, an empty or (with drop_last_short) too short document, another dtype or
        shape, rows or segment below 1.
    """

    def __init__(
        self,
        documents: Sequence[Tensor],
        *,
        rows: int,
        segment: int,
        seed: int | None = None,
        drop_last_short: bool = False,
        repeat: bool = False,
    ) -> None:
        if rows < 1 or segment < 1:
            raise ValueError(f"SegmentStream: wanted at least 1 row and 1 token, got rows={rows}, segment={segment}")
        _check_documents(documents, segment if drop_last_short else 1)
        self.documents = list(documents)
        self.rows, self.segment, self.seed, self.repeat = rows, segment, seed, repeat
        self._lengths = [len(ids) - len(ids) % segment if drop_last_short else len(ids) for ids in self.documents]
        if repeat and rows > self.useful_rows:
            warnings.warn(
                f"SegmentStream: {rows} rows over {len(self.documents)} document{'s' * (len(self.documents) > 1)}: rows"
                f" will read the same text side by side; rows={self.useful_rows} learns the same at less cost",
                RuntimeWarning,
                stacklevel=2,
            )
        self.tokens_per_epoch = sum(self._lengths)
        self.dropped_tokens = sum(map(len, self.documents)) - self.tokens_per_epoch
        self._checksum = _checksum(self.documents)
        self._epoch = 0  # the one that iterating is in; with repeat, always 0
        self._taken = 0  # documents handed out since the beginning, over all epochs
        self._lane_document = [-1] * rows
        self._lane_offset = [0] * rows
        self._order: tuple[int, list[int]] | None = None

    @property
    def useful_rows(self) -> int:
        """The number of lanes that have a document of their own."""
        return min(self.rows, len(self.documents))

    def __iter__(self) -> Iterator[Batch]:
        """Goes on from the present state. It advances before a batch is handed out: saved after one, it resumes with
        the next."""
        while (batch := self._advance()) is not None:
            yield batch
        self._epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists (JSON can hold them), from which a stream over the same documents goes on exactly."""
        return {
            "shape": self._shape(),
            "epoch": self._epoch,
            "taken": self._taken,
            "lane_document": list(self._lane_document),
            "lane_offset": list(self._lane_offset),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a saved state. Raises ValueError, naming what differs, where it is that of a stream over other
        documents or with other settings, or none."""
        what = "SegmentStream.load_state_dict: the state"
        check_fields(what, state, _STATE)
        wanted, got = self._shape(), state["shape"]
        different = [
            f"{key}: wanted {value}, got {show(got.get(key))}" for key, value in wanted.items() if value != got.get(key)
        ]
        if different:
            raise ValueError(f"SegmentStream.load_state_dict: the state is another stream's ({'; '.join(different)})")
        documents, offsets = state["lane_document"], state["lane_offset"]
        if not len(documents) == len(offsets) == self.rows or not all(map(self._is_place, documents, offsets)):
            raise ValueError(
                f"{what} must have places in documents for {self.rows} rows, got documents {documents} and tokens"
                f" {offsets}"
            )
        self._epoch, self._taken = state["epoch"], state["taken"]
        self._lane_document, self._lane_offset = list(state["lane_document"]), list(state["lane_offset"])

    def _is_place(self, document: int, offset: int) -> bool:
        """True when a lane may be there; -1 is no document."""
        return document < 0 or (document < len(self.documents) and offset <= self._lengths[document])

    def _shape(self) -> dict[str, Any]:
        return {
            "documents": len(self.documents),
            "checksum": self._checksum,
            "tokens_per_epoch": self.tokens_per_epoch,
            "rows": self.rows,
            "segment": self.segment,
            "seed": self.seed,
            "repeat": self.repeat,
        }

    def _advance(self) -> Batch | None:
        for lane in range(self.rows):
            document = self._lane_document[lane]
            if document < 0 or self._lane_offset[lane] >= self._lengths[document]:
                self._lane_document[lane], self._lane_offset[lane] = self._take(), 0
        if all(document < 0 for document in self._lane_document):
            return None
        shape = (self.rows, self.segment)
        batch = Batch(
            tokens=torch.zeros(shape, dtype=torch.int64),
            targets=torch.full(shape, IGNORE, dtype=torch.int64),
            new_document=torch.zeros(self.rows, dtype=torch.bool),
            mask=torch.zeros(shape, dtype=torch.bool),
            document=torch.tensor(self._lane_document, dtype=torch.int64),
            start=torch.tensor(self._lane_offset, dtype=torch.int64),
        )
        for lane, document in enumerate(self._lane_document):
            if document >= 0:
                self._fill(batch, lane, document)
        return batch

    def _fill(self, batch: Batch, lane: int, document: int) -> None:
        ids, start = self.documents[document], self._lane_offset[lane]
        stop = min(start + self.segment, self._lengths[document])
        # Targets look past a dropped tail's border: the token after the last kept one is known all the same.
        following = ids[start + 1 : stop + 1]
        batch.tokens[lane, : stop - start] = ids[start:stop]
        batch.targets[lane, : len(following)] = following
        batch.mask[lane, : stop - start] = True
        batch.new_document[lane] = start == 0
        self._lane_offset[lane] = stop

    def _take(self) -> int:
        """The next document that nobody has taken, -1 where the epoch has none left."""
        count = len(self.documents)
        epoch, position = divmod(self._taken, count)
        if epoch > self._epoch and not self.repeat:
            return -1
        self._taken += 1
        return self._order_of(epoch)[position]

    def _order_of(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            order = list(range(len(self.documents)))
            if self.seed is not None:
                # Seeded with text: unlike seed + epoch, no two (seed, epoch) meet, and it gives the same order on
                # every Python and machine.
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def _check_documents(documents: Sequence[Tensor], shortest: int) -> None:
    if not documents:
        raise ValueError("SegmentStream: wanted at least one document, got none")
    for index, ids in enumerate(documents):
        if not isinstance(ids, Tensor) or ids.dtype not in IDS or ids.dim() != 1 or ids.device.type != "cpu":
            got = (
                f"{ids.dtype} of shape {list(ids.shape)} on {ids.device}"
                if isinstance(ids, Tensor)
                else type(ids).__name__
            )
            raise TypeError(
                f"SegmentStream: documents[{index}]: wanted an int64 tensor of shape [n] on the CPU, got {got}"
                " (int32 is taken too)"
            )
        if len(ids) < shortest:
            raise ValueError(f"SegmentStream: documents[{index}]: wanted at least {shortest} tokens, got {len(ids)}")


def _checksum(documents: Sequence[Tensor]) -> int:
    """Checksum of all tokens and document ends: a cursor into other texts would resume without a sign of it.

    The same for int32 and int64."""
    value = 0
    for ids in documents:
        value = zlib.crc32(b"%d" % len(ids), value)
        for part in ids.split(1 << 20):
            value = zlib.crc32(part.long().contiguous().numpy().data, value)
    return value
