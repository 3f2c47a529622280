"""Local and memory attention without our kernels: written out, compiled, the official way, and by FlexAttention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..inputs import FusionInputs
from ..providers import Prepared, attention, eager_bytes, too_large
from ..shapes import Shape

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def local_attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> Tensor:
    """Causal softmax attention with every score written out; probabilities rounded to the inputs' dtype."""
    H, T, D = query.shape[1:]
    S = key.shape[2]
    key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.mT).float() * D**-0.5
    ahead = torch.arange(S, device=query.device) - torch.arange(S - T, S, device=query.device)[:, None]
    if slopes is not None:
        scores = scores + slopes[:, None, None] * ahead
    scores = scores.masked_fill(ahead > 0, float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value


def gathered_attention(query: Tensor, chunk_key: Tensor, chunk_value: Tensor) -> Tensor:
    """Attention of every query to its own keys and values [B, H, T, K*C, D]."""
    scores = (chunk_key @ query.unsqueeze(-1)).squeeze(-1).float() * query.shape[-1] ** -0.5
    return (scores.softmax(-1).to(query.dtype).unsqueeze(-2) @ chunk_value).squeeze(-2)


def gated(local: Tensor, memory: Tensor, gate: Tensor) -> Tensor:
    share = gate.sigmoid().to(local.dtype)[:, None, None]
    return (1 - share) * local + share * memory


def gather(stored: Tensor, ids: Tensor, shape: Shape) -> Tensor:
    """[B, H, T, K*C, D], the chunks `ids` [B, H, T, K] of stored [R, G, M, C, D]. All ids are taken to be valid."""
    rows = torch.arange(shape.B, device=ids.device)[:, None, None, None] // shape.rows_per_ring
    heads = (torch.arange(shape.H, device=ids.device) // (shape.H // shape.G))[:, None, None]
    return stored[rows, heads, ids].flatten(3, 4)


def _eager(inputs: FusionInputs) -> Attend:
    ring, shape, slopes, ids = inputs.ring, inputs.shape, inputs.slopes, inputs.chunk_ids.long()

    def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        memory = gathered_attention(query, gather(ring.key, ids, shape), gather(ring.value, ids, shape))
        return gated(local_attention(query, key, value, slopes), memory, gate)

    return attend


def prepare_eager(inputs: FusionInputs, *, backward: bool) -> Prepared:
    """What one writes without a kernel: gather the chunks of every query, two softmaxes, a gate."""
    return attention(inputs, _eager(inputs), backward=backward)


def why_no_eager(shape: Shape, device: torch.device, *, backward: bool) -> str | None:
    return too_large(eager_bytes(shape), device)


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


def why_no_compiled(shape: Shape, device: torch.device, *, backward: bool) -> str | None:
    return too_large(eager_bytes(shape), device) or _why_no_inductor(device.type)


def prepare_compiled(inputs: FusionInputs, *, backward: bool) -> Prepared:
    """The eager composition under torch.compile, for this shape alone."""
    torch.compiler.reset()  # a graph per case: shapes compiled before would turn sizes into symbols
    compiled: Attend = torch.compile(_eager(inputs), dynamic=False, fullgraph=True)
    return _warmed(attention(inputs, compiled, backward=backward))


def _warmed(prepared: Prepared) -> Prepared:
    begin = time.perf_counter()
    prepared.run()
    return replace(prepared, note=f"compiled in {time.perf_counter() - begin:.0f} s, once")


def prepare_official(inputs: FusionInputs, *, backward: bool) -> Prepared:
    """As LongMem's published code does it: chunks gathered head by head by the index's ids, stacked, laid out anew for
    a batched product, scores in float32. Attention alone: ids are given."""
    ring, shape, ids, slopes = inputs.ring, inputs.shape, inputs.chunk_ids.long(), inputs.slopes
    B, H, T, D = shape.B, shape.H, shape.T, shape.D

    def gather_heads(stored: Tensor) -> Tensor:
        """[B * H * T, K*C, D], one query head of one row after another."""
        heads = []
        for row in range(B):
            for head in range(H):
                heads.append(stored[row // shape.rows_per_ring, head // (H // shape.G)][ids[row, head].flatten()])
        return torch.stack(heads).view(B * H * T, -1, D)

    def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        memory_key, memory_value = gather_heads(ring.key), gather_heads(ring.value)
        scaled = (query * D**-0.5).reshape(B * H * T, 1, D)
        weights = torch.bmm(scaled, memory_key.transpose(1, 2)).float().softmax(-1).to(query.dtype)
        memory = torch.bmm(weights, memory_value).view(B, H, T, D)
        return gated(local_attention(query, key, value, slopes), memory, gate)

    return attention(inputs, attend, backward=backward)


_FLEX_BLOCK = 128


def why_no_flex(shape: Shape, device: torch.device, *, backward: bool) -> str | None:
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


def prepare_flex(inputs: FusionInputs, *, backward: bool) -> Prepared:
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


def why_no_sdpa(shape: Shape, device: torch.device, *, backward: bool) -> str | None:
    return None if shape.T in (1, shape.keys) else "its causal mask is aligned to the first key; needs T = 1 or T = S"


def prepare_sdpa(inputs: FusionInputs, *, backward: bool) -> Prepared:
    """PyTorch's own attention over the local keys, without ALiBi: what any fusion costs at least."""
    causal, shared = inputs.shape.T > 1, inputs.shape.H != inputs.shape.G

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=shared)

    return attention(inputs, attend, backward=backward, gated=False)
