"""Texts tokenised in pieces: the ids of the whole, whatever the tokenizer and the text, and no more than is needed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_families import SYLLABLES, byte_level, counting, prose, unigram, unsplit_bpe, word_piece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longmem.data.documents import Document, Skipped, TextFile
from longmem.data.sources import Unreadable
from longmem.data.stream import tokenize_documents
from longmem.data.tokens import Sizes, _Joiner, tokenize_texts

SPECIAL = "<|end|>"


@pytest.fixture(scope="module", params=[byte_level, unsplit_bpe, unigram, word_piece], ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=request.param())
    made.add_special_tokens({"additional_special_tokens": [SPECIAL]})
    return made


def nasty(draw: random.Random) -> str:
    """Prose between long runs, words without end, digits, special tokens, and characters outside the vocabulary."""
    kinds: list[Callable[[int], str]] = [
        lambda length: prose(length // 3 + 1, draw.randint(0, 99)),
        lambda length: prose(length // 3 + 1, draw.randint(0, 99)),
        lambda length: draw.choice("a 1\n\t字👍é.") * length,
        lambda length: "".join(draw.choices("ab", k=length)),
        lambda length: "".join(draw.choices(SYLLABLES, k=length // 3 + 1)),
        lambda _: draw.choice([SPECIAL, f" {SPECIAL}", "\r\n", "  \n  ", "0123456789" * 9]),
        lambda length: "".join(draw.choices("日本語中文字\u0301\u200dé🙂~", k=length)),
    ]
    parts = [draw.choice(kinds)(draw.randint(1, 300)) for _ in range(draw.randint(1, 25))]
    return draw.choice(["", " ", "\n"]).join(parts)


def in_pieces(text: str, tokenizer: Any, sizes: Sizes, enough: int | None = None) -> list[int]:
    ((_, ids),) = tokenize_texts([Document("one", text)], tokenizer, sizes=sizes, enough=enough)
    assert not isinstance(ids, Unreadable)
    return ids.tolist()


def at_once(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_pieces_give_the_ids_of_the_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = random.Random(0)
    for _ in range(60):
        text, overlap = "a" + nasty(draw), draw.choice([64, 128, 256])
        sizes = Sizes(4 * overlap + draw.randint(0, overlap), overlap, at_once=draw.choice([1, 3000, 10**6]))
        assert in_pieces(text, tokenizer, sizes) == at_once(text, tokenizer), (sizes, text)


def test_pieces_of_prose_are_joined_and_never_merged(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = prose(4000)
    joined: list[bool] = []
    join = _Joiner._join
    monkeypatch.setattr(_Joiner, "_join", lambda self, piece: joined.append(join(self, piece)) or joined[-1])
    assert in_pieces(text, tokenizer, Sizes(2048, 256, 8192)) == at_once(text, tokenizer)
    assert len(joined) == -(-(len(text) - 256) // (2048 - 256)) - 1 and all(joined)


def test_where_pieces_never_agree_the_text_is_taken_whole() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=counting())
    text = "".join(random.Random(0).choices("ab", k=5000))
    calls: list[int] = []

    class Counted(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, texts: Any, **options: Any) -> Any:
            calls.append(sum(map(len, texts)) if isinstance(texts, list) else 0)
            return super().__call__(texts, **options)

    tokenizer.__class__ = Counted
    assert in_pieces(text, tokenizer, Sizes(260, 64, 1)) == at_once(text, tokenizer)
    assert sum(calls) < 8 * len(text), "tokenised anew with every piece"


@pytest.mark.parametrize("digits", [4000, 4001, 4002])
def test_pieces_that_agreed_and_turn_out_wrong_are_given_up(digits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits in threes, counted from a number's end: pieces a multiple of three apart agree before the end is known."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "7": 1, "77": 2, "777": 3}, "<unk>"))
    threes = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(\d{3})*(?!\d))"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), threes])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    taken: list[bool] = []
    whole = _Joiner._whole
    monkeypatch.setattr(_Joiner, "_whole", lambda self: taken.append(True) or whole(self))
    text = f"{prose(200)} {'7' * digits} {prose(200)}"
    assert in_pieces(text, fast, Sizes(1056, 96, 1)) == at_once(text, fast)
    assert bool(taken) == bool((digits + len(prose(200)) + 1 - 1056) % 3)


def test_no_more_is_tokenised_than_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    text, read = prose(20_000), 0

    class Slow(Document):
        def pieces(self):
            nonlocal read
            for start in range(0, len(text), 1000):
                read += 1000
                yield text[start : start + 1000]

    wanted = at_once(text, tokenizer)
    ((_, ids),) = tokenize_texts([Slow("one", text)], tokenizer, enough=300, sizes=Sizes(4096, 256, 4096))
    assert 300 <= len(ids) < len(wanted) and ids.tolist() == wanted[: len(ids)]
    assert read < 20_000 < len(text)
    (kept,), _ = tokenize_documents([Document("one", text)], tokenizer, min_tokens=10, cut=300)
    assert kept.tolist() == wanted[:300] and kept.untyped_storage().nbytes() == 300 * 4


def test_a_large_file_is_never_held_as_a_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """And its line ends and byte order mark, cut anywhere, are those of a small one."""
    text = prose(2000).replace(",", ",\r\n").replace(" ", " é")
    path = tmp_path / "large.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    longest = 0

    class Watched(TextFile):
        def pieces(self):
            nonlocal longest
            for piece in super().pieces():
                longest = max(longest, len(piece))
                yield piece

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longmem.data.sources.BLOCK", 997)
        ((_, ids),) = tokenize_texts([Watched("large", path)], tokenizer, sizes=Sizes(2048, 256, 4096))
    assert ids.tolist() == at_once(text.replace("\r\n", "\n"), tokenizer)
    assert longest < 1000


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (b"\xff", "not UTF-8: byte 0xff at offset 11000"),
        (b"\0", "not plain text: a zero character after 11000 others"),
    ],
)
def test_what_a_large_file_holds_behind_its_beginning_leaves_it_out(
    damage: bytes, reason: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(b"abcdefghij " * 1000 + damage + b"more" * 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longmem.data.sources.BLOCK", 4096)
        found = tokenize_documents([TextFile("large", path), Document("good", "a text")], tokenizer)
    assert len(found[0]) == 1 and found[1] == [Skipped("large", reason)]
    path.write_bytes(b" \n" * 1000)
    assert tokenize_documents([TextFile("large", path), Document("good", "a text")], tokenizer)[1][0].reason == "empty"


def test_texts_that_come_twice_are_kept_once_where_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document("a", prose(50)), Document("b", prose(60, 1)), Document("c", prose(50))]
    assert len(tokenize_documents(documents, tokenizer)[0]) == 3
    kept, skipped = tokenize_documents(documents, tokenizer, distinct=True)
    assert len(kept) == 2 and skipped == [Skipped("c", "the same text as a")]
    same_beginning = [Document("a", prose(50) + " and so"), Document("b", prose(50) + " or else")]
    kept, skipped = tokenize_documents(same_beginning, tokenizer, cut=40, distinct=True)
    assert len(kept) == 1 and skipped == [Skipped("b", "the same text as a")]
