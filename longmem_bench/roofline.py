"""The roofline: bytes and operations that an operation needs at least, and the bandwidth and rate of this machine.

Bytes: every input is read once and every output written once. A multiply-add is two floating-point operations. The
machine's ceilings are measured in the same process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch

from .shapes import Shape
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


@dataclass(frozen=True)
class Work:
    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def work(op: str, shape: Shape) -> Work | None:
    """The work of a kernel op; None of others."""
    if op == "chunk_topk":
        return _search(shape)
    if op == "ring_write":
        return _write(shape)
    if op == "memory_layer":
        return _search(shape) + _attention(shape) + _write(shape)
    if op == "memory_attention":
        return _attention(shape)
    if op == "memory_attention_backward":
        return _attention(shape) + _gradients(shape)
    return None


def _search(shape: Shape) -> Work:
    queries = shape.B * shape.H * shape.T
    centroids = shape.rings * shape.G * shape.M
    found = 8 * queries * shape.K  # an int32 id and a float32 score
    return Work((queries + centroids) * shape.D * shape.dtype.itemsize + found, 2 * queries * shape.M * shape.D)


def _tokens(shape: Shape) -> tuple[int, int, int]:
    """Elements of query, of key and value, and of the chunks read; a chunk that several queries found is read once."""
    query = shape.B * shape.H * shape.T * shape.D
    local = 2 * shape.B * shape.G * shape.keys * shape.D
    finders = shape.rows_per_ring * (shape.H // shape.G) * shape.T
    chunks = shape.rings * shape.G * min(shape.M, finders * shape.K)
    return query, local, 2 * chunks * shape.C * shape.D


def _pairs(shape: Shape) -> tuple[int, int]:
    """Pairs of query and local key that causality allows, and of query and memory key."""
    heads, T = shape.B * shape.H, shape.T
    return heads * (T * shape.keys - T * (T - 1) // 2), heads * T * shape.K * shape.C


def _attention(shape: Shape) -> Work:
    query, local, memory = _tokens(shape)
    ids = 4 * shape.B * shape.H * shape.T * shape.K
    near, far = _pairs(shape)
    return Work((2 * query + local + memory) * shape.dtype.itemsize + ids, 4 * shape.D * (near + far))


def _gradients(shape: Shape) -> Work:
    """Reads what the forward pass read, its output and that one's gradient; the bank gets no gradient."""
    query, local, memory = _tokens(shape)
    ids = 4 * shape.B * shape.H * shape.T * shape.K
    near, far = _pairs(shape)
    return Work((4 * query + 2 * local + memory) * shape.dtype.itemsize + ids, shape.D * (10 * near + 6 * far))


def _write(shape: Shape) -> Work:
    tokens = 2 * shape.B * shape.G * shape.T * shape.D
    centroids = shape.B * shape.G * (shape.T // shape.C) * shape.D
    return Work((2 * tokens + centroids) * shape.dtype.itemsize, tokens // 2)
