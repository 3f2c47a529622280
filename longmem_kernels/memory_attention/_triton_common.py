"""What the forward and backward Triton kernels of memory_attention share.

Local attention and memory attention are two softmaxes, each with its output and log-sum-exp. Both fusions are
`out = (1 - share) * local + share * memory`: "gated" has share = sigmoid(gate), "joint" the memory's share of the sum
of exponentials; share = 0 where no memory was found. So the kernels of either part never see the other.

Per-row tensors that the kernels make (outputs, log-sum-exps, ...) are contiguous [B, H, T, ...] and addressed by row
number (b * H + h) * T + t. Program ids are int64 from the start: products with strides may pass 2^31.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from longmem_kernels._triton import dot


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the local kernels, T queries by S keys, and launch options: largest without register spills."""

    BT: int
    BS: int
    num_warps: int = 4
    num_stages: int = 3


def local_tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    """Of the forward kernel."""
    if dtype == torch.float32:
        return Tiles(32, 32) if head_dim <= 64 else Tiles(16, 16)
    if head_dim <= 64:
        return Tiles(64, 64)
    return Tiles(64, 32) if head_dim <= 128 else Tiles(32, 32)


def local_backward_tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    if dtype == torch.float32:
        return Tiles(32, 32, num_warps=8) if head_dim <= 64 else Tiles(16, 16, num_warps=8, num_stages=1)
    if head_dim <= 64:
        return Tiles(64, 32, num_warps=8)
    return Tiles(32, 64, num_warps=8) if head_dim <= 128 else Tiles(32, 32, num_warps=8)


def memory_tiles(tokens: int, head_dim: int) -> tuple[int, int]:
    """BT queries and BJ of their `tokens` retrieved tokens; keys and values take 16 registers of a thread each."""
    BJ = min(16, triton.next_power_of_2(tokens))
    return max(1, 2048 // (BJ * triton.next_power_of_2(head_dim))), BJ


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
def local_scores(b_query, b_key, p_slopes, i_h, o_t, o_s, T, S, scale, CAUSAL: tl.constexpr, window):
    """[BT, BS] scores of keys b_key [BS, BD], -inf where a key may not be seen. The queries are the last T of S."""
    distance = (o_t + (S - T))[:, None] - o_s[None, :]
    m_seen = (o_t < T)[:, None] & (o_s < S)[None, :]
    if CAUSAL:
        m_seen &= distance >= 0
    if window is not None:
        m_seen &= distance < window
    b_score = dot(b_query, tl.trans(b_key)) * scale
    if p_slopes is not None:
        b_score -= tl.load(p_slopes + i_h).to(tl.float32) * distance.to(tl.float32)
    return tl.where(m_seen, b_score, float("-inf"))


@triton.jit
def seen_keys(first_t, T, S, CAUSAL: tl.constexpr, window, BT: tl.constexpr, BS: tl.constexpr):
    """Range of keys, begin a multiple of BS, that queries first_t ... first_t + BT - 1 may see."""
    begin = 0
    end = S
    if CAUSAL:
        end = tl.minimum(S, S - T + first_t + BT)
    if window is not None:
        begin = tl.maximum(0, S - T + first_t - window + 1) // BS * BS
    return begin, end


@triton.jit
def retrieved_tokens(p_ids, o_t, o_j, T, M, s_ids_t, s_ids_k, K: tl.constexpr, C: tl.constexpr):
    """Slots [BT, BJ] int64 of the retrieved tokens o_j in [0, K * C), their places [BJ] in the chunk, which exist."""
    m_id = (o_t < T)[:, None] & (o_j < K * C)[None, :]
    o_id = o_t.to(tl.int64)[:, None] * s_ids_t + (o_j // C)[None, :] * s_ids_k
    b_slot = tl.load(p_ids + o_id, mask=m_id, other=-1)
    return b_slot.to(tl.int64), o_j % C, (b_slot >= 0) & (b_slot < M)
