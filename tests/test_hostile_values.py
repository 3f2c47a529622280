"""Rings, counts, ids and indices whose values make no sense, where the public functions do not check values: compiled,
on CUDA, and torch ops called by hand. Nothing outside is read or written; test_fuzz.py tries more."""

from __future__ import annotations

import pytest
import torch
from factories import new_ring, random_ring
from torch import Tensor, ones, randn, zeros

from longmem_kernels import chunk_topk, memory_attention, ring_write
from longmem_kernels.chunk_topk.reference import chunk_topk_reference
from longmem_kernels.memory_attention.reference import memory_attention_reference
from longmem_kernels.ring_write.reference import ring_write_reference

B, H, G, T, S, D, R, M, C, K = 2, 4, 2, 3, 5, 8, 2, 6, 4, 3
TRUE = ones(2).bool()


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("cursor", [-(2**63), -50, -1, 2**48, 2**63 - 1])
def test_count_of_any_cursor_is_a_count(cursor: int) -> None:
    ring = new_ring(rings=1)
    ring.cursor.fill_(cursor)
    assert ring.count().tolist() == ([0] if cursor < 0 else [ring.chunks])


@pytest.mark.parametrize(
    "rings", [ones(1).bool(), ones(3).bool(), ones(2), ones(2).bool()[None], ones(2).bool().to("meta")]
)
def test_ring_reset_refuses_rings_that_do_not_fit(rings: Tensor) -> None:
    ring = random_ring(7)
    with pytest.raises((ValueError, TypeError), match=r"Ring.reset: rings .*must .*, got"):
        ring.reset(rings)
    assert ring.cursor.tolist() == [7, 7]


def test_compiled_kernels_refuse_what_they_cannot_write() -> None:
    """torch.compile traces the checks of values away; the kernels have their own."""
    key = randn(2, 2, 3, 8)
    write = torch.compile(lambda r, i: ring_write(r, key, key, ring_index=i, impl="cpp"), backend="aot_eager")
    for cursor, index in ((-50, (0, 1)), (2**62, (0, 1)), (0, (0, 5)), (0, (-(2**31), 1))):
        ring = new_ring()
        ring.cursor.fill_(cursor)
        with pytest.raises(RuntimeError, match=r"ring_write: (ring\.cursor|ring_index) must lie in"):
            write(ring, rows(*index))
        assert ring.cursor.tolist() == [cursor, cursor] and not ring.store.any()
    search = torch.compile(
        lambda n, i: chunk_topk(key, zeros(2, 2, 5, 8), 3, count=n, ring_index=i, impl="cpp"), backend="aot_eager"
    )
    for count, index in ((6, 0), (-1, 0), (2**31 - 1, 0), (3, 2), (3, -1)):
        with pytest.raises(RuntimeError, match=r"chunk_topk: (count|ring_index) must lie in"):
            search(rows(count, 1), rows(index, 0))


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
def test_compiled_attention_reads_no_chunk_that_is_none(implementation: str) -> None:
    """The reference takes it for none, the C++ kernel refuses it."""
    bank, local = randn(R, G, M, C, D), randn(B, G, S, D)
    good = torch.randint(0, M, (B, H, T, K), dtype=torch.int32)
    bad = good.clone()
    bad[..., 0] = rows(-2, M, 2**31 - 1, -(2**31)).view(1, H, 1)
    good[..., 0] = -1
    query = randn(B, H, T, D)
    attend = torch.compile(
        lambda ids: memory_attention(query, local, local, bank, bank, ids, fusion="joint", impl=implementation),
        backend="aot_eager",
    )
    if implementation == "reference":
        assert torch.equal(attend(bad), attend(good))
        return
    for row in range(H):  # each kind of bad id alone
        ids = good.clone()
        ids[:, row] = bad[:, row]
        with pytest.raises(RuntimeError, match=r"memory_attention: chunk_ids must lie in \[-1, 6\), got"):
            attend(ids)


