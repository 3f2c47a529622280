"""Tables of tile sizes and launch options of the Triton kernels: `tiles/sm_80.json` and `tiles/sm_90.json`.

A table names kernels. Each has `rows`, of which the first that fits a launch is used, and `candidates`, which `longmem
bench tune` times:

    "some_kernel": {
     "rows": [
      {"dtype": "half", "D": 64, "use": {"BT": 128, "BS": 64, "num_warps": 8, "num_stages": 3}},
      {"use": {"BT": 64, "BS": 32, "num_warps": 8, "num_stages": 2}}
     ],
     "candidates": [
      {"dtype": "half", "try": {"BT": [64, 128], "BS": [32, 64], "num_warps": [4, 8], "num_stages": [2, 3]}}
     ]
    }

What stands beside `use` or `try` are conditions on the facts that the launcher gives: a number is the largest that
fits, a text or a truth value must be equal. `try` is a grid: all combinations are candidates.

LONGMEM_TILES names a file of the same form, or one that `longmem-bench tune --json` wrote; its rows come first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, wraps
from itertools import product
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch

Use: TypeAlias = dict[str, Any]
"""What a launch is made with: tile sizes by the names of the kernel's constants, and `num_warps`, `num_stages` and
`maxnreg` as Triton knows them."""

Facts: TypeAlias = Mapping[str, int | str | bool]

FOLDER = Path(__file__).parent / "tiles"
ARCHITECTURES = (80, 90)  # compute capability 8.0 and 9.0
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
"""Shared memory that a block can have on every GPU that uses the table."""


_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Lookup:
    """A launch that asked for its row: of which kernel, with which facts, and what it was given."""

    kernel: str
    architecture: int
    facts: tuple[tuple[str, int | str | bool], ...]
    use: tuple[tuple[str, Any], ...]

    @property
    def conditions(self) -> dict[str, Any]:
        """Conditions of the row that fits."""
        row = _row(self.kernel, self.architecture, dict(self.facts))
        return {name: value for name, value in row.items() if name != "use"}


_forced: dict[str, Use] = {}
_noted: list[Lookup] | None = None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of Hopper for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def architecture(capability: tuple[int, int]) -> int:
    """The table for a GPU of this capability: the newest that is not newer, or the oldest."""
    number = 10 * capability[0] + capability[1]
    return max((known for known in ARCHITECTURES if known <= number), default=ARCHITECTURES[0])


def kind(dtype: torch.dtype) -> str:
    """ "float32" or "half" (16 bits): what tables tell apart, for it decides about tensor cores and registers."""
    return "float32" if dtype == torch.float32 else "half"


def choose(kernel: str, capability: tuple[int, int], **facts: int | str | bool) -> Use:
    """Tile sizes and launch options for `kernel` on a GPU of this capability; not to be changed by the caller.

    Raises:
        KeyError: the table does not name the kernel, or no row of it fits.
    """
    found = _forced.get(kernel) or _chosen(kernel, architecture(capability), tuple(facts.items()))
    if _noted is not None:
        _noted.append(Lookup(kernel, architecture(capability), tuple(facts.items()), tuple(found.items())))
    return found


def planned(make: Callable[_P, _T]) -> Callable[_P, _T]:
    """`make`, a function of a launch's facts alone that asks `choose`, with its results kept: a call like an earlier
    one plans nothing again. Within `forced` and `noted` it does. The caller must not change what it gets."""
    kept: Callable[..., _T] = lru_cache(maxsize=4096)(make)

    @wraps(make)
    def plan(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if _forced or _noted is not None:
            return make(*args, **kwargs)
        return kept(*args, **kwargs)

    return plan


# Triton's `cdiv` and `next_power_of_2` are made for kernels: called on the host, each takes a microsecond or two.


def blocks(length: int, size: int) -> int:
    """How many blocks of `size` cover `length`."""
    return -(-length // size)


def power_of_2(length: int) -> int:
    """The smallest power of 2 that is not less than `length`, which is at least 1."""
    return 1 << (length - 1).bit_length()


@cache
def _chosen(kernel: str, number: int, facts: tuple[tuple[str, int | str | bool], ...]) -> Use:
    return dict(_row(kernel, number, dict(facts))["use"])


def _row(kernel: str, number: int, facts: Facts) -> dict[str, Any]:
    for row in (*_own(number).get(kernel, {}).get("rows", ()), *table(number)[kernel]["rows"]):
        if _fits(row, facts):
            return row
    raise KeyError(f"tiles of sm_{number}: no row of {kernel} fits {dict(facts)}")


def _fits(row: Mapping[str, Any], facts: Facts) -> bool:
    for name, wanted in row.items():
        if name in ("use", "try"):
            continue
        got = facts[name]
        if isinstance(wanted, int) and not isinstance(wanted, bool) and not isinstance(got, str):
            if got > wanted:
                return False
        elif got != wanted:
            return False
    return True


def candidates(kernel: str, number: int, facts: Facts) -> list[Use]:
    """Tiles that `longmem-bench tune` tries for a launch with these facts: the row in use, then the grid that fits."""
    found = [dict(_row(kernel, number, facts)["use"])]
    for grid in table(number)[kernel].get("candidates", ()):
        if _fits(grid, facts):
            names = grid["try"]
            tried = (dict(zip(names, values, strict=True)) for values in product(*names.values()))
            found += [use for use in tried if use not in found]
            break
    return found


@contextmanager
def forced(uses: Mapping[str, Use]) -> Iterator[None]:
    """Kernels named here are launched with this, whatever the table says."""
    before = dict(_forced)
    _forced.update(uses)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def noted() -> Iterator[list[Lookup]]:
    """A list of the lookups of the block."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


@cache
def table(number: int) -> dict[str, Any]:
    """The table of architecture sm_`number`, as its file has it."""
    path = FOLDER / f"sm_{number}.json"
    return _checked(json.loads(path.read_text(encoding="utf-8")), path)


@cache
def _own(number: int) -> dict[str, Any]:
    """The user's rows for this architecture."""
    name = os.environ.get("LONGMEM_TILES")
    if not name:
        return {}
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
        content = content.get("tiles", content)
        return _checked(content.get(f"sm_{number}", {}), name)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"LONGMEM_TILES: {name} holds no tables of tiles: {error}") from None


def _checked(content: Any, path: Path | str) -> dict[str, Any]:
    """Raises ValueError, naming file and kernel, for a row of another form."""
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted kernels by name, got {type(content).__name__}")
    for kernel, entry in content.items():
        rows = entry.get("rows") if isinstance(entry, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and _is_use(row.get("use")) for row in rows):
            raise ValueError(f'{path}: {kernel} wants "rows", each with "use": sizes by name')
    return content


def _is_use(use: Any) -> bool:
    return isinstance(use, dict) and all(value is None or type(value) is int for value in use.values())


def with_row(content: dict[str, Any], kernel: str, conditions: Mapping[str, Any], use: Use) -> None:
    """Put `use` into the row of `kernel` with these conditions, or add such a row in front."""
    rows = content.setdefault(kernel, {}).setdefault("rows", [])
    for row in rows:
        if {name: value for name, value in row.items() if name != "use"} == dict(conditions):
            row["use"] = use
            return
    rows.insert(0, {**conditions, "use": use})


def as_text(content: Mapping[str, Any]) -> str:
    """A table as it is kept: one row a line."""
    kernels = []
    for kernel, entry in content.items():
        parts = [
            f'  "{part}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
            for part, rows in entry.items()
        ]
        kernels.append(f' "{kernel}": {{\n' + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"
