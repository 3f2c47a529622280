"""LongMem: a frozen language model with a long-term memory, on `longmem_kernels`."""

from longmem_kernels import __version__

from .backbones import Backbone, PaperGPTConfig, huggingface_backbone, paper_gpt
from .backbones.load import default_memory_layers
from .config import LongMemConfig
from .memory import MemoryBank
from .model import LongMem, Output
from .sharded import ShardedMemoryBank

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
