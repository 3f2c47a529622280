"""memory_fused_attention: retrieval and fusion in one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._checks import Sizes, check_device, check_dtype, check_last_axis_contiguous
from ._plans import Plans
from .chunk_topk import chunk_topk
from .memory_attention import memory_attention
from .ring import Ring
from .ring_write.api import check_is_ring, check_ring

OP = "memory_fused_attention"


def memory_fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring: Ring,
    k: int,
    *,
    memory_query: Tensor | None = None,
    ring_index: Tensor | None = None,
    **options: Any,
) -> Any:
    """`chunk_topk` in a ring, then `memory_attention` to what it found. (LongMem, section 2.3: one query does both.)

    Args:
        query: [B, H, T, D].
        key, value: [B, G, S, D], local.
        ring: the memory, with G heads.
        k: K, chunks per query, 1 to 64.
        memory_query: [B, H, T, D], what searches the memory and meets its keys; default `query`.
        ring_index: [B] int32, which ring a row uses.
        options: all others of `memory_attention`, `gate` and `fusion` first.

    Returns:
        As `memory_attention`.

    Raises:
        ValueError, TypeError, RuntimeError: as both operations.
    """
    check_is_ring(OP, ring)
    _plans.find((ring.store, ring.centroid, ring.tail, ring.cursor, ring.scale, query, memory_query), ())
    searching = query if memory_query is None else memory_query
    # The implementation asked for is one of memory_attention's; chunk_topk has the same names.
    impl = options.get("impl", "auto")
    ids, _ = chunk_topk(searching, ring.centroid, k, count=ring.count(), ring_index=ring_index, impl=impl)
    memory_key, memory_value = ring.store.unbind(3)  # `Ring.key` and `Ring.value` in one call
    return memory_attention(
        query, key, value, memory_key, memory_value, ids,
        memory_query=memory_query, memory_scale=ring.scale, ring_index=ring_index, **options,
    )  # fmt: skip


def _check(
    store: Tensor,
    centroid: Tensor,
    tail: Tensor,
    cursor: Tensor,
    scale: Tensor | None,
    query: Tensor,
    memory_query: Tensor | None,
) -> bool:
    """Checks what the two operations would blame on one another's arguments."""
    sizes = Sizes(OP)
    check_ring(OP, Ring(store, centroid, tail, cursor, scale), sizes)
    sizes.bind("query", query, "B H T D")
    if memory_query is not None:
        sizes.bind("memory_query", memory_query, "B H T D")
        check_dtype(OP, "memory_query", memory_query, (query.dtype,))
        check_device(OP, query.device, memory_query=memory_query)
        check_last_axis_contiguous(OP, memory_query=memory_query)
    return True


_plans = Plans(_check)
