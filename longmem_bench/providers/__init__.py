"""The registry: per operation every implementation of ours, and the baselines."""

from __future__ import annotations

from ..provider import MODEL_OPS, OPS, Provider
from . import faiss_search, flashlib_search, ours, published, torch_compiled, torch_eager


def providers(op: str) -> list[Provider]:
    """All providers of `op`, those that cannot run here included; of a kernel's ours first.

    Raises:
        ValueError: there is no such op.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if op in MODEL_OPS:
        from . import models  # needs transformers

        return models.providers(op)
    eager, composed = torch_eager.providers(op), published.providers(op)
    if op == "chunk_topk":
        return [*ours.providers(op), *eager, *faiss_search.providers(), *flashlib_search.providers()]
    if op in ("ring_write", "memory_layer"):
        return [*ours.providers(op), *eager, *composed]
    return [*ours.providers(op), *eager, *torch_compiled.providers(op), *composed]
