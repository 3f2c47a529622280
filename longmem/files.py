"""Files that this package writes and reads: replaced atomically, and believed only after they have been checked.

What comes from a file is damaged, foreign or forged until it was compared with what is wanted. All that can be wrong
with one ends in a ValueError of one line that names the file, what was wanted and what came.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_SHOWN = 80  # characters of a value, or of another package's message


@dataclass(frozen=True)
class Whole:
    """Type of a field: an integer from `low` to `high`."""

    low: int = 0
    high: int = 2**53


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to. What is there at the end replaces `path`, with the mode that the user's umask
    gives; an error leaves the old file, and nothing beside it.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "x") as empty:
            mode = os.stat(empty.fileno()).st_mode  # what the umask leaves; safetensors would give less
        yield temporary
        os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        what = f"{error.strerror or error}; not written, what was there before is untouched"
        raise OSError(error.errno, what, str(path)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path: str | Path, tensors: dict[str, Tensor], kind: str, about: dict[str, Any]) -> None:
    """Write `tensors` and, as `kind`, the header `about`. `path` holds the old file or the new, never half.

    Raises:
        OSError: it cannot be written (no room, no permission); the old file is as it was.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, {kind: json.dumps(about)})
    except SafetensorError as error:  # how safetensors reports what the system said
        raise OSError(f"{kind}: {path} was not written, what was there before is untouched: {short(error)}") from None


def load_tensors(
    path: str | Path, kind: str, device: torch.device | str = "cpu", header: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by `save_tensors` with the same `kind`.

    Args:
        header: the fields that are needed in it, and their types (see `check_fields`).

    Raises:
        ValueError: there is no such file, it is something else or damaged, or a field is missing or of another type.
    """
    with _unbroken(path, kind), open_tensors(path, kind, device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = file.metadata()[kind]
    about = parse_json(text, f"{kind}: the header of {path}")
    return tensors, check_fields(f"{kind}: the header of {path}", about, header or {}, others=True)


def open_tensors(path: str | Path, kind: str, device: torch.device | str = "cpu") -> Any:
    """A file written by `save_tensors` with the same `kind`, open: a `safe_open` handle that reads tensors, or parts of
    them, when asked for.

    Raises:
        ValueError: there is no such file, or it is something else or damaged.
    """
    if not Path(path).is_file():
        raise ValueError(f"{kind}: there is no file {path}{' but a folder' if Path(path).is_dir() else ''}")
    with _unbroken(path, kind):
        file = safe_open(path, framework="pt", device=str(device))
        if kind not in (file.metadata() or {}):
            raise ValueError(f"{kind}: {path} is a safetensors file, but not a {kind}")
    return file


def tensors_like(file: Any, path: str | Path, kind: str) -> dict[str, Tensor]:
    """Without content, the tensors of an open file. Raises ValueError where it is damaged."""
    found = {}
    with _unbroken(path, kind):
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape = part.get_shape()
            few = part[:0] if shape else file.get_tensor(name)
            found[name] = torch.empty(shape, dtype=few.dtype, device="meta")
    return found


@contextmanager
def _unbroken(path: str | Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, AttributeError, TypeError) as error:  # the last two: a dtype it does not know
        raise ValueError(f"{kind}: {path} is no whole safetensors file ({short(error)})") from None


def load_json(path: str | Path, kind: str) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: there is no such file, or it is no JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{kind}: {path} cannot be read: {reason}") from None
    return parse_json(text, f"{kind}: {path}")


def parse_json(text: str, what: str) -> Any:
    """Raises ValueError, naming `what`, where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({short(error)})") from None


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors about values that come from a file name it: `what`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what}: {error}") from None


