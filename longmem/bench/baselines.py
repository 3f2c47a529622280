"""The alternatives that our kernels are measured against, independent of our references."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import FusionInputs, RetrievalInputs, WriteInputs
from .providers import Prepared, Provider, attention, contents, copy_of, too_large
from .shapes import Shape

_SCORE_BYTES = 2**30  # how much of the score matrix the matmul baseline holds at once


def of(op: str) -> list[Provider]:
    """The baselines of `op`."""
    if op == "chunk_topk":
        return [
            Provider("torch matmul + topk", prepare_matmul_topk),
            Provider("faiss-cpu IndexFlatIP per head", _prepare_faiss_cpu, _why_no_faiss_cpu),
            Provider("faiss-gpu GpuIndexFlatIP per head", _prepare_faiss_gpu, _why_no_faiss_gpu, own_memory=True),
        ]
    if op == "ring_write":
        return [
            Provider("eager index_copy", prepare_index_copy, _why_no_index_copy),
            Provider("copy of the same bytes", prepare_copy, computes="copy"),
        ]
    backward = op.endswith("_backward")
    return [
        Provider("eager composition", partial(prepare_eager, backward=backward), _why_no_eager),
        Provider("SDPA, local only", partial(prepare_sdpa, backward=backward), _why_no_sdpa, computes="local"),
    ]


# chunk_topk


def prepare_matmul_topk(inputs: RetrievalInputs) -> Prepared:
    """Scores of as many heads at once as fit into a fixed buffer, then `topk`. Every chunk is taken to be stored."""
    shape = inputs.shape
    query = inputs.query.reshape(shape.B * shape.G, -1, shape.D)  # heads that share a key head are more queries of it
    centroid = inputs.centroid.flatten(0, 1).mT
    block = max(1, _SCORE_BYTES // (query.shape[1] * shape.M * 4))
    half_on_gpu = query.is_cuda and query.dtype != torch.float32

    def multiply(left: Tensor, right: Tensor) -> Tensor:
        # Scores rounded to 16 bits would rank other chunks; the GPU can keep the products of 16-bit inputs in float32.
        if half_on_gpu:
            return torch.bmm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()

    def run() -> list[Any]:
        parts = zip(query.split(block), centroid.split(block), strict=True)
        return [multiply(left, right).topk(shape.K, dim=-1) for left, right in parts]

    def collect(found: list[Any]) -> tuple[Tensor, ...]:
        size = (shape.B, shape.H, shape.T, shape.K)
        ids, scores = [part.indices for part in found], [part.values for part in found]
        return torch.cat(ids).view(size), torch.cat(scores).view(size)

    return Prepared(run, collect)


def _why_no_faiss_cpu(shape: Shape, device: torch.device) -> str | None:
    if importlib.util.find_spec("faiss") is None:
        return "FAISS is not installed (pip install faiss-cpu)"
    return None if device.type == "cpu" else "searches host memory; measured on the CPU device"


def _why_no_faiss_gpu(shape: Shape, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if importlib.util.find_spec("faiss") is None:
        return "FAISS is not installed"
    import faiss

    return None if hasattr(faiss, "StandardGpuResources") else "the installed FAISS was built without GPU support"


def _prepare_faiss_cpu(inputs: RetrievalInputs) -> Prepared:
    """One index per key head and one search per query head, as in LongMem's published code. Only search is timed."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    shape = inputs.shape
    indices = []
    for vectors in inputs.centroid.flatten(0, 1).float().contiguous():
        indices.append(faiss.IndexFlatIP(shape.D))
        indices[-1].add(vectors.numpy())
    queries = inputs.query.flatten(0, 1).float().contiguous().numpy()
    return _search_per_head(shape, indices, queries)


def _prepare_faiss_gpu(inputs: RetrievalInputs) -> Prepared:
    """As on the CPU, on tensors that stay on the device."""
    import faiss
    import faiss.contrib.torch_utils  # lets indices take tensors

    shape = inputs.shape
    resources = faiss.StandardGpuResources()
    config = faiss.GpuIndexFlatConfig()
    config.device = inputs.query.device.index or 0
    indices = []
    for vectors in inputs.centroid.flatten(0, 1).float():
        indices.append(faiss.GpuIndexFlatIP(resources, shape.D, config))
        indices[-1].add(vectors.contiguous())
    return _search_per_head(shape, indices, inputs.query.flatten(0, 1).float().contiguous())


