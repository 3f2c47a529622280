"""Safetensors files with a JSON header that says what they are, replaced atomically."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: str | Path, tensors: dict[str, Tensor], kind: str, about: dict[str, Any]) -> None:
    """Write `tensors` and, as `kind`, the header `about`. `path` holds the old file or the new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, {kind: json.dumps(about)})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_tensors(
    path: str | Path, kind: str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by `save_tensors` with the same `kind`.

    Raises:
        ValueError: there is no such file, or it is something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{kind}: there is no file {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = (file.metadata() or {}).get(kind)
            if header is None:
                raise ValueError(f"{kind}: {path} is a safetensors file, but not a {kind}")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header)  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{kind}: {path} is no whole safetensors file ({error})") from None


def save_text(path: str | Path, text: str) -> None:
    """Write a small file. `path` holds the old text or the new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
