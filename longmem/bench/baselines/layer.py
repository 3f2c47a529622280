"""The whole memory layer by compositions of other libraries' parts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import LayerInputs
from ..providers import Prepared, Provider, eager_bytes, too_large
from ..shapes import Shape
from .write import EVICTION_NOTE, why_no_index_copy, why_no_official


def providers() -> list[Provider]:
    return [
        Provider("torch matmul + topk, eager, index_copy", _prepare_torch, _why_no_torch),
        Provider("official: faiss, gather, eager, cat-shift", _prepare_official, _why_no_official, own_memory=True),
    ]


def _why_no_torch(shape: Shape, device: torch.device) -> str | None:
    return why_no_index_copy(shape, device) or too_large(eager_bytes(shape), device)


def _why_no_official(shape: Shape, device: torch.device) -> str | None:
    return why_no_official(shape, device) or too_large(eager_bytes(shape), device)


def _prepare_torch(inputs: LayerInputs) -> Prepared:
    from ..layer import TorchLayer

    layer = TorchLayer(inputs)
    return Prepared(layer.step, layer.collect, layer=layer)


def _prepare_official(inputs: LayerInputs) -> Prepared:
    from ..layer import OfficialLayer

    layer = OfficialLayer(inputs)

    def two_steps() -> Tensor:
        out = layer.step()
        layer.step()
        return out

    return Prepared(two_steps, layer.collect, repeat=2, note=EVICTION_NOTE, layer=layer)