def test_references_treat_rings_that_do_not_exist_as_the_kernels_do_on_cuda() -> None:
    """Rows of no ring are dropped, find nothing and read nothing."""
    key, ring, whole = randn(3, G, 9, D), new_ring(chunks=M, chunk_size=C), new_ring(chunks=M, chunk_size=C)
    index = rows(1, -5, 2**31 - 1)
    ring_write_reference(ring, key, key, index, None)
    ring_write_reference(whole, key[:1], key[:1], rows(1), None)
    for part in ("store", "centroid", "cursor"):
        assert torch.equal(getattr(ring, part), getattr(whole, part))
    query = randn(3, H, T, D)
    ids, scores = chunk_topk_reference(query, ring.centroid, ring.count(), index, K)
    assert (ids[0] >= 0).any() and (ids[1:] == -1).all() and (scores[1:] == -torch.inf).all()
    local, ids = randn(3, G, S, D), torch.zeros(3, H, T, K, dtype=torch.int32)
    attend = (query, local, local, query, ring.key, ring.value)
    options = (None, None, None, None, "joint", 1.0, True, None, 0.0)
    _, _, memory_lse = memory_attention_reference(*attend, ids, None, index, *options)
    assert memory_lse[0].isfinite().all() and (memory_lse[1:] == -torch.inf).all()


@pytest.mark.parametrize("cursor", [-(2**63), -50, 2**48 - 3, 2**62 + 5])
def test_reference_takes_a_cursor_modulo_2_to_the_48(cursor: int) -> None:
    key, rings = randn(1, 2, 9, 8), [new_ring(rings=1), new_ring(rings=1)]
    for ring, begin in zip(rings, (cursor, cursor % 2**48), strict=True):
        ring.cursor.fill_(begin)
        ring_write_reference(ring, key, key, None, None)
        assert ring.cursor.tolist() == [(cursor % 2**48 + 9) % 2**48]
    assert torch.equal(rings[0].store, rings[1].store) and torch.equal(rings[0].centroid, rings[1].centroid)


BY_HAND = {
    "cursor of another size": ("ring_write", 3, zeros(1).long()),
    "store of another dtype": ("ring_write", 0, zeros(2, 2, 5, 2, 4, 8).half()),
    "tail that is too small": ("ring_write", 2, zeros(2, 2, 2, 3, 8)),
    "key of more heads": ("ring_write", 5, zeros(2, 3, 3, 8)),
    "value of another dtype": ("ring_write", 6, zeros(2, 2, 3, 8).bfloat16()),
    "mask that is too small": ("ring_write", 8, zeros(2, 2).bool()),
    "mask of numbers": ("ring_write", 8, zeros(2, 3)),
    "ring_index of int64": ("ring_write", 7, zeros(2).long()),
    "nothing for a key": ("ring_write", 5, None),
    "too few counts": ("chunk_topk", 2, rows(1)),
    "query of another width": ("chunk_topk", 0, zeros(2, 4, 3, 9)),
    "heads that do not divide": ("chunk_topk", 0, zeros(2, 3, 3, 8)),
    "k of none": ("chunk_topk", 4, 0),
    "k beyond all": ("chunk_topk", 4, 2**40),
    "centroids in strides": ("chunk_topk", 1, zeros(2, 2, 6, 8, 2)[..., 0]),
    "too few ids": ("memory_attention", 6, zeros(2, 4, 2, 3).int()),
    "values fewer than keys": ("memory_attention", 5, zeros(2, 2, 5, 4, 8)),
    "scale beside float32": ("memory_attention", 7, zeros(2, 2, 6, 2)),
    "gate that is too small": ("memory_attention", 9, zeros(3)),
    "slopes of float64": ("memory_attention", 10, zeros(4).double()),
    "key_mask that is too small": ("memory_attention", 11, zeros(2, 4).bool()),
    "window of none": ("memory_attention", 16, -3),
    "memory of endless chunks": ("memory_attention", 4, zeros(2, 2, 6, 1, 8).expand(2, 2, 6, 2**33, 8)),
}


@pytest.mark.parametrize("what", BY_HAND)
def test_an_op_called_by_hand_checks_what_it_follows(what: str) -> None:
    op, place, change = BY_HAND[what]
    ring, local = new_ring(), zeros(B, G, S, D)
    bank = zeros(R, G, M, C, D)
    arguments = {
        "ring_write": [*vars(ring).values(), zeros(2, 2, 3, 8), zeros(2, 2, 3, 8), None, None],
        "chunk_topk": [zeros(B, H, T, D), zeros(R, G, M, D), rows(M, 0), None, K],
        "memory_attention": [
            zeros(B, H, T, D), local, local, zeros(B, H, T, D), bank, bank, zeros(B, H, T, K).int(), None, None,
            zeros(H), None, None, None, "gated", 1.0, True, None, 0.0,
        ],
    }[op]  # fmt: skip
    kernel = getattr(torch.ops.longmem, f"{op}_cpp")
    kernel(*arguments)
    arguments[place] = change
    with pytest.raises((RuntimeError, ValueError), match=op):
        kernel(*arguments)
