"""memory_attention in Triton for few queries, as in decoding: keys and retrieved tokens are split among programs.

The first kernel does local attention and memory attention in one launch, each program a part of the keys of a few rows
or a part of a row's retrieved tokens; the second merges the parts. All sizes that matter to either are known on the
host, nothing is counted in memory: the launches can be captured in a CUDA graph and sums have a fixed order.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem_kernels._triton import narrow, ring_of_row
from longmem_kernels.memory_attention._triton_common import (
    LN2,
    LOG2E,
    Bank,
    any_not_finite,
    attend,
    attend_tokens,
    decode_tiles,
    drop_threshold,
    dropout_rows,
    finish,
    fusion_share,
    load_rows,
)

DECODE_QUERIES = 16  # of a head, at most
MERGED = 16  # parts that the merging kernel adds at once


def few_queries(T: int) -> bool:
    """Whether a call is for the kernels here: whatever else it asks for, they can do it."""
    return T <= DECODE_QUERIES


@triton.jit
def _local_part(
    pid, p_query, p_key, p_value, p_slopes, p_key_mask, p_seed, p_part_out, p_part_lse,
    s_query_b, s_query_h, s_query_t, s_key_b, s_key_g, s_key_s, s_value_b, s_value_g, s_value_s, s_mask_b, s_mask_s,
    H, G, T, S, scale, window, threshold, first_key, keys_per_part, local_parts, parts,
    CAUSAL: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Local attention of BT rows to `keys_per_part` keys. A group's rows are one list of H/G * T, head by head."""
    rows = H // G * T
    blocks = tl.cdiv(rows, BT)
    i_part = pid % local_parts
    i_g = (pid // local_parts // blocks % G).to(tl.int64)
    i_b = (pid // local_parts // blocks // G).to(tl.int64)
    o_list = pid // local_parts % blocks * BT + tl.arange(0, BT)
    m_row = o_list < rows
    o_list = tl.minimum(o_list, rows - 1)
    o_h = i_g * (H // G) + o_list // T
    o_t = o_list % T
    o_d = tl.arange(0, BD)

    p_rows = p_query + i_b * s_query_b + o_h * s_query_h + o_t.to(tl.int64) * s_query_t
    b_query = tl.load(p_rows[:, None] + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
    p_key += i_b * s_key_b + i_g * s_key_g
    p_value += i_b * s_value_b + i_g * s_value_g
    if p_key_mask is not None:
        p_key_mask += i_b * s_mask_b
    slope = None
    if p_slopes is not None:
        slope = (tl.load(p_slopes + o_h).to(tl.float32) * LOG2E)[:, None]
    o_row = (i_b * H + o_h) * T + o_t
    b_row = None
    if p_seed is not None:
        b_row = dropout_rows(p_seed, o_row)

    begin = first_key + i_part * keys_per_part
    end = tl.minimum(begin + keys_per_part, S)
    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_out = tl.zeros([BT, BD], tl.float32)
    b_max, b_sum, b_out = attend(
        b_query, b_max, b_sum, b_out, begin, end, p_key, p_value, s_key_s, s_value_s,
        S - T + o_t, 0, S, scale, slope, p_key_mask, s_mask_s, window, b_row, p_seed, threshold,
        CAUSAL, True, False, False, D, BS, BD,
    )  # fmt: skip
    if any_not_finite(b_out):
        b_max, b_sum, b_out = attend(
            b_query, tl.full([BT], float("-inf"), tl.float32), tl.zeros([BT], tl.float32),
            tl.zeros([BT, BD], tl.float32), begin, end, p_key, p_value, s_key_s, s_value_s,
            S - T + o_t, 0, S, scale, slope, p_key_mask, s_mask_s, window, b_row, p_seed, threshold,
            CAUSAL, True, False, True, D, BS, BD,
        )  # fmt: skip
    b_out, b_lse = finish(b_max, b_sum, b_out)
    o_part = o_row * parts + i_part
    tl.store(p_part_out + o_part[:, None] * D + o_d[None, :], b_out, mask=m_row[:, None] & (o_d < D)[None, :])
    tl.store(p_part_lse + o_part, b_lse, mask=m_row)


@triton.jit
def _memory_part(
    pid, p_query, p_key, p_value, p_ids, p_scale, p_ring_index, p_part_out, p_part_lse,
    s_query_b, s_query_h, s_query_t, s_key_r, s_key_g, s_key_m, s_key_c, s_value_r, s_value_g, s_value_m, s_value_c,
    s_ids_b, s_ids_h, s_ids_t, s_ids_k,
    H, G, T, R, M, scale, tokens_per_part, local_parts, parts,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attention of one row to `tokens_per_part` of its retrieved tokens."""
    memory_parts = parts - local_parts
    i_part = pid % memory_parts
    i_row = (pid // memory_parts).to(tl.int64)
    i_t = i_row % T
    i_h = i_row // T % H
    i_b = i_row // T // H
    i_g = i_h // (H // G)
    i_r, M = ring_of_row(p_ring_index, i_b, R, M)
    if p_scale is not None:
        p_scale += (i_r * G + i_g) * M * 2

    o_t = i_t.to(tl.int32) + tl.arange(0, 1)
    b_query = load_rows(p_query + i_b * s_query_b + i_h * s_query_h, o_t, s_query_t, T, D, BD, False)
    begin = i_part * tokens_per_part
    b_max, b_sum, b_out = attend_tokens(
        b_query.to(tl.float32) * (scale * LOG2E), tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32),
        tl.zeros([1, BD], tl.float32), begin, tl.minimum(begin + tokens_per_part, K * C),
        p_key + i_r * s_key_r + i_g * s_key_g, p_value + i_r * s_value_r + i_g * s_value_g,
        p_ids + i_b * s_ids_b + i_h * s_ids_h, p_scale, o_t, T, M,
        s_ids_t, s_ids_k, s_key_m, s_key_c, s_value_m, s_value_c, K, C, D, BD, BJ, SAME, WIDE,
    )  # fmt: skip
    b_out, b_lse = finish(b_max, b_sum, b_out)
    o_part = i_row * parts + local_parts + i_part + tl.arange(0, 1)
    o_d = tl.arange(0, BD)
    tl.store(p_part_out + o_part[:, None] * D + o_d[None, :], b_out, mask=(o_d < D)[None, :])
    tl.store(p_part_lse + o_part, b_lse)


@triton.jit
def memory_attention_decode_kernel(
    p_query, p_key, p_value, p_slopes, p_key_mask, p_seed,
    p_memory_query, p_memory_key, p_memory_value, p_ids, p_scale, p_ring_index, p_part_out, p_part_lse,
    s_query_b, s_query_h, s_query_t, s_key_b, s_key_g, s_key_s, s_value_b, s_value_g, s_value_s, s_mask_b, s_mask_s,
    s_memory_query_b, s_memory_query_h, s_memory_query_t,
    s_memory_key_r, s_memory_key_g, s_memory_key_m, s_memory_key_c,
    s_memory_value_r, s_memory_value_g, s_memory_value_m, s_memory_value_c,
    s_ids_b, s_ids_h, s_ids_t, s_ids_k,
    H, G, T, S, R, M, scale, window, threshold,
    first_key, keys_per_part, tokens_per_part, local_parts, parts, local_programs,
    CAUSAL: tl.constexpr, K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BJ: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Partial outputs [B, H, T, parts, D] and log-sum-exps [B, H, T, parts] in units of log 2, local parts first."""
    pid = tl.program_id(0)
    if pid < local_programs:
        _local_part(
            pid, p_query, p_key, p_value, p_slopes, p_key_mask, p_seed, p_part_out, p_part_lse,
            s_query_b, s_query_h, s_query_t, s_key_b, s_key_g, s_key_s, s_value_b, s_value_g, s_value_s,
            s_mask_b, s_mask_s, H, G, T, S, scale, window, threshold, first_key, keys_per_part, local_parts, parts,
            CAUSAL, D, BT, BS, BD,
        )  # fmt: skip
    else:
        _memory_part(
            pid - local_programs, p_memory_query, p_memory_key, p_memory_value, p_ids, p_scale, p_ring_index,
            p_part_out, p_part_lse, s_memory_query_b, s_memory_query_h, s_memory_query_t,
            s_memory_key_r, s_memory_key_g, s_memory_key_m, s_memory_key_c,
            s_memory_value_r, s_memory_value_g, s_memory_value_m, s_memory_value_c,
            s_ids_b, s_ids_h, s_ids_t, s_ids_k, H, G, T, R, M, scale, tokens_per_part, local_parts, parts,
            K, C, D, BD, BJ, SAME, WIDE,
        )  # fmt: skip


@triton.jit
def _merged(p_part_out, p_part_lse, begin, end, D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """Output [1, BD] and log-sum-exp [1], in units of log 2, of parts begin ... end - 1."""
    o_d = tl.arange(0, BD)
    b_max = tl.full([1], float("-inf"), tl.float32)
    b_sum = tl.zeros([1], tl.float32)
    b_out = tl.zeros([1, BD], tl.float32)
    for start in range(begin, end, BP):
        o_part = start + tl.arange(0, BP)
        m_part = o_part < end
        b_lse = tl.load(p_part_lse + o_part, mask=m_part, other=float("-inf"))[:, None]  # [BP, 1]
        m_tile = m_part[:, None] & (o_d < D)[None, :]
        b_part = tl.load(p_part_out + o_part[:, None] * D + o_d[None, :], mask=m_tile, other=0.0)
        b_new_max = tl.maximum(b_max, tl.max(b_lse, axis=0))
        b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_shrink = tl.exp2(b_max - b_base)
        b_weight = tl.exp2(b_lse - b_base[None, :])
        b_sum = b_sum * b_shrink + tl.sum(b_weight, axis=0)
        b_out = b_out * b_shrink[:, None] + tl.sum(b_weight * b_part, axis=0)[None, :]
        b_max = b_new_max
    return finish(b_max, b_sum, b_out)


@triton.jit
def memory_attention_decode_merge_kernel(
    p_part_out, p_part_lse, p_gate, p_out, p_local_out, p_local_lse, p_memory_out, p_memory_lse,
    H, T, local_parts, parts, kept_scale, D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All five results of a row from its parts."""
    i_row = tl.program_id(0).to(tl.int64)
    p_part_out += i_row * parts * D
    p_part_lse += i_row * parts
    b_local, b_local_lse = _merged(p_part_out, p_part_lse, 0, local_parts, D, BP, BD)
    b_memory, b_memory_lse = _merged(p_part_out, p_part_lse, local_parts, parts, D, BP, BD)
    b_local *= kept_scale
    b_local_lse *= LN2
    b_memory_lse *= LN2
    b_share = fusion_share(b_local_lse, b_memory_lse, p_gate, i_row // T % H)[:, None]

    o_row = i_row + tl.arange(0, 1)
    o_d = tl.arange(0, BD)
    o_out = o_row[:, None] * D + o_d[None, :]
    m_out = (o_d < D)[None, :]
    tl.store(p_out + o_out, narrow((1 - b_share) * b_local + b_share * b_memory, p_out.dtype.element_ty), mask=m_out)
    tl.store(p_local_out + o_out, b_local, mask=m_out)
    tl.store(p_memory_out + o_out, b_memory, mask=m_out)
    tl.store(p_local_lse + o_row, b_local_lse)
    tl.store(p_memory_lse + o_row, b_memory_lse)


def parts_of(length: int, tile: int, programs: int, wanted: int) -> tuple[int, int]:
    """Length of a part, a multiple of `tile`, and how many parts: each for `programs` programs, together `wanted`."""
    tiles = max(1, triton.cdiv(length, tile))
    per_part = triton.cdiv(tiles, max(1, min(tiles, wanted // programs)))
    return per_part * tile, triton.cdiv(tiles, per_part)


def decode_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_query: Tensor,
    bank: Bank,
    chunk_ids: Tensor,
    memory_scale: Tensor | None,
    ring_index: Tensor | None,
    gate: Tensor | None,
    alibi_slopes: Tensor | None,
    key_mask: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    dropout_p: float,
    outputs: tuple[Tensor, ...],
) -> None:
    """`memory_attention_forward` for few queries; `outputs` are its five results, to be filled."""
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    R, _, M, C, _ = bank.key.shape
    K = chunk_ids.shape[3]
    tiles = decode_tiles(query, H // G, K * C)
    blocks = B * G * triton.cdiv(H // G * T, tiles.BT)
    first_key = 0 if window is None else max(0, S - T - window + 1) // tiles.BS * tiles.BS
    keys_per_part, local_parts = parts_of(S - first_key, tiles.BS, blocks, tiles.programs)
    tokens_per_part, memory_parts = parts_of(K * C, tiles.BJ, B * H * T, tiles.programs)
    parts = local_parts + memory_parts
    part_out = query.new_empty((B, H, T, parts, D), dtype=torch.float32)
    part_lse = query.new_empty((B, H, T, parts), dtype=torch.float32)
    mask_strides = (0, 0) if key_mask is None else key_mask.stride()
    memory_attention_decode_kernel[(blocks * local_parts + B * H * T * memory_parts,)](
        query, key, value, alibi_slopes, key_mask, dropout_seed,
        memory_query, bank.key, bank.value, chunk_ids, memory_scale, ring_index, part_out, part_lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides,
        *memory_query.stride()[:3], *bank.strides, *chunk_ids.stride(),
        H, G, T, S, R, M, scale, window, drop_threshold(dropout_p),
        first_key, keys_per_part, tokens_per_part, local_parts, parts, blocks * local_parts,
        CAUSAL=causal, K=K, **bank.options, **tiles.launch,
    )  # fmt: skip
    memory_attention_decode_merge_kernel[(B * H * T,)](
        part_out, part_lse, gate, *outputs, H, T, local_parts, parts, 1 / (1 - dropout_p),
        D=D, BP=MERGED, BD=bank.options["BD"], num_warps=1,
    )  # fmt: skip