def _search_per_head(shape: Shape, indices: list[Any], queries: Any) -> Prepared:
    per_index = shape.H // shape.G

    def run() -> list[tuple[Any, Any]]:
        return [indices[head // per_index].search(queries[head], shape.K) for head in range(len(queries))]

    def collect(found: list[tuple[Any, Any]]) -> tuple[Tensor, ...]:
        size = (shape.B, shape.H, shape.T, shape.K)
        scores = torch.stack([torch.as_tensor(score) for score, _ in found])
        ids = torch.stack([torch.as_tensor(slot) for _, slot in found])
        return ids.view(size), scores.view(size)

    return Prepared(run, collect)


# memory_attention


def _why_no_eager(shape: Shape, device: torch.device) -> str | None:
    gathered = shape.B * shape.H * shape.T * shape.K * shape.C * shape.D * shape.dtype.itemsize
    scores = shape.B * shape.H * shape.T * shape.keys * 4
    return too_large(4 * gathered + 4 * scores, device)


def local_attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> Tensor:
    """Causal softmax attention with every score written out; probabilities rounded to the inputs' dtype."""
    H, T, D = query.shape[1:]
    S = key.shape[2]
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.mT).float() * D**-0.5
    ahead = torch.arange(S, device=query.device) - torch.arange(S - T, S, device=query.device)[:, None]
    if slopes is not None:
        scores = scores + slopes[:, None, None] * ahead
    scores = scores.masked_fill(ahead > 0, float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value


def prepare_eager(inputs: FusionInputs, *, backward: bool) -> Prepared:
    """What one writes without a kernel: gather the chunks of every query, two softmaxes, a gate. All ids are valid."""
    ring, slopes = inputs.ring, inputs.slopes
    B, H, _, _ = inputs.query.shape
    rows = torch.arange(B, device=inputs.query.device)[:, None, None, None]
    heads = (torch.arange(H, device=inputs.query.device) // (H // ring.kv_heads))[:, None, None]
    ids = inputs.chunk_ids.long()

    def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        chunk_key = ring.key[rows, heads, ids].flatten(3, 4)  # [B, H, T, K*C, D]
        chunk_value = ring.value[rows, heads, ids].flatten(3, 4)
        scores = (chunk_key @ query.unsqueeze(-1)).squeeze(-1).float() * query.shape[-1] ** -0.5
        memory = (scores.softmax(-1).to(query.dtype).unsqueeze(-2) @ chunk_value).squeeze(-2)
        share = gate.sigmoid().to(query.dtype)[:, None, None]
        return (1 - share) * local_attention(query, key, value, slopes) + share * memory

    return attention(inputs, attend, backward=backward)


def _why_no_sdpa(shape: Shape, device: torch.device) -> str | None:
    return None if shape.T in (1, shape.keys) else "its causal mask is aligned to the first key; needs T = 1 or T = S"


def prepare_sdpa(inputs: FusionInputs, *, backward: bool) -> Prepared:
    """PyTorch's own attention over the local keys, without ALiBi: what any fusion costs at least."""
    causal, shared = inputs.shape.T > 1, inputs.shape.H != inputs.shape.G

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=shared)

    return attention(inputs, attend, backward=backward, gated=False)


# ring_write


def _why_no_index_copy(shape: Shape, device: torch.device) -> str | None:
    return None if shape.T % shape.C == 0 else f"writes whole chunks only; T={shape.T} is no multiple of C={shape.C}"


def prepare_index_copy(inputs: WriteInputs) -> Prepared:
    """A ring of whole chunks without a kernel; rows are in step, so that one index serves all of them."""
    ring, C = copy_of(inputs.ring), inputs.shape.C
    offset = torch.arange(inputs.shape.T // C, device=ring.cursor.device)

    def run() -> None:
        slots = (ring.cursor[0] // C + offset) % ring.chunks
        chunks = torch.stack([inputs.key, inputs.value], 2).unflatten(3, (-1, C)).transpose(2, 3)  # [B, G, n, 2, C, D]
        ring.store.index_copy_(2, slots, chunks)
        ring.centroid.index_copy_(2, slots, chunks[:, :, :, 0].mean(-2, dtype=torch.float32).to(ring.centroid.dtype))
        ring.cursor.add_(inputs.shape.T)

    return Prepared(run, lambda _: contents(ring))


def prepare_copy(inputs: WriteInputs) -> Prepared:
    """The same keys and values into one flat buffer: the memory traffic and nothing else."""
    target = torch.empty(2, *inputs.key.shape, dtype=inputs.ring.store.dtype, device=inputs.key.device)

    def run() -> None:
        target[0].copy_(inputs.key)
        target[1].copy_(inputs.value)

    return Prepared(run, lambda _: (target,))
