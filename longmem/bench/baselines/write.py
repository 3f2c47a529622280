"""Appending to a memory without a kernel: in place, the official way, and the bare copy."""

from __future__ import annotations

import torch
from torch import Tensor

from longmem_kernels import Ring

from ..inputs import WriteInputs
from ..providers import Prepared, contents, copy_of
from ..shapes import Shape
from .faiss_search import Indices, why_none


def by_ring(tokens: Tensor, shape: Shape) -> Tensor:
    """[B, G, T, D] as the tokens of each ring, [R, G, n, D], rows that share a ring one after another."""
    return tokens.unflatten(0, (shape.rings, shape.rows_per_ring)).transpose(1, 2).flatten(2, 3)


def written(shape: Shape) -> int:
    """Whole chunks that one write adds to a ring."""
    return shape.rows_per_ring * shape.T // shape.C


def why_no_index_copy(shape: Shape, device: torch.device) -> str | None:
    return None if written(shape) < shape.M else "would write the same slot twice"


class EagerRing:
    """A ring kept without a kernel. All rings are in step, so that one index serves all of them; where the open chunk
    begins is counted on the host."""

    def __init__(self, ring: Ring, shape: Shape) -> None:
        self.ring, self.shape = copy_of(ring), shape
        self.open = int(ring.cursor[0]) % shape.C  # tokens in the open chunk

    def write(self, key: Tensor, value: Tensor) -> None:
        ring, shape = self.ring, self.shape
        tokens = torch.stack([by_ring(key, shape), by_ring(value, shape)], 2).to(ring.store.dtype)  # [R, G, 2, n, D]
        if self.open:
            tokens = torch.cat([ring.tail[:, :, :, : self.open], tokens], 3)
        whole, rest = divmod(tokens.shape[3], shape.C)
        if whole:
            chunks = tokens[:, :, :, : whole * shape.C].unflatten(3, (whole, shape.C)).transpose(2, 3)
            slots = (ring.cursor[0] // shape.C + torch.arange(whole, device=ring.cursor.device)) % ring.chunks
            ring.store.index_copy_(2, slots, chunks)
            means = chunks[:, :, :, 0].mean(-2, dtype=torch.float32)
            ring.centroid.index_copy_(2, slots, means.to(ring.centroid.dtype))
        if rest:
            ring.tail[:, :, :, :rest] = tokens[:, :, :, whole * shape.C :]
        self.open = rest
        ring.cursor.add_(shape.rows_per_ring * shape.T)


def prepare_index_copy(inputs: WriteInputs) -> Prepared:
    ring = EagerRing(inputs.ring, inputs.shape)
    return Prepared(
        lambda: ring.write(inputs.key, inputs.value), lambda _: contents(ring.ring), graphable=_in_whole(inputs.shape)
    )


def _in_whole(shape: Shape) -> bool:
    """Every write is the same then: it begins and ends with a chunk."""
    return shape.rows_per_ring * shape.T % shape.C == 0


def prepare_copy(inputs: WriteInputs) -> Prepared:
    """The same keys and values into one flat buffer: the memory traffic and nothing else."""
    target = torch.empty(2, *inputs.key.shape, dtype=inputs.ring.store.dtype, device=inputs.key.device)

    def run() -> None:
        target[0].copy_(inputs.key)
        target[1].copy_(inputs.value)

    return Prepared(run, lambda _: (target,))


EVICTION_NOTE = "mean of a step that evicts and one that does not; holds M or M + n chunks in turn, n being written"


class OfficialMemory:
    """A memory kept as LongMem's published code keeps it.

    Chunks lie in the order of their age; an index per key head holds their means. When n new chunks would reach the
    capacity, the 2n oldest are removed first: what is left is shifted to the front by `cat`, and ids of the indices
    with it. So every second write evicts. The capacity here is what makes the memory hold M chunks or M + n in turn,
    where a ring of M chunks always holds M.
    """

    def __init__(self, ring: Ring, shape: Shape) -> None:
        self.shape, self.new = shape, written(shape)
        self.size, self.capacity = ring.chunks, ring.chunks + 2 * self.new
        self.total = int(ring.cursor[0]) // shape.C
        aged = ring.store.roll(-(self.total % ring.chunks), 2)
        room = aged.new_zeros(*aged.shape[:2], 2 * self.new, *aged.shape[4:])
        self.keys, self.values = (torch.cat([aged[:, :, :, part], room], 2) for part in (0, 1))
        self.indices = Indices(ring.centroid.roll(-(self.total % ring.chunks), 2).flatten(0, 1))

    def write(self, key: Tensor, value: Tensor) -> None:
        if self.size + self.new >= self.capacity:
            self._remove(2 * self.new)
        chunk = (self.new, self.shape.C)
        key, value = (by_ring(part, self.shape).unflatten(2, chunk).to(self.keys.dtype) for part in (key, value))
        self.keys[:, :, self.size : self.size + self.new] = key
        self.values[:, :, self.size : self.size + self.new] = value
        self.indices.add(key.mean(-2, dtype=torch.float32).flatten(0, 1))
        self.size += self.new
        self.total += self.new

    def _remove(self, count: int) -> None:
        self.indices.remove_oldest(count)
        end = torch.zeros_like(self.keys[:, :, :count])
        self.keys = torch.cat([self.keys[:, :, count:], end], 2)
        self.values = torch.cat([self.values[:, :, count:], end], 2)
        self.size -= count

    def as_ring(self) -> tuple[Tensor, ...]:
        """The newest M chunks where a ring of M chunks holds them."""
        M = self.shape.M
        newest = slice(self.size - M, self.size)
        store = torch.stack([self.keys[:, :, newest], self.values[:, :, newest]], 3).roll(self.total % M, 2)
        means = self.indices.vectors().unflatten(0, self.keys.shape[:2])[:, :, newest].roll(self.total % M, 2)
        means = means.to(store)
        tail = torch.zeros_like(store[:, :, 0])
        return store, means, tail, torch.full((store.shape[0],), self.total * self.shape.C, device=store.device)


def why_no_official(shape: Shape, device: torch.device) -> str | None:
    if not _in_whole(shape):
        return f"writes whole chunks and drops the rest; {shape.rows_per_ring * shape.T} tokens come at once"
    return why_no_index_copy(shape, device) or why_none(shape, device)


def prepare_official(inputs: WriteInputs) -> Prepared:
    """The mean of a write that evicts and one that does not."""
    memory = OfficialMemory(inputs.ring, inputs.shape)

    def run() -> None:
        memory.write(inputs.key, inputs.value)
        memory.write(inputs.key, inputs.value)

    return Prepared(run, lambda _: memory.as_ring(), repeat=2, note=EVICTION_NOTE)
