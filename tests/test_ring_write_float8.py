"""Rings that store float8_e4m3fn with two scales for each chunk: what is kept of the numbers."""

from __future__ import annotations

import pytest
import torch
from factories import RING_WRITE, device_of, new_ring
from ring_model import FLOAT8, tokens_for
from torch import Tensor

from longmem_kernels import Ring, ring_write


@pytest.fixture(params=RING_WRITE, scope="module")
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


def written(key: Tensor, value: Tensor, implementation: str, chunk_size: int, dtype: torch.dtype = FLOAT8) -> Ring:
    """A ring that holds key, value [T, D] and nothing else, on the CPU."""
    T, D = key.shape
    ring = new_ring(
        rings=1, kv_heads=1, chunks=T // chunk_size, chunk_size=chunk_size, head_dim=D,
        dtype=dtype, device=device_of(implementation),
    )  # fmt: skip
    ring_write(ring, *(x[None, None].to(ring.store.device) for x in (key, value)), impl=implementation)
    parts = (ring.store, ring.centroid, ring.tail, ring.cursor, ring.scale)
    return Ring(*(None if part is None else part.cpu() for part in parts))  # type: ignore[arg-type]


def read_back(ring: Ring) -> Tensor:
    """[M, 2, C, D] of the only head of the only ring."""
    assert ring.scale is not None
    return (ring.store.float() * ring.scale[..., None, None])[0, 0]


def test_a_new_ring_keeps_tokens_in_bfloat16_until_their_chunk_closes() -> None:
    ring = new_ring(dtype=FLOAT8)
    assert ring.store.dtype == FLOAT8 and ring.tail.dtype == ring.centroid.dtype == torch.bfloat16
    assert ring.scale is not None and ring.scale.shape == (2, 2, 5, 2) and ring.scale.dtype == torch.float32
    assert all(new_ring(dtype=dtype).scale is None for dtype in (torch.float32, torch.bfloat16, torch.float64))


def test_numbers_read_back_to_the_accuracy_that_is_promised(implementation: str) -> None:
    key, value = (torch.randn(2, 400, 8) * torch.logspace(-6, 3, 400)[:, None]).bfloat16()
    ring = written(key, value, implementation, chunk_size=4)
    exact = torch.stack([key, value]).float().view(2, 100, 4, 8).transpose(0, 1)
    largest = exact.abs().amax((-2, -1), keepdim=True)
    error = (read_back(ring) - exact).abs()
    assert (error <= 1.000001 * torch.maximum(exact.abs() / 16, largest / 458752)).all()
    assert (error > 0).double().mean() > 0.5  # bfloat16 would have passed otherwise


def test_every_number_rounds_to_the_nearest_ties_to_even(implementation: str) -> None:
    """Every bfloat16 up to 448, beside a 448 that makes the scale of its chunk one."""
    numbers = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[(numbers.abs() <= 448)]
    numbers = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 7)]).view(-1, 7)
    key = torch.cat([torch.full_like(numbers[:, :1], 448), numbers], 1)
    ring = written(key, -key, implementation, chunk_size=1)
    assert ring.scale is not None and (ring.scale == 1).all()
    assert torch.equal(ring.store[0, 0, :, 0, 0].float(), key.float().to(FLOAT8).float())
    assert torch.equal(ring.store[0, 0, :, 1, 0].float(), -key.float().to(FLOAT8).float())
    step = 2.0 ** (key.float().abs().log2().floor().clamp(min=-6) - 3)  # between neighbours of the format
    assert ((ring.store[0, 0, :, 0, 0].float() - key.float()).abs() <= step / 2).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_chunk_that_is_not_finite_reads_back_as_nan_and_its_neighbours_do_not(
    implementation: str, bad: float
) -> None:
    key, value = torch.randn(2, 12, 8)
    key[5, 3], value[9, 0] = bad, bad
    chunks = read_back(written(key, value, implementation, chunk_size=4))
    nan = chunks.isnan().flatten(2)
    assert nan.all(-1).tolist() == nan.any(-1).tolist() == [[False, False], [True, False], [False, True]]


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-38, 3e38])
def test_extreme_magnitudes_have_a_scale(implementation: str, size: float) -> None:
    key = torch.linspace(-1, 1, 32).view(4, 8) * size
    ring = written(key, key, implementation, chunk_size=4)
    assert ring.scale is not None and ring.scale.isfinite().all() and (ring.scale >= 2.0**-126).all()
    back, exact = read_back(ring)[0, 0], key.bfloat16().float()
    # The smallest scale has its own smallest step.
    bound = torch.maximum(exact.abs() / 16, exact.abs().max() / 458752).clamp(min=2.0**-136)
    assert ((back - exact).abs() <= 1.000001 * bound).all()


def test_the_centroid_is_of_the_keys_before_they_are_quantised(implementation: str) -> None:
    key, value = torch.randn(2, 8, 16)
    key[1] *= 1000  # rounds its chunk's other keys away
    ring = written(key, value, implementation, chunk_size=4)
    plain = written(key, value, implementation, chunk_size=4, dtype=torch.bfloat16)
    assert torch.equal(ring.centroid, plain.centroid)


def test_float16_is_read_and_rounded_like_pytorch_does(implementation: str) -> None:
    """Every float16 there is; then the numbers half-way between two of them, and their neighbours in float32."""
    half = torch.arange(2**16).to(torch.int16).view(torch.float16)
    stored = written(half.view(-1, 64), half.view(-1, 64), implementation, chunk_size=1, dtype=torch.float32)
    assert torch.equal(stored.store[0, 0, :, 0, 0].nan_to_num(7e7), half.float().view(-1, 64).nan_to_num(7e7))

    below = half[half.isfinite()].float()
    middle = (below + torch.nextafter(below.half(), torch.tensor(torch.inf).half()).float().clamp(max=65536)) / 2
    exact = torch.cat([middle.nextafter(torch.tensor(side)) for side in (-torch.inf, torch.inf)] + [middle, -middle])
    exact = exact[: len(exact) // 64 * 64].view(-1, 64)
    stored = written(exact, exact, implementation, chunk_size=1, dtype=torch.float16)
    assert torch.equal(stored.store[0, 0, :, 0, 0], exact.half())


def test_no_gradient_and_no_version_is_lost(implementation: str) -> None:
    """A backward pass that still needs what a write replaces has to notice, the scale included."""
    ring = new_ring(dtype=FLOAT8, device=device_of(implementation))
    assert ring.scale is not None
    before = ring.store._version, ring.scale._version
    ring_write(ring, *tokens_for(ring, 2, 9), impl=implementation)
    assert ring.store._version > before[0] and ring.scale._version > before[1]
