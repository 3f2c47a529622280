"""Reading texts into memory: segment by segment, without what the memory would overwrite before anybody reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .memory import MemoryBank
from .padding import align_left, fill_padding, token_spans
from .sharded import ShardedMemoryBank

if TYPE_CHECKING:
    from .model import LongMem


@torch.no_grad()
def remember(
    model: LongMem,
    tokens: Tensor,
    memory: MemoryBank,
    mask: Tensor | None,
    rows: Sequence[int] | None,
    progress: Callable[[int], object] | None,
) -> list[int]:
    """The loop of `LongMem.remember`, whose arguments it checks."""
    starts, lengths = [0] * len(tokens), [tokens.shape[1]] * len(tokens)
    if mask is not None:
        starts, lengths = token_spans("remember", mask)
        tokens = align_left(fill_padding(tokens, mask, starts), starts)
    owners = list(range(memory.rows)) if rows is None else list(rows)
    if isinstance(memory, ShardedMemoryBank):
        return _remember_together(model, tokens, lengths, memory, owners, progress)
    rings = owners if memory.scope == "row" else [0] * len(owners)
    fate = foresee(lengths, rings, memory, model.config.segment)
    if any(fate.skipped):
        memory.skip(fate.skipped)
        if progress is not None:
            progress(sum(fate.skipped))
    try:
        _write_segments(model, tokens, lengths, memory, owners, fate.first, progress)
    except BaseException:
        if any(fate.skipped):  # rings that skipped, and were not filled, hold nothing that makes sense
            emptied = torch.tensor([count > 0 for count in fate.skipped], device=memory.ring.cursor.device)
            memory.ring.reset(emptied)
        raise
    return fate.kept


def _write_segments(
    model: LongMem,
    tokens: Tensor,
    lengths: list[int],
    memory: MemoryBank,
    owners: list[int],
    first: list[int],
    progress: Callable[[int], object] | None,
) -> None:
    """Encode and write each row's segments from its `first` one on; a row that has no more is left out."""
    segment = model.config.segment
    for begin in range(0, max(lengths, default=0), segment):
        some = [i for i, length in enumerate(lengths) if begin >= first[i] * segment and begin < length]
        if not some:
            continue
        counts = [min(segment, lengths[i] - begin) for i in some]
        piece = tokens[:, begin : begin + max(counts)][some]
        states = model.backbone.encode(piece, model.config.memory_layers, ())
        memory.write(states.key, states.value, _up_to(counts, piece), [owners[i] for i in some])
        if progress is not None:
            progress(sum(counts))


def _remember_together(
    model: LongMem,
    tokens: Tensor,
    lengths: list[int],
    memory: ShardedMemoryBank,
    owners: list[int],
    progress: Callable[[int], object] | None,
) -> list[int]:
    """For a memory over several processes, which write together: all rows and columns, whatever this one's hold."""
    segment = model.config.segment
    full, counts = tokens.new_zeros(memory.rows, tokens.shape[1]), [0] * memory.rows
    full[owners] = tokens
    for i, owner in enumerate(owners):
        counts[owner] = lengths[i]
    for begin in range(0, tokens.shape[1], segment):
        piece = full[:, begin : begin + segment]
        states = model.backbone.encode(piece, model.config.memory_layers, ())
        here = [min(max(count - begin, 0), piece.shape[1]) for count in counts]
        memory.write(states.key, states.value, _up_to(here, piece))
        if progress is not None:
            progress(sum(here))
    (cursor, chunks), size = memory.progress(), memory.ring.chunk_size
    held = (chunks * size + cursor % size).expand(memory.rows).tolist()  # whole chunks and the open one
    return [min(length, held[owner]) for length, owner in zip(lengths, owners, strict=True)]


def _up_to(counts: list[int], piece: Tensor) -> Tensor | None:
    """Bool [R, T], the first `counts` columns of each row of `piece` [R, T]; None where that is all."""
    if min(counts) == piece.shape[1]:
        return None
    return torch.arange(piece.shape[1], device=piece.device) < torch.tensor(counts, device=piece.device)[:, None]


@dataclass(frozen=True)
class Fate:
    """Outcome of writing a text segment by segment.

    Attributes:
        first: of each row of the text, the first segment that is worth encoding.
        skipped: tokens of earlier segments, by ring of the memory.
        kept: of each row, how many of its tokens the memory holds in the end.
    """

    first: list[int]
    skipped: list[int]
    kept: list[int]


def foresee(lengths: list[int], rings: list[int], memory: MemoryBank, segment: int) -> Fate:
    """Finds the segments of rows with `lengths` tokens, row i going to ring `rings[i]`, that later ones overwrite.

    Rows that share a ring are written in turn, one segment of each. A segment is worth encoding when any token of it,
    or of what is written to the same ring together with it, is kept.
    """
    ring = memory.ring
    size, chunks = ring.chunk_size, ring.chunks
    total = [0] * ring.rings
    for length, place in zip(lengths, rings, strict=True):
        total[place] += length
    first, skipped = [0] * len(lengths), [0] * ring.rings
    if max(total) <= chunks * size:  # decided without a look at the device
        return Fate(first, skipped, list(lengths))
    end = ring.cursor.tolist()
    # (segment, row, position in the ring's stream of tokens where it begins, tokens)
    pieces: list[tuple[int, int, int, int]] = []
    for index in range(-(-max(lengths) // segment)):
        for row, length in enumerate(lengths):
            count = min(segment, length - index * segment)
            if count > 0:
                pieces.append((index, row, end[rings[row]], count))
                end[rings[row]] += count
    oldest = [(stop // size - chunks) * size for stop in end]  # the first position that a ring still holds
    # What the open tail holds beyond its end is left from earlier writes, whose ends come round within `size` writes
    # at most: doing so many keeps it the same, too.
    together = [sum(place == other for other in rings) * segment for place in range(ring.rings)]
    worth = [min(old, stop - size * count) for old, stop, count in zip(oldest, end, together, strict=True)]
    needed = {(index, rings[row]) for index, row, start, count in pieces if start + count > worth[rings[row]]}
    kept = [0] * len(lengths)
    for index, row, start, count in pieces:
        place = rings[row]
        kept[row] += max(0, min(count, start + count - oldest[place]))
        if (index, place) not in needed:
            first[row] = index + 1
            skipped[place] += count
    return Fate(first, skipped, kept)
