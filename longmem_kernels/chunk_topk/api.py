"""chunk_topk: exact top-K chunks of memory for every query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import (
    COMPUTE_DTYPES,
    Sizes,
    check_device,
    check_dtype,
    check_integer,
    check_last_axis_contiguous,
    check_range,
    check_ring_index,
    constant,
    packed,
)
from .._dispatch import choose
from .._plans import Plan, Plans
from .reference import chunk_topk_reference

MAX_K = 64
OP = "chunk_topk"


def chunk_topk(
    query: Tensor,
    centroid: Tensor,
    k: int,
    *,
    count: Tensor,
    ring_index: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Exact top-K of `query . centroid` over the chunks stored in each row's ring. (LongMem, section 2.3.)

    Kernels never write the [T, M] scores to memory. Exact means: the set, in the order, that inner products in float32
    give. Two chunks whose exact scores differ by less than the rounding of a D-term float32 sum may swap places.
    Ties go to the lower slot; NaN scores come after all numbers; where fewer than K chunks are stored, id -1 and score
    -inf. Selection is not differentiable: no gradient flows, of either mode, and scores never require grad.

    Args:
        query: [B, H, T, D] float32, bfloat16, float16 or float64. T = 0 gives empty results.
        centroid: [R, G, M, D], mean keys of the chunks, H % G == 0; query head h searches head h // (H / G). The last
            axis of both must be contiguous; all other strides, and those of other arguments, are free.
        k: K, chunks per query, 1 to 64.
        count: [R] int32 in [0, M], the first `count[r]` slots of ring r are searched (`Ring.count()`).
        ring_index: [B] int32 in [0, R). Left out: row b searches ring b when R == B, ring 0 when R == 1.
        impl: "auto", "triton", "cpp" or "reference".

    Returns:
        chunk_ids [B, H, T, K] int32, scores [B, H, T, K] float32 (float64 for float64 inputs).

    Values are checked on CPU, and on CUDA with `debug_checks(True)`. Without, a count counts as the nearest in [0, M],
    and a row whose ring does not exist finds nothing. Compiled CPU code raises RuntimeError for both.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was wanted and what came.
        RuntimeError: `impl` cannot run here.
    """
    plan = _plans.find((query, centroid, count, ring_index), (k, impl))
    return plan.run(
        lambda: _check_values(centroid, count, ring_index),
        constant(query), constant(centroid), count.contiguous(), packed(ring_index), plan.k,
    )  # fmt: skip


@dataclass(frozen=True)
class _Plan(Plan):
    k: int


def _plan(query: Tensor, centroid: Tensor, count: Tensor, ring_index: Tensor | None, k: int, impl: str) -> _Plan:
    op = OP
    sizes = Sizes(op)
    sizes.bind("query", query, "B H T D")
    sizes.bind("centroid", centroid, "R G M D")
    sizes.bind("count", count, "R")
    sizes.positive("H", "D", "R", "M")
    sizes.grouped()
    k = check_integer(op, "k", k, 1, MAX_K)
    check_dtype(op, "query", query, COMPUTE_DTYPES)
    check_dtype(op, "centroid", centroid, COMPUTE_DTYPES)
    check_dtype(op, "count", count, (torch.int32,))
    check_device(op, query.device, centroid=centroid, count=count, ring_index=ring_index)
    check_last_axis_contiguous(op, query=query, centroid=centroid)
    check_ring_index(op, ring_index, sizes)
    name = choose(op, impl, query.device, (query.dtype, centroid.dtype), sizes["D"])
    kernel = chunk_topk_reference if name == "reference" else getattr(torch.ops.longmem, f"{op}_{name}").default
    return _Plan(kernel, name == "cpp", k)


def _check_values(centroid: Tensor, count: Tensor, ring_index: Tensor | None) -> None:
    check_range(OP, "ring_index", ring_index, 0, centroid.shape[0])
    check_range(OP, "count", count, 0, centroid.shape[2] + 1)


_plans = Plans(_plan)
