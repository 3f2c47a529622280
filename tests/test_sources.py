"""Damaged records and files, files that are not there, and files under several names: the rest is used."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_families import byte_level
from transformers import PreTrainedTokenizerFast

from longmem import console
from longmem.data import formats
from longmem.data.documents import Corpus, Document, Skipped, read_documents

GOOD = b'{"text": "good"}\n'
RECORDS: dict[str, tuple[bytes, str]] = {
    "a number of 5000 digits": (b'{"text": "x", "id": ' + b"7" * 5000 + b"}", "not JSON that Python reads: Exceeds"),
    "nested deeply": (b'{"text": "x", "y": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "nested objects": (b'{"text": ' * 100_000, "nested too deeply"),
    "cut off": (b'{"text": "x', "not JSON"),
    "a zero byte": (b'{"text": "x\0y"}', "not JSON"),
    "zero bytes alone": (b"\0" * 100, "not JSON"),
    "half a surrogate pair": (b'{"text": "x\\ud83d"}', "lone surrogate at character 1"),
    "half a surrogate pair as a name": (b'{"\\ud83d": "x"}', "no field 'text'"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9"),
    "the field twice": (b'{"text": "x", "text": "y"}', "one field 'text' wanted, got 2 of them"),
    "no object": (b'["text"]', "got a JSON list"),
    "a string": (b'"text"', "got a JSON str"),
    "null": (b"null", "got a JSON NoneType"),
    "not a number": (b'{"text": NaN}', "wanted a string, got float"),
    "a text that is null": (b'{"text": null}', "wanted a string, got null"),
    "a text that is an object": (b'{"text": {"a": "b"}}', "wanted a string, got object"),
    "many names": (json.dumps(dict.fromkeys(map(str, range(10_000)))).encode(), "..."),
    "a blank text": (b'{"text": " \\n"}', "empty"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_record_is_left_out_and_named(name: str, tmp_path: Path) -> None:
    record, reason = RECORDS[name]
    path = tmp_path / "many.jsonl"
    path.write_bytes(GOOD + record + b"\n" + GOOD)
    documents, skipped = read_documents(path)
    assert documents == [Document(f"{path}:1", "good"), Document(f"{path}:3", "good")]
    (left_out,) = skipped
    assert left_out.name == f"{path}:2" and reason in left_out.reason and len(left_out.reason) < 300


@pytest.mark.parametrize(
    "record", [b'\xef\xbb\xbf{"text": "x"}', b'{"a": NaN, "b": 1e999, "text": "x", "a": 2}', b'{"text": "x"}\r']
)
def test_an_odd_record_is_used(record: bytes, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(record)
    assert [item.text for item in read_documents(tmp_path)[0]] == ["x"]


def test_a_line_without_end_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST_LINE", 1000)
    path = tmp_path / "many.jsonl"
    path.write_bytes(GOOD + b'{"text": "' + b"x" * 3_000_000 + b'"}\n' + GOOD)
    documents, skipped = read_documents(path)
    assert [item.name for item in documents] == [f"{path}:1", f"{path}:3"]
    assert skipped == [Skipped(f"{path}:2", "a line of 3,000,013 bytes, wanted at most 1,000")]


def test_of_many_bad_records_some_are_named_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "NAMED", 3)
    (tmp_path / "many.jsonl").write_bytes(b"oops\n" * 10 + GOOD)
    documents, skipped = read_documents(tmp_path)
    assert len(documents) == 1 and len(skipped) == 4 and sum(item.count for item in skipped) == 10
    assert skipped[-1].reason == "7 more records"


# --- compressed files ---


def zst(data: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(data, "zstd", asbytes=True)


COMPRESSORS = pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zst)])


@COMPRESSORS
def test_compressed_files_are_read(suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(GOOD) + compress(GOOD))
    (tmp_path / f"b.TXT{suffix}").write_bytes(compress(b"a\r\ntext"))
    (tmp_path / f"c.tar{suffix}").write_bytes(compress(b"x"))
    documents, skipped = read_documents(tmp_path)
    assert [item.text for item in documents] == ["good", "good", "a\ntext"]
    assert [Path(item.name).name for item in skipped] == [f"c.tar{suffix}"]


@COMPRESSORS
def test_damaged_compressed_files_are_used_up_to_the_damage(
    suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(60_000))
    whole = compress(lines)
    flipped = bytearray(whole)
    for i in range(len(whole) * 3 // 4, len(whole) * 3 // 4 + 40):
        flipped[i] ^= 0xFF
    for name, data in {"cut": whole[: len(whole) * 3 // 4], "flipped": bytes(flipped)}.items():
        path = tmp_path / name / f"many.jsonl{suffix}"
        path.parent.mkdir()
        path.write_bytes(data)
        (path.parent / "good.txt").write_text("good")
        documents, skipped = read_documents(path.parent)
        assert documents[0].text == "good" and len(documents) > 10_000, name
        assert skipped and (name != "cut" or "cut off or damaged from here on" in skipped[-1].reason), name
    (tmp_path / f"text.txt{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"none.jsonl{suffix}").write_bytes(b"not compressed")
    documents, skipped = read_documents([tmp_path / "cut" / "good.txt", *tmp_path.glob(f"*{suffix}")])
    assert len(documents) == 1 and len(skipped) == 2
    (tmp_path / f"text.txt{suffix}").write_bytes(b"")
    assert len(read_documents([tmp_path / "cut" / "good.txt", tmp_path / f"text.txt{suffix}"])[1]) == 1


# --- Parquet ---


def parquet_bytes(column: Any, **options: Any) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": column}), file, **options)
    return file.getvalue()


def read_parquet(data: bytes, folder: Path) -> tuple[list[str], list[Skipped]]:
    (folder / "a.parquet").write_bytes(data)
    (folder / "good.txt").write_text("good")
    documents, skipped = read_documents(folder)
    assert documents[-1].text == "good"
    return [item.text for item in documents[:-1]], skipped


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "dictionary"])
def test_parquet_columns_of_any_kind_of_string(kind: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array(["one", None, "caf\u00e9", "one"])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    texts, skipped = read_parquet(parquet_bytes(column), tmp_path)
    assert texts == ["one", "caf\u00e9", "one"]
    assert skipped == [Skipped(f"{tmp_path}/a.parquet:2", "field 'text': wanted a string, got null")]


def test_parquet_columns_that_hold_no_strings_are_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    for column in ([["a"], ["b"]], [{"a": "b"}] * 2, [1, 2], pyarrow.nulls(2)):
        texts, (skipped,) = read_parquet(parquet_bytes(column), tmp_path)
        assert not texts and "column 'text': wanted strings, got" in skipped.reason and skipped.count == 2
    assert read_parquet(parquet_bytes(pyarrow.array([], pyarrow.string())), tmp_path)[1][0].reason == "empty"


def test_parquet_strings_that_are_not_utf8_are_left_out_alone(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 3, 6))
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"one\xe9\xe8\xe7")]
    texts, (skipped,) = read_parquet(parquet_bytes(pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)), tmp_path)
    assert texts == ["one"] and skipped.name.endswith("a.parquet:2") and "byte 0xe9 at offset 0" in skipped.reason


@pytest.mark.parametrize(
    "options", [{}, {"compression": "none", "write_page_checksum": True}], ids=["snappy", "checksum"]
)
def test_the_row_groups_beside_a_damaged_one_are_used(options: dict[str, Any], tmp_path: Path) -> None:
    column = [f"text {i} {os.urandom(8).hex()}" for i in range(900)]
    data = parquet_bytes(column, row_group_size=300, use_dictionary=False, **options)
    from pyarrow import parquet

    place = parquet.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0).data_page_offset
    damaged = bytearray(data)
    for i in range(place + 60, place + 400):
        damaged[i] ^= 0xFF
    texts, skipped = read_parquet(bytes(damaged), tmp_path)
    assert texts == column[:300] + column[600:]
    (left_out,) = skipped
    assert left_out.name == f"{tmp_path}/a.parquet:301-600" and left_out.count == 300
    assert "row group 1 not readable as Parquet" in left_out.reason


def test_parquet_files_damaged_anywhere_end_nothing(tmp_path: Path) -> None:
    data = parquet_bytes([f"text {i}" for i in range(200)], row_group_size=50)
    for cut in (0, 3, 4, 100, len(data) // 2, len(data) - 9, len(data) - 1):
        texts, skipped = read_parquet(data[:cut], tmp_path)
        assert not texts and len(skipped) == 1
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        texts, skipped = read_parquet(bytes(damaged), tmp_path)
        assert len(texts) + sum(item.count for item in skipped) >= 1


# --- what stands in a folder ---


def test_what_is_no_file_to_read_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "folder.txt" / "inside.txt").write_text("inside")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "folder.txt" / "above").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("good", "vanished", "forbidden"):
        (tmp_path / f"{name}.txt").write_text(name)
    is_open = formats.TextFile.pieces

    def pieces(self: formats.TextFile) -> Any:
        if "vanished" in self.name:
            self.path.unlink()
        if "forbidden" in self.name:  # as root, no file is
            monkeypatch.setattr("longmem.data.sources._Counted", _forbidden)
        try:
            yield from is_open(self)
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(formats.TextFile, "pieces", pieces)

    monkeypatch.setattr(formats.TextFile, "pieces", pieces)
    for found in (tmp_path, str(tmp_path / "*")):
        documents, skipped = read_documents(found)
        assert sorted(item.text for item in documents) == ["good", "inside"]
        reasons = {Path(item.name).name: item.reason for item in skipped}
        wanted = {
            "broken.txt": "leads nowhere",
            "loop.txt": "leads nowhere",
            "pipe.txt": "no regular file",
            "vanished.txt": "No such file",
            "forbidden.txt": "Permission denied",
        }
        assert reasons.keys() == wanted.keys()
        assert all(reason in reasons[name] for name, reason in wanted.items()), reasons
        (tmp_path / "vanished.txt").write_text("again")


def _forbidden(path: Path) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def test_a_file_under_several_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("text")
    (folder / "a.txt").symlink_to(folder / "b.txt")
    (folder / "c.txt").hardlink_to(folder / "b.txt")
    (tmp_path / "other").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names = ["folder/b.txt", tmp_path / "folder", "folder/../folder/c.txt", "other", "other/*.txt"]
    for paths in (names, names[::-1]):
        documents, skipped = read_documents(paths)
        assert len(documents) == 1 and not skipped
    assert read_documents(folder)[0][0].name == str(folder / "a.txt"), "the first name"


@pytest.mark.parametrize(
    "name", ["", "nowhere", "nowhere/*.txt", "broken.txt", "~nobody-of-that-name/a.txt", "pipe.txt"]
)
def test_a_path_that_leads_nowhere_is_a_mistake(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "broken.txt").symlink_to("nowhere.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match="read_documents: "):
        read_documents(["good.txt", name])


# --- several sources of a command ---


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level())


def test_several_sources_some_of_them_empty(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, nothing = tmp_path / "texts", tmp_path / "nothing"
    folder.mkdir(), nothing.mkdir()
    (folder / "a.txt").write_text("one good text")
    (tmp_path / "copy.txt").write_text("one good text")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_bytes(b"oops\n{}\n" + GOOD)
    sources = [tmp_path / "bad.jsonl", folder, folder / "a.txt", tmp_path / "empty.txt", nothing, tmp_path / "copy.txt"]
    tokens = console.load_documents(list(map(str, sources)), "train", tokenizer, min_tokens=1)
    texts = [tokenizer.decode(ids).strip() for ids in tokens]
    assert texts == ["good", "one good text"], "in the order of the sources"
    shown = capsys.readouterr().err
    for name, reason in (
        ("bad.jsonl:1", "not JSON"),
        ("bad.jsonl:2", "no field"),
        ("empty.txt", "empty"),
        ("nothing", "holds no file"),
        ("copy.txt", f"the same text as {folder / 'a.txt'}"),
    ):
        assert any(name in line and reason in line for line in shown.splitlines()), (name, shown)
    assert "train: 2 documents of 7," in shown
    with pytest.raises(ValueError, match=r"got none\n.*empty.txt: empty"):
        console.load_documents([str(tmp_path / "empty.txt"), str(nothing)], "train", tokenizer, min_tokens=1)
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*tets"):
        console.load_documents([str(folder), str(tmp_path / "tets")], "train", tokenizer, min_tokens=1)


def test_corpora_and_files_together(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [[Document(f"{part} {i}", f"{part} {i}") for i in "ab"] for part in ("train", "valid", "test")]
    monkeypatch.setattr(console, "named_corpus", lambda name: Corpus(*parts))
    (tmp_path / "a.txt").write_text("my own")

    def texts(documents: list[Any]) -> list[str]:
        return [tokenizer.decode(ids).strip() for ids in documents]

    both = [str(tmp_path / "a.txt"), "shakespeare", "shakespeare"]
    assert texts(console.load_documents(both, "test", tokenizer, min_tokens=1)) == ["my own", "test a", "test b"]
    train, held_out = console.split_documents(both, tokenizer, 2, min_tokens=1)
    assert texts(train) == ["my own", "train a", "train b", "valid a", "valid b"]
    assert texts(held_out) == ["test a", "test b"]
    train, held_out = console.split_documents(["shakespeare"], tokenizer, 1, min_tokens=1)
    assert (texts(train), texts(held_out)) == (["train a", "train b"], ["test a"])
    with pytest.raises(ValueError, match="at least 1 document to hold out, got 0"):
        console.split_documents(both, tokenizer, 0, min_tokens=1)
