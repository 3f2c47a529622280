"""Sources of texts: documents, large text files, and the files behind paths, folders and patterns."""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

TEXT_SUFFIXES = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".zst")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
KINDS = "a file ending in .jsonl, .parquet, .txt"  # where .jsonl.gz and the like count as .jsonl
EMPTY_FOLDER = "the folder holds no file"
BLOCK = 1 << 20  # bytes or characters read at once
# What reading a file may raise that says something about the file, and nothing about this package.
READ_ERRORS = (OSError, EOFError, zlib.error, MemoryError)


class Text(Protocol):
    """A text with a name, given out in pieces."""

    @property
    def name(self) -> str: ...

    def pieces(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class Document:
    """A text that a memory may span. `name` is its file, with ":line" or ":row" (from 1) where a file holds many."""

    name: str
    text: str

    def pieces(self) -> Iterator[str]:
        for start in range(0, len(self.text), BLOCK):
            yield self.text[start : start + BLOCK]


@dataclass(frozen=True)
class TextFile:
    """A .txt file that is read when its pieces are asked for, and never held as a whole.

    `pieces` raises `Unreadable`, in their middle too.
    """

    name: str
    path: Path
    told: Callable[[int], object] | None = field(default=None, compare=False)

    def pieces(self) -> Iterator[str]:
        try:
            with open_bytes(self.path, self.told) as file:
                yield from _decoded(iter(lambda: file.read(BLOCK), b""))
        except READ_ERRORS as error:
            raise Unreadable(reason_of(error)) from None


@dataclass(frozen=True)
class Skipped:
    """Something left out, and the reason. `count`: the documents it stands for, as the rows of a damaged row group."""

    name: str
    reason: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Unreadable(Exception):
    """A text cannot be read to its end. The message is the reason, without the text's name."""


def reason_of(error: BaseException) -> str:
    """An error as a short reason on one line."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def kind_of(path: Path) -> str:
    """The ending that says how to read a file (".txt", ".jsonl", ".parquet"), whatever compresses it; "" for none."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in TEXT_SUFFIXES else ""
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


class _Counted(io.FileIO):
    """A file that tells `told` how many bytes were read of it."""

    told: Callable[[int], object] | None = None

    def readinto(self, buffer: Any, /) -> int | None:
        count = super().readinto(buffer)
        if count and self.told is not None:
            self.told(count)
        return count


def open_bytes(path: Path, told: Callable[[int], object] | None = None) -> BinaryIO:
    """Open a file for reading, decompressed where its name ends in .gz or .zst. `told` hears of the bytes on disk.

    Raises:
        OSError: it cannot be opened. Reading may raise any of `READ_ERRORS` where it is cut off or damaged.
        ImportError: a .zst file without pyarrow.
    """
    raw = _Counted(path)
    raw.told = told
    file: Any = io.BufferedReader(cast(io.RawIOBase, raw), BLOCK)
    suffix = path.suffix.lower()
    if suffix == ".gz":
        unpacked = gzip.GzipFile(fileobj=file, mode="rb")
        unpacked.myfileobj = file  # which is closed with it
        file = unpacked
    elif suffix == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raw.close()
            raise ImportError(f"read_documents: reading {path} needs pyarrow (pip install pyarrow)") from error
        file = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), BLOCK)
    return cast(BinaryIO, file)


def _decoded(blocks: Iterator[bytes]) -> Iterator[str]:
    """UTF-8 in blocks as text with line ends "\\n" and without a byte order mark. Raises `Unreadable`."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    position = characters = 0
    final = False
    while not final:
        block = next(blocks, b"")
        final = not block
        begin = position - len(utf8.getstate()[0])
        try:
            text = utf8.decode(block, final)
        except UnicodeDecodeError as error:
            raise Unreadable(not_utf8(error, begin)) from None
        if not position:
            text = text.removeprefix("\ufeff")
        position += len(block)
        if (zero := text.find("\0")) >= 0:
            raise Unreadable(f"not plain text: a zero character after {characters + zero} others")
        characters += len(text)
        if text := lines.decode(text, final):
            yield text


def not_utf8(error: UnicodeDecodeError, begin: int) -> str:
    """The reason why bytes that lie at offset `begin` of a file are left out."""
    mark = " (the file begins as UTF-16 does)" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") and not begin else ""
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {begin + error.start}{mark}"


def find_files(
    items: Iterable[str | PathLike[str]], seen: set[tuple[int, int] | str] | None = None
) -> list[Path | Skipped]:
    """The files behind paths of files and folders, and glob patterns: sorted, each once under its first name.

    Folders are walked through symbolic links; names in them that begin with a dot are not looked at. A file is known by
    its place on disk, so that links and other spellings of its path count as the same one.

    Args:
        seen: places of files found before, which are left away without a word; those found now are added.

    Returns:
        Paths, and what stands in a folder or matches a pattern but is no file that can be read.

    Raises:
        FileNotFoundError: a path does not exist, or a pattern matches nothing.
        ValueError: a path named outright is no file of a known kind, or empty.
    """
    seen = set() if seen is None else seen
    found = [entry for item in items for entry in _expand(item)]
    kept: list[Path | Skipped] = []
    for entry in sorted(found, key=lambda entry: Path(entry.name) if isinstance(entry, Skipped) else entry):
        place = _place(entry)
        if place not in seen:
            seen.add(place)
            kept.append(entry)
    return kept


def _place(entry: Path | Skipped) -> tuple[int, int] | str:
    if isinstance(entry, Skipped):
        return entry.name
    try:
        status = entry.stat()
    except OSError:  # vanished since: reading it says so
        return str(entry)
    return (status.st_dev, status.st_ino) if status.st_ino else str(entry.resolve())


def _expand(item: str | PathLike[str]) -> list[Path | Skipped]:
    if not os.fspath(item):
        raise ValueError("read_documents: wanted the path of a file or folder, got an empty one")
    try:
        path = Path(item).expanduser()
    except RuntimeError as error:  # ~nobody
        raise FileNotFoundError(f"read_documents: {item}: {error}") from None
    if path.is_dir():
        return _walk(path)
    if os.path.lexists(path):
        if not path.exists():
            raise FileNotFoundError(f"read_documents: the symbolic link {path} leads nowhere")
        if not kind_of(path) or not path.is_file():
            raise ValueError(f"read_documents: wanted {KINDS}, got {path}")
        return [path]
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(f"read_documents: no file or folder {item}")
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    if not matches:
        raise FileNotFoundError(f"read_documents: no file matches {item}")
    return [entry for match in matches for entry in (_walk(match) if match.is_dir() else [_usable(match)])]


def _walk(folder: Path) -> list[Path | Skipped]:
    found: list[Path | Skipped] = []
    waiting, visited = [folder], set()
    while waiting:
        here = waiting.pop()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in visited:  # a link to a folder above
                continue
            visited.add((status.st_dev, status.st_ino))
            names = sorted(os.listdir(here))
        except OSError as error:
            found.append(Skipped(str(here), reason_of(error)))
            continue
        paths = [here / name for name in names if not name.startswith(".")]
        waiting += [path for path in paths if path.is_dir()]
        found += [_usable(path) for path in paths if not path.is_dir()]
    return found or [Skipped(str(folder), EMPTY_FOLDER)]


def _usable(path: Path) -> Path | Skipped:
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        what = "a symbolic link that leads nowhere" if path.is_symlink() else "not readable"
        return Skipped(str(path), f"{what}: {reason_of(error)}")
    if not regular:
        return Skipped(str(path), "no regular file")
    return path if kind_of(path) else Skipped(str(path), f"wanted {KINDS}")
