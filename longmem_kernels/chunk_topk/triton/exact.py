"""What decides a block whose lists overflow: bisection for the K-th largest score.

Lists overflow where scores are equal by the hundred, or where the sample of the tiles was misleading. Each step of the
bisection counts in one pass over the centroids, so the worst case is 32 passes and two more, whatever the scores are.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

import triton
import triton.language as tl

from .keys import KEY_LOWEST, key_of_score, score_of_key
from .lists import LANES, lanes, octet, octets, sum_in_lanes, take
from .scores import scores


@triton.jit
def exact(
    task, first, end, b_bar, p_list, K,
    HOW: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, BN: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Lists that hold the best K of the slots `first` to `end` whatever their scores are.

    Args:
        b_bar: [BT], reached by K chunks or more, where there are K numbers.
        p_list: [BT, LANES].

    Returns:
        The lists' lengths [BT, LANES], at most CAPACITY.
    """
    BT: tl.constexpr = b_bar.shape[0]
    shape: tl.constexpr = [BT, LANES]
    o_n = tl.arange(0, BN)[None, :]
    numbers = tl.zeros(shape, tl.int32)
    largest = tl.full(shape, float("-inf"), tl.float32)
    for n in tl.range(first, end, BN, num_stages=2):
        b_score = scores(task, n, end, HOW, D, PIECE, BN)
        b_score = tl.where(o_n < end - n, b_score, float("nan"))
        numbers += sum_in_lanes(b_score == b_score)
        largest = tl.maximum(largest, tl.max(tl.max(lanes(b_score), axis=3), axis=1))
    numbers = tl.sum(numbers, axis=1)

    # K or more, but at most `found`, reach `low`; `above`, fewer than K, reach what comes after `high`.
    low = tl.where(numbers < K, KEY_LOWEST, key_of_score(b_bar))
    high = tl.maximum(key_of_score(tl.max(largest, axis=1)), low)
    found, above = numbers, tl.zeros([BT], tl.int32)
    unsettled = task.m_row & (found > CAPACITY) & (low < high)
    while tl.max(unsettled.to(tl.int32), axis=0) > 0:
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        b_middle = score_of_key(middle)[:, None]
        reach = tl.zeros(shape, tl.int32)
        for n in tl.range(first, end, BN, num_stages=2):
            b_score = scores(task, n, end, HOW, D, PIECE, BN)
            reach += sum_in_lanes((b_score >= b_middle) & (o_n < end - n))
        reached = tl.sum(reach, axis=1)
        enough, lacking = unsettled & (reached >= K), unsettled & (reached < K)
        low, found = tl.where(enough, middle, low), tl.where(enough, reached, found)
        high, above = tl.where(lacking, middle - 1, high), tl.where(lacking, reached, above)
        unsettled = task.m_row & (found > CAPACITY) & (low < high)

    # All that is better than `low`; of its equals, and of NaN, the first in each lane that may be needed.
    ties_left = tl.where(task.m_row, tl.where(found > CAPACITY, K - above, CAPACITY), 0)
    ties_left = tl.broadcast_to(ties_left[:, None], shape)
    nans_left = tl.broadcast_to(tl.where(task.m_row, tl.maximum(K - numbers, 0), 0)[:, None], shape)
    b_low = tl.broadcast_to(tl.where(task.m_row, score_of_key(low), float("inf"))[:, None], shape)
    o_lane = tl.broadcast_to(tl.arange(0, LANES)[None, :] * 2, shape)
    length = tl.zeros(shape, tl.int32)
    for n in tl.range(first, end, BN, num_stages=2):
        b_score = scores(task, n, end, HOW, D, PIECE, BN)
        s0, s1, s2, s3, s4, s5, s6, s7 = octet(tl.reshape(octets(b_score), [BT, LANES, 2, 2, 2]))
        slot = n + o_lane
        length, ties_left, nans_left = take(length, ties_left, nans_left, b_low, p_list, slot, end, s0)
        length, ties_left, nans_left = take(length, ties_left, nans_left, b_low, p_list, slot + 1, end, s1)
        length, ties_left, nans_left = take(length, ties_left, nans_left, b_low, p_list, slot + 8, end, s2)
        length, ties_left, nans_left = take(length, ties_left, nans_left, b_low, p_list, slot + 9, end, s3)
        length, ties_left, nans_left = take(length, ties_left, nans_left, b_low, p_list, slot + 16, end, s4)
        length, ties_left, nans_left = take(length, ties_left, nans_left, b_low, p_list, slot + 17, end, s5)
        length, ties_left, nans_left = take(length, ties_left, nans_left, b_low, p_list, slot + 24, end, s6)
        length, ties_left, nans_left = take(length, ties_left, nans_left, b_low, p_list, slot + 25, end, s7)
    return length
