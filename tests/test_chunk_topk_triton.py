"""The Triton chunk_topk against its reference: on a GPU, or under the interpreter (see test_triton_interpreter.py)."""

from __future__ import annotations

import importlib
import math
import os
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device: run by test_triton_interpreter.py", allow_module_level=True)

from interpreter import prepare_once_per_launch  # noqa: E402

from longmem_kernels import chunk_topk  # noqa: E402
from longmem_kernels.chunk_topk.reference import chunk_topk_reference  # noqa: E402

if not CUDA:
    prepare_once_per_launch()
# The package has a function of the same name as this module's parent.
implementation = importlib.import_module("longmem_kernels.chunk_topk.triton")

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
T_LONG, M_LONG = (129, 5000) if CUDA else (9, 300)


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs them one after the other."""
    if not CUDA:
        monkeypatch.setattr(implementation, "WARPS", 1)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Small integers: their inner products are exact in every dtype and order of summation, and full of ties."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def counts(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def check(
    query: Tensor, centroid: Tensor, k: int, count: Tensor, ring_index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Bit for bit as the reference; -0 and +0 are one score."""
    ids, scores = chunk_topk(query, centroid, k, count=count, ring_index=ring_index, impl="triton")
    wanted_ids, wanted_scores = chunk_topk(query, centroid, k, count=count, ring_index=ring_index, impl="reference")
    torch.testing.assert_close(ids, wanted_ids, rtol=0, atol=0)
    torch.testing.assert_close(scores, wanted_scores, rtol=0, atol=0, equal_nan=True)
    return ids, scores


# Under the interpreter every kernel path once: it takes seconds where a GPU takes none.
KINDS = list(product(DTYPES, [1, 3, 16, 64])) if CUDA else list(zip(DTYPES, [16, 64, 3], strict=True))


@pytest.mark.parametrize(("dtype", "k"), KINDS, ids=str)
def test_integers_with_ties(dtype: torch.dtype, k: int) -> None:
    # GQA, M no multiple of a tile, rings filled differently
    query, centroid = integers(2, 2, T_LONG, 64, dtype=dtype), integers(2, 1, M_LONG, 64, dtype=dtype, seed=1)
    check(query, centroid, k, counts(M_LONG, 70))


@pytest.mark.parametrize("tokens", [1, 65, 129])
def test_tiles_for_every_number_of_queries(tokens: int) -> None:
    query, centroid = integers(1, 1, tokens, 32, dtype=torch.bfloat16), integers(1, 1, 300, 32, seed=1).bfloat16()
    check(query, centroid, 4, counts(290))


def test_slots_are_split_among_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    query, centroid = integers(1, 1, 3, 32, dtype=torch.bfloat16), integers(1, 1, 1000, 32, seed=1).bfloat16()
    for warps in (2, 64):
        monkeypatch.setattr(implementation, "WARPS", warps)
        check(query, centroid, 4, counts(901))
        check(query, centroid, 4, counts(33))  # most splits are empty


@settings(max_examples=200 if CUDA else 6)
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    B, G, group, T = (draw(st.integers(1, most)) for most in (2, 2, 2, 3))
    M, rings = draw(st.integers(1, 200)), draw(st.sampled_from(sorted({1, B, 3})))
    k, seed = draw(st.integers(1, 64 if CUDA else 20)), draw(st.integers(0, 2**20))
    query = integers(B, G * group, T, 32, dtype=draw(st.sampled_from(DTYPES)), seed=seed)
    centroid = integers(rings, G, M, 32, dtype=draw(st.sampled_from(DTYPES)), seed=seed + 1)
    count = torch.randint(M + 1, (rings,), generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.int32)
    for ring, stored in enumerate(count.tolist()):
        centroid[ring, :, stored:] = math.nan
    index = None if rings in (1, B) else counts(*([rings - 1, 0][:B]))
    check(query, centroid, k, count, index)


@pytest.mark.parametrize("head_dim", [32, 80, 96, 128, 256])
def test_head_dims(head_dim: int) -> None:
    query, centroid = integers(1, 2, 3, head_dim), integers(1, 1, 40, head_dim, seed=1)
    check(query, centroid, 4, counts(40))
    check(query.bfloat16(), centroid.bfloat16(), 4, counts(40))


@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bank_dtype", DTYPES, ids=str)
def test_bank_of_another_dtype(query_dtype: torch.dtype, bank_dtype: torch.dtype) -> None:
    check(integers(1, 2, 5, 32, dtype=query_dtype), integers(1, 2, 70, 32, dtype=bank_dtype, seed=1), 5, counts(70))


@pytest.mark.parametrize("count", [0, 1, 2, 5, 32, 33])
def test_fewer_stored_than_asked(count: int) -> None:
    centroid = integers(1, 1, 40, 32, seed=1)
    centroid[:, :, count:] = math.nan  # never written
    ids, scores = check(integers(1, 2, 3, 32), centroid, 16, counts(count))
    found = min(count, 16)
    assert (ids[..., :found] >= 0).all() and (ids[..., found:] == -1).all()
    assert (scores[..., found:] == -math.inf).all()


