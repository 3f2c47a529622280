"""Choice of the implementation of an op that runs, and the reason why another one cannot.

An implementation asked for by name never falls back. `auto` takes the first of `PREFERENCE` that can run the call.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from . import _extension

PREFERENCE: dict[str, tuple[str, ...]] = {
    "ring_write": ("cuda", "cpp", "reference"),
    "chunk_topk": ("triton", "cpp", "reference"),
    "memory_attention": ("triton", "cpp", "reference"),
}
KERNEL_HEAD_DIMS = (32, 64, 80, 96, 128, 256)

_has_triton = importlib.util.find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_unavailable(op: str, impl: str, device: str) -> str | None:
    """The reason why `impl` of `op` cannot run on tensors of device type `device`; None when it can."""
    if impl not in PREFERENCE[op]:
        return f"{op} has no such implementation; it has {', '.join(PREFERENCE[op])}"
    if impl == "reference":
        return None
    if impl == "triton":
        if not _has_triton:
            return "Triton is not installed (pip install triton)"
        if device == "cpu" and not _interpreted:
            return "Triton needs a CUDA device, or TRITON_INTERPRET=1 in the environment before Python starts"
        if device not in ("cuda", "cpu"):
            return f"Triton kernels run on cuda, not on {device}"
        return None
    if _extension.extension is None:
        return _extension.load_error
    if impl == "cuda" and not _extension.cuda_kernels:
        return "the extension was built without CUDA (no nvcc was found, or LONGMEM_BUILD=cpu)"
    wanted = {"cpp": "cpu", "cuda": "cuda"}[impl]
    return None if device == wanted else f"the {impl} kernel runs on {wanted} tensors, not on {device}"


def why_unsupported(impl: str, dtypes: tuple[torch.dtype, ...], head_dim: int) -> str | None:
    """The reason why kernel `impl` cannot take these dtypes and this head dim; None when it can."""
    if impl == "reference":
        return None
    if torch.float64 in dtypes:
        return "float64 is supported by the reference alone"
    if impl == "triton" and head_dim not in KERNEL_HEAD_DIMS:
        return f"head dim D must be one of {KERNEL_HEAD_DIMS} for this kernel, got {head_dim}"
    return None


def choose(op: str, impl: str, device: torch.device, dtypes: tuple[torch.dtype, ...], head_dim: int) -> str:
    """The name of the implementation to run.

    Raises:
        ValueError: `impl` is not one of this op's implementations.
        RuntimeError: `impl` was asked for by name and cannot run here, with the reason.
    """
    if impl != "auto":
        if impl not in PREFERENCE[op]:
            raise ValueError(f"{op}: impl must be one of auto, {', '.join(PREFERENCE[op])}, got {impl!r}")
        reason = why_unavailable(op, impl, device.type) or why_unsupported(impl, dtypes, head_dim)
        if reason is not None:
            raise RuntimeError(f"{op}: impl={impl!r} cannot run: {reason}")
        return impl
    for name in PREFERENCE[op]:
        # The interpreter is a debugger: it runs when asked for, never because it happens to be there.
        if name == "triton" and device.type != "cuda":
            continue
        if why_unavailable(op, name, device.type) is None and why_unsupported(name, dtypes, head_dim) is None:
            return name
    raise AssertionError("unreachable: the reference runs everywhere")
