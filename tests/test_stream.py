"""Tokenising documents and walking them segment by segment."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longmem.data.documents import Document, Skipped
from longmem.data.stream import IGNORE, Batch, SegmentStream, tokenize_documents


def characters(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_tokenize_keeps_order_and_reports_short_ones() -> None:
    texts = ["abc", "", "d", *(["xyz"] * 40)]
    documents = [Document(str(index), text) for index, text in enumerate(texts)]
    kept, skipped = tokenize_documents(documents, characters, min_tokens=2)
    assert kept[0].tolist() == [97, 98, 99]
    assert kept[0].dtype == torch.int32
    assert len(kept) == 41
    assert skipped == [Skipped("1", "0 tokens, wanted at least 2"), Skipped("2", "1 tokens, wanted at least 2")]
    with pytest.raises(ValueError, match="got none\n  2: 1 tokens"):
        tokenize_documents(documents[2:3], characters, min_tokens=2)


def make_documents(lengths: list[int]) -> list[torch.Tensor]:
    return [torch.arange(length) + 1000 * (index + 1) for index, length in enumerate(lengths)]


def walk(batches: list[Batch]) -> dict[int, list[int]]:
    """What each document's tokens were, in the order seen; checks what must hold of any batch."""
    seen: dict[int, list[int]] = {}
    where: dict[int, int] = {}
    for batch in batches:
        for row, document in enumerate(batch.document.tolist()):
            length = int(batch.mask[row].sum())
            assert batch.mask[row, :length].all(), "padding is on the right"
            assert (batch.tokens[row, length:] == 0).all()
            assert (batch.targets[row, length:] == IGNORE).all()
            if document < 0:
                assert length == 0
                assert not batch.new_document[row]
                continue
            assert length > 0
            assert bool(batch.new_document[row]) == (document not in seen)
            assert where.setdefault(document, row) == row, "a document stays in its lane"
            seen.setdefault(document, []).extend(batch.tokens[row, :length].tolist())
    return seen


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Batch))


streams = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 30), min_size=1, max_size=9),
        "rows": st.integers(1, 5),
        "segment": st.integers(1, 8),
        "seed": st.none() | st.integers(0, 3),
    }
)


@given(streams)
def test_every_token_once_per_epoch_in_order(drawn: dict[str, Any]) -> None:
    documents = make_documents(drawn.pop("lengths"))
    stream = SegmentStream(documents, **drawn)
    for _ in range(2):
        batches = list(stream)
        seen = walk(batches)
        assert {index: ids.tolist() for index, ids in enumerate(documents)} == seen
        for batch in batches:
            for tokens, targets, mask in zip(batch.tokens, batch.targets, batch.mask, strict=True):
                ends = {int(ids[-1]) for ids in documents}
                for token, target in zip(tokens[mask].tolist(), targets[mask].tolist(), strict=True):
                    assert target == (IGNORE if token in ends else token + 1)
        assert stream.tokens_per_epoch == sum(int(batch.mask.sum()) for batch in batches)


@pytest.mark.filterwarnings("ignore:SegmentStream")
@given(streams, st.booleans(), st.integers(0, 20))
def test_resume_equals_uninterrupted(drawn: dict[str, Any], repeat: bool, cut: int) -> None:
    documents = make_documents(drawn.pop("lengths"))

    def endless(stream: SegmentStream):
        while True:
            yield from stream

    straight = SegmentStream(documents, repeat=repeat, **drawn)
    whole = [batch for batch, _ in zip(endless(straight), range(40), strict=False)]
    first = SegmentStream(documents, repeat=repeat, **drawn)
    for _ in zip(range(cut), endless(first), strict=False):
        pass
    state = json.loads(json.dumps(first.state_dict()))
    second = SegmentStream(documents, repeat=repeat, **drawn)
    second.load_state_dict(state)
    rest = [batch for batch, _ in zip(endless(second), range(40 - cut), strict=False)]
    assert all(same(one, other) for one, other in zip(whole[cut:], rest, strict=True))


