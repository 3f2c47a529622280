"""LongMem: a frozen language model with a long-term memory, on `longmem_kernels`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longmem_kernels import __version__

    from .backbones import Backbone, PaperGPTConfig, huggingface_backbone, paper_gpt
    from .backbones.load import default_memory_layers
    from .config import LongMemConfig
    from .memory import MemoryBank
    from .model import LongMem, Output
    from .sharded import ShardedMemoryBank

# Loaded when first asked for: `longmem --help` answers without PyTorch.
_MODULES = {
    "Backbone": "longmem.backbones",
    "LongMem": "longmem.model",
    "LongMemConfig": "longmem.config",
    "MemoryBank": "longmem.memory",
    "Output": "longmem.model",
    "PaperGPTConfig": "longmem.backbones",
    "ShardedMemoryBank": "longmem.sharded",
    "__version__": "longmem_kernels",
    "default_memory_layers": "longmem.backbones.load",
    "huggingface_backbone": "longmem.backbones",
    "paper_gpt": "longmem.backbones",
}

__all__ = [
    "Backbone",
    "LongMem",
    "LongMemConfig",
    "MemoryBank",
    "Output",
    "PaperGPTConfig",
    "ShardedMemoryBank",
    "__version__",
    "default_memory_layers",
    "huggingface_backbone",
    "paper_gpt",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'longmem' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
