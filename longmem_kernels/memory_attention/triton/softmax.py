"""Softmaxes that see their keys block by block, and the fusion of two of them.

Scores are kept in units of log 2, so that a weight is one `exp2` of a difference.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class State(NamedTuple):
    """An online softmax of BT rows after some of their keys.

    Attributes:
        max: [BT], the largest score.
        sum: [BT], of the weights, each `exp2(score - max)`.
        out: [BT, BD], the sum of the values times their weights.
    """

    max: Any
    sum: Any
    out: Any


@triton.jit
def empty_state(BT: tl.constexpr, BD: tl.constexpr):
    """The state before any key."""
    b_max = tl.full([BT], float("-inf"), tl.float32)
    return State(b_max, tl.zeros([BT], tl.float32), tl.zeros([BT, BD], tl.float32))


@triton.jit
def online_softmax(state, b_score, factor, AXIS: tl.constexpr):
    """The state with a block of scores, whose values the caller is still to add, and the block's weights.

    AXIS of b_score is that of the keys, the other one that of the rows. A positive `factor`, unless None, multiplies
    the scores: to multiply the maximum instead saves a multiplication of every score.
    """
    b_most = tl.max(b_score, axis=AXIS)
    if factor is not None:
        b_most *= factor
        b_score *= factor
    b_max = tl.maximum(state.max, b_most)
    b_base = tl.where(b_max == float("-inf"), 0.0, b_max)  # nothing seen yet: exp2(-inf - 0), not NaN
    b_weight = tl.exp2(b_score - tl.expand_dims(b_base, AXIS))
    b_alpha = tl.exp2(state.max - b_base)
    b_sum = state.sum * b_alpha + tl.sum(b_weight, axis=AXIS)
    return State(b_max, b_sum, state.out * b_alpha[:, None]), b_weight


@triton.jit
def finish(state):
    """Output and log-sum-exp, in units of log 2, of a softmax; 0 and -inf where nothing was seen."""
    m_none = state.sum == 0.0
    b_sum = tl.where(m_none, 1.0, state.sum)
    return state.out / b_sum[:, None], tl.where(m_none, float("-inf"), state.max + tl.log2(b_sum))


@triton.jit
def fusion_share(b_local_lse, b_memory_lse, p_gate, i_h):
    """Share of the memory in the output: gated when there is a gate, else joint."""
    m_found = b_memory_lse != float("-inf")
    if p_gate is not None:
        share = tl.sigmoid(tl.load(p_gate + i_h).to(tl.float32))
    else:
        share = 1 / (1 + tl.exp(b_local_lse - b_memory_lse))
    return tl.where(m_found, share, 0.0)
