"""One file of any known kind as documents: what cannot be read of it is left out and named, the rest is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from longmem.data.sources import (
    COMPRESSIONS,
    READ_ERRORS,
    Document,
    Skipped,
    TextFile,
    Unreadable,
    kind_of,
    not_utf8,
    open_bytes,
    reason_of,
)

LARGE = 1 << 23  # bytes of a .txt file from which it is read piece by piece
LONGEST_LINE = 1 << 30  # bytes; a record so long is no document
NAMED = 1000  # records of one file that are named where they are left out; more are counted
ROWS = 256  # of a Parquet file, read at once


def read_file(
    path: Path, text_field: str = "text", told: Callable[[int], object] | None = None
) -> Iterator[Document | TextFile | Skipped]:
    """The documents of a file, one after another as they are read, and what is left out of it.

    A .txt file from 8 MiB on, or compressed, is given out as `TextFile`, whose text is read when it is asked for.
    `told` hears how many bytes of the file were read.
    """
    try:
        kind = kind_of(path)
        if kind == ".jsonl":
            yield from _bounded(path, _read_jsonl(path, text_field, told))
        elif kind == ".parquet":
            yield from _bounded(path, _read_parquet(path, text_field, told))
        else:
            text = TextFile(str(path), path, told)
            lazy = path.suffix.lower() in COMPRESSIONS or path.stat().st_size >= LARGE  # unpacked it may be large
            yield text if lazy else whole_text(text)
    except READ_ERRORS as error:
        yield Skipped(str(path), reason_of(error))


def _bounded(path: Path, items: Iterator[Document | TextFile | Skipped]) -> Iterator[Document | TextFile | Skipped]:
    """Bounds the records that are named of a file in which hardly anything can be used."""
    named = more = 0
    for item in items:
        if not isinstance(item, Skipped):
            yield item
        elif named < NAMED:
            named += 1
            yield item
        else:
            more += item.count
    if more:
        yield Skipped(str(path), f"{more:,} more records", count=more)


def whole_text(file: TextFile) -> Document | Skipped:
    """The text of a file as a document that is held in memory."""
    try:
        return _document(file.name, "".join(file.pieces()))
    except Unreadable as error:
        return Skipped(file.name, str(error))


def _document(name: str, text: str) -> Document | Skipped:
    if not text or text.isspace():
        return Skipped(name, "empty")
    return Document(name, text.replace("\r\n", "\n").replace("\r", "\n"))


def _read_jsonl(
    path: Path, text_field: str, told: Callable[[int], object] | None
) -> Iterator[Document | TextFile | Skipped]:
    start = number = records = 0
    with open_bytes(path, told) as file:
        while True:
            number += 1
            try:
                line, length = _next_line(file)
            except READ_ERRORS as error:
                yield Skipped(f"{path}:{number}", f"cut off or damaged from here on: {reason_of(error)}")
                return
            if not length:
                break
            if line is None:
                records += 1
                yield Skipped(f"{path}:{number}", f"a line of {length:,} bytes, wanted at most {LONGEST_LINE:,}")
            elif line.strip():
                records += 1
                yield _read_json_line(f"{path}:{number}", line, start, text_field)
            start += length
    if not records:
        yield Skipped(str(path), "empty")


def _next_line(file: Any) -> tuple[bytes | None, int]:
    """The next line and its length; None for a line that is too long to be held."""
    line = file.readline(LONGEST_LINE + 1)
    length = len(line)
    if length <= LONGEST_LINE:
        return line, length
    while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
        length += len(line)
    return None, length


class _Object(list[tuple[str, Any]]):
    """A JSON object as it stands in the text: a name may stand twice."""


def _read_json_line(name: str, line: bytes, start: int, text_field: str) -> Document | Skipped:
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        return Skipped(name, not_utf8(error, start))
    try:
        record = json.loads(text, object_pairs_hook=_Object)
    except RecursionError:
        return Skipped(name, "not JSON that Python reads: nested too deeply")
    except json.JSONDecodeError as error:
        return Skipped(name, f"not JSON: {error}")
    except (ValueError, MemoryError) as error:  # a number of thousands of digits
        return Skipped(name, f"not JSON that Python reads: {reason_of(error)}")
    if not isinstance(record, _Object):
        return Skipped(name, f"no field {text_field!r}, got a JSON {type(record).__name__}")
    values = [value for key, value in record if key == text_field]
    if len(values) != 1:
        got = f"{len(values)} of them" if values else _shortened(f"the fields {sorted({key for key, _ in record})}")
        return Skipped(name, f"{'one' if values else 'no'} field {text_field!r}{' wanted' * bool(values)}, got {got}")
    return _document_of(name, values[0], text_field)


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def _document_of(name: str, value: object, text_field: str) -> Document | Skipped:
    if not isinstance(value, str):
        got = {_Object: "object", type(None): "null"}.get(type(value), type(value).__name__)
        return Skipped(name, f"field {text_field!r}: wanted a string, got {got}")
    try:
        value.encode("utf-8")  # JSON can write half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        return Skipped(name, f"not UTF-8: lone surrogate at character {error.start}")
    return _document(name, value)


def _read_parquet(
    path: Path, text_field: str, told: Callable[[int], object] | None
) -> Iterator[Document | TextFile | Skipped]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"read_documents: reading {path} needs pyarrow (pip install pyarrow)") from error
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        wrong = _wrong_column(file.schema_arrow, text_field)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    except Exception as error:  # pyarrow's decoders raise anything over damaged bytes
        yield Skipped(str(path), f"not readable as Parquet: {reason_of(error)}")
        return
    with file:
        if wrong or not sum(sizes):
            yield Skipped(str(path), wrong or "empty", count=max(sum(sizes), 1))
            return
        before = 0
        for group, size in enumerate(sizes):
            yield from _read_row_group(file, path, group, before, size, text_field)
            before += size
    if told is not None:
        told(path.stat().st_size)


def _wrong_column(schema: Any, text_field: str) -> str | None:
    """Why texts cannot be read from the column; None where they can."""
    from pyarrow import types

    places = schema.get_all_field_indices(text_field)
    if len(places) != 1:
        got = f"{len(places)} of them" if places else _shortened(str(schema.names))
        return f"{'one' if places else 'no'} column {text_field!r}{' wanted' * bool(places)}, got {got}"
    kind = schema.field(places[0]).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    known = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if any(getattr(types, f"is_{name}")(values) for name in known if hasattr(types, f"is_{name}")):
        return None
    return f"column {text_field!r}: wanted strings, got {_shortened(str(kind))}"


def _read_row_group(
    file: Any, path: Path, group: int, before: int, size: int, text_field: str
) -> Iterator[Document | Skipped]:
    done = 0
    try:
        for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=[text_field]):
            for scalar in batch.column(0):
                name = f"{path}:{before + done + 1}"
                done += 1
                yield _document_of_scalar(name, scalar, text_field)
    except Exception as error:  # as above; the other row groups may be whole
        rows = f"{before + done + 1}-{before + size}"
        reason = f"row group {group} not readable as Parquet: {reason_of(error)}"
        yield Skipped(f"{path}:{rows}", reason, count=max(size - done, 1))


def _document_of_scalar(name: str, scalar: Any, text_field: str) -> Document | Skipped:
    scalar = getattr(scalar, "value", scalar)  # of a dictionary
    if scalar is None or not scalar.is_valid:
        return _document_of(name, None, text_field)
    data = scalar.as_buffer().to_pybytes()  # not as_py: whether the bytes are UTF-8 nobody has checked
    try:
        return _document(name, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Skipped(name, f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} of the text")
