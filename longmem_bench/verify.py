"""Verification: what a provider returns is compared with what it should be in float64 before it is timed.

Bounds follow from the arithmetic, none is tuned:
- Top-k: a D-term float32 inner product is off by at most D * eps * |q| * |c|, and so is the j-th largest of them.
  Scores are compared in order, and every returned id must have the score that was returned with it. Where there are
  very many scores, those of evenly spaced queries are checked; ids are checked for all.
- Attention: at most twice the error against float64 of the eager composition in the same precision (three times for
  gradients), plus one rounding of the output's dtype, in the mean and in the worst element. Eager's worst error counts
  for six times its mean at least: the worst of few elements is a matter of luck. The gate's gradient has so few that it
  may also be off by what rounding the terms of its sum makes likely, and single elements of query's and key's gradients
  by one rounding of what softmax's gradient cancels.
- Ring: keys, values and positions bit by bit; centroids within the rounding of a C-term float32 sum and of their dtype.
- Memory layer: output and ring as above, but for queries whose K-th and next score are closer than their error bounds:
  either chunk is right for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from longmem_kernels import Ring, memory_attention, ring_write

from .inputs import FusionInputs, LayerInputs, OpInputs, RetrievalInputs, WriteInputs, by_key_head, contents, copy_of
from .provider import WrongResult
from .providers.attention import attention
from .providers.torch_eager import local_attention, prepare_eager
from .shapes import Shape

_T = TypeVar("_T")
_SCORES_CHECKED = {"cpu": 2**28, "cuda": 2**30}
_BLOCK_SCORES = 2**26  # scores held at once in float64
_WORST = 6.0  # standard deviations: what the worst of a thousand million normal errors may reach
_UNDECIDED = 0.1  # share of queries of a layer whose K-th and next score may be too close to tell


@dataclass
class Verifier:
    """Checks results of `op` on one set of inputs; the expensive expectations are computed once."""

    op: str
    inputs: OpInputs
    _expected: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, result: tuple[Tensor, ...], computes: str = "op", repeat: int = 1) -> None:
        """Raises WrongResult, naming the provider, unless `result` is right. `computes`, `repeat`: see `Provider`."""
        try:
            self._check(result, computes, repeat)
        except WrongResult as error:
            detail = error.detail
            message = f"{self.op}: {name!r} failed the correctness check and is not timed: {detail}"
            raise WrongResult(detail, message) from None

    def _check(self, result: tuple[Tensor, ...], computes: str, repeat: int) -> None:
        inputs = self.inputs
        if isinstance(inputs, WriteInputs):
            check_write(inputs, result, computes, repeat)
        elif isinstance(inputs, RetrievalInputs):
            check_search(inputs, result, self._once(computes, lambda: _expect_search(inputs, computes)))
        elif isinstance(inputs, LayerInputs):
            self._once(computes, lambda: _expect_layer(inputs)).check(result[0])
            check_write(inputs.write, result[1:], computes, repeat)
        else:
            backward = self.op.endswith("_backward")
            expected = self._once(computes, lambda: _expect_attention(inputs, computes, backward))
            if len(result) != len(expected):
                raise WrongResult(f"wanted {len(expected)} tensors, got {len(result)}")
            for want, got in zip(expected, result, strict=True):
                want.check(got)

    def _once(self, computes: str, expect: Callable[[], _T]) -> _T:
        if computes not in self._expected:
            self._expected[computes] = expect()
        return self._expected[computes]


@dataclass(frozen=True)
class _Bounded:
    """An expectation with bounds on the error: of each element (`worst` broadcasts), and of the root mean square.

    Where `free` [B, H, T] is true anything finite is right.
    """

    name: str
    value: Tensor
    worst: Tensor
    mean: float = float("inf")
    free: Tensor | None = None

    def check(self, got: Tensor) -> None:
        if got.shape != self.value.shape:
            raise WrongResult(f"{self.name} must have shape {tuple(self.value.shape)}, got {tuple(got.shape)}")
        error = (got.to(self.value) - self.value).abs()
        if self.free is not None:
            error = error.masked_fill(self.free.unsqueeze(-1) & got.isfinite(), 0.0)
        # Written so that NaN fails.
        if not bool((error <= self.worst).all()):
            raise WrongResult(f"{self.name}: worst error {error.max():.3g} is above its bound {self.worst.max():.3g}")
        mean = _rms(error)
        if not mean <= self.mean:
            raise WrongResult(f"{self.name}: root mean square error {mean:.3g} is above its bound {self.mean:.3g}")


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# chunk_topk


@dataclass(frozen=True)
class _Search:
    """Right results of a search for some queries: `best` [R * G, n, K] in order, to within `band` [R * G, n, 1]."""

    positions: Tensor  # of the queries checked, among the T of each head
    query: Tensor  # [R * G, n, D] float64
    best: Tensor
    band: Tensor
    distance: bool


def _expect_search(inputs: RetrievalInputs, computes: str) -> _Search:
    """The K best scores of each query in float64, or with "distance" the smallest squared distances."""
    shape, device = inputs.shape, inputs.query.device
    checked = min(shape.T, max(1, _SCORES_CHECKED[device.type] // (shape.B * shape.H * shape.M)))
    positions = torch.linspace(0, shape.T - 1, checked, device=device).round().long()
    part = replace(inputs, query=inputs.query[:, :, positions], shape=replace(shape, T=checked, S=0))
    query, centroid = by_key_head(part)
    query = query.double()
    best, longest = [], []
    for mine, stored in zip(query, centroid, strict=True):
        stored = stored.double()
        rows = mine.split(max(1, _BLOCK_SCORES // shape.M))
        if computes == "distance":
            found = [-(torch.cdist(row, stored).square()).topk(shape.K, largest=False).values for row in rows]
        else:
            found = [(row @ stored.mT).topk(shape.K).values for row in rows]
        best.append(torch.cat(found))
        longest.append(stored.norm(dim=-1).amax())
    eps, length, most = torch.finfo(torch.float32).eps, query.norm(dim=-1), torch.stack(longest)[:, None]
    band = shape.D * eps * length * most
    if computes == "distance":
        band = 2 * (shape.D + 2) * eps * (length + most).square()
    return _Search(positions, query, torch.stack(best), band.unsqueeze(-1), computes == "distance")


def check_search(inputs: RetrievalInputs, result: tuple[Tensor, ...], expected: _Search) -> None:
    """`result`: ids and scores [B, H, T, K] of any integer and float dtype."""
    shape = inputs.shape
    if len(result) != 2:
        raise WrongResult(f"wanted ids and scores, got {len(result)} tensors")
    size = (shape.B, shape.H, shape.T, shape.K)
    ids, scores = result[0].to(inputs.query.device).long(), result[1].to(inputs.query.device)
    if ids.shape != size or scores.shape != size:
        raise WrongResult(f"ids and scores must have shape {size}, got {tuple(ids.shape)} and {tuple(scores.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= shape.M:
        raise WrongResult(f"ids must lie in [0, {shape.M}), got {int(ids.min())} to {int(ids.max())}")
    in_order = ids.sort(-1).values
    if bool((in_order[..., 1:] == in_order[..., :-1]).any()):
        raise WrongResult("an id is returned twice for one query")
    ids, scores = (_checked(part, shape, expected) for part in (ids, scores))
    sign = -1 if expected.distance else 1
    _Bounded("scores", expected.best, expected.band).check(sign * scores.double())
    for mine, stored, slots, claimed, band in zip(
        expected.query, inputs.centroid.flatten(0, 1), ids, scores, expected.band, strict=True
    ):
        chosen = stored[slots].double()  # [n, K, D]
        if expected.distance:
            exact = (chosen - mine.unsqueeze(1)).square().sum(-1)
        else:
            exact = (chosen @ mine.unsqueeze(-1)).squeeze(-1)
        if not bool(((exact - claimed).abs() <= band).all()):
            raise WrongResult("an id does not have the score that was returned with it")


def _checked(found: Tensor, shape: Shape, expected: _Search) -> Tensor:
    """found [B, H, T, K] of the queries checked, in the order of `by_key_head`."""
    part = found[:, :, expected.positions]
    part = part.view(shape.rings, shape.rows_per_ring, shape.G, shape.H // shape.G, *part.shape[2:])
    return part.transpose(1, 2).reshape(shape.rings * shape.G, -1, shape.K)


# memory_attention


def _expect_attention(inputs: FusionInputs, computes: str, backward: bool) -> list[_Bounded]:
    """Output, and gradients with `backward`, in float64; bounds from the eager composition in the inputs' precision."""
    if computes == "op":
        yardstick = prepare_eager(inputs, backward=backward)
    else:  # the lower bound leaves ALiBi out
        yardstick = attention(
            inputs, lambda q, k, v: local_attention(q, k, v, None), backward=backward, gated=False
        )  # fmt: skip
    exact = _exact_attention(inputs, local_only=computes == "local", backward=backward)
    expected = []
    names = ("output", "gradient of query", "gradient of key", "gradient of value", "gradient of gate")
    for name, want, eager in zip(names, exact, yardstick.collect(yardstick.run()), strict=False):
        error = (eager.double() - want).abs()
        eps, size = torch.finfo(eager.dtype).eps, _rms(want)
        if not _rms(error) <= 16 * torch.finfo(inputs.query.dtype).eps * size:
            raise WrongResult(
                f"the eager composition itself is wrong in {name}: relative error {_rms(error) / size:.3g}"
            )
        factor = 2 if name == "output" else 3
        likely = _gate_rounding(inputs, exact[0]) if name == "gradient of gate" else 0.0
        mean = max(_rms(error), likely)
        worst = factor * error.max().clamp(min=_WORST * mean) + eps * want.abs().max()
        if name in ("gradient of query", "gradient of key"):
            worst = worst + _cancelled_rounding(inputs)
        expected.append(_Bounded(name, want, worst, factor * mean + eps * size))
    return expected


