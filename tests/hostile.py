"""Calls of the kernels that nobody should make: values that make no sense, and torch ops called by hand with tensors
that do not fit. Every call is made from a seed; see test_fuzz.py.

Tensors that are written to lie between guards, so that a write outside shows without a sanitizer too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longmem_kernels import Ring, chunk_topk, memory_attention, ring_write
from longmem_kernels.ring import token_dtype

NUMBERS = (-(2**63), -(2**48), -(2**31), -50, -7, -1, 2**31 - 1, 2**31, 2**47, 2**48 - 1, 2**48, 2**62, 2**63 - 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
GUARD, SENTINEL = 64, 0x5A  # bytes


class Guarded:
    """Tensors with guards before and behind them."""

    def __init__(self) -> None:
        self._blocks: list[tuple[Tensor, int]] = []

    def put(self, tensor: Tensor) -> Tensor:
        """A contiguous copy between guards."""
        size = tensor.numel() * tensor.element_size()
        block = torch.full((GUARD + size + GUARD,), SENTINEL, dtype=torch.uint8)
        inside = block[GUARD : GUARD + size].view(tensor.dtype).view(tensor.shape)
        inside.copy_(tensor)
        self._blocks.append((block, size))
        return inside

    def check(self) -> None:
        for block, size in self._blocks:
            assert bool((block[:GUARD] == SENTINEL).all()), "written before the tensor"
            assert bool((block[GUARD + size :] == SENTINEL).all()), "written behind the tensor"


class Hostile:
    """What `seed` draws: sizes, tensors and numbers."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.guarded = Guarded()
        one_of = self.random.choice
        self.G, self.D, self.C = one_of((1, 2)), one_of((1, 8, 16, 33)), one_of((1, 3, 4, 64))
        self.H, self.M, self.K = self.G * one_of((1, 3)), one_of((1, 2, 5, 17)), one_of((1, 3, 64))
        self.B, self.T = one_of((1, 2, 3)), one_of((0, 1, 2, 9, 40))
        self.R = one_of((1, self.B, self.B + 1))
        self.S = self.T + one_of((0, 0, 5))
        self.store, self.dtype = one_of(DTYPES), one_of(DTYPES[:3])

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.torch).to(dtype or self.dtype)

    def integers(self, n: Sequence[int], low: int, end: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """In [low, end), sometimes with one that is not."""
        values = torch.randint(low, end, tuple(n), generator=self.torch).to(dtype)
        if values.numel() and self.random.random() < 0.5:
            bad = [x for x in (*NUMBERS, end, low - 1) if torch.iinfo(dtype).min <= x <= torch.iinfo(dtype).max]
            values.view(-1)[self.random.randrange(values.numel())] = self.random.choice(bad)
        return values

    def maybe(self, make: Callable[[], Any], chance: float = 0.5) -> Any:
        return make() if self.random.random() < chance else None

    def ring_index(self) -> Tensor | None:
        needed = self.R not in (1, self.B)
        return self.maybe(lambda: self.integers([self.B], 0, self.R), 0.95 if needed else 0.4)

    def ring(self) -> Ring:
        kept = token_dtype(self.store)
        sizes = (self.R, self.G, self.M)
        scale = torch.rand(*sizes, 2, generator=self.torch) if self.store == torch.float8_e4m3fn else None
        put = self.guarded.put
        return Ring(
            store=put(self.floats(*sizes, 2, self.C, self.D).to(self.store)),
            centroid=put(self.floats(*sizes, self.D, dtype=kept)),
            tail=put(self.floats(self.R, self.G, 2, self.C, self.D, dtype=kept)),
            cursor=put(self.integers([self.R], 0, 3 * self.M * self.C, torch.int64)),
            scale=None if scale is None else put(scale),
        )

    def ring_write_arguments(self, ring: Ring) -> list[Any]:
        key, value = (self.floats(self.B, self.G, self.T, self.D) for _ in range(2))
        mask = self.maybe(lambda: torch.rand(self.B, self.T, generator=self.torch) < 0.7)
        return [*vars(ring).values(), key, value, self.ring_index(), mask]

    def chunk_topk_arguments(self, ring: Ring) -> list[Any]:
        count = self.integers([self.R], 0, self.M + 1)
        return [self.floats(self.B, self.H, self.T, self.D), ring.centroid, count, self.ring_index(), self.K]

    def memory_attention_arguments(self, ring: Ring) -> list[Any]:
        query, memory_query = (self.floats(self.B, self.H, self.T, self.D) for _ in range(2))
        key, value = (self.floats(self.B, self.G, self.S, self.D) for _ in range(2))
        ids = self.integers([self.B, self.H, self.T, self.K], -1, self.M)
        slopes = self.maybe(lambda: torch.rand(self.H, generator=self.torch))
        mask = self.maybe(lambda: torch.rand(self.B, self.S, generator=self.torch) < 0.7)
        seed, causal = self.maybe(lambda: self.integers([1], 0, 9, torch.int64), 0.3), self.random.random() < 0.8
        window = self.maybe(lambda: self.random.choice((1, 3, *NUMBERS)), 0.3)
        gate = self.maybe(lambda: torch.randn(self.H, generator=self.torch))
        return [
            query, key, value, memory_query, ring.key, ring.value, ids, ring.scale, self.ring_index(), gate, slopes,
            mask, seed, "joint" if gate is None else "gated", self.D**-0.5, causal, window,
            0.0 if seed is None else 0.3,
        ]  # fmt: skip

    def another(self, argument: Any, meta: bool) -> Any:
        """Something else in its place: another shape, dtype, layout or number, or nothing; with `meta` perhaps a tensor
        without content."""
        if not isinstance(argument, Tensor):
            return self.random.choice((None, "gated", "joint", True, 0, -1, 65, 2**40, -(2**63), 0.5))
        axis = self.random.randrange(max(argument.dim(), 1))
        changes: list[Callable[[Tensor], Any]] = [
            lambda x: x.narrow(axis, 0, x.shape[axis] - 1),
            lambda x: torch.cat([x.float(), x.float()], axis).to(x.dtype),
            lambda x: x[None],
            lambda x: x.select(axis, 0),
            lambda x: x.transpose(axis, -1),
            lambda x: x.to(self.random.choice((torch.float64, torch.float16, torch.int64, torch.uint8))),
            lambda x: x.narrow(axis, 0, 1).expand(
                *x.shape[:axis], self.random.choice((7, 2**20)), *x.shape[axis + 1 :]
            ),
            lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dtype != torch.float8_e4m3fn else x[:0],
            lambda x: x.to("meta") if meta else x,
            lambda x: torch.empty(0, dtype=x.dtype),
            lambda x: None,
        ]
        try:
            return self.random.choice(changes)(argument)
        except (RuntimeError, IndexError):  # of a tensor that is too small for the change
            return None


def call_public(seed: int) -> str:
    """A public function with values that may make no sense. Returns "refused", or "right" where it equals the
    reference."""
    hostile = Hostile(seed)
    ring = hostile.ring()
    op = ("ring_write", "chunk_topk", "memory_attention")[seed % 3]
    arguments = getattr(hostile, f"{op}_arguments")(ring)
    outcome = _refused(op, lambda: _compare(op, ring, arguments))
    hostile.guarded.check()
    count = ring.count()
    assert bool(((count >= 0) & (count <= ring.chunks)).all())
    return outcome


def _compare(op: str, ring: Ring, arguments: list[Any]) -> None:
    if op == "ring_write":
        *_, key, value, ring_index, mask = arguments
        copy = Ring(*(None if part is None else part.clone() for part in vars(ring).values()))
        ring_write(ring, key, value, ring_index=ring_index, mask=mask, impl="cpp")
        ring_write(copy, key, value, ring_index=ring_index, mask=mask, impl="reference")
        for name, part in vars(ring).items():
            if part is not None and name != "tail":  # whose end means nothing
                assert torch.equal(part.float(), getattr(copy, name).float()), name
    elif op == "chunk_topk":
        query, centroid, count, ring_index, k = arguments
        results = [
            chunk_topk(query, centroid, k, count=count, ring_index=ring_index, impl=impl)[1]
            for impl in ("cpp", "reference")
        ]
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    else:
        _compare_attention(arguments)


def _compare_attention(arguments: list[Any]) -> None:
    names = ("memory_scale", "ring_index", "gate", "alibi_slopes", "key_mask", "dropout_seed", "fusion", "scale")
    names += ("causal", "window", "dropout_p")
    query, key, value, memory_query, *bank = arguments[:7]
    options = dict(zip(names, arguments[7:], strict=True))
    results, gradients = [], []
    for impl in ("cpp", "reference"):
        inputs = [x.detach().clone().requires_grad_() for x in (query, key, value, memory_query)]
        out = memory_attention(*inputs[:3], *bank, memory_query=inputs[3], **options, impl=impl)
        out.float().sum().backward()
        results.append(out.detach().float())
        gradients.append([torch.zeros_like(x).float() if x.grad is None else x.grad.float() for x in inputs])
    torch.testing.assert_close(*results, rtol=0.1, atol=0.1)
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0.2, atol=0.3)


