"""ring_write against a ring kept as a Python list, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from factories import RING_WRITE, device_of, new_ring, poison
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longmem_kernels import Ring, chunk_topk, ring_write

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class ListRing:
    """One ring as the list of all tokens it was given: pairs of stored key and value, [G, D] each."""

    chunks: int
    chunk_size: int
    tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def slots(self) -> dict[int, list[tuple[Tensor, Tensor]]]:
        """The tokens of every searchable chunk, by slot."""
        closed = len(self.tokens) // self.chunk_size
        return {
            number % self.chunks: self.tokens[number * self.chunk_size : (number + 1) * self.chunk_size]
            for number in range(max(0, closed - self.chunks), closed)
        }

    def tail(self) -> list[tuple[Tensor, Tensor]]:
        return self.tokens[len(self.tokens) // self.chunk_size * self.chunk_size :]


def mean_key(tokens: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    total = np.zeros(tokens[0][0].shape, np.float32)
    with np.errstate(invalid="ignore"):  # inf - inf, which float16 storage can meet
        for key, _ in tokens:
            total = total + key.float().numpy()
    return torch.from_numpy(total / np.float32(len(tokens))).to(dtype)


def write_both(
    ring: Ring,
    models: list[ListRing],
    key: Tensor,
    value: Tensor,
    implementation: str,
    ring_index: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    ring_write(ring, key, value, ring_index=ring_index, mask=mask, impl=implementation)
    stored_key, stored_value = key.cpu().to(ring.store.dtype), value.cpu().to(ring.store.dtype)
    for row in range(key.shape[0]):
        model = models[int(ring_index[row]) if ring_index is not None else row if ring.rings == key.shape[0] else 0]
        for token in range(key.shape[2]):
            if mask is None or mask[row, token]:
                model.tokens.append((stored_key[row, :, token], stored_value[row, :, token]))


def equal_bits(got: Tensor, wanted: Tensor) -> bool:
    """Equal, NaN for NaN."""
    return (
        got.dtype == wanted.dtype
        and torch.equal(got.isnan(), wanted.isnan())
        and torch.equal(got.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0))
    )


def check(ring: Ring, models: list[ListRing]) -> None:
    """Everything that may be read from the ring is what the model holds; what was never written is still NaN."""
    assert ring.cursor.tolist() == [len(model.tokens) for model in models]
    assert ring.count().tolist() == [len(model.slots()) for model in models]
    for r, model in enumerate(models):
        slots = model.slots()
        for slot in range(ring.chunks):
            store, centroid = ring.store[r, :, slot].cpu(), ring.centroid[r, :, slot].cpu()
            if slot not in slots:
                assert store.isnan().all() and centroid.isnan().all(), f"ring {r}: unwritten slot {slot} was touched"
                continue
            wanted = torch.stack([torch.stack(pair, 1) for pair in slots[slot]], 2)  # [G, 2, C, D]
            assert equal_bits(store, wanted), f"ring {r}: slot {slot} holds other tokens"
            assert equal_bits(centroid, mean_key(slots[slot], centroid.dtype)), f"ring {r}: centroid of slot {slot}"
        for offset, pair in enumerate(model.tail()):
            got = ring.tail[r, :, :, offset].cpu()
            assert equal_bits(got, torch.stack(pair, 1)), f"ring {r}: tail token {offset}"


def fresh(implementation: str, **sizes: object) -> tuple[Ring, list[ListRing]]:
    ring = poison(new_ring(device=device_of(implementation), **sizes))  # type: ignore[arg-type]
    return ring, [ListRing(ring.chunks, ring.chunk_size) for _ in range(ring.rings)]


def tokens_for(ring: Ring, rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    shape = (rows, ring.kv_heads, tokens, ring.head_dim)
    key, value = (torch.randn(shape).to(ring.store.device, dtype) for _ in range(2))
    return key, value


@pytest.fixture(params=RING_WRITE, scope="module")
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@given(data=st.data())
def test_any_sequence_of_writes_and_resets_leaves_what_the_list_model_holds(
    implementation: str, data: st.DataObject
) -> None:
    rings = data.draw(st.integers(1, 3), "rings")
    ring, models = fresh(
        implementation,
        rings=rings,
        kv_heads=data.draw(st.integers(1, 2), "kv_heads"),
        chunks=data.draw(st.integers(1, 5), "chunks"),
        chunk_size=data.draw(st.sampled_from([1, 2, 3, 4, 7, 64]), "chunk_size"),
        head_dim=data.draw(st.sampled_from([1, 3, 8]), "head_dim"),
        dtype=data.draw(st.sampled_from(DTYPES), "storage"),
    )
    torch.manual_seed(data.draw(st.integers(0, 2**20), "seed"))
    dtype = data.draw(st.sampled_from(DTYPES), "input")
    for _ in range(data.draw(st.integers(1, 4), "steps")):
        if data.draw(st.integers(0, 9), "reset") == 0:
            chosen = torch.rand(rings) < 0.5
            ring.reset(chosen.to(ring.store.device))
            for r in chosen.nonzero().flatten().tolist():
                models[r].tokens.clear()
                ring.store[r], ring.centroid[r] = torch.nan, torch.nan
            continue
        indexed = data.draw(st.booleans(), "ring_index given")
        rows = data.draw(st.integers(0, 4), "rows") if indexed or rings == 1 else rings
        tokens = data.draw(st.integers(0, 3 * ring.chunks * ring.chunk_size // 2 + 3), "tokens")
        index = torch.randint(rings, (rows,), dtype=torch.int32).to(ring.store.device) if indexed else None
        masked = data.draw(st.booleans(), "masked")
        mask = (torch.rand(rows, tokens) < 0.7).to(ring.store.device) if masked else None
        write_both(ring, models, *tokens_for(ring, rows, tokens, dtype), implementation, index, mask)
        check(ring, models)


@pytest.mark.parametrize(("chunk_size", "chunks"), [(1, 5), (3, 4), (64, 2)])
def test_ring_wraps_at_every_offset(implementation: str, chunk_size: int, chunks: int) -> None:
    for offset in range(chunks * chunk_size + chunk_size + 1):
        ring, models = fresh(implementation, rings=1, kv_heads=1, chunks=chunks, chunk_size=chunk_size, head_dim=2)
        for tokens in (offset, chunk_size + 1):
            write_both(ring, models, *tokens_for(ring, 1, tokens), implementation)
        check(ring, models)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_input_and_storage_dtype_rounds_alike(
    implementation: str, dtype: torch.dtype, storage: torch.dtype
) -> None:
    ring, models = fresh(implementation, chunk_size=3, head_dim=64, dtype=storage)
    # Magnitudes from subnormal to overflowing in float16, so that rounding has every case to get wrong.
    key, value = tokens_for(ring, 2, 25)
    spread = torch.logspace(-9, 6, 64, device=key.device)
    write_both(ring, models, (key * spread).to(dtype), (value * spread).to(dtype), implementation)
    check(ring, models)


def test_strided_inputs_are_read_in_place(implementation: str) -> None:
    ring, models = fresh(implementation, rings=3, chunks=3)
    device = ring.store.device
    as_projected = torch.randn(2, 3, 11, 2, 16, device=device)  # [2, B, T, G, 2 * D]
    key, value = as_projected.transpose(2, 3)[..., 3:11]
    mask = (torch.rand(11, 6, device=device) < 0.7).mT[::2]
    index = torch.tensor([2, 0, 0, 1, 2, 1], dtype=torch.int32, device=device)[::2]
    assert not (key.is_contiguous() or mask.is_contiguous() or index.is_contiguous())
    write_both(ring, models, key, value, implementation, index, mask)
    one_token = torch.randn(3, 2, 1, 8, device=device).expand(3, 2, 7, 8)
    same_ring = torch.ones(1, dtype=torch.int32, device=device).expand(3)
    write_both(ring, models, one_token, one_token, implementation, same_ring)
    check(ring, models)


def test_writing_in_pieces_leaves_what_writing_at_once_leaves(implementation: str) -> None:
    whole, pieces = (fresh(implementation, chunks=4, chunk_size=3, dtype=torch.bfloat16)[0] for _ in range(2))
    key, value = tokens_for(whole, 2, 41)
    ring_write(whole, key, value, impl=implementation)
    start = 0
    for size in (1, 1, 5, 0, 3, 13, 18):
        ring_write(pieces, key[:, :, start : start + size], value[:, :, start : start + size], impl=implementation)
        start += size
    assert start == 41
    assert torch.equal(whole.store, pieces.store) and torch.equal(whole.centroid, pieces.centroid)
    assert torch.equal(whole.cursor, pieces.cursor)
    open_tokens = 41 % 3
    assert torch.equal(whole.tail[:, :, :, :open_tokens], pieces.tail[:, :, :, :open_tokens])


def test_rows_that_share_a_ring_are_appended_in_row_order(implementation: str) -> None:
    shared, joined = (fresh(implementation, rings=1, chunks=9, chunk_size=2)[0] for _ in range(2))
    key, value = tokens_for(shared, 3, 5)
    ring_write(shared, key, value, impl=implementation)
    for row in range(3):
        ring_write(joined, key[row : row + 1], value[row : row + 1], impl=implementation)
    assert shared.cursor.tolist() == [15]
    assert equal_bits(shared.store, joined.store) and equal_bits(shared.centroid, joined.centroid)


def test_one_call_may_overwrite_the_whole_ring_several_times(implementation: str) -> None:
    ring, models = fresh(implementation, chunks=3, chunk_size=4)
    write_both(ring, models, *tokens_for(ring, 2, 2), implementation)
    write_both(ring, models, *tokens_for(ring, 2, 63), implementation)
    check(ring, models)


@pytest.mark.parametrize("nothing", ["no tokens", "no rows", "all masked"])
def test_writing_nothing_changes_nothing(implementation: str, nothing: str) -> None:
    ring, _ = fresh(implementation, rings=1)
    ring_write(ring, *tokens_for(ring, 1, 6), impl=implementation)
    before = [part.clone() for part in (ring.store, ring.centroid, ring.tail, ring.cursor)]
    rows, tokens = (0, 3) if nothing == "no rows" else (1, 0) if nothing == "no tokens" else (1, 9)
    mask = torch.zeros(rows, tokens, dtype=torch.bool, device=ring.store.device) if nothing == "all masked" else None
    ring_write(ring, *tokens_for(ring, rows, tokens), mask=mask, impl=implementation)
    for part, old in zip((ring.store, ring.centroid, ring.tail, ring.cursor), before, strict=True):
        assert equal_bits(part, old)


def test_the_open_tail_is_not_searchable(implementation: str) -> None:
    ring, _ = fresh(implementation, rings=1, kv_heads=1, chunk_size=4)
    key, value = tokens_for(ring, 1, 4)
    ring_write(ring, key[:, :, :3], value[:, :, :3], impl=implementation)
    query = key.mean(2, keepdim=True)
    ids, scores = chunk_topk(query, ring.centroid, 2, count=ring.count())
    assert ids.flatten().tolist() == [-1, -1] and (scores == -torch.inf).all()
    ring_write(ring, key[:, :, 3:], value[:, :, 3:], impl=implementation)
    ids, scores = chunk_topk(query, ring.centroid, 2, count=ring.count())
    assert ids.flatten().tolist() == [0, -1] and scores[..., 0].isfinite().all()


def test_reset_empties_the_chosen_rings_and_no_other(implementation: str) -> None:
    ring, models = fresh(implementation, rings=3)
    write_both(ring, models, *tokens_for(ring, 3, 10), implementation)
    ring.reset(torch.tensor([False, True, False], device=ring.store.device))
    assert ring.cursor.tolist() == [10, 0, 10] and ring.count().tolist() == [2, 0, 2]
    models[1].tokens.clear()
    write_both(ring, models, *tokens_for(ring, 3, 10), implementation)  # as many again: every slot is written anew
    check(ring, models)
    ring.reset()
    assert ring.cursor.tolist() == [0, 0, 0]


def test_no_gradient_flows_into_the_ring(implementation: str) -> None:
    ring, _ = fresh(implementation)
    key, value = (x.requires_grad_() for x in tokens_for(ring, 2, 9))
    ring_write(ring, key, value, impl=implementation)
    assert not any(part.requires_grad for part in (ring.store, ring.centroid, ring.tail))


def test_float64_rings_average_in_float64() -> None:
    ring = new_ring(rings=1, kv_heads=1, chunk_size=2, dtype=torch.float64)
    key = torch.tensor([1.0, 1e-12], dtype=torch.float64)[:, None].repeat(1, 1, 1, 8)
    ring_write(ring, key, key)
    assert ring.centroid[0, 0, 0, 0].item() == (1.0 + 1e-12) / 2


@pytest.mark.parametrize("masked", [False, True])
def test_operator_passes_opcheck(masked: bool) -> None:
    ring = new_ring(rings=3)
    key, value = tokens_for(ring, 2, 9)
    index = torch.tensor([2, 0], dtype=torch.int32) if masked else torch.tensor([1, 1], dtype=torch.int32)
    mask = torch.rand(2, 9) < 0.5 if masked else None
    arguments = (ring.store, ring.centroid, ring.tail, ring.cursor, key, value, index, mask)
    torch.library.opcheck(torch.ops.longmem.ring_write_cpp.default, arguments)


@pytest.mark.parametrize("compiled_implementation", ["auto", "reference", "cpp"])
def test_writing_then_searching_compiles_into_one_graph(compiled_implementation: str) -> None:
    def write_and_search(
        store: Tensor, centroid: Tensor, tail: Tensor, cursor: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        ring = Ring(store, centroid, tail, cursor)
        ring_write(ring, key, value, impl=compiled_implementation)
        return chunk_topk(key, ring.centroid, 3, count=ring.count(), impl=compiled_implementation)

    eager, compiled = new_ring(), new_ring()
    step = torch.compile(write_and_search, fullgraph=True, backend="aot_eager")
    for tokens in (9, 6):
        key, value = tokens_for(eager, 2, tokens)
        wanted = write_and_search(eager.store, eager.centroid, eager.tail, eager.cursor, key, value)
        got = step(compiled.store, compiled.centroid, compiled.tail, compiled.cursor, key, value)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        for name in ("store", "centroid", "cursor"):
            assert torch.equal(getattr(compiled, name), getattr(eager, name)), name
