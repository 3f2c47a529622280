"""Peak memory of a call beyond what was there before it, and estimates of what would not fit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from .shapes import Shape

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes during `call()` above the level before it, results included; None where this cannot be measured.

    On CUDA: what PyTorch's allocator handed out. On the CPU: resident memory of the process as the Linux kernel counts
    it, so that allocations of any library count, however short-lived.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _trim_heap()
    if not _reset_peak():
        return None
    before = _peak_resident_bytes()
    call()
    return max(0, _peak_resident_bytes() - before)


def _reset_peak() -> bool:
    """Set the process's peak resident size to its present size; False where the system has no such switch."""
    try:
        _CLEAR_REFS.write_text("5")
        return _STATUS.exists()
    except OSError:
        return False


def _peak_resident_bytes() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no line VmHWM")


def _trim_heap() -> None:
    """Give freed pages back to the system: a call that reuses them would seem to need no memory of its own."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return
    trim(0)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on `device`, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def too_large(bytes_needed: int, device: torch.device) -> str | None:
    """The reason not to start something that needs about this much memory; None when it fits."""
    free = free_bytes(device)
    if free is None or bytes_needed <= 0.9 * free:
        return None
    return f"needs about {bytes_needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def eager_bytes(shape: Shape) -> int:
    """Upper estimate of what a composition needs that gathers chunks and writes out scores."""
    gathered = shape.B * shape.H * shape.T * shape.K * shape.C * shape.D * shape.dtype.itemsize
    scores = shape.B * shape.H * shape.T * shape.keys * 4
    return 4 * gathered + 4 * scores
