"""What a call of a known signature still checks, and what it does not: longmem_kernels/_plans.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from factories import new_ring, random_ring
from torch import Tensor, randn, zeros

from longmem_kernels import (
    Ring,
    _plans,
    chunk_topk,
    memory_attention,
    memory_fused_attention,
    ring_write,
)
from longmem_kernels._checks import Sizes

B, H, G, T, S, D, M, C, K = 2, 4, 2, 3, 5, 8, 6, 4, 3


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def parts(ring: Ring) -> list[Tensor]:
    """Copies, with numbers for NaN."""
    return [part.nan_to_num() for part in vars(ring).values() if part is not None]


@pytest.fixture
def binds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the arguments whose shapes were checked, in order."""
    names: list[str] = []
    bind = Sizes.bind

    def counted(sizes: Sizes, name: str, *arguments: Any) -> None:
        names.append(name)
        bind(sizes, name, *arguments)

    monkeypatch.setattr(Sizes, "bind", counted)
    yield names


def arguments_of(op: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The public function, and a call of it whose shapes no other test has."""
    ring = random_ring(M * C + 1, chunks=M, chunk_size=C, head_dim=D, kv_heads=G)
    query, local, gate = randn(B, H, T, D), randn(B, G, S, D), zeros(H)
    attend = {"query": query, "key": local, "value": local, "gate": gate}
    ids = torch.randint(-1, M, (B, H, T, K), dtype=torch.int32)
    write, index = {"key": randn(B, G, T, D), "value": randn(B, G, T, D)}, rows(1, 0)
    return {
        "chunk_topk": (
            chunk_topk,
            {"query": query, "centroid": ring.centroid, "k": K, "count": ring.count(), "ring_index": index},
        ),
        "ring_write": (ring_write, {"ring": ring, "ring_index": index, **write}),
        "memory_attention": (
            memory_attention,
            {
                **attend, "memory_key": ring.key, "memory_value": ring.value, "chunk_ids": ids, "ring_index": index,
                "causal": True,
            },
        ),
        "memory_fused_attention": (memory_fused_attention, {**attend, "ring": ring, "k": K, "ring_index": index}),
    }[op]  # fmt: skip


OPS = ("chunk_topk", "ring_write", "memory_attention", "memory_fused_attention")


@pytest.mark.parametrize("op", OPS)
def test_a_known_signature_is_not_checked_again(op: str, binds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call, arguments = arguments_of(op)
    call(**arguments)
    binds.clear()
    call(**arguments)
    other = {
        **arguments,
        **{name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor) and x.is_contiguous()},
    }
    call(**other)
    assert not binds
    # Anything that a check looks at makes another signature.
    name = "key" if op == "ring_write" else "query"
    tensor = arguments[name]
    for changed in (
        tensor.transpose(1, 2).contiguous().transpose(1, 2),
        tensor.clone().requires_grad_(),
        tensor[:, :, :2],
        tensor.bfloat16(),
    ):
        binds.clear()
        with contextlib.suppress(ValueError, TypeError):
            call(**{**arguments, name: changed})
        assert binds, (tuple(changed.shape), changed.stride(), changed.dtype)


@pytest.mark.parametrize("op", OPS)
def test_values_are_checked_in_every_call(op: str) -> None:
    call, arguments = arguments_of(op)
    call(**arguments)
    bad: list[tuple[str, dict[str, Any]]] = [
        (r"ring_index must lie in \[0, 2\), got values from", {"ring_index": rows(0, 2)})
    ]
    if op == "chunk_topk":
        bad.append((r"count must lie in \[0, 7\), got values from 1 to 7", {"count": rows(1, 7)}))
    if op == "memory_attention":
        for value in (-2, M, -(2**31), 2**31 - 1):
            ids = arguments["chunk_ids"].clone()
            ids[1, 2, 1, 0] = value
            bad.append((r"chunk_ids must lie in \[-1, 6\), got values from", {"chunk_ids": ids}))
    for message, change in bad:
        with pytest.raises(ValueError, match=f"{message}"):
            call(**{**arguments, **change})
    call(**arguments)


def test_a_known_ring_that_makes_no_sense_is_refused_and_left_alone() -> None:
    key = randn(2, 2, 3, 8)
    ring_write(new_ring(), key, key)
    ring = random_ring(7)
    ring.cursor.fill_(-1)
    before = parts(ring)
    with pytest.raises(ValueError, match=r"ring.cursor must lie in .* got values from -1 to -1"):
        ring_write(ring, key, key)
    assert all(torch.equal(a, b) for a, b in zip(before, parts(ring), strict=True))
    whole = new_ring()
    shared = torch.zeros(whole.store.numel() + whole.centroid.numel())
    overlapping = Ring(
        shared[: whole.store.numel()].view(whole.store.shape),
        shared[whole.store.numel() - 1 :][: whole.centroid.numel()].view(whole.centroid.shape),
        whole.tail,
        whole.cursor,
    )
    with pytest.raises(ValueError, match=r"parts of ring must not overlap in memory, got ring.store and ring.centroid"):
        ring_write(overlapping, key, key)
    assert not shared.any()


@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_may_be_views_of_the_ring(compiled: bool) -> None:
    """Of a known signature, and compiled."""
    write = torch.compile(ring_write, backend="eager", fullgraph=True) if compiled else ring_write
    rings = [random_ring(23, head_dim=8, chunk_size=4, chunks=6) for _ in range(2)]
    for part, other in zip(vars(rings[0]).values(), vars(rings[1]).values(), strict=True):
        if part is not None:
            other.copy_(part)
    tokens = [ring.store[:, :, 1:6, 0].flatten(2, 3) for ring in rings]
    strided = [ring.store[:, :, 0, 0] for ring in rings]
    assert tokens[0].data_ptr() != rings[0].store.data_ptr() and strided[0].data_ptr() == rings[0].store.data_ptr()
    write(rings[0], strided[0].clone(), strided[0].clone())
    write(rings[1], strided[1].clone(), strided[1].clone())
    for _ in range(4):
        copies = strided[0].clone()
        write(rings[0], copies, copies)
        write(rings[1], strided[1], strided[1])
        assert all(torch.equal(a, b) for a, b in zip(parts(rings[0]), parts(rings[1]), strict=True))


def test_what_looks_alike_is_told_apart() -> None:
    query, centroid, count = randn(1, 1, 2, 3), randn(1, 1, 7, 3), rows(7)
    chunk_topk(query, centroid, 1, count=count)
    for k in (True, 1.0, "1", torch.tensor(1)):
        with pytest.raises(TypeError, match="k must be an integer"):
            chunk_topk(query, centroid, k, count=count)  # type: ignore[arg-type]
    opaque = [query.to_sparse(), torch.nested.nested_tensor([query[0]])]
    if torch.backends.mkldnn.is_available():
        opaque.append(query.to_mkldnn())  # has the strides of a tensor that is contiguous
    for other in opaque:
        with pytest.raises(TypeError, match="query must be a strided tensor"):
            chunk_topk(other, centroid, 1, count=count)


def test_plans_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plans, "MOST_PLANS", 3)
    made: list[int] = []
    plans = _plans.Plans(lambda tensor, option: made.append(option) or option)
    tensor = randn(2)
    for option in (0, 1, 2, 0, 1, 2, 3, 0):
        assert plans.find((tensor,), (option,)) == option
        assert len(plans._made) <= 3
    assert made == [0, 1, 2, 3, 0]


def test_kernels_skip_autograd_where_nothing_requires_a_gradient() -> None:
    call, arguments = arguments_of("memory_attention")
    out = call(**arguments)
    arguments["gate"] = arguments["gate"].requires_grad_()
    with_gradient = call(**arguments)
    assert not out.requires_grad and with_gradient.requires_grad and torch.equal(out, with_gradient)
    with torch.no_grad():
        assert not call(**arguments).requires_grad
