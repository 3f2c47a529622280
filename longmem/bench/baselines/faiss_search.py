"""FAISS: exact inner-product indices of chunk means, on the CPU and on the GPU."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..inputs import RetrievalInputs
from ..providers import Prepared, Provider
from ..shapes import Shape
from .retrieval import by_key_head, by_query_head


def providers() -> list[Provider]:
    """Searches of one query head of one row at a time, and of all queries of an index in one call.

    An index holds the chunks of one key head, and no call of FAISS searches several indices at once. So a batch can
    hold the query heads that share a key head, and the rows that share a ring; the latter is what LongMem's published
    code does. Where neither is shared, both ways are the same calls.
    """
    found = []
    for kind, why, own in (("cpu", why_no_cpu, False), ("gpu", why_no_gpu, True)):
        index = "IndexFlatIP" if kind == "cpu" else "GpuIndexFlatIP"
        found += [
            Provider(f"faiss-{kind} {index} per head", partial(_prepare, batched=False), why, own_memory=own),
            Provider(
                f"faiss-{kind} {index} batched",
                partial(_prepare, batched=True),
                partial(_why_no_batch, why),
                own_memory=own,
            ),
        ]
    return found


def why_no_cpu(shape: Shape, device: torch.device) -> str | None:
    if importlib.util.find_spec("faiss") is None:
        return "FAISS is not installed (pip install faiss-cpu)"
    return None if device.type == "cpu" else "searches host memory; measured on the CPU device"


def why_no_gpu(shape: Shape, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if importlib.util.find_spec("faiss") is None:
        return "FAISS is not installed"
    import faiss

    return None if hasattr(faiss, "StandardGpuResources") else "the installed FAISS was built without GPU support"


def why_none(shape: Shape, device: torch.device) -> str | None:
    """The reason why FAISS cannot index what lies on `device`."""
    return why_no_gpu(shape, device) if device.type == "cuda" else why_no_cpu(shape, device)


def _why_no_batch(why: Any, shape: Shape, device: torch.device) -> str | None:
    reason: str | None = why(shape, device)
    if reason is None and shape.H == shape.G and shape.rings == shape.B:
        return "no two heads or rows search the same index: the same calls as per head"
    return reason


class Indices:
    """A list of exact inner-product indices on one device, filled with vectors [n, M, D] in float32."""

    def __init__(self, vectors: Tensor) -> None:
        import faiss

        self.on_gpu = vectors.is_cuda
        if self.on_gpu:
            import faiss.contrib.torch_utils  # lets indices take tensors

            self.resources = faiss.StandardGpuResources()
            self.config = faiss.GpuIndexFlatConfig()
            self.config.device = vectors.device.index or 0
        else:
            faiss.omp_set_num_threads(torch.get_num_threads())
        self.indices = [self._new(vectors.shape[-1]) for _ in vectors]
        self.add(vectors)

    def _new(self, size: int) -> Any:
        import faiss

        return faiss.GpuIndexFlatIP(self.resources, size, self.config) if self.on_gpu else faiss.IndexFlatIP(size)

    def native(self, vectors: Tensor) -> Any:
        """Vectors as this FAISS takes them: tensors on the GPU, arrays on the CPU."""
        vectors = vectors.float().contiguous()
        return vectors if self.on_gpu else vectors.numpy()

    def add(self, vectors: Tensor) -> None:
        for index, mine in zip(self.indices, vectors, strict=True):
            index.add(self.native(mine))

    def remove_oldest(self, count: int) -> None:
        """As the official code does: a GPU index cannot remove, so it goes to the host and back."""
        import faiss

        ids = faiss.IDSelectorRange(0, count)
        for number, index in enumerate(self.indices):
            if self.on_gpu:
                host = faiss.index_gpu_to_cpu(index)
                host.remove_ids(ids)
                self.indices[number] = faiss.index_cpu_to_gpu(self.resources, self.config.device, host)
            else:
                index.remove_ids(ids)

    def vectors(self) -> Tensor:
        """What the indices hold, [n, M, D]."""
        return torch.stack([torch.as_tensor(index.reconstruct_n(0, index.ntotal)) for index in self.indices])


def _prepare(inputs: RetrievalInputs, *, batched: bool) -> Prepared:
    """Only search is timed; indices are built before."""
    shape = inputs.shape
    query, centroid = by_key_head(inputs)
    indices = Indices(centroid)
    calls = 1 if batched else query.shape[1] // shape.T
    queries = [indices.native(part) for part in query.unflatten(1, (calls, -1)).flatten(0, 1)]

    def run() -> list[tuple[Any, Any]]:
        return [indices.indices[number // calls].search(part, shape.K) for number, part in enumerate(queries)]

    def collect(found: list[tuple[Any, Any]]) -> tuple[Tensor, ...]:
        scores = torch.stack([torch.as_tensor(score) for score, _ in found])
        ids = torch.stack([torch.as_tensor(slot) for _, slot in found])
        merged = (shape.rings * shape.G, -1, shape.K)
        return by_query_head(ids.reshape(merged), shape), by_query_head(scores.reshape(merged), shape)

    return Prepared(run, collect)
