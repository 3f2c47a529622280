"""What an operation has to do at least: bytes to move when every input is read and every output written once, and
floating-point operations (a multiply-add is two)."""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import Shape


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
