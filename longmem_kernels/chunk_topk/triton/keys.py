"""Scores as integers in the order of chunk_topk: numbers, then NaN, then nothing; ties by ascending slot.

An entry of a list is what the search writes: a score's bits above a slot. A candidate is what the decision compares: a
key above an inverted slot, so that the larger of two int64 is the better chunk.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

import triton
import triton.language as tl

KEY_MISSING = tl.constexpr(-(2**31))
KEY_NAN = tl.constexpr(-(2**31) + 1)
KEY_LOWEST = tl.constexpr(-(2**31) + 0x7FFFFF)  # of -inf
LAST = tl.constexpr(2**31 - 1)
MISSING = tl.constexpr(-(2**63))  # a candidate whose key is KEY_MISSING


@triton.jit
def key_of_score(score):
    """int32 in the order of the scores; -0 counts as +0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, KEY_NAN, key)


@triton.jit
def score_of_key(key):
    score = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    score = tl.where(key == KEY_NAN, float("nan"), score)
    return tl.where(key == KEY_MISSING, float("-inf"), score)


@triton.jit
def entry_of(score, slot):
    return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | slot.to(tl.int64)


@triton.jit
def score_of_entry(entry):
    return (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def slot_of_entry(entry):
    return entry.to(tl.int32)


@triton.jit
def candidate_of(score, slot):
    return (key_of_score(score).to(tl.int64) << 32) | (slot ^ LAST).to(tl.int64)


@triton.jit
def key_of_candidate(candidate):
    return (candidate >> 32).to(tl.int32)


@triton.jit
def slot_of_candidate(candidate):
    return (candidate & LAST).to(tl.int32) ^ LAST