def call_by_hand(seed: int) -> str:
    """A C++ op itself, with up to two arguments exchanged. Returns "refused" or "ran"."""
    hostile = Hostile(seed)
    ring = hostile.ring()
    op = ("ring_write", "chunk_topk", "memory_attention", "memory_attention_backward")[seed % 4]
    arguments = getattr(hostile, f"{op.removesuffix('_backward')}_arguments")(ring)
    if op == "memory_attention_backward":
        out = (hostile.B, hostile.H, hostile.T, hostile.D)
        grads = [
            hostile.maybe(lambda: hostile.floats(*out)),
            *(hostile.maybe(lambda: torch.randn(out[:3])) for _ in "12"),
        ]
        arguments = [*grads, *arguments, *(torch.randn(out[: 4 - i % 2]) for i in range(4))]
    changes = hostile.random.choice((0, 1, 1, 2))
    for _ in range(changes):
        place = hostile.random.randrange(len(arguments))
        arguments[place] = hostile.another(arguments[place], meta=changes == 1)
    outcome = _refused(op, lambda: getattr(torch.ops.longmem, f"{op}_cpp")(*arguments))
    hostile.guarded.check()
    return "ran" if outcome == "right" else outcome


def _refused(op: str, call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        assert op.removesuffix("_backward") in str(error), f"an error that does not name {op}: {error!r}"
        return "refused"
    return "right"
