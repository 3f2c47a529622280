"""The alternatives that our kernels are measured against, independent of our references."""

from __future__ import annotations

from functools import partial

from ..providers import Provider
from . import faiss_search, flashlib_search, fusion, layer, retrieval, write

_COMPILES = "compiles for every size"


def of(op: str) -> list[Provider]:
    """The baselines of `op`."""
    if op == "chunk_topk":
        return [
            Provider(
                "torch matmul + topk", retrieval.prepare_matmul_topk, retrieval.why_no_matmul_topk, graphable=True
            ),
            *faiss_search.providers(),
            *flashlib_search.providers(),
        ]
    if op == "ring_write":
        return [
            Provider("eager index_copy", write.prepare_index_copy, write.why_no_index_copy, graphable=True),
            Provider("official cat-shift eviction", write.prepare_official, write.why_no_official, own_memory=True),
            Provider("copy of the same bytes", write.prepare_copy, computes="copy", graphable=True),
        ]
    if op == "memory_layer":
        return layer.providers()
    backward = op.endswith("_backward")

    def provider(name: str, prepare, why, **options) -> Provider:  # type: ignore[no-untyped-def]  # as Provider's
        return Provider(name, partial(prepare, backward=backward), partial(why, backward=backward), **options)

    graphable = not backward
    return [
        provider("eager composition", fusion.prepare_eager, fusion.why_no_eager, graphable=graphable),
        provider("torch.compile composition", fusion.prepare_compiled, fusion.why_no_compiled, unswept=_COMPILES),
        provider("official composition", fusion.prepare_official, fusion.why_no_eager, graphable=graphable),
        provider("FlexAttention, dense mask", fusion.prepare_flex, fusion.why_no_flex, unswept=_COMPILES),
        provider("SDPA, local only", fusion.prepare_sdpa, fusion.why_no_sdpa, computes="local", graphable=graphable),
    ]
