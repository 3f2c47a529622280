"""FAISS: exact inner-product indices of chunk means, on the CPU and on the GPU."""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..inputs import RetrievalInputs, by_key_head, by_query_head
from ..provider import Prepared, Provider
from ..shapes import Shape


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


class FaissIndex:
    """An exact inner-product index of float32 vectors [n, D], in the memory of `device`."""

    index: Any

    def __init__(self, size: int, device: torch.device) -> None:
        import faiss

        self.device, self.on_gpu = device, device.type == "cuda"
        if self.on_gpu:
            import faiss.contrib.torch_utils  # lets indices take tensors

            config = faiss.GpuIndexFlatConfig()
            config.device = device.index or 0
            self.index = faiss.GpuIndexFlatIP(_resources(), size, config)
        else:
            faiss.omp_set_num_threads(torch.get_num_threads())
            self.index = faiss.IndexFlatIP(size)

    def native(self, vectors: Tensor) -> Any:
        """Vectors as this FAISS takes them: tensors on the GPU, arrays on the CPU."""
        vectors = vectors.float().contiguous()
        return vectors if self.on_gpu else vectors.numpy()

    def add(self, vectors: Tensor) -> None:
        self.index.add(self.native(vectors))

    def remove_oldest(self, count: int) -> None:
        """Remove as the official code does: a GPU index cannot, so it goes to the host and back."""
        import faiss

        ids = faiss.IDSelectorRange(0, count)
        if self.on_gpu:
            host = faiss.index_gpu_to_cpu(self.index)
            host.remove_ids(ids)
            self.index = faiss.index_cpu_to_gpu(_resources(), self.device.index or 0, host)
        else:
            self.index.remove_ids(ids)

    def search(self, queries: Tensor, k: int) -> Tensor:
        """Numbers [n, k] int64 by descending inner product, -1 where there are fewer than k."""
        return torch.as_tensor(self.index.search(self.native(queries), k)[1]).to(self.device)

    def vectors(self) -> Tensor:
        """Everything in the index, [n, D], the oldest first."""
        return torch.as_tensor(self.index.reconstruct_n(0, self.index.ntotal))


@cache
def _resources() -> Any:
    """Scratch memory on the GPU, one for all indices."""
    import faiss

    return faiss.StandardGpuResources()


def _prepare(inputs: RetrievalInputs, *, batched: bool) -> Prepared:
    """Only search is timed; indices are built before."""
    shape = inputs.shape
    query, centroid = by_key_head(inputs)
    indices = [FaissIndex(shape.D, centroid.device) for _ in centroid]
    for index, vectors in zip(indices, centroid, strict=True):
        index.add(vectors)
    calls = 1 if batched else query.shape[1] // shape.T
    queries = [indices[0].native(part) for part in query.unflatten(1, (calls, -1)).flatten(0, 1)]

    def run() -> list[tuple[Any, Any]]:
        return [indices[number // calls].index.search(part, shape.K) for number, part in enumerate(queries)]

    def collect(found: list[tuple[Any, Any]]) -> tuple[Tensor, ...]:
        scores = torch.stack([torch.as_tensor(score) for score, _ in found])
        ids = torch.stack([torch.as_tensor(slot) for _, slot in found])
        merged = (shape.rings * shape.G, -1, shape.K)
        return by_query_head(ids.reshape(merged), shape), by_query_head(scores.reshape(merged), shape)

    return Prepared(run, collect)
