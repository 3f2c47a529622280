"""Backbones by name, for the command line."""

from __future__ import annotations

from typing import Any

import torch

from longmem.config import sidenet_source

from .base import Backbone
from .huggingface import huggingface_backbone

# What helped most where it was measured (docs/experiments.md); elsewhere the same share of the depth.
MEASURED_MEMORY_LAYERS = {"smollm2": tuple(range(10, 25))}


def load_backbone(name: str, device: str | torch.device = "cpu") -> tuple[Backbone, Any]:
    """A backbone and its tokenizer: "smollm2", or the folder or hub name of a `transformers` causal language model.

    Raises:
        ValueError: the model's architecture is not supported.
        OSError: there is no such model (from `transformers`).
    """
    if name == "smollm2":
        from .smollm2 import load_smollm2

        model, tokenizer = load_smollm2()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    return huggingface_backbone(model, name).to(device), tokenizer


def default_memory_layers(backbone: Backbone, sidenet: str = "none", reduction: int = 2) -> tuple[int, ...]:
    """All layers from a third to five sixths of the depth: the more read memory, the more it is worth. With a SideNet,
    those of them that its layers are copies of: each reads the keys that its queries were made for."""
    depth = len(backbone.layers)
    middle = MEASURED_MEMORY_LAYERS.get(backbone.name, range(depth // 3, max(depth * 5 // 6, depth // 3 + 1)))
    if sidenet == "none" or not 1 <= reduction <= depth:
        return tuple(middle)
    copied = [sidenet_source(sidenet, reduction, place) for place in range(depth // reduction)]
    return tuple(layer for layer in copied if layer in middle) or (copied[len(copied) // 2],)
