"""Random models under official parameter names, and the published composition beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem.official import OfficialConfig, OfficialLongMem, load_official, official_state
from longmem.official.loading import official_parameters
from longmem_bench.providers.published import TorchIndex
from longmem_bench.providers.published_model import PublishedModel

DATA = Path(__file__).parent / "data"
SMALL = {
    "vocab": 61,
    "layers": 4,
    "embed": 24,
    "ffn": 40,
    "heads": 3,
    "tokens_per_sample": 12,
    "memory_size": 96,
    "k": 8,
    "chunk": 4,
    "retrieval_layer_index": 3,
    "layer_reduction_factor": 2,
}


def small_config(**changes: Any) -> OfficialConfig:
    return OfficialConfig.from_dict(SMALL | changes)


def random_model(config: OfficialConfig, *, storage: torch.dtype = torch.float32) -> OfficialLongMem:
    """Weights so large that attention, gates and memory matter."""
    model = OfficialLongMem(config, storage=storage)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=0.3)
    return model


def composition_of(model: OfficialLongMem, *, storage: torch.dtype = torch.float32) -> PublishedModel:
    """The published composition with a copy of the model's parameters; the same ones train."""
    trained = {name for name, parameter in official_parameters(model).items() if parameter.requires_grad}
    parameters = {name: t.clone().requires_grad_(name in trained) for name, t in official_state(model).items()}
    return PublishedModel(parameters, model.config, storage=storage, index=TorchIndex)


def recorded(path: Path) -> dict[str, Tensor]:
    """Arrays of a recording; what was written as int32 or int16 as int64, text left out."""
    with np.load(path) as arrays:
        numbers = {name: arrays[name] for name in arrays.files if arrays[name].dtype.kind != "U"}
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in numbers.items()}
    return {name: t.long() if t.dtype in (torch.int16, torch.int32) else t for name, t in tensors.items()}


def recorded_text(path: Path, name: str) -> Any:
    with np.load(path) as arrays:
        return json.loads(str(arrays[name]))


__all__ = [
    "DATA",
    "SMALL",
    "composition_of",
    "load_official",
    "random_model",
    "recorded",
    "recorded_text",
    "small_config",
]
