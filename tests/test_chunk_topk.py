"""chunk_topk against brute force: bit for bit where scores are exact, within a derived band where they are rounded."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from factories import integers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longmem_kernels import chunk_topk
from longmem_kernels._extension import build_info

INF, NAN = torch.inf, torch.nan
UNIT_ROUNDOFF = 2.0**-24  # of float32, which scores are summed in


@pytest.fixture(params=["reference", "cpp"], scope="module")
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


def rings_of_rows(query: Tensor, centroid: Tensor, ring_index: Tensor | None) -> list[int]:
    if ring_index is not None:
        return ring_index.tolist()
    return list(range(len(query))) if len(query) == len(centroid) else [0] * len(query)


def brute_force(
    query: Tensor, centroid: Tensor, k: int, count: Tensor, ring_index: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Every score in float64, sorted: numbers descending, then NaN, equal ones by slot; -1 and -inf fill up to k."""
    B, H, T, _ = query.shape
    group = H // centroid.shape[1]
    ids = np.full((B, H, T, k), -1, np.int64)
    best = np.full((B, H, T, k), -np.inf)
    for b, ring in enumerate(rings_of_rows(query, centroid, ring_index)):
        for h in range(H):
            stored = centroid[ring, h // group, : count[ring]].double().numpy()
            with np.errstate(invalid="ignore"):
                scores = query[b, h].double().numpy() @ stored.T
            nan = np.isnan(scores)
            order = np.lexsort((np.where(nan, 0.0, -scores), nan))[:, :k]  # by the last key first, and stable
            ids[b, h, :, : order.shape[1]] = order
            best[b, h, :, : order.shape[1]] = np.take_along_axis(scores, order, -1)
    return ids, best


def assert_equals_brute_force(
    implementation: str, query: Tensor, centroid: Tensor, k: int, count: Tensor, ring_index: Tensor | None = None
) -> None:
    ids, scores = chunk_topk(query, centroid, k, count=count, ring_index=ring_index, impl=implementation)
    wanted_ids, wanted_scores = brute_force(query, centroid, k, count, ring_index)
    assert ids.dtype == torch.int32 and scores.dtype == torch.float32
    np.testing.assert_array_equal(scores.numpy(), wanted_scores)
    np.testing.assert_array_equal(ids.numpy(), wanted_ids)


def counts(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def with_unstored_nan(centroid: Tensor, count: Tensor) -> Tensor:
    for ring, stored in enumerate(count.tolist()):
        centroid[ring, :, stored:] = NAN
    return centroid


# --- exact scores: ids and scores bit for bit ------------------------------------------------------------------------


@given(data=st.data())
def test_whole_numbers_give_exactly_the_brute_force_result(implementation: str, data: st.DataObject) -> None:
    draw = data.draw
    B, G, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    T, M = draw(st.sampled_from([0, 1, 5, 63, 129])), draw(st.integers(1, 300))
    D = draw(st.sampled_from([1, 3, 8, 33, 64]))
    K = draw(st.integers(1, 64))
    rings = draw(st.sampled_from(sorted({1, B, 4})))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    count = torch.randint(0, M + 1, (rings,), dtype=torch.int32)
    query = integers(B, G * group, T, D, dtype=draw(st.sampled_from(dtypes)))
    centroid = with_unstored_nan(integers(rings, G, M, D, dtype=draw(st.sampled_from(dtypes))), count)
    needs_index = rings not in (1, B)
    index = torch.randint(rings, (B,), dtype=torch.int32) if needs_index or draw(st.booleans()) else None
    assert_equals_brute_force(implementation, query, centroid, K, count, index)


@pytest.mark.parametrize("K", [1, 3, 16, 64])
@pytest.mark.parametrize("M", [1, 2, 127, 128, 129, 1000])
def test_sizes_beside_the_tile_edges(implementation: str, M: int, K: int) -> None:
    query, centroid = integers(1, 2, 5, 32), integers(1, 1, M, 32)
    assert_equals_brute_force(implementation, query, centroid, K, counts(M))


@pytest.mark.parametrize("T", [0, 1, 63, 127, 128, 129])
def test_every_number_of_queries(implementation: str, T: int) -> None:
    query, centroid = integers(2, 3, T, 16), integers(2, 3, 150, 16)
    assert_equals_brute_force(implementation, query, centroid, 4, counts(150, 77))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_missing_chunks_are_minus_one_and_minus_infinity(implementation: str, count: int) -> None:
    query, centroid = integers(1, 2, 3, 8), with_unstored_nan(integers(1, 2, 9, 8), counts(count))
    ids, scores = chunk_topk(query, centroid, 6, count=counts(count), impl=implementation)
    assert (ids[..., count:] == -1).all() and (scores[..., count:] == -INF).all()
    assert (ids[..., :count] >= 0).all() and scores[..., :count].isfinite().all()
    assert_equals_brute_force(implementation, query, centroid, 6, counts(count))


@pytest.mark.parametrize("M", [64, 300])
def test_equal_scores_go_to_the_lower_slots_in_order(implementation: str, M: int) -> None:
    ids, _ = chunk_topk(torch.ones(1, 2, 40, 8), torch.ones(1, 2, M, 8), 64, count=counts(M), impl=implementation)
    assert (ids == torch.arange(64)).all()


@pytest.mark.parametrize("direction", [1, -1])
def test_ascending_scores_make_every_chunk_a_new_best(implementation: str, direction: int) -> None:
    centroid = torch.zeros(1, 1, 1000, 4)
    centroid[..., 0] = torch.arange(1000)
    query = torch.zeros(1, 1, 17, 4)
    query[..., 0] = direction
    ids, scores = chunk_topk(query, centroid, 16, count=counts(1000), impl=implementation)
    winners = torch.arange(999, 983, -1) if direction == 1 else torch.arange(16)
    assert (ids == winners).all() and (scores == direction * winners).all()


@pytest.mark.parametrize("tile", [0, 1, 7])
def test_all_winners_may_lie_in_one_tile(implementation: str, tile: int) -> None:
    centroid = integers(1, 1, 1000, 16, low=-1, high=1)
    centroid[:, :, tile * 128 + 20 : tile * 128 + 60] = integers(1, 1, 40, 16, low=3, high=9)
    query = torch.ones(1, 1, 9, 16)
    assert_equals_brute_force(implementation, query, centroid, 40, counts(1000))
    ids, _ = chunk_topk(query, centroid, 40, count=counts(1000), impl=implementation)
    assert (ids // 128 == tile).all()


@pytest.mark.parametrize("K", [1, 4, 64])
def test_infinite_and_nan_scores_have_their_place(implementation: str, K: int) -> None:
    """+inf first, then numbers, then -inf, then NaN, each by slot; chunks that are not stored after all of them."""
    centroid = integers(1, 1, 150, 8, low=1)
    query = integers(1, 1, 40, 8, low=1)
    centroid[0, 0, 3::11, 2] = INF
    centroid[0, 0, 4::7, 5] = -INF
    centroid[0, 0, ::13, 1] = NAN
    assert_equals_brute_force(implementation, query, centroid, K, counts(140))


@pytest.mark.parametrize("stored", [-INF, NAN, INF])
def test_chunks_whose_score_is_not_finite_are_still_found(implementation: str, stored: float) -> None:
    centroid = torch.full((1, 1, 9, 4), stored)
    assert_equals_brute_force(implementation, torch.ones(1, 1, 3, 4), centroid, 12, counts(7))


def test_a_nan_query_harms_no_other_query(implementation: str) -> None:
    query, centroid = integers(1, 2, 70, 8), integers(1, 1, 90, 8)
    query[0, 0, 33, 2] = NAN
    query[0, 1, 60] = INF
    assert_equals_brute_force(implementation, query, centroid, 5, counts(90))
    ids, scores = chunk_topk(query, centroid, 5, count=counts(90), impl=implementation)
    assert scores[0, 0, 33].isnan().all() and ids[0, 0, 33].tolist() == [0, 1, 2, 3, 4]


def test_unstored_slots_and_other_rings_never_matter(implementation: str) -> None:
    query, centroid = integers(2, 4, 9, 8), integers(3, 2, 50, 8)
    count, index = counts(20, 50, 33), counts(2, 0)
    wanted = chunk_topk(query, centroid, 7, count=count, ring_index=index, impl=implementation)
    with_unstored_nan(centroid, count)[1] = NAN
    got = chunk_topk(query, centroid, 7, count=count, ring_index=index, impl=implementation)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_rows_may_share_a_ring(implementation: str) -> None:
    query, centroid = integers(3, 2, 9, 8), integers(2, 1, 50, 8)
    assert_equals_brute_force(implementation, query, centroid, 7, counts(30, 50), counts(1, 0, 1))
    assert_equals_brute_force(implementation, query, centroid[1:], 7, counts(50))


def test_strided_inputs_are_read_in_place(implementation: str) -> None:
    query = integers(2, 30, 4, 24).transpose(1, 2)[..., 5:21]  # as projected: [B, T, H, D]
    centroid = integers(2, 90, 2, 40).transpose(1, 2)[:, :, ::2, 3:19]
    count = counts(40, 0, 45, 0)[::2]
    index = counts(1, 0, 0, 1)[::3]
    assert not any(x.is_contiguous() for x in (query, centroid, count, index))
    assert_equals_brute_force(implementation, query, centroid, 6, count, index)
    one_query = query[:, :, :1].expand(2, 4, 9, 16)
    assert_equals_brute_force(implementation, one_query, centroid, 6, count, counts(1).expand(2))


# --- few queries: the slots are split, and centroids are read in the format they are stored in -----------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "group"), [(1, 1), (1, 8), (3, 4), (13, 1)])
def test_few_queries_over_several_splits(implementation: str, tokens: int, group: int, dtype: torch.dtype) -> None:
    query, centroid = integers(2, group, tokens, 40, dtype=dtype), integers(2, 1, 5000, 40, dtype=dtype)
    count = counts(5000, 2049)
    assert_equals_brute_force(implementation, query, with_unstored_nan(centroid, count), 16, count)


@pytest.mark.parametrize(
    ("rows", "group", "tokens"), [(2, 1, 1), (5, 1, 1), (3, 2, 1), (9, 1, 1), (70, 1, 1), (7, 3, 10)]
)
def test_rows_that_share_the_only_ring_search_together(implementation: str, rows: int, group: int, tokens: int) -> None:
    """As few queries up to 8 per head of memory, as many above; across the edge of a task of 128."""
    query, centroid = integers(rows, 2 * group, tokens, 24), integers(1, 2, 2500, 24)
    assert_equals_brute_force(implementation, query, centroid, 16, counts(2300))
    index = torch.zeros(rows, dtype=torch.int32)
    assert_equals_brute_force(implementation, query, centroid, 16, counts(2300), index)


@pytest.mark.parametrize("M", [15, 16, 17, 2047, 2048, 2049, 4096])
@pytest.mark.parametrize("D", [1, 16, 33])
def test_few_queries_beside_the_split_edges(implementation: str, M: int, D: int) -> None:
    query, centroid = integers(1, 2, 1, D), integers(1, 2, M, D, low=-1, high=1)
    assert_equals_brute_force(implementation, query, centroid, 20, counts(M))


@pytest.mark.parametrize("order", ["equal", "ascending", "descending", "one_split", "minus_infinity", "nan"])
@pytest.mark.parametrize("K", [1, 16, 64])
def test_few_queries_with_adversarial_scores(implementation: str, order: str, K: int) -> None:
    slot = torch.arange(5000.0)
    score = {
        "equal": torch.full_like(slot, -7.0),
        "ascending": slot,
        "descending": -slot,
        "one_split": torch.where((slot >= 2048) & (slot < 4096), slot % 50, -1.0),
        "minus_infinity": torch.where(slot % 500 == 499, slot, -INF),
        "nan": torch.where(slot % 700 == 699, slot, torch.where(slot % 2 == 0, NAN, -INF)),
    }[order]
    assert_equals_brute_force(implementation, torch.ones(1, 1, 2, 1), score.view(1, 1, -1, 1), K, counts(4999))


@given(data=st.data())
def test_few_queries_of_any_shape(implementation: str, data: st.DataObject) -> None:
    draw = data.draw
    B, G, group, T, R = (draw(st.integers(1, most)) for most in (3, 2, 4, 3, 2))
    M, D, K = draw(st.integers(1, 4500)), draw(st.sampled_from([1, 8, 17, 64])), draw(st.integers(1, 64))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    count = torch.randint(0, M + 1, (R,), dtype=torch.int32)
    query = integers(B, G * group, T, D, dtype=draw(st.sampled_from(dtypes)))
    centroid = with_unstored_nan(integers(R, G, M, D, dtype=draw(st.sampled_from(dtypes))), count)
    assert_equals_brute_force(implementation, query, centroid, K, count, torch.randint(R, (B,), dtype=torch.int32))


def test_every_half_is_read_exactly(implementation: str) -> None:
    """All float16 numbers, subnormal ones included, as scores of one query."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    centroid = every[every.isfinite()].view(1, 1, -1, 1).expand(1, 1, -1, 32).clone()
    centroid[..., 1:] = 0
    query = torch.zeros(1, 1, 1, 32)
    query[..., 0] = 1
    stored = centroid.shape[2]
    for first in range(0, stored, 64):
        ids, scores = chunk_topk(
            query, centroid[:, :, first : first + 64], 64, count=counts(min(64, stored - first)), impl=implementation
        )
        expected = centroid[0, 0, first : first + 64, 0].float()
        found = ids.flatten() >= 0
        assert torch.equal(scores.flatten()[found], expected[ids.flatten()[found].long()])


# --- rounded scores: within the error of a float32 sum ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "magnitude"), [(32, 1.0), (80, 1e-4), (256, 1e3)])
def test_rounded_scores_stay_within_the_band_of_a_float32_sum(
    implementation: str, dtype: torch.dtype, D: int, magnitude: float
) -> None:
    """A D-term float32 sum, in any order, is off by at most gamma_D * sum |q_d c_d| (Higham 2002, section 3.1), and a
    sorted list moves by no more than its entries do."""
    K = 16
    query = torch.randn(2, 4, 33, D).to(dtype)
    centroid = (torch.randn(2, 2, 700, D) * magnitude).to(dtype)
    ids, scores = chunk_topk(query, centroid, K, count=counts(700, 650), impl=implementation)
    gamma = D * UNIT_ROUNDOFF / (1 - D * UNIT_ROUNDOFF)
    for b, stored in enumerate((700, 650)):
        q, c = query[b].double(), centroid[b, :, :stored].double().repeat_interleave(2, 0)
        exact, band = q @ c.mT, gamma * (q.abs() @ c.abs().mT)
        chosen = ids[b].long()
        assert ((scores[b] - exact.gather(-1, chosen)).abs() <= band.gather(-1, chosen)).all()
        widest = band.amax(-1, keepdim=True)
        assert ((scores[b] - exact.topk(K).values).abs() <= widest).all()
        assert (scores[b].diff(dim=-1) <= 0).all()
        assert (chosen.sort(-1).values.diff(dim=-1) > 0).all(), "a chunk was chosen twice"


def test_float64_is_searched_in_float64() -> None:
    centroid = torch.tensor([1.0, 1.0 + 1e-12, 1.0 - 1e-12], dtype=torch.float64).view(1, 1, 3, 1)
    ids, scores = chunk_topk(torch.ones(1, 1, 1, 1, dtype=torch.float64), centroid, 3, count=counts(3))
    assert ids.flatten().tolist() == [1, 0, 2] and scores.dtype == torch.float64


@pytest.mark.parametrize(("T", "M"), [(200, 600), (1, 9000)])
def test_results_do_not_depend_on_the_number_of_threads_or_the_run(implementation: str, T: int, M: int) -> None:
    query, centroid = torch.randn(2, 4, T, 64), torch.randn(2, 2, M, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            results.append(chunk_topk(query, centroid, 16, count=counts(M, M - 1), impl=implementation))
    finally:
        torch.set_num_threads(threads)
    for ids, scores in results[1:]:
        assert torch.equal(ids, results[0][0]) and torch.equal(scores, results[0][1])


ONE_LEVEL = """
import torch
from longmem_kernels import chunk_topk
from longmem_kernels._extension import build_info

torch.manual_seed(0)
for T, M, D, K in [(1, 129, 64, 16), (3, 4100, 33, 16), (63, 1000, 32, 64), (129, 127, 33, 3)]:
    query, centroid = (torch.randint(-4, 5, s).float() for s in ((2, 4, T, D), (2, 2, M, D)))
    centroid[:, :, 5::17, 0] = torch.inf
    centroid[:, :, 6::19, 1] = torch.nan
    count = torch.tensor([M, M // 2], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = (query.to(dtype), centroid.to(dtype), K)
        wanted = chunk_topk(*arguments, count=count, impl="reference")
        got = chunk_topk(*arguments, count=count, impl="cpp")
        assert torch.equal(got[0], wanted[0]), (T, M, D, K, dtype)
        assert torch.equal(got[1].nan_to_num(nan=7e7), wanted[1].nan_to_num(nan=7e7)), (T, M, D, K, dtype)
print(build_info()["simd"])
"""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_simd_level_gives_the_same_result(level: str) -> None:
    levels = ["baseline", "avx2", "avx512"]
    here = build_info()["simd"]
    if levels.index(level) > levels.index(here):
        pytest.skip(f"NOT TESTED: this CPU (or LONGMEM_SIMD) stops at {here}, the test needs {level}")
    environment = {**os.environ, "LONGMEM_SIMD": level}
    run = subprocess.run([sys.executable, "-c", ONE_LEVEL], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == level


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [False, True])
def test_operator_passes_opcheck(indexed: bool) -> None:
    query, centroid = torch.randn(2, 4, 5, 16), torch.randn(3 if indexed else 2, 2, 9, 16)
    index = counts(2, 0) if indexed else None
    count = counts(*[9] * len(centroid))
    torch.library.opcheck(torch.ops.longmem.chunk_topk_cpp.default, (query, centroid, count, index, 4))


def test_compiles_into_one_graph(implementation: str) -> None:
    def search(query: Tensor, centroid: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_topk(query * 2, centroid, 5, count=count, impl=implementation)

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    for tokens in (7, 3):
        arguments = integers(2, 4, tokens, 8), integers(2, 2, 20, 8), counts(20, 3)
        for got, wanted in zip(compiled(*arguments), search(*arguments), strict=True):
            assert torch.equal(got, wanted)


def test_no_gradient_flows_through_the_selection(implementation: str) -> None:
    query, centroid = torch.randn(1, 1, 3, 8, requires_grad=True), torch.randn(1, 1, 9, 8, requires_grad=True)
    ids, scores = chunk_topk(query, centroid, 2, count=counts(9), impl=implementation)
    assert not ids.requires_grad and not scores.requires_grad
