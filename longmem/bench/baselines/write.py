"""Appending to a memory without a kernel: in place, the official way, and the bare copy."""

from __future__ import annotations

import torch
from torch import Tensor

from longmem_kernels import Ring

from ..inputs import WriteInputs
from ..providers import Prepared, contents, copy_of
from ..shapes import Shape
from .faiss_search import Indices, why_none


def chunks_of(tokens: Tensor, shape: Shape) -> Tensor:
    """[B, G, T, D] as whole chunks per ring, [R, G, n, C, D], rows that share a ring one after another."""
    rows = tokens.unflatten(0, (shape.rings, shape.rows_per_ring)).transpose(1, 2)
    return rows.flatten(2, 3).unflatten(2, (-1, shape.C))


def _why_not_whole(shape: Shape) -> str | None:
    if shape.T % shape.C:
        return f"writes whole chunks only; T={shape.T} is no multiple of C={shape.C}"
    return None if written(shape) <= shape.M else "would write the same slot twice"


def written(shape: Shape) -> int:
    """Chunks that one write adds to a ring."""
    return shape.rows_per_ring * shape.T // shape.C


def why_no_index_copy(shape: Shape, device: torch.device) -> str | None:
    return _why_not_whole(shape)


def index_copy(ring: Ring, key: Tensor, value: Tensor, shape: Shape) -> None:
    """Whole chunks into the next slots; rings are in step, so that one index serves all of them."""
    slots = (ring.cursor[0] // shape.C + torch.arange(written(shape), device=ring.cursor.device)) % ring.chunks
    key, value = chunks_of(key, shape), chunks_of(value, shape)
    ring.store.index_copy_(2, slots, torch.stack([key, value], 3).to(ring.store.dtype))
    ring.centroid.index_copy_(2, slots, key.mean(-2, dtype=torch.float32).to(ring.centroid.dtype))
    ring.cursor.add_(shape.rows_per_ring * shape.T)


def prepare_index_copy(inputs: WriteInputs) -> Prepared:
    ring = copy_of(inputs.ring)
    return Prepared(lambda: index_copy(ring, inputs.key, inputs.value, inputs.shape), lambda _: contents(ring))


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
        key, value = (chunks_of(part, self.shape).to(self.keys.dtype) for part in (key, value))
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
    return _why_not_whole(shape) or why_none(shape, device)


def prepare_official(inputs: WriteInputs) -> Prepared:
    """The mean of a write that evicts and one that does not."""
    memory = OfficialMemory(inputs.ring, inputs.shape)

    def run() -> None:
        memory.write(inputs.key, inputs.value)
        memory.write(inputs.key, inputs.value)

    return Prepared(run, lambda _: memory.as_ring(), repeat=2, note=EVICTION_NOTE)
