"""What the machine can do at best: copy bandwidth and the rate of matrix products, measured in the same process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch

from .timing import Call, synchronised, wall_times

_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
_MATRIX = {"cpu": 2048, "cuda": 8192}
_SECONDS = 0.7


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a large copy (read plus written) and operations per second of a large matrix product."""

    copy: float
    matmul: float

    def floor_ms(self, bytes_moved: int, flops: int) -> tuple[float, str]:
        """The time that these amounts take at least, and which of the two says so."""
        moving, computing = bytes_moved / self.copy * 1e3, flops / self.matmul * 1e3
        return (moving, "copy") if moving >= computing else (computing, "matmul")


@cache
def ceilings(device: str, dtype: torch.dtype, threads: int) -> Ceilings:
    """Measured once per process, in about two seconds; `threads` is there to measure again when it changes."""
    return Ceilings(_copy(torch.device(device)), _multiply(torch.device(device), dtype))


@cache
def _copy(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best(lambda: target.copy_(source), device)


def _multiply(device: torch.device, dtype: torch.dtype) -> float:
    size = _MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / _best(lambda: torch.mm(left, right, out=product), device)


def _best(run: Call, device: torch.device) -> float:
    """Seconds of the fastest of several calls."""
    call = synchronised(run, device)
    call()
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - begin < _SECONDS:
        taken += wall_times(call, 1)
    return min(taken)
