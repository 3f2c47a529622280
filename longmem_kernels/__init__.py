"""Kernels for memory-augmented attention: write a ring-buffer memory, search it exactly, attend to it.

`ring_write`, `chunk_topk` and `memory_attention` each have a plain-PyTorch reference and kernels for CPU and GPU;
`python -m longmem_kernels.info` says which of them run here.
"""

from ._checks import debug_checks
from ._extension import load_extension
from ._version import __version__
from .chunk_topk import chunk_topk
from .memory_attention import memory_attention
from .memory_fused_attention import memory_fused_attention
from .ring import Ring
from .ring_write import ring_write

load_extension()

__all__ = [
    "Ring",
    "__version__",
    "chunk_topk",
    "debug_checks",
    "memory_attention",
    "memory_fused_attention",
    "ring_write",
]
