"""Matrix products over visible pairs alone, for the reference: a pair that is hidden has no part in them.

A hidden pair weighs zero, but zero times NaN or infinity is NaN. So a plain matrix product would carry what nobody may
see into its result; and its derivatives, which are such products again, into gradients. The two products here are each
other's derivatives, of any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PAIRS_AT_ONCE = 2**24  # numbers that the exact product makes at once


def visible_scores(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """[..., T, S], query [..., T, D] times key [..., S, D] where `visible` [..., T, S], else 0."""
    if torch.compiler.is_compiling():  # which traces neither choices by value nor forward-mode rules
        return (query[..., None, :] * _as_seen(key, visible)).sum(-1)
    return _Scores.apply(query, key, visible)


def visible_sum(weight: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
    """[..., T, D], for each query the sum of the rows [..., S, D] it sees, times `weight` [..., T, S]."""
    if torch.compiler.is_compiling():
        return (torch.where(visible, weight, 0.0)[..., None] * _as_seen(rows, visible)).sum(-2)
    return _Sum.apply(weight, rows, visible)


def _as_seen(rows: Tensor, visible: Tensor) -> Tensor:
    """[..., T, S, D], the rows once for every query, hidden ones zero."""
    return torch.where(visible[..., None], rows[..., None, :, :], 0.0)


def _sum(weight: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
    weight = torch.where(visible, weight, 0.0)
    if weight.numel() == 0 or rows.is_meta or _all_finite(rows):
        return weight @ rows
    T = weight.shape[-2]
    step = max(1, _PAIRS_AT_ONCE // (weight.numel() // T * rows.shape[-1]))
    pieces = [slice(begin, begin + step) for begin in range(0, T, step)]
    sums = [(weight[..., t, :, None] * _as_seen(rows, visible[..., t, :])).sum(-2) for t in pieces]
    return torch.cat(sums, -2)


def _all_finite(rows: Tensor) -> bool:
    """False also where nobody can tell: batched gradients have no values yet."""
    try:
        return bool(rows.isfinite().all())
    except RuntimeError:
        return False


class _Product(torch.autograd.Function):
    """Product of two tensors, the third being `visible`; `torch.vmap` batches it along a new first axis."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @classmethod
    def batched(cls, size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, int]:
        moved = (
            x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)
            for x, axis in zip(tensors, in_dims, strict=True)
        )
        return cls.apply(*moved), 0


class _Scores(_Product):
    @staticmethod
    def forward(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
        return torch.where(visible, query @ key.mT, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        query, key, visible = ctx.saved_tensors
        return _Sum.apply(grad, key, visible), _Sum.apply(grad.mT, query, visible.mT), None

    @staticmethod
    def jvp(ctx: Any, query_tangent: Tensor | None, key_tangent: Tensor | None, _: None) -> Tensor | None:
        query, key, visible = ctx.saved_tensors
        return _added(_Scores, (query_tangent, key, visible), (query, key_tangent, visible))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _Scores.batched(info.batch_size, in_dims, tensors)


class _Sum(_Product):
    @staticmethod
    def forward(weight: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
        return _sum(weight, rows, visible)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, rows, visible = ctx.saved_tensors
        return _Scores.apply(grad, rows, visible), _Sum.apply(weight.mT, grad, visible.mT), None

    @staticmethod
    def jvp(ctx: Any, weight_tangent: Tensor | None, rows_tangent: Tensor | None, _: None) -> Tensor | None:
        weight, rows, visible = ctx.saved_tensors
        return _added(_Sum, (weight_tangent, rows, visible), (weight, rows_tangent, visible))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return _Sum.batched(info.batch_size, in_dims, tensors)


def _added(product: Any, *factors: tuple[Tensor | None, Tensor | None, Tensor]) -> Tensor | None:
    """The sum of the products whose factors are there: no tangent is none."""
    terms = [product.apply(a, b, visible) for a, b, visible in factors if a is not None and b is not None]
    return sum(terms[1:], terms[0]) if terms else None
