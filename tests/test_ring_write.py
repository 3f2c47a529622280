"""ring_write against a ring kept as a Python list, bit for bit."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from factories import GPU, RING_WRITE, integers, new_ring
from hypothesis import given
from hypothesis import strategies as st
from ring_model import (
    FLOAT8,
    ListRing,
    check,
    equal_bits,
    forget,
    fresh,
    mean_key,
    remember,
    tokens_for,
    write_both,
)
from torch import Tensor

from longmem_kernels import Ring, chunk_topk, ring_write

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STORAGE = [*DTYPES, FLOAT8]
PARTS = ("store", "centroid", "tail", "cursor", "scale")


def parts_of(ring: Ring) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return ring.store, ring.centroid, ring.tail, ring.cursor, ring.scale


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
        dtype=data.draw(st.sampled_from(STORAGE), "storage"),
    )
    torch.manual_seed(data.draw(st.integers(0, 2**20), "seed"))
    dtype = data.draw(st.sampled_from(DTYPES), "input")
    for _ in range(data.draw(st.integers(1, 4), "steps")):
        if data.draw(st.integers(0, 9), "reset") == 0:
            forget(ring, models, torch.rand(rings) < 0.5)
            continue
        indexed = data.draw(st.booleans(), "ring_index given")
        rows = data.draw(st.integers(0, 4), "rows") if indexed or rings == 1 else rings
        tokens = data.draw(st.integers(0, 3 * ring.chunks * ring.chunk_size // 2 + 3), "tokens")
        index = torch.randint(rings, (rows,), dtype=torch.int32).to(ring.store.device) if indexed else None
        masked = data.draw(st.booleans(), "masked")
        mask = (torch.rand(rows, tokens) < 0.7).to(ring.store.device) if masked else None
        write_both(ring, models, *tokens_for(ring, rows, tokens, dtype), implementation, index, mask)
        check(ring, models)


def best_chunks(model: ListRing, query: Tensor, head: int, k: int) -> tuple[list[int], list[float]]:
    """Slots and scores of the k best chunks for query [D], the lower slot first where scores are equal."""
    means = {slot: mean_key(tokens, torch.float32)[head] for slot, tokens in model.slots().items()}
    scores = {slot: float(query @ mean) for slot, mean in means.items()}
    best = sorted(scores, key=lambda slot: (-scores[slot], slot))[:k]
    missing = k - len(best)
    return best + [-1] * missing, [scores[slot] for slot in best] + [-math.inf] * missing


@given(data=st.data())
def test_any_sequence_of_writes_resets_and_searches_finds_what_the_list_model_finds(
    implementation: str, data: st.DataObject
) -> None:
    """Whole numbers, and chunks of a power of two tokens: means and scores are exact, and ids must be equal."""
    ring, models = fresh(
        implementation,
        rings=data.draw(st.integers(1, 3), "rings"),
        chunks=data.draw(st.integers(1, 9), "chunks"),
        chunk_size=data.draw(st.sampled_from([1, 2, 4]), "chunk_size"),
        head_dim=data.draw(st.sampled_from([1, 5, 32]), "head_dim"),
        dtype=data.draw(st.sampled_from(STORAGE), "storage"),
    )
    device = ring.store.device
    search = "auto" if implementation == "cuda" else implementation
    torch.manual_seed(data.draw(st.integers(0, 2**20), "seed"))
    for _ in range(data.draw(st.integers(1, 6), "steps")):
        if data.draw(st.integers(0, 9), "reset") == 0:
            forget(ring, models, torch.rand(ring.rings) < 0.5)
        rows, tokens = data.draw(st.integers(1, 4), "rows"), data.draw(st.integers(0, 40), "tokens")
        index = torch.randint(ring.rings, (rows,), dtype=torch.int32).to(device)
        mask = (torch.rand(rows, tokens) < data.draw(st.sampled_from([0.3, 1.0]), "kept")).to(device)
        key, value = (integers(rows, 2, tokens, ring.head_dim).to(device) for _ in range(2))
        write_both(ring, models, key, value, implementation, index, mask)

        k = data.draw(st.integers(1, 12), "k")
        query = integers(rows, 4, 2, ring.head_dim)  # two query heads for each key/value head
        ids, scores = chunk_topk(query.to(device), ring.centroid, k, count=ring.count(), ring_index=index, impl=search)
        for row, head, token in product(range(rows), range(4), range(2)):
            wanted = best_chunks(models[int(index[row])], query[row, head, token], head // 2, k)
            assert (ids[row, head, token].tolist(), scores[row, head, token].tolist()) == wanted


@pytest.mark.parametrize(("chunk_size", "chunks"), [(1, 5), (3, 4), (64, 2)])
def test_ring_wraps_at_every_offset(implementation: str, chunk_size: int, chunks: int) -> None:
    for offset in range(chunks * chunk_size + chunk_size + 1):
        ring, models = fresh(implementation, rings=1, kv_heads=1, chunks=chunks, chunk_size=chunk_size, head_dim=2)
        for tokens in (offset, chunk_size + 1):
            write_both(ring, models, *tokens_for(ring, 1, tokens), implementation)
        check(ring, models)


@pytest.mark.parametrize("storage", STORAGE)
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


@pytest.mark.parametrize("storage", [torch.bfloat16, FLOAT8])
def test_writing_in_pieces_leaves_what_writing_at_once_leaves(implementation: str, storage: torch.dtype) -> None:
    whole, pieces = (fresh(implementation, chunks=4, chunk_size=3, dtype=storage)[0] for _ in range(2))
    key, value = tokens_for(whole, 2, 41)
    ring_write(whole, key, value, impl=implementation)
    start = 0
    for size in (1, 1, 5, 0, 3, 13, 18):
        ring_write(pieces, key[:, :, start : start + size], value[:, :, start : start + size], impl=implementation)
        start += size
    assert start == 41
    assert equal_bits(whole.store, pieces.store) and torch.equal(whole.centroid, pieces.centroid)
    assert whole.scale is None or pieces.scale is None or torch.equal(whole.scale, pieces.scale)
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


@pytest.mark.parametrize("storage", [torch.float32, FLOAT8])
@pytest.mark.parametrize("masked", [False, True])
def test_operator_passes_opcheck(masked: bool, storage: torch.dtype) -> None:
    ring = new_ring(rings=3, dtype=storage)
    key, value = tokens_for(ring, 2, 9)
    index = torch.tensor([2, 0], dtype=torch.int32) if masked else torch.tensor([1, 1], dtype=torch.int32)
    mask = torch.rand(2, 9) < 0.5 if masked else None
    arguments = (ring.store, ring.centroid, ring.tail, ring.cursor, ring.scale, key, value, index, mask)
    utils = ["test_schema"] if storage != FLOAT8 else []  # multiplies the arguments, which PyTorch cannot for float8
    utils += ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.longmem.ring_write_cpp.default, arguments, test_utils=utils)


@pytest.mark.parametrize("storage", [torch.float32, FLOAT8])
@pytest.mark.parametrize("compiled_implementation", ["auto", "reference", "cpp"])
def test_writing_then_searching_compiles_into_one_graph(compiled_implementation: str, storage: torch.dtype) -> None:
    def write_and_search(
        store: Tensor, centroid: Tensor, tail: Tensor, cursor: Tensor, scale: Tensor | None, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        ring = Ring(store, centroid, tail, cursor, scale)
        ring_write(ring, key, value, impl=compiled_implementation)
        return chunk_topk(key, ring.centroid, 3, count=ring.count(), impl=compiled_implementation)

    eager, compiled = new_ring(dtype=storage), new_ring(dtype=storage)
    step = torch.compile(write_and_search, fullgraph=True, backend="aot_eager")
    for tokens in (9, 6):
        key, value = tokens_for(eager, 2, tokens)
        wanted = write_and_search(*parts_of(eager), key, value)
        got = step(*parts_of(compiled), key, value)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        for name, a, b in zip(PARTS, parts_of(compiled), parts_of(eager), strict=True):
            assert name == "tail" or a is None or equal_bits(a, b), name


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, FLOAT8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ring_index", [None, (2, 0, 2)])
def test_large_writes_are_shared_out_and_leave_what_the_reference_leaves(
    implementation: str, ring_index: tuple[int, ...] | None, masked: bool, storage: torch.dtype
) -> None:
    """Enough chunks for several threads on a CPU, and for several blocks on a GPU."""
    sizes = {"rings": 3, "chunks": 300, "head_dim": 80, "dtype": storage}
    ours, wanted = fresh(implementation, **sizes)[0], fresh("reference", **sizes)[0]
    index = torch.tensor(ring_index, dtype=torch.int32) if ring_index else None
    device, threads = ours.store.device, torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for tokens in (1, 1310, 6):
            key, value = tokens_for(wanted, 3, tokens)
            mask = torch.rand(3, tokens) < 0.7 if masked else None
            ring_write(wanted, key, value, ring_index=index, mask=mask, impl="reference")
            on_device = [None if part is None else part.to(device) for part in (index, mask)]
            ring_write(
                ours, key.to(device), value.to(device),
                ring_index=on_device[0], mask=on_device[1], impl=implementation,
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for name, a, b in zip(PARTS, parts_of(ours), parts_of(wanted), strict=True):
        assert name == "tail" or a is None or b is None or equal_bits(a.cpu(), b), name


# --- on a GPU --------------------------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("storage", [torch.bfloat16, FLOAT8])
def test_a_captured_write_advances_the_ring_with_every_replay(storage: torch.dtype) -> None:
    ring, models = fresh("cuda", chunks=4, dtype=storage)
    key, value = tokens_for(ring, 2, 7)
    mask = torch.rand(2, 7, device="cuda") < 0.7
    write_both(ring, models, key, value, "cuda", mask=mask)  # what is loaded on first use cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ring_write(ring, key, value, mask=mask, impl="cuda")
    for _ in range(3):
        key.normal_(), value.normal_()
        graph.replay()
        remember(models, ring, key, value, mask=mask)
        check(ring, models)


@GPU
@pytest.mark.parametrize("tokens", [1, 500])
@pytest.mark.parametrize("masked", [False, True])
def test_a_write_is_one_kernel_and_nothing_else(tokens: int, masked: bool) -> None:
    ring, _ = fresh("cuda", chunks=50, head_dim=64)
    key, value = tokens_for(ring, 2, tokens)
    mask = torch.rand(2, tokens, device="cuda") < 0.7 if masked else None
    ring_write(ring, key, value, mask=mask, impl="cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        ring_write(ring, key, value, mask=mask, impl="cuda")
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) == 1 and "ring_write_kernel" in on_device[0], on_device
