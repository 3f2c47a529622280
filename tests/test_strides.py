"""Any stride of any argument gives what packed arguments give, in every implementation.

Those that are refused are in bad_inputs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from bad_inputs import Subject
from factories import random_ring
from test_bad_input_generated import PACKED, subjects
from torch import Tensor

from longmem_kernels import Ring, chunk_topk, memory_attention, ring_write

CALLS = [subject for subject in subjects() if "impl" in subject.good]
SINGLE = [s for s in subjects(B=1, H=1, G=1, T=1, S=1, R=1, M=1, K=1) if "impl" in s.good]


def layouts(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same numbers otherwise laid out, and others that are laid out in no memory of their own."""
    around = torch.full([size + 2 for size in value.shape], 1, dtype=torch.uint8).to(value.dtype)
    inside = around[tuple(slice(1, -1) for _ in value.shape)]
    inside.copy_(value)
    yield "within a larger tensor", inside
    axes = list(range(value.dim()))
    if value.dim() > 2:
        order = [*reversed(axes[:-1]), axes[-1]]
        yield "axes in another order", value.permute(order).contiguous().permute(order)
    for axis in axes[:-1]:
        yield f"axis {axis} expanded", value.narrow(axis, 0, 1).expand(value.shape)
    if name in PACKED:
        yield "last axis strided", torch.stack([value, value], -1)[..., 0]
        yield "last axis expanded", value[..., :1].expand(value.shape)
        yield "all axes in another order", value.permute(*reversed(axes)).contiguous().permute(*reversed(axes))


def outcome(subject: Subject, changes: dict[str, Any]) -> list[Tensor]:
    """Results, or what became of the ring."""
    torch.manual_seed(0)
    call = {**subject.good, **changes}
    if subject.function is ring_write:
        ring = call["ring"] = Ring(**{part.name: _clone(getattr(call["ring"], part.name)) for part in fields(Ring)})
        ring_write(**call)
        return [part.float().nan_to_num(7.0) for part in vars(ring).values() if part is not None]
    found = subject.function(**call)
    return list(found) if isinstance(found, tuple) else [found]


def _clone(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.clone()


@pytest.mark.parametrize("subject", CALLS, ids=lambda s: f"{s.name}-{s.good['impl']}")
def test_strides_change_nothing(subject: Subject) -> None:
    wrong = []
    for name, value in subject.good.items():
        if not isinstance(value, Tensor):
            continue
        for layout, laid_out in layouts(name, value):
            got, want = (outcome(subject, {name: x}) for x in (laid_out, laid_out.contiguous()))
            if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
                wrong.append(f"{name}: {layout}")
    assert not wrong, wrong


@pytest.mark.parametrize("subject", SINGLE, ids=lambda s: f"{s.name}-{s.good['impl']}")
def test_strides_of_axes_of_size_one_mean_nothing(subject: Subject) -> None:
    for name, value in subject.good.items():
        if not isinstance(value, Tensor):
            continue
        strides = [7 if size == 1 else stride for size, stride in zip(value.shape, value.stride(), strict=True)]
        got, want = (outcome(subject, {name: x}) for x in (value.as_strided(value.shape, strides), value))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_gradients_come_in_any_strides(impl: str) -> None:
    """Expanded, transposed and of the log-sum-exps too."""
    (subject,) = (s for s in CALLS if s.function is memory_attention and s.good["impl"] == impl)
    leaves = {
        name: subject.good[name].clone().requires_grad_() for name in ("query", "key", "value", "gate", "memory_query")
    }
    outputs = memory_attention(**{**subject.good, **leaves})
    shapes = [out.shape for out in outputs]
    transposed = [torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))) for shape in shapes]
    for grads in ([torch.ones(()).expand(shape) for shape in shapes], transposed):
        got, want = (
            torch.autograd.grad(outputs, list(leaves.values()), given, retain_graph=True)
            for given in (grads, [grad.contiguous() for grad in grads])
        )
        torch.testing.assert_close(got, want)


def test_outputs_of_a_search_do_not_pretend_to_be_differentiable() -> None:
    (subject,) = (s for s in CALLS if s.function is chunk_topk and s.good["impl"] == "cpp")
    for impl in ("reference", "cpp"):
        call = {**subject.good, "query": subject.good["query"].clone().requires_grad_(), "impl": impl}
        assert not any(found.requires_grad for found in chunk_topk(**call))


@pytest.mark.parametrize("impl", ["reference", "cpp"])
def test_tokens_may_be_views_of_the_ring_and_require_grad(impl: str) -> None:
    """What a ring holds is written to it once more, as if it had been copied before."""
    ring, copied = random_ring(27), random_ring(27)
    for part in fields(Ring):
        if (old := getattr(ring, part.name)) is not None:
            getattr(copied, part.name).copy_(old)
    key, value = (x[:, :, [0, 0], 0].detach() for x in (copied.key, copied.value))
    ring_write(copied, key.clone().requires_grad_(), value.clone(), impl=impl)
    aliased = (x[:, :, :1, 0].expand(-1, -1, 2, -1) for x in (ring.key, ring.value))
    ring_write(ring, *aliased, impl=impl)
    assert torch.equal(ring.cursor, copied.cursor)
    for part in ("store", "centroid", "tail"):
        a, b = (getattr(x, part).nan_to_num(7.0) for x in (ring, copied))
        assert torch.equal(a, b) and not getattr(copied, part).requires_grad, part


def test_parts_of_a_ring_that_share_memory_are_refused() -> None:
    ring = random_ring(7)
    store = ring.store.clone()
    broken = Ring(store, store.view(-1)[: ring.centroid.numel()].view_as(ring.centroid), ring.tail, ring.cursor)
    key = torch.randn(2, 2, 3, 8)
    for impl in ("reference", "cpp"):
        with pytest.raises(ValueError, match="ring_write: the parts of ring must not overlap in memory, got ring"):
            ring_write(broken, key, key, impl=impl)
