"""What the Triton kernels of memory_attention share.

Local attention and memory attention are two softmaxes, each with its output and log-sum-exp. Both fusions are
`out = (1 - share) * local + share * memory`: "gated" has share = sigmoid(gate), "joint" the memory's share of the sum
of exponentials; share = 0 where no memory was found. So the kernels of either part never see the other.

Scores are kept in units of log 2, so that a weight is one `exp2` of a difference.

A hidden key weighs zero, but zero times NaN or infinity is NaN. The loops over keys do not look for that: a program
whose result is not finite computes it again, CAREFUL, with what is hidden left out.

Per-row tensors that the kernels make (outputs, log-sum-exps, ...) are contiguous [B, H, T, ...] and addressed by row
number (b * H + h) * T + t. Products with strides may pass 2^31: one factor is int64.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem_kernels._triton import dot, narrow

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the local kernels, T queries by S keys, and launch options: the best without spills in a loop.

    Two blocks for each multiprocessor, where they fit, are worth more than a larger tile: one computes exponentials
    while the other multiplies matrices.
    """

    BT: int
    BS: int
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of Hopper for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _hopper(query: Tensor) -> bool:
    """Matrix products read their operands from shared memory, which leaves more registers for the rest."""
    return capability(query.device) >= (9, 0)


def local_tiles(query: Tensor, dropout: bool) -> Tiles:
    """Of the forward kernel."""
    D = query.shape[-1]
    if query.dtype == torch.float32:
        return Tiles(32, 32) if D <= 64 else Tiles(16, 16)
    if D <= 64:
        return Tiles(128, 64, num_warps=8, maxnreg=128 if _hopper(query) and not dropout else None)
    if D <= 128:
        return Tiles(128, 64, num_warps=8) if _hopper(query) else Tiles(64, 64, num_stages=2)
    return Tiles(64, 32, num_warps=8, num_stages=2)


def query_grad_tiles(query: Tensor) -> Tiles:
    D = query.shape[-1]
    if query.dtype == torch.float32:
        return Tiles(32, 32, num_warps=8) if D <= 64 else Tiles(16, 16, num_warps=8, num_stages=1)
    if D <= 64:
        return Tiles(64, 64)
    if D <= 128:
        return Tiles(128 if _hopper(query) else 64, 64, num_warps=8, num_stages=2)
    return Tiles(32, 32, num_warps=8, num_stages=2)


def key_value_grad_tiles(query: Tensor, dropout: bool) -> Tiles:
    """`dropout` needs the weights twice, whole and thinned."""
    D, roomy = query.shape[-1], _hopper(query) and not dropout
    if query.dtype == torch.float32:
        return Tiles(32, 32, num_warps=8, num_stages=1) if D <= 64 else Tiles(16, 16, num_warps=8, num_stages=2)
    if D <= 64:
        return Tiles(64, 128, num_warps=8) if roomy else Tiles(32, 128, num_warps=8, num_stages=2)
    if D <= 128:
        return Tiles(32, 128, num_warps=8, num_stages=2) if roomy else Tiles(32, 32, num_stages=2)
    return Tiles(32, 32, num_warps=8, num_stages=2)


def decode_tiles(query: Tensor, group: int) -> Tiles:
    """Of the kernel for few queries: BT rows are queries of all `group` heads that share keys."""
    T, D = query.shape[-2:]
    if query.dtype == torch.float32:
        return Tiles(16, 32) if D <= 64 else Tiles(16, 16, num_warps=4 if D <= 128 else 8)
    BT = min(64 if D <= 64 else 32, max(16, triton.next_power_of_2(group * T)))  # tl.dot needs 16
    return Tiles(BT, 64) if D <= 128 else Tiles(16, 32)


@dataclass(frozen=True)
class Bank:
    """Memory as the gathering kernels take it: pointers and strides, and what of them is compiled in."""

    key: Tensor
    value: Tensor
    strides: tuple[int, ...]
    options: dict[str, Any]