def check_fields(
    what: str, values: Any, wanted: Mapping[str, Any], *, optional: Collection[str] = (), others: bool = False
) -> dict[str, Any]:
    """`values`, once they are the JSON object that is wanted.

    Args:
        what: named in the error.
        wanted: field -> `Whole`, int, float (finite), str, bool, dict, Any, `[x]` for a list of x, or what annotates a
            field of a dataclass: a list or tuple of these, or a union.
        optional: fields that may be missing. others: whether there may be more fields.

    Raises:
        ValueError: names every field that is missing, unknown or of another type.
    """
    if type(values) is not dict:
        named = f" with {', '.join(wanted)}" if wanted else ""
        raise ValueError(f"{what} must be an object{named}, got {show(values)}")
    wrong = [f"{name} is missing" for name in wanted if name not in values and name not in optional]
    for name, value in values.items():
        if name in wanted and not _fits(value, wanted[name]):
            wrong.append(f"{name} must be {_type_name(wanted[name])}, got {show(value)}")
        elif name not in wanted and not others:
            wrong.append(f"{show(name)} is unknown")
    if wrong:
        raise ValueError(f"{what} does not fit: {'; '.join(wrong)}")
    return values


def fields_of(kind: type) -> tuple[dict[str, Any], set[str]]:
    """`wanted` and `optional` of `check_fields`, for what a dataclass is made from."""
    hints = typing.get_type_hints(kind)
    optional = {field.name for field in fields(kind) if not field.default is field.default_factory is MISSING}
    return {field.name: hints[field.name] for field in fields(kind)}, optional


def check_tensors(
    what: str, found: Mapping[str, Any], wanted: Mapping[str, Tensor], *, others: bool = False, any_float: bool = False
) -> None:
    """Compare names, shapes and dtypes of `found` with those of `wanted`, which may be on the meta device.

    Args:
        others: whether there may be more tensors. any_float: whether one floating dtype is as good as another.

    Raises:
        ValueError: names the tensors that are missing, superfluous, or of another shape or dtype.
    """
    wrong = [f"there should be no {show(name)}" for name in found if name not in wanted and not others]
    for name, like in wanted.items():
        tensor = found.get(name)
        if not isinstance(tensor, Tensor):
            got = "nothing" if tensor is None else type(tensor).__name__
        elif tensor.shape != like.shape or not _same_dtype(tensor, like, any_float):
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
        else:
            continue
        wrong.append(f"{name} must be {like.dtype} {tuple(like.shape)}, got {got}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{what}: {'; '.join(wrong[:3])}{more}")


def _same_dtype(a: Tensor, b: Tensor, any_float: bool) -> bool:
    return a.dtype == b.dtype or (any_float and a.is_floating_point() and b.is_floating_point())


def _fits(value: Any, wanted: Any) -> bool:
    if wanted is Any:
        return True
    if isinstance(wanted, Whole):
        return type(value) is int and wanted.low <= value <= wanted.high
    if isinstance(wanted, list):
        return type(value) is list and all(_fits(one, wanted[0]) for one in value)
    if wanted is float:
        return type(value) in (int, float) and abs(value) <= 2**1023 and math.isfinite(value)
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return type(value) is str and value in inner
    if origin in (list, tuple):
        return type(value) in (list, tuple) and all(_fits(one, inner[0]) for one in value)
    if wanted is types.NoneType:
        return value is None
    return type(value) is (origin or wanted)


def _type_name(wanted: Any) -> str:
    if isinstance(wanted, Whole):
        return f"an integer from {wanted.low} to {wanted.high}"
    if isinstance(wanted, list):
        return f"a list, each {_type_name(wanted[0])}"
    named: dict[Any, str] = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}
    named |= {dict: "an object", types.NoneType: "null"}
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_type_name, inner))
    if origin is typing.Literal:
        return f"one of {', '.join(inner)}"
    if origin in (list, tuple):
        return f"a list, each {_type_name(inner[0])}"
    return named.get(origin or wanted, str(wanted))


def show(value: Any) -> str:
    """A value that may be anything, in one line."""
    if isinstance(value, int) and abs(value) >= 2**64:  # thousands of digits have no text
        return "an integer beyond 64 bits"
    text = " ".join(repr(value).split()) if not isinstance(value, (dict, list)) else f"{type(value).__name__}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def short(error: BaseException, characters: int = _SHOWN) -> str:
    """Another package's message, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= characters else text[: characters - 3] + "..."
