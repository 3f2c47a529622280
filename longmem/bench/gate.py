"""The correctness gate: what a provider returns is compared with the reference before it is timed.

Bounds follow from the arithmetic, none is tuned:
- Top-k: a D-term float32 inner product is off by at most D * eps * |q| * |c|, and so is the j-th largest of them.
  Scores are compared in order, and every returned id must have the score that was returned with it.
- Attention: at most twice the error against float64 of the eager composition in the same precision (three times for
  gradients), plus one rounding of the output's dtype, in the mean and in the worst element.
- Ring: keys, values and positions bit by bit; centroids within the rounding of a C-term float32 sum and of their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from longmem_kernels import chunk_topk, memory_attention, ring_write

from . import baselines
from .inputs import FusionInputs, Inputs, RetrievalInputs, WriteInputs
from .providers import contents, copy_of

_BLOCK_SCORES = 2**26  # scores the float64 reference holds at once


class GateError(AssertionError):
    """A provider's result is not the operation's result; it must not be timed."""


@dataclass
class Gate:
    """Checks results of `op` on one set of inputs; the expensive expectations are computed once."""

    op: str
    inputs: Inputs
    _expected: dict[str, list[_Bounded]] = field(default_factory=dict)

    def check(self, name: str, result: tuple[Tensor, ...], computes: str = "op") -> None:
        """Raises GateError, naming the provider, unless `result` is right. `computes`: see `Provider`."""
        try:
            self._check(result, computes)
        except GateError as error:
            raise GateError(f"{self.op}: {name!r} failed the correctness gate and is not timed: {error}") from None

    def _check(self, result: tuple[Tensor, ...], computes: str) -> None:
        inputs = self.inputs
        if isinstance(inputs, WriteInputs):
            check_write(inputs, result, computes)
            return
        if computes not in self._expected:
            if isinstance(inputs, RetrievalInputs):
                self._expected[computes] = [_expect_topk(inputs)]
            else:
                self._expected[computes] = _expect_attention(inputs, computes, self.op.endswith("_backward"))
        expected = self._expected[computes]
        if isinstance(inputs, RetrievalInputs):
            check_topk(inputs, result, expected[0])
            return
        if len(result) != len(expected):
            raise GateError(f"wanted {len(expected)} tensors, got {len(result)}")
        for want, got in zip(expected, result, strict=True):
            want.check(got)


@dataclass(frozen=True)
class _Bounded:
    """An expectation with bounds on the error: of each element (`worst` broadcasts), and of the root mean square."""

    name: str
    value: Tensor
    worst: Tensor
    mean: float = float("inf")

    def check(self, got: Tensor) -> None:
        if got.shape != self.value.shape:
            raise GateError(f"{self.name} must have shape {tuple(self.value.shape)}, got {tuple(got.shape)}")
        error = (got.to(self.value) - self.value).abs()
        # Written so that NaN fails.
        if not bool((error <= self.worst).all()):
            raise GateError(f"{self.name}: worst error {error.max():.3g} is above its bound {self.worst.max():.3g}")
        mean = _rms(error)
        if not mean <= self.mean:
            raise GateError(f"{self.name}: root mean square error {mean:.3g} is above its bound {self.mean:.3g}")


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# chunk_topk


def _expect_topk(inputs: RetrievalInputs) -> _Bounded:
    """Scores [B, H, T, K] of the reference in float64 and the error band of each query."""
    query, centroid = inputs.query.double(), inputs.centroid.double()
    shape = inputs.shape
    block = max(1, _BLOCK_SCORES // (shape.B * shape.H * shape.M))
    parts = query.split(block, dim=2)
    scores = [chunk_topk(part, centroid, shape.K, count=inputs.count, impl="reference")[1] for part in parts]
    largest = centroid.norm(dim=-1).amax(-1).repeat_interleave(shape.H // shape.G, 1)  # [B, H]
    band = shape.D * torch.finfo(torch.float32).eps * query.norm(dim=-1) * largest[..., None]
    return _Bounded("scores", torch.cat(scores, 2), band[..., None])


def check_topk(inputs: RetrievalInputs, result: tuple[Tensor, ...], expected: _Bounded) -> None:
    """`result`: ids and scores [B, H, T, K] of any integer and float dtype."""
    shape = inputs.shape
    if len(result) != 2:
        raise GateError(f"wanted ids and scores, got {len(result)} tensors")
    ids, scores = result[0].to(inputs.query.device).long(), result[1].to(inputs.query.device)
    expected.check(scores)
    if ids.shape != scores.shape or int(ids.min()) < 0 or int(ids.max()) >= shape.M:
        raise GateError(f"ids must have shape {tuple(scores.shape)} and lie in [0, {shape.M})")
    in_order = ids.sort(-1).values
    if bool((in_order[..., 1:] == in_order[..., :-1]).any()):
        raise GateError("an id is returned twice for one query")
    for row in range(shape.B):
        for head in range(shape.H):
            chosen = inputs.centroid[row, head // (shape.H // shape.G)].double()[ids[row, head]]  # [T, K, D]
            exact = (chosen @ inputs.query[row, head].double().unsqueeze(-1)).squeeze(-1)
            if not bool(((exact - scores[row, head]).abs() <= expected.worst[row, head]).all()):
                raise GateError("an id does not have the score that was returned with it")


# memory_attention


def _expect_attention(inputs: FusionInputs, computes: str, backward: bool) -> list[_Bounded]:
    """Output, and gradients with `backward`, in float64; bounds from the eager composition in the inputs' precision."""
    if computes == "op":
        yardstick = baselines.prepare_eager(inputs, backward=backward)
    else:
        slopes = None  # the lower bound leaves ALiBi out
        yardstick = baselines.attention(
            inputs, lambda q, k, v: baselines.local_attention(q, k, v, slopes), backward=backward, gated=False
        )
    exact = _exact_attention(inputs, local_only=computes == "local", backward=backward)
    expected = []
    names = ("output", "gradient of query", "gradient of key", "gradient of value", "gradient of gate")
    for name, want, eager in zip(names, exact, yardstick.collect(yardstick.run()), strict=False):
        error = (eager.double() - want).abs()
        eps, size = torch.finfo(eager.dtype).eps, _rms(want)
        if not _rms(error) <= 16 * _eps(inputs) * size:
            raise GateError(f"the eager composition itself is wrong in {name}: relative error {_rms(error) / size:.3g}")
        factor = 2 if name == "output" else 3
        worst = factor * error.max() + eps * want.abs().max()
        expected.append(_Bounded(name, want, worst, factor * _rms(error) + eps * size))
    return expected


