"""Tensors as the kernels of memory_attention take them: named tuples of pointers, strides and numbers.

Triton passes a named tuple as its fields, so that a view costs no more than a list of arguments: each field is
specialised for itself, and a field, or a whole view, that is None is compiled out.

Tensors that the kernels make, `Part` and `RowTerms`, are contiguous [B, H, T, ...] and addressed by row number
(b * H + h) * T + t. Products with strides may pass 2^31: one factor is int64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from longmem_kernels import _tiles
from longmem_kernels._triton import Rows


class Chunks(NamedTuple):
    """Keys or values of a bank, [R, G, M, C, D]: a pointer, and strides of ring, head, slot and token."""

    ptr: Any
    r: Any
    g: Any
    m: Any
    c: Any


class Ids(NamedTuple):
    """Retrieved chunks, [B, H, T, K]: a pointer, and strides of batch row, head, query and rank."""

    ptr: Any
    b: Any
    h: Any
    t: Any
    k: Any


class Bank(NamedTuple):
    """Memory: R rings of M slots.

    Attributes:
        scale: contiguous [R, G, M, 2], of keys and values; None unless they are float8.
        ring_index: [B], or None.
    """

    key: Chunks
    value: Chunks
    scale: Any
    ring_index: Any
    R: Any
    M: Any


class Mask(NamedTuple):
    """A key mask [B, S]: a pointer, and strides of batch row and key."""

    ptr: Any
    b: Any
    s: Any


class Dropout(NamedTuple):
    """Dropout of local weights: a pointer to the seed, below what 32 hashed bits are dropped, and 1 / (1 - p)."""

    seed: Any
    threshold: Any
    kept_scale: Any


class Sizes(NamedTuple):
    """Query heads, key/value heads, queries and local keys."""

    H: Any
    G: Any
    T: Any
    S: Any


class Part(NamedTuple):
    """Pointers to the results of one of the two softmaxes, float32: out [B, H, T, D], log-sum-exp [B, H, T]."""

    out: Any
    lse: Any


class RowTerms(NamedTuple):
    """Pointers to two numbers of a part for each row, float32 [B, H, T], for the gradient kernels; see backward.py."""

    base: Any
    offset: Any


class Call(NamedTuple):
    """A call of the op, forward or backward, for the kernels.

    Attributes:
        query, memory_query: [B, H, T]; key, value: [B, G, S].
        gate, slopes: [H] float32, or None.
        constants: what of memory is compiled in: its sizes; SAME, whether keys and values lie alike, so that their
            offsets are equal; WIDE, whether an offset may pass 2^31. Not to be changed.
    """

    query: Rows
    key: Rows
    value: Rows
    memory_query: Rows
    bank: Bank
    ids: Ids
    gate: Tensor | None
    slopes: Tensor | None
    key_mask: Mask | None
    dropout: Dropout | None
    sizes: Sizes
    scale: float
    causal: bool
    window: int | None
    constants: dict[str, Any]

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, memory_query: Tensor, memory_key: Tensor, memory_value: Tensor,
        chunk_ids: Tensor, memory_scale: Tensor | None, ring_index: Tensor | None, gate: Tensor | None,
        alibi_slopes: Tensor | None, key_mask: Tensor | None, dropout_seed: Tensor | None,
        fusion: str, scale: float, causal: bool, window: int | None, dropout_p: float,
    ) -> Call:  # fmt: skip
        """From the arguments of `memory_attention`, already checked, defaults filled in."""
        _, H, T, D = query.shape
        _, G, S, _ = key.shape
        R, _, M, C, _ = memory_key.shape
        key_strides, value_strides = memory_key.stride(), memory_value.stride()
        constants = _memory_constants(chunk_ids.shape[3], M, C, D, key_strides, value_strides)
        memory_key, memory_value = _readable(memory_key), _readable(memory_value)
        mask = None if key_mask is None else Mask(key_mask, *key_mask.stride())
        dropout = None
        if dropout_seed is not None:
            dropout = Dropout(dropout_seed, int(dropout_p * 2**32), 1 / (1 - dropout_p))
        return cls(
            query=Rows.of(query),
            key=Rows.of(key),
            value=Rows.of(value),
            memory_query=Rows.of(memory_query),
            bank=Bank(
                Chunks(memory_key, *key_strides[:4]),
                Chunks(memory_value, *value_strides[:4]),
                memory_scale,
                ring_index,
                R,
                M,
            ),
            ids=Ids(chunk_ids, *chunk_ids.stride()),
            gate=gate,
            slopes=alibi_slopes,
            key_mask=mask,
            dropout=dropout,
            sizes=Sizes(H, G, T, S),
            scale=scale,
            causal=causal,
            window=window,
            constants=constants,
        )


@lru_cache(maxsize=4096)
def _memory_constants(
    K: int, M: int, C: int, D: int, key_strides: tuple[int, ...], value_strides: tuple[int, ...]
) -> dict[str, Any]:
    ends = ((M - 1) * s_m + (C - 1) * s_c + D for _, _, s_m, s_c, _ in (key_strides, value_strides))
    return {
        "K": K,
        "C": C,
        "D": D,
        "BD": _tiles.power_of_2(D),
        "SAME": key_strides == value_strides,
        "WIDE": max(ends) > 2**31,
    }


def _readable(memory: Tensor) -> Tensor:
    """Memory as bytes where it is float8 and no instruction converts that, or the interpreter, inexactly."""
    if memory.dtype != torch.float8_e4m3fn:
        return memory
    interpreted = triton.knobs.runtime.interpret
    return memory.view(torch.uint8) if interpreted or _tiles.capability(memory.device) < (8, 9) else memory