def _cancelled_rounding(inputs: FusionInputs) -> float:
    """Softmax's gradient is a difference of products of the output's gradient with values. Where it cancels, as for a
    query that sees one key, compositions happen to round both alike and kernels need not: the rounding of a product
    remains, times a key or query."""
    products = inputs.grad.float().norm(dim=-1).max() * inputs.value.float().norm(dim=-1).max()
    across = max(inputs.query.float().abs().max(), inputs.key.float().abs().max())
    return float(torch.finfo(torch.float32).eps * products * across * inputs.shape.D**-0.5)


def _gate_rounding(inputs: FusionInputs, out: Tensor) -> float:
    """The gate's gradient sums B * T * D products of the output's gradient with what is as large as the output."""
    terms = inputs.grad.numel() // inputs.shape.H
    return torch.finfo(inputs.query.dtype).eps * terms**0.5 * _rms(inputs.grad) * _rms(out)


def _exact_attention(inputs: FusionInputs, *, local_only: bool, backward: bool) -> list[Tensor]:
    """The reference in float64, one row at a time to bound its memory."""
    shape = inputs.shape
    gate = inputs.gate.double().requires_grad_(backward)
    outputs, gradients = [], []
    for row in range(shape.B):
        part = slice(row, row + 1)
        ring = row // shape.rows_per_ring
        leaves = [x[part].double().requires_grad_(backward) for x in (inputs.query, inputs.key, inputs.value)]
        query, key, value = leaves
        ids = inputs.chunk_ids[part]
        out = memory_attention(
            query, key, value, inputs.ring.key[ring : ring + 1], inputs.ring.value[ring : ring + 1],
            torch.full_like(ids, -1) if local_only else ids,
            gate=gate, alibi_slopes=None if local_only else inputs.slopes, impl="reference",
        )  # fmt: skip
        outputs.append(out.detach())
        if backward:
            gradients.append(torch.autograd.grad(out, [*leaves, gate], inputs.grad[part].double()))
    exact = [torch.cat(outputs)]
    if backward:
        *local, gates = zip(*gradients, strict=True)
        exact += [torch.cat(parts) for parts in local]
        if not local_only:
            exact.append(torch.stack(gates).sum(0))
    return exact


