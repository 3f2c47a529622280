"""Backbones by name, for the command line, and finding again the one that a run was trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from longmem.config import sidenet_source

from .base import Backbone, check_backbone
from .huggingface import huggingface_backbone

# What helped most where it was measured (docs/experiments.md); elsewhere the same share of the depth.
MEASURED_MEMORY_LAYERS = {"smollm2": tuple(range(10, 25))}


def load_backbone(name: str, device: str | torch.device = "cpu") -> tuple[Backbone, Any]:
    """A backbone and its tokenizer.

    Args:
        name: "smollm2"; the folder of a `transformers` causal language model, or its hub name where there is no such
            folder; a GGUF file, or a folder that holds one and no other model. What is read from GGUF is float32.

    Raises:
        ValueError: the model's architecture is not supported; a path where nothing is; a GGUF file that cannot be read,
            or several.
        OSError: there is no such model (from `transformers`).
    """
    if not name:
        raise ValueError("load_backbone: wanted the name of a backbone, got an empty one")
    path = Path(name).expanduser()
    if name == "smollm2":
        from .smollm2 import load_smollm2

        model, tokenizer = load_smollm2()
    elif file := _gguf_file(path):
        from .gguf import load_gguf

        model, tokenizer = load_gguf(file)
    elif not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise ValueError(f"load_backbone: there is no folder or GGUF file {name}")
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = path if path.exists() else name
        model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    return huggingface_backbone(model, name).to(device), tokenizer


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that is meant by `path`, None where it is another kind of model.

    Raises:
        ValueError: there are several to choose from, or none of that name.
    """
    if path.is_file():
        return path
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        raise ValueError(f"load_backbone: there is no GGUF file {path}")
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"load_backbone: {path} holds {len(found)} GGUF files, name one of them: {names}")
    return found[0] if found else None


def place_of(name: str, run: Path) -> dict[str, str]:
    """Returns what a run keeps in order to find its backbone again: where the file or folder of this name is, as an
    absolute path and, where there is one, relative to the folder `run`. Empty for hub names and "smollm2"."""
    path = Path(name).expanduser().absolute()
    if name == "smollm2" or not path.exists():
        return {}
    try:
        return {"absolute": str(path), "relative": os.path.relpath(path, run.absolute())}
    except ValueError:  # on another drive
        return {"absolute": str(path)}


def find_backbone(name: str, place: Any, run: Path) -> str:
    """Returns the name to load a run's backbone by: of what `place_of` gave, the first path where something is: the
    absolute one, then that from the folder `run`, then `name` from the working directory. Without a place, `name`.

    Raises:
        ValueError: nothing is at any of them, or `place` is damaged.
    """
    if place == {}:
        return name
    if not isinstance(place, dict) or not isinstance(place.get("absolute"), str):
        raise ValueError(f"{run} is damaged: wanted the place of its backbone, got {place!r}")
    tried = [Path(place["absolute"])]
    if isinstance(place.get("relative"), str):
        tried.append(Path(os.path.normpath(run.absolute() / place["relative"])))
    tried.append(Path(name).expanduser().absolute())
    for path in tried:
        if path.exists():
            return str(path)
    places = ", ".join(dict.fromkeys(map(str, tried)))
    raise ValueError(f"the backbone {name!r} of {run} is gone; tried {places}; name its new place (--backbone)")


def default_memory_layers(backbone: Backbone, sidenet: str = "none", reduction: int = 2) -> tuple[int, ...]:
    """All layers from a third to five sixths of the depth: the more read memory, the more it is worth. With a SideNet,
    those of them that its layers are copies of: each reads the keys that its queries were made for."""
    check_backbone("default_memory_layers", backbone)
    depth = len(backbone.layers)
    middle = MEASURED_MEMORY_LAYERS.get(backbone.name, range(depth // 3, max(depth * 5 // 6, depth // 3 + 1)))
    if sidenet == "none" or not 1 <= reduction <= depth:
        return tuple(middle)
    copied = [sidenet_source(sidenet, reduction, place) for place in range(depth // reduction)]
    return tuple(layer for layer in copied if layer in middle) or (copied[len(copied) // 2],)
