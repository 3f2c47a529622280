"""Local and memory attention that torch.compile makes: of the eager composition, and FlexAttention."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from ..inputs import FusionInputs
from ..peak_memory import eager_bytes, too_large
from ..provider import Prepared, Provider
from ..shapes import Shape
from .attention import attention
from .torch_eager import Attend, eager, gated

_COMPILES = "compiles for every size"
_FLEX_BLOCK = 128


def providers(op: str) -> list[Provider]:
    """The compiled baselines of "memory_attention" and "memory_attention_backward"."""
    backward = op.endswith("_backward")
    return [
        Provider(
            "torch.compile composition", partial(_prepare_compiled, backward=backward), _why_no_compiled,
            unswept=_COMPILES,
        ),
        Provider(
            "FlexAttention, dense mask", partial(_prepare_flex, backward=backward),
            partial(_why_no_flex, backward=backward), unswept=_COMPILES,
        ),
    ]  # fmt: skip


@cache
def _why_no_inductor(device_type: str) -> str | None:
    """Compiles one addition to see whether torch.compile works here: it needs a C++ compiler, on CUDA Triton."""
    try:
        one = torch.ones(8, device=device_type)
        if not bool((torch.compile(lambda x: x + 1, dynamic=False)(one) == 2).all()):
            return "torch.compile computes 1 + 1 wrongly here"
    except Exception as error:
        return f"torch.compile does not work here: {type(error).__name__}: {error}"
    return None


def _why_no_compiled(shape: Shape, device: torch.device) -> str | None:
    return too_large(eager_bytes(shape), device) or _why_no_inductor(device.type)


def _prepare_compiled(inputs: FusionInputs, *, backward: bool) -> Prepared:
    """The eager composition under torch.compile, for this shape alone."""
    torch.compiler.reset()  # a graph per case: shapes compiled before would turn sizes into symbols
    compiled: Attend = torch.compile(eager(inputs), dynamic=False, fullgraph=True)
    return _warmed(attention(inputs, compiled, backward=backward))


def _warmed(prepared: Prepared) -> Prepared:
    begin = time.perf_counter()
    prepared.run()
    return replace(prepared, note=f"compiled in {time.perf_counter() - begin:.0f} s, once")


def _why_no_flex(shape: Shape, device: torch.device, *, backward: bool) -> str | None:
    if device.type == "cpu" and backward:
        return "FlexAttention has no backward pass on CPU"
    if shape.T == 1:
        return "a mask block of FlexAttention holds 128 queries: its decoding path takes no mask per query head"
    if shape.T % _FLEX_BLOCK or shape.keys != shape.T or (shape.M * shape.C) % _FLEX_BLOCK or _FLEX_BLOCK % shape.C:
        return f"needs T = S and M * C in whole blocks of {_FLEX_BLOCK}"
    if shape.H != shape.G or shape.rings != shape.B:
        return "written for one key head per query head and one ring per row"
    dense = shape.B * shape.H * shape.T * shape.M
    return too_large(4 * dense, device) or _why_no_inductor(device.type)


def _prepare_flex(inputs: FusionInputs, *, backward: bool) -> Prepared:
    """Memory as attention to everything stored under a mask [B, H, T, M] of the chunks found, which is built in every
    call, as ids are new in every step. Nearly every block of 128 queries and 128 keys has a chunk that one of the
    queries found, so nearly all of them are computed."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    torch.compiler.reset()
    flex = torch.compile(flex_attention, dynamic=False)
    shape, slopes, ids = inputs.shape, inputs.slopes, inputs.chunk_ids.long()
    B, H, T, M, C = shape.B, shape.H, shape.T, shape.M, shape.C
    # Keys lie apart from values here; FlexAttention wants them contiguous.
    stored_key, stored_value = (part.flatten(2, 3).contiguous() for part in (inputs.ring.key, inputs.ring.value))
    causal = create_block_mask(lambda b, h, i, j: j <= i, None, None, T, T, device=ids.device.type)

    def of_chunks() -> BlockMask:
        found = torch.zeros(B, H, T, M, dtype=torch.bool, device=ids.device).scatter_(-1, ids, True)
        blocks = found.view(B, H, T // _FLEX_BLOCK, _FLEX_BLOCK, -1, _FLEX_BLOCK // C).any(-1).any(3)
        order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return BlockMask.from_kv_blocks(
            blocks.sum(-1, dtype=torch.int32),
            order,
            BLOCK_SIZE=_FLEX_BLOCK,
            mask_mod=lambda b, h, i, j: found[b, h, i, j // C],
            seq_lengths=(T, M * C),
        )

    def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        local = flex(query, key, value, score_mod=lambda s, b, h, i, j: s + slopes[h] * (j - i), block_mask=causal)
        return gated(local, flex(query, stored_key, stored_value, block_mask=of_chunks()), gate)

    return _warmed(attention(inputs, attend, backward=backward))