def _eps(inputs: FusionInputs) -> float:
    return torch.finfo(inputs.query.dtype).eps


def _exact_attention(inputs: FusionInputs, *, local_only: bool, backward: bool) -> list[Tensor]:
    """The reference in float64, one row at a time to bound its memory."""
    gate = inputs.gate.double().requires_grad_(backward)
    outputs, gradients = [], []
    for row in range(inputs.shape.B):
        part = slice(row, row + 1)
        leaves = [x[part].double().requires_grad_(backward) for x in (inputs.query, inputs.key, inputs.value)]
        query, key, value = leaves
        ids = inputs.chunk_ids[part]
        out = memory_attention(
            query, key, value, inputs.ring.key[part], inputs.ring.value[part],
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


def check_write(inputs: WriteInputs, result: tuple[Tensor, ...], computes: str) -> None:
    """`result`: what the ring holds after one write (`contents`), or the buffer of a plain copy."""
    if computes == "copy":
        want = torch.stack([inputs.key, inputs.value]).to(inputs.ring.store.dtype)
        if not torch.equal(result[0], want):
            raise GateError("the copied bytes differ")
        return
    ring = copy_of(inputs.ring)
    ring_write(ring, inputs.key, inputs.value, impl="reference")
    names = ("store", "centroid", "tail", "cursor")
    for name, want, got in zip(names, contents(ring), result, strict=True):
        if name != "centroid" and not torch.equal(want, got):
            raise GateError(f"ring.{name} differs from the reference's")
    rounding = ring.chunk_size * torch.finfo(torch.float32).eps + torch.finfo(ring.centroid.dtype).eps
    size = ring.key.abs().mean(-2, dtype=torch.float32)
    # Slots not written keep whatever centroid they had: compared as well, bound by the same.
    _Bounded("ring.centroid", ring.centroid.float(), rounding * size).check(result[1])
