"""Rings kept as Python lists, for tests to hold the real ones against, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from factories import device_of, new_ring, poison
from torch import Tensor

from longmem_kernels import Ring, ring_write

FLOAT8 = torch.float8_e4m3fn


@dataclass
class ListRing:
    """One ring as the list of all tokens it was given: pairs of key and value, [G, D] each, rounded as they came."""

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


def quantised(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [..., C, D] as float8, and their scale [...], both by NumPy's float32 arithmetic."""
    exact = tokens.float().numpy()
    with np.errstate(invalid="ignore"):  # NaN, and inf / inf
        largest = np.abs(exact).max((-2, -1), keepdims=True)
        scale = np.maximum(largest / np.float32(448), np.float32(2.0**-126))
        return torch.from_numpy(exact / scale).to(FLOAT8), torch.from_numpy(scale[..., 0, 0])


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
    remember(models, ring, key, value, ring_index, mask)


def remember(
    models: list[ListRing],
    ring: Ring,
    key: Tensor,
    value: Tensor,
    ring_index: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """What `ring_write` with these arguments does to `ring`, done to its models."""
    stored_key, stored_value = key.cpu().to(ring.tail.dtype), value.cpu().to(ring.tail.dtype)
    for row in range(key.shape[0]):
        model = models[int(ring_index[row]) if ring_index is not None else row if ring.rings == key.shape[0] else 0]
        for token in range(key.shape[2]):
            if mask is None or mask[row, token]:
                model.tokens.append((stored_key[row, :, token], stored_value[row, :, token]))


def equal_bits(got: Tensor, wanted: Tensor) -> bool:
    """Equal, NaN for NaN."""
    if got.dtype != wanted.dtype:
        return False
    got, wanted = got.double(), wanted.double()  # exact, and knows more operations than float8 does
    return torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(0.0), wanted.nan_to_num(0.0))


def check(ring: Ring, models: list[ListRing]) -> None:
    """Everything that may be read from the ring is what the model holds; what was never written is still NaN."""
    assert ring.cursor.tolist() == [len(model.tokens) for model in models]
    assert ring.count().tolist() == [len(model.slots()) for model in models]
    for r, model in enumerate(models):
        slots = model.slots()
        for slot in range(ring.chunks):
            parts = [part[r, :, slot].cpu() for part in (ring.store, ring.centroid, ring.scale) if part is not None]
            if slot not in slots:
                assert all(part.float().isnan().all() for part in parts), f"ring {r}: unwritten slot {slot} was touched"
                continue
            store, centroid, *scale = parts
            wanted = torch.stack([torch.stack(pair, 1) for pair in slots[slot]], 2)  # [G, 2, C, D]
            if scale:
                wanted, wanted_scale = quantised(wanted)
                assert equal_bits(scale[0], wanted_scale), f"ring {r}: scale of slot {slot}"
            assert equal_bits(store, wanted), f"ring {r}: slot {slot} holds other tokens"
            assert equal_bits(centroid, mean_key(slots[slot], centroid.dtype)), f"ring {r}: centroid of slot {slot}"
        for offset, pair in enumerate(model.tail()):
            got = ring.tail[r, :, :, offset].cpu()
            assert equal_bits(got, torch.stack(pair, 1)), f"ring {r}: tail token {offset}"


def forget(ring: Ring, models: list[ListRing], chosen: Tensor) -> None:
    """Reset the rings where `chosen` [R] bool, and poison what they held."""
    ring.reset(chosen.to(ring.store.device))
    for r in chosen.nonzero().flatten().tolist():
        models[r].tokens.clear()
        for part in (ring.store, ring.centroid, ring.scale):
            if part is not None:
                part[r].fill_(torch.nan)


def fresh(implementation: str, **sizes: object) -> tuple[Ring, list[ListRing]]:
    ring = poison(new_ring(device=device_of(implementation), **sizes))  # type: ignore[arg-type]
    return ring, [ListRing(ring.chunks, ring.chunk_size) for _ in range(ring.rings)]


def tokens_for(ring: Ring, rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    shape = (rows, ring.kv_heads, tokens, ring.head_dim)
    key, value = (torch.randn(shape).to(ring.store.device, dtype) for _ in range(2))
    return key, value