def bank_of(memory_key: Tensor, memory_value: Tensor, tokens: int) -> Bank:
    """`tokens`: how many a query has retrieved.

    A warp reads BT queries' tokens, 16 bytes of a token per lane, BJ tokens one after another: the lanes of a query
    hold all of its tokens, and its softmax needs no other warp. Float8 is read as bytes where no instruction converts
    it, and in the interpreter, which converts it inexactly.
    """
    M, C, D = memory_key.shape[2:]
    interpreted = triton.knobs.runtime.interpret
    BD = triton.next_power_of_2(D)
    strides = (*memory_key.stride()[:4], *memory_value.stride()[:4])
    options = {
        "SAME": strides[:4] == strides[4:],
        "WIDE": any((M - 1) * s_m + (C - 1) * s_c + D > 2**31 for s_m, s_c in (strides[2:4], strides[6:8])),
        "C": C,
        "D": D,
        "BD": BD,
        "BT": max(1, 32 * 16 // memory_key.element_size() // BD),
        "BJ": min(8 if memory_key.element_size() > 1 else 4, triton.next_power_of_2(tokens)),
    }
    if memory_key.dtype == torch.float8_e4m3fn and (interpreted or capability(memory_key.device) < (8, 9)):
        memory_key, memory_value = memory_key.view(torch.uint8), memory_value.view(torch.uint8)
    return Bank(memory_key, memory_value, strides, options)


def drop_threshold(dropout_p: float) -> int:
    """A weight whose 32 hashed bits are less is dropped; see `dropout_keep` of the reference."""
    return int(dropout_p * 2**32)


@triton.jit
def fusion_share(b_local_lse, b_memory_lse, p_gate, i_h):
    """Share of the memory in the output: gated when there is a gate, else joint."""
    m_found = b_memory_lse != float("-inf")
    if p_gate is not None:
        share = tl.sigmoid(tl.load(p_gate + i_h).to(tl.float32))
    else:
        share = 1 / (1 + tl.exp(b_local_lse - b_memory_lse))
    return tl.where(m_found, share, 0.0)


@triton.jit
def load_rows(p_rows, o_row, s_row, end, D: tl.constexpr, BD: tl.constexpr, CHECKED: tl.constexpr):
    """Rows o_row, [rows, BD]: zero past D and, when CHECKED, from row `end` on; else there are no such rows."""
    o_d = tl.arange(0, BD)
    p_tile = p_rows + o_row.to(tl.int64)[:, None] * s_row + o_d[None, :]
    if CHECKED:
        return tl.load(p_tile, mask=(o_row < end)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D < BD:
        return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def any_not_finite(b_tile):
    """Whether a tile [rows, columns] of float32 holds NaN or infinity."""
    return tl.max(tl.max((b_tile * 0.0 != 0.0).to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def finite_numbers(b_rows):
    """A tile with zeros for NaN and infinity."""
    b_number = b_rows.to(tl.float32)
    return narrow(tl.where(b_number * 0.0 == 0.0, b_number, 0.0), b_rows.dtype)


@triton.jit
def add_not_finite(
    b_out, begin, end, p_value, s_value_s, o_query, p_key_mask, s_mask_s, window,
    CAUSAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """b_out [BT, BD] with the values of keys begin ... end - 1 that are not finite, whatever they weigh."""
    o_d = tl.arange(0, BD)
    for i_key in tl.range(begin, end, num_stages=1):
        b_value = tl.load(p_value + tl.cast(i_key, tl.int64) * s_value_s + o_d, mask=o_d < D, other=0.0)
        b_value = b_value.to(tl.float32)
        m_seen = o_query == o_query
        if CAUSAL:
            m_seen = i_key <= o_query
        if window is not None:
            m_seen = m_seen & (o_query - i_key < window)
        if p_key_mask is not None:
            m_seen = m_seen & (tl.load(p_key_mask + tl.cast(i_key, tl.int64) * s_mask_s) != 0)
        b_value = tl.where(b_value * 0.0 != 0.0, b_value, 0.0)
        b_out += tl.where(m_seen[:, None], b_value[None, :], 0.0)
    return b_out


@triton.jit
def alibi_bias(slope, o_query, start, first, BS: tl.constexpr, MASKED: tl.constexpr):
    """What ALiBi adds to scores of keys start ... start + BS - 1, to broadcast to [BT, BS].

    When not MASKED, the queries' own part of the distance is left out (see `alibi_rows`): one number per key. No term
    of it is larger than the distance, so that nothing is lost to rounding.
    """
    if MASKED:
        o_key = (start + tl.arange(0, BS)).to(tl.float32)
        return slope * (o_key[None, :] - o_query.to(tl.float32)[:, None])
    else:
        b_key = slope * (tl.arange(0, BS) - (BS - 1)).to(tl.float32)
        return (b_key + slope * (start + (BS - 1) - first).to(tl.float32))[None, :]


@triton.jit
def alibi_rows(slope, o_query, first):
    """What `alibi_bias` leaves out of the distance of queries, from position `first`."""
    return slope * (o_query - first).to(tl.float32)


@triton.jit
def seen_keys(first, last, S, CAUSAL: tl.constexpr, window, BS: tl.constexpr):
    """Keys that queries at positions first ... last see: some of them begin ... end - 1, all all_begin ... all_end - 1.

    All four are multiples of BS, but for `end`: before all_begin and from all_end on scores need masks.
    """
    begin = 0
    all_begin = 0
    all_end = S // BS * BS
    end = S
    if CAUSAL:
        all_end = (first + 1) // BS * BS
        end = tl.minimum(S, last + 1)
    if window is not None:
        begin = tl.maximum(0, first - window + 1) // BS * BS
        all_begin = tl.minimum(tl.cdiv(tl.maximum(0, last - window + 1), BS) * BS, tl.cdiv(end, BS) * BS)
        all_end = tl.maximum(all_begin, all_end)
    return begin, all_begin, all_end, end


@triton.jit
def local_scores(
    b_dot, b_bias, o_query, o_key, S, scale, p_key_mask, s_mask_s, window, CAUSAL: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Scores in units of log 2 of the products b_dot; -inf where a key may not be seen.

    b_bias (None without ALiBi) and the positions o_query and o_key are shaped to broadcast to b_dot. Not MASKED: all
    see all, but for the key mask.
    """
    b_score = b_dot * (scale * LOG2E)
    if b_bias is not None:
        b_score += b_bias
    if MASKED:
        m_seen = o_key < S
        if CAUSAL:
            m_seen = m_seen & (o_key <= o_query)
        if window is not None:
            m_seen = m_seen & (o_query - o_key < window)
        b_score = tl.where(m_seen, b_score, float("-inf"))
    if p_key_mask is not None:
        p_key_mask += o_key.to(tl.int64) * s_mask_s
        m_key = tl.load(p_key_mask, mask=o_key < S, other=0) if MASKED else tl.load(p_key_mask)
        b_score = tl.where(m_key != 0, b_score, float("-inf"))
    return b_score


@triton.jit
def _mix(x):
    """32 bits hashed into 32 ("lowbias32", C. Wellons)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_rows(p_seed, o_row):
    """What the hash of a weight takes from the seed and from the number of its row, int64."""
    seed = tl.load(p_seed)
    low = o_row.to(tl.uint32) ^ _mix(seed.to(tl.uint32))
    high = (o_row >> 32).to(tl.uint32) ^ _mix((seed >> 32).to(tl.uint32) ^ 0x9E3779B9)
    return _mix(_mix(low) ^ high)


@triton.jit
def kept_by_dropout(b_row, o_key, threshold):
    """Which weights stay: rows and positions of keys are shaped to broadcast."""
    return _mix(b_row ^ (o_key.to(tl.uint32) * 0x9E3779B1)) >= tl.cast(threshold, tl.uint32)


@triton.jit
def retrieved_tokens(
    p_ids, o_t, o_j, T, M, s_ids_t, s_ids_k, s_key_m, s_key_c, s_value_m, s_value_c,
    K: tl.constexpr, C: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Retrieved tokens o_j in [0, K * C) of queries o_t, [BJ, BT]: slots, offsets of keys and values, which exist."""
    m_id = (o_j < K * C)[:, None] & (o_t < T)[None, :]
    o_id = o_t.to(tl.int64)[None, :] * s_ids_t + (o_j // C)[:, None] * s_ids_k
    b_slot = tl.load(p_ids + o_id, mask=m_id, other=-1)
    m_there = (b_slot >= 0) & (b_slot < M)
    if WIDE:
        b_slot = b_slot.to(tl.int64)
    o_c = (o_j % C)[:, None]
    o_key = b_slot * s_key_m + o_c * s_key_c
    if SAME:
        return b_slot, o_key, o_key, m_there
    else:
        return b_slot, o_key, b_slot * s_value_m + o_c * s_value_c, m_there


@triton.jit
def load_tokens(p_bank, o_token, m_there, D: tl.constexpr, BD: tl.constexpr):
    """Keys or values of retrieved tokens, float32 [BJ, BT, BD], 0 where there are none; of bytes, their 256th part."""
    o_d = tl.arange(0, BD)
    m_load = m_there[:, :, None]
    if D < BD:
        m_load = m_load & (o_d < D)[None, None, :]
    b_stored = tl.load(p_bank + o_token[:, :, None] + o_d[None, None, :], mask=m_load, other=0.0)
    return stored_numbers(b_stored)


@triton.jit
def stored_numbers(b_stored):
    """Float32 of what memory holds; of float8_e4m3fn given as bytes, the 256th part.

    Moved into place, the bits of a float8 are those of a float16 with another bias, also of subnormals.
    """
    if b_stored.dtype == tl.uint8:
        bits = b_stored.to(tl.uint16)
        moved = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        moved = tl.where((bits & 0x7F) == 0x7F, 0x7E00, moved).to(tl.uint16)  # NaN
        return moved.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return b_stored.to(tl.float32)


@triton.jit
def token_scales(p_scale, p_bank, b_slot, m_there):
    """Scales of keys and values of retrieved tokens; p_scale points to those of the row's ring and head."""
    p_chunk = p_scale + b_slot.to(tl.int64) * 2
    b_key_scale = tl.load(p_chunk, mask=m_there, other=0.0)
    b_value_scale = tl.load(p_chunk + 1, mask=m_there, other=0.0)
    if p_bank.dtype.element_ty == tl.uint8:  # see stored_numbers
        return b_key_scale * 256.0, b_value_scale * 256.0
    else:
        return b_key_scale, b_value_scale


@triton.jit
def attend(
    b_query, b_max, b_sum, b_out, begin, end, p_key, p_value, s_key_s, s_value_s,
    o_query, first, S, scale, slope, p_key_mask, s_mask_s, window, b_row, p_seed, threshold,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, RISING: tl.constexpr, CAREFUL: tl.constexpr,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One pass of flash attention over keys begin ... end - 1: the running maximum, sum and output after it."""
    if slope is not None and not MASKED:
        b_max += alibi_rows(slope, o_query, first)
    # Registers are for the loops that usually run; those of float32 products take more without stages.
    STAGES: tl.constexpr = 1 if CAREFUL and p_key.dtype.element_ty != tl.float32 else None
    for start in tl.range(begin, end, BS, num_stages=STAGES):
        o_key = start + tl.arange(0, BS)
        b_key = load_rows(p_key, o_key, s_key_s, S, D, BD, MASKED)  # [BS, BD]
        b_value = load_rows(p_value, o_key, s_value_s, S, D, BD, MASKED)
        if CAREFUL:
            b_value = finite_numbers(b_value)
        b_dot = dot(b_query, tl.trans(b_key))
        if MASKED or not RISING or slope is not None or p_key_mask is not None:
            b_bias = None
            if slope is not None:
                b_bias = alibi_bias(slope, o_query, start, first, BS, MASKED)
            b_score = local_scores(
                b_dot, b_bias, o_query[:, None], o_key[None, :], S, scale, p_key_mask, s_mask_s, window, CAUSAL, MASKED
            )
            b_new_max = tl.maximum(b_max, tl.max(b_score, axis=1))
            b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_weight = tl.exp2(b_score - b_base[:, None])
        else:  # scaling the maximum saves a multiplication of every score
            b_new_max = tl.maximum(b_max, tl.max(b_dot, axis=1) * (scale * LOG2E))
            b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_weight = tl.exp2(b_dot * (scale * LOG2E) - b_base[:, None])
        b_shrink = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_shrink + tl.sum(b_weight, axis=1)
        if p_seed is not None:
            b_weight = tl.where(kept_by_dropout(b_row[:, None], o_key[None, :], threshold), b_weight, 0.0)
        b_out = b_out * b_shrink[:, None] + dot(narrow(b_weight, b_value.dtype), b_value)
        b_max = b_new_max
    if slope is not None and not MASKED:
        b_max -= alibi_rows(slope, o_query, first)
    if CAREFUL:
        b_out = add_not_finite(
            b_out, begin, end, p_value, s_value_s, o_query, p_key_mask, s_mask_s, window, CAUSAL, D, BD
        )
    return b_max, b_sum, b_out


@triton.jit
def attend_tokens(
    b_query, b_max, b_sum, b_out, begin, end, p_key, p_value, p_ids, p_scale, o_t, T, M,
    s_ids_t, s_ids_k, s_key_m, s_key_c, s_value_m, s_value_c,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`attend` for retrieved tokens begin ... end - 1; b_query is float32, scaled, in units of log 2.

    Every query has its own tokens, so nothing is shared for a matrix product: scores are sums over a [BJ, BT, BD] tile.
    The K * C tokens are one list, whatever C is.
    """
    for start in range(begin, end, BJ):
        b_slot, o_key, o_value, m_there = retrieved_tokens(
            p_ids, o_t, start + tl.arange(0, BJ), T, M, s_ids_t, s_ids_k, s_key_m, s_key_c, s_value_m, s_value_c,
            K, C, SAME, WIDE,
        )  # fmt: skip
        b_key = load_tokens(p_key, o_key, m_there, D, BD)
        b_value = load_tokens(p_value, o_value, m_there, D, BD)
        b_score = tl.sum(b_query[None, :, :] * b_key, axis=2)  # [BJ, BT]
        if p_scale is not None:
            b_key_scale, b_value_scale = token_scales(p_scale, p_key, b_slot, m_there)
            b_score *= b_key_scale
        b_score = tl.where(m_there, b_score, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, axis=0))
        b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # nothing found yet: exp2(-inf - 0), not NaN
        b_shrink = tl.exp2(b_max - b_base)
        b_weight = tl.exp2(b_score - b_base[None, :])
        b_sum = b_sum * b_shrink + tl.sum(b_weight, axis=0)
        if p_scale is not None:
            b_weight *= b_value_scale
        b_out = b_out * b_shrink[:, None] + tl.sum(b_weight[:, :, None] * b_value, axis=0)
        b_max = b_new_max
    return b_max, b_sum, b_out


@triton.jit
def finish(b_max, b_sum, b_out):
    """Output and log-sum-exp, in units of log 2, of a softmax; 0 and -inf where nothing was seen."""
    m_none = b_sum == 0.0
    b_sum = tl.where(m_none, 1.0, b_sum)
    return b_out / b_sum[:, None], tl.where(m_none, float("-inf"), b_max + tl.log2(b_sum))
