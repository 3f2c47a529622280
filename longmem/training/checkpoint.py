"""One file that holds a whole training run, replaced atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from longmem.files import load_tensors, save_tensors

_KIND = "longmem checkpoint"


def save_checkpoint(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and a JSON header; a kill at any moment leaves the old file or the new one."""
    save_tensors(path, tensors, _KIND, about)


def load_checkpoint(path: Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header.

    Raises:
        ValueError: the file is no checkpoint, or that of a run with another `identity`; names what differs.
    """
    tensors, about = load_tensors(path, _KIND)
    if about["identity"] != identity:
        raise ValueError(
            f"checkpoint: {path} belongs to another run ({'; '.join(_differences(about['identity'], identity))});"
            " choose another folder, or remove the file to start anew"
        )
    return tensors, about


def _differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(saved.keys() | wanted.keys()):
        old, new = saved.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: saved {old}, now {new}")
    return found