# ring_write


def check_write(inputs: WriteInputs, result: tuple[Tensor, ...], computes: str, repeat: int) -> None:
    """`result`: what the ring holds after `repeat` writes (`contents`), or the buffer of a plain copy."""
    if computes == "copy":
        want = torch.stack([inputs.key, inputs.value]).to(inputs.ring.store.dtype)
        if not torch.equal(result[0], want):
            raise WrongResult("the copied bytes differ")
        return
    ring = copy_of(inputs.ring)
    for _ in range(repeat):
        ring_write(ring, inputs.key, inputs.value, impl="reference")
    names = ("store", "centroid", "tail", "cursor")
    for name, want, got in zip(names, contents(ring), result, strict=True):
        if name != "centroid" and not torch.equal(want, got):
            raise WrongResult(f"ring.{name} differs from the reference's")
    _centroids(ring).check(result[1])


def _centroids(ring: Ring) -> _Bounded:
    """Slots not written keep whatever centroid they had: compared as well, bound by the same."""
    rounding = ring.chunk_size * torch.finfo(torch.float32).eps + torch.finfo(ring.centroid.dtype).eps
    size = ring.key.abs().mean(-2, dtype=torch.float32)
    return _Bounded("ring.centroid", ring.centroid.float(), rounding * size)


# memory_layer


def _expect_layer(inputs: LayerInputs) -> _Bounded:
    """The output of attention to the chunks that an exact search finds."""
    shape, fusion = inputs.shape, inputs.fusion
    ids = torch.empty_like(fusion.chunk_ids)
    close = torch.empty(ids.shape[:-1], dtype=torch.bool, device=ids.device)
    eps = torch.finfo(torch.float32).eps
    for row in range(shape.B):
        for head in range(shape.H):
            query = fusion.query[row, head].double()
            stored = fusion.ring.centroid[row // shape.rows_per_ring, head // (shape.H // shape.G)].double()
            found = (query @ stored.mT).topk(shape.K + 1)
            ids[row, head] = found.indices[:, :-1].int()
            band = shape.D * eps * query.norm(dim=-1) * stored.norm(dim=-1).amax()
            close[row, head] = found.values[:, -2] - found.values[:, -1] <= 2 * band
    undecided = close.double().mean().item()
    if undecided > _UNDECIDED:
        raise WrongResult(f"{undecided:.0%} of the queries have no clear K-th chunk: these inputs check nothing")
    expected = _expect_attention(replace(fusion, chunk_ids=ids), "op", False)[0]
    return replace(expected, free=close)