@pytest.mark.filterwarnings("ignore:SegmentStream")
@given(streams)
def test_repeat_never_leaves_a_row_empty_and_is_fair(drawn: dict[str, Any]) -> None:
    documents = make_documents(drawn.pop("lengths"))
    stream = SegmentStream(documents, repeat=True, **drawn)
    counts = [0] * len(documents)
    for _, batch in zip(range(60), stream, strict=False):
        assert (batch.document >= 0).all()
        for document in batch.document[batch.new_document].tolist():
            counts[document] += 1
    assert max(counts) - min(counts) <= 1, "every document is started once before any is started again"


def test_natural_order_and_free_lanes() -> None:
    stream = SegmentStream(make_documents([2, 5, 1, 3]), rows=2, segment=2)
    assert [batch.document.tolist() for batch in stream] == [[0, 1], [2, 1], [3, 1], [3, -1]]


def test_seed_shuffles_each_epoch_anew() -> None:
    def orders(seed: int | None) -> list[list[int]]:
        stream = SegmentStream(make_documents([1] * 20), rows=1, segment=4, seed=seed)
        return [[int(batch.document) for batch in stream] for _ in range(2)]

    assert orders(None) == [list(range(20))] * 2
    assert orders(7) == orders(7)
    assert orders(7)[0] != orders(7)[1]
    assert orders(7)[1] != orders(8)[0]


def test_dropping_the_short_end_is_counted_and_keeps_its_first_token_as_target() -> None:
    stream = SegmentStream(make_documents([7, 6]), rows=1, segment=3, drop_last_short=True)
    batches = list(stream)
    assert (stream.dropped_tokens, stream.tokens_per_epoch) == (1, 12)
    assert [int(batch.targets[0, -1]) for batch in batches] == [1003, 1006, 2003, IGNORE]
    assert all(batch.mask.all() for batch in batches)


def test_stream_refuses_what_it_cannot_walk() -> None:
    good = make_documents([4])
    for wrong, kind, message in (
        (([], 1, 2), ValueError, "at least one document"),
        ((good, 0, 2), ValueError, "rows=0"),
        (([torch.zeros(0, dtype=torch.int64)], 1, 2), ValueError, r"documents\[0\]: wanted at least 1 tokens, got 0"),
        (([good[0].float()], 1, 2), TypeError, r"wanted an int64 tensor of shape \[n\] on the CPU, got torch.float32"),
        (([[1, 2]], 1, 2), TypeError, "got list"),
    ):
        documents, rows, segment = wrong
        with pytest.raises(kind, match=message):
            SegmentStream(documents, rows=rows, segment=segment)
    with pytest.raises(ValueError, match="wanted at least 5 tokens, got 4"):
        SegmentStream(good, rows=1, segment=5, drop_last_short=True)


def test_a_state_of_another_stream_is_refused() -> None:
    state = SegmentStream(make_documents([4, 5]), rows=1, segment=2).state_dict()
    with pytest.raises(ValueError, match=r"segment: wanted 3, got 2"):
        SegmentStream(make_documents([4, 5]), rows=1, segment=3).load_state_dict(state)
    other = SegmentStream(make_documents([5, 4]), rows=1, segment=2)
    with pytest.raises(ValueError, match="checksum"):
        other.load_state_dict(state)


def test_compact_documents_give_the_same_batches_and_states() -> None:
    wide = make_documents([7, 5, 9])
    one, other = (
        SegmentStream(documents, rows=2, segment=3, seed=0)
        for documents in (wide, [ids.to(torch.int32) for ids in wide])
    )
    assert all(same(a, b) and b.tokens.dtype == torch.int64 for a, b in zip(one, other, strict=True))
    assert one.state_dict() == other.state_dict()


def test_rows_without_a_document_of_their_own_are_not_taken_silently() -> None:
    with pytest.warns(RuntimeWarning, match=r"4 rows over 1 document: .* rows=1 learns the same"):
        stream = SegmentStream(make_documents([9]), rows=4, segment=3, repeat=True)
    assert stream.useful_rows == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SegmentStream(make_documents([9, 9]), rows=2, segment=3, repeat=True).useful_rows == 2
        SegmentStream(make_documents([9]), rows=4, segment=3)  # without repeat the others are empty


def test_batch_moves_as_one() -> None:
    batch = next(iter(SegmentStream(make_documents([4]), rows=1, segment=2)))
    assert {getattr(batch.to("meta"), f.name).device.type for f in dataclasses.fields(Batch)} == {"meta"}