def test_k_larger_than_the_ring() -> None:
    check(integers(1, 2, 3, 32), integers(1, 1, 7, 32, seed=1), 16, counts(7))


def row_of_scores(score: Tensor) -> tuple[Tensor, Tensor]:
    """Query and centroids of one head, such that the first token scores the slots `score` and the second -`score`."""
    centroid = torch.zeros(1, 1, len(score), 32, device=DEVICE)
    centroid[..., 0] = score
    query = torch.zeros(1, 1, 2, 32, device=DEVICE)
    query[..., 0, 0], query[..., 1, 0] = 1, -1
    return query, centroid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "order", ["equal", "ascending", "one_group", "one_tile", "one_lane", "two_levels", "zeros_of_both_signs", "nan"]
)
def test_adversarial_orders(order: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough that lists overflow, with whole numbers that bfloat16 holds."""
    monkeypatch.setattr(implementation, "WARPS", 1)  # no splits
    slot = torch.arange(5000 if CUDA else 1500, dtype=torch.float32, device=DEVICE)
    score = {
        "equal": torch.full_like(slot, -7.0),
        "ascending": (slot // 6).clamp(max=256),  # six of each: ties at every boundary
        "one_group": torch.where(slot // 8 == 77, slot % 8 + 100, -1.0),
        "one_tile": torch.where(slot // 128 == 5, slot % 5 + 100, -(slot % 7)),
        "one_lane": torch.where(slot // 2 % 4 == 1, slot // 32, -1.0),
        "two_levels": (slot % 100 == 99).float(),
        "zeros_of_both_signs": torch.where(slot % 2 == 0, 0.0, -0.0),
        "nan": torch.where(slot % 300 == 299, 1.0, math.nan),
    }[order]
    query, centroid = row_of_scores(score)
    for k in (1, 16, 64) if CUDA else (16,):
        check(query.to(dtype), centroid.to(dtype), k, counts(len(slot) - 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinities(dtype: torch.dtype) -> None:
    M = 90
    centroid = integers(1, 2, M, 32, dtype=dtype, seed=1)
    centroid[:, :, 3::7, 0] = math.nan
    centroid[:, :, 5::7, 1] = math.inf  # a query component of 0 makes it NaN
    centroid[:, :, 6::7, 1] = -math.inf
    query = integers(1, 4, 6, 32, dtype=dtype)
    check(query, centroid, 16, counts(M))
    _, scores = check(query, centroid, 64, counts(60))  # all of them, the NaN ones too
    assert scores.isnan().any() and (scores == math.inf).any()


def test_negative_infinity_beats_nan_beats_nothing() -> None:
    centroid = torch.zeros(1, 1, 5, 32, device=DEVICE)
    centroid[0, 0, :, 0] = torch.tensor([math.nan, -math.inf, math.nan, 1.0, -math.inf])
    ids, scores = check(torch.ones(1, 1, 1, 32, device=DEVICE), centroid, 6, counts(5))
    assert ids.flatten().tolist() == [3, 1, 4, 0, 2, -1]
    wanted = torch.tensor([1, -math.inf, -math.inf, math.nan, math.nan, -math.inf])
    torch.testing.assert_close(scores.flatten().cpu(), wanted, equal_nan=True)


def test_nan_query_finds_lowest_slots() -> None:
    query = integers(1, 1, 3, 32)
    query[:, :, 1] = math.nan
    ids, _ = check(query, integers(1, 1, 70, 32, seed=1), 4, counts(70))
    assert ids[0, 0, 1].tolist() == [0, 1, 2, 3]


def test_ring_index_and_shared_ring() -> None:
    query, centroid = integers(3, 2, 4, 32), integers(5, 2, 70, 32, seed=1)
    centroid[[0, 3]] = math.nan  # rings nobody reads
    check(query, centroid, 8, counts(9, 70, 33, 5, 1), counts(4, 1, 1))
    check(query, centroid[1:2], 8, counts(70))


def test_strides() -> None:
    query = integers(2, 5, 4, 64).transpose(1, 2)[..., :32]
    centroid = integers(2, 70, 2, 3, 32, seed=1).transpose(1, 2)[:, :, ::2, 1]
    check(query, centroid, 8, counts(35, 20))


def test_empty() -> None:
    centroid = integers(1, 1, 5, 32)
    for B, T in ((0, 3), (2, 0)):
        ids, scores = chunk_topk(integers(B, 2, T, 32), centroid, 3, count=counts(5), impl="triton")
        assert ids.shape == scores.shape == (B, 2, T, 3)


def test_a_sample_that_misleads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is made from tiles that hold nothing good: lists overflow, and the block is decided otherwise."""
    sizes = {"BT": 16, "BN": 32, "NG": 32, "SAMPLE": 2, "CAPACITY": 16, "PIECE": 32, "STAGES": 2, "num_warps": 1}
    monkeypatch.setattr(implementation, "search_tiles", lambda *_: sizes)
    slot = torch.arange(1300, dtype=torch.float32, device=DEVICE)
    query, centroid = row_of_scores(torch.where(slot // 32 % 2 == 1, slot % 200, -slot % 50))
    for dtype in (torch.bfloat16, torch.float32):
        check(query.to(dtype), centroid.to(dtype), 16, counts(1290))


# Products whose first 11 bits put the wrong chunks first, at the ends of float32's range as well.
UNITS = {"plain": (1.0, 1.0), "large": (2.0**60, 2.0**40), "norms beyond float32": (2.0**66, 2.0**44)}
UNITS |= {"small": (2.0**-60, 2.0**-40), "denormal queries": (2.0**-140, 1.0)}


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("attack", ["rounding", "cancellation"])
def test_scores_of_less_precision_decide_nothing(attack: str, units: str) -> None:
    """Whole numbers times powers of two, whose sums are exact in float32: all bits of the result are known."""
    M = 5000 if CUDA else 400
    generator = torch.Generator().manual_seed(0)
    query, centroid = torch.zeros(1, 1, 20, 32), torch.zeros(1, 1, M, 32)
    if attack == "rounding":
        # 4095 + 4095 is cut to 8188, and 8188 + 1 is not: twenty of the former belong before sixty of the latter.
        query[..., :2] = 1.0
        centroid[..., 0] = 8180.0
        some = torch.randperm(M, generator=generator)[:80]
        centroid[..., some[:20], :2] = 4095.0
        centroid[..., some[20:], :2] = torch.tensor([8188.0, 1.0])
    else:
        # 1 * -3x + 3 * x is 0, but 3x and x are not cut alike; the rest decides.
        x = torch.randint(-2047, 2048, (M,), generator=generator) * 2.0 + 1
        query[..., 0], query[..., 1], query[..., 2:] = 1.0, 3.0, 2.0**-6
        centroid[..., 0], centroid[..., 1] = -3 * x, x
        centroid[..., 2:] = torch.randint(-5, 6, (M, 30), generator=generator).float()
    query_unit, centroid_unit = UNITS[units]
    check(query.to(DEVICE) * query_unit, centroid.to(DEVICE) * centroid_unit, 16, counts(M))


def test_a_chunk_far_larger_than_all_others() -> None:
    """Its error band is as large as all scores; those of other tiles keep theirs."""
    query, centroid = integers(1, 1, 20, 32), integers(1, 1, 700, 32, seed=1)
    centroid[0, 0, 300] = 2.0**100
    centroid[0, 0, 301] = math.inf
    check(query, centroid, 16, counts(690))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floats_by_value(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, T_LONG, 80, generator=generator).to(DEVICE, dtype)
    centroid = torch.randn(1, 2, M_LONG, 80, generator=generator).to(DEVICE, dtype)
    ids, scores = chunk_topk(query, centroid, 16, count=counts(M_LONG), impl="triton")
    exact = query.double() @ centroid.double().mT
    # No float32 sum of D products is further from the exact one than D roundings of the sum of their magnitudes; and
    # the j-th largest of perturbed numbers is no further from the j-th largest than the largest perturbation.
    band = 80 * 2.0**-24 * (query.double().abs() @ centroid.double().abs().mT).amax(-1, keepdim=True)
    assert ((scores - exact.gather(-1, ids.long())).abs() <= band).all()
    assert ((scores - exact.topk(16, dim=-1).values).abs() <= band).all()
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all(), "a chunk came twice"


def test_opcheck() -> None:
    arguments = (integers(2, 2, 3, 32), integers(2, 1, 20, 32, seed=1), counts(20, 3), None, 4)
    torch.library.opcheck(torch.ops.longmem.chunk_topk_triton, arguments)


@pytest.mark.skipif(not CUDA, reason="a bank beyond 2^31 elements needs a GPU")
def test_bank_beyond_int32_offsets() -> None:
    M = 2**25 + 70
    centroid = torch.zeros(1, 1, M, 64, dtype=torch.bfloat16, device=DEVICE)
    centroid[0, 0, -5:, 0] = torch.arange(1, 6)
    query = torch.ones(1, 1, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    ids, _ = chunk_topk(query, centroid, 4, count=counts(M), impl="triton")
    assert ids.flatten().tolist() == [M - 1, M - 2, M - 3, M - 4]


@pytest.mark.parametrize("rows", [1, 9])
def test_counts_and_rings_that_make_no_sense_are_none_or_all(rows: int) -> None:
    """Called by hand: the public function would refuse them on the CPU."""
    query, centroid = integers(5, 2, rows, 32), integers(4, 2, 37, 32, seed=1)
    count, index = counts(-(2**31), 2**31 - 1, 38, 5), counts(0, 1, 2, 4, -1)
    got = torch.ops.longmem.chunk_topk_triton(query, centroid, count, index, 7)
    wanted = chunk_topk_reference(query, centroid, count.clamp(0, 37), index, 7)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert (got[0][[0, 3, 4]] == -1).all()
    with pytest.raises(ValueError, match="chunk_topk: count must be"):
        torch.ops.longmem.chunk_topk_triton(query, centroid, count[:3], index, 7)
