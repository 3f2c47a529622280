"""Peak memory that one call takes beyond what was there before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

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
