"""The search kernel of chunk_topk: every chunk that may be among the best K of a query, in a few short lists.

Two passes over the centroids, nothing compacted, no list read. The first keeps the largest score of each of NG disjoint
groups of slots; the K-th largest of these, the bar, is reached by at least K chunks. The second computes the same
scores again and appends what reaches the bar: with NG = 4 K some 1.15 K chunks, and so many times more where the first
pass looks at a sample of the tiles.

Tensor cores leave a row of scores with four threads, its lanes, each with every fourth pair of columns:

    column   0 1 | 2 3 | 4 5 | 6 7 | 8 9 | ...
    lane      0     1     2     3     0    ...

Each lane has a list, a counter and a copy of the bar of its own, so that neither scores nor entries nor counts ever move
between threads, and appends need no atomics. A lane meets slots in ascending order.

Lists overflow where scores are equal by the hundred, or where the sample was misleading. Such a block is decided by a
third part, on the device: it bisects for the K-th largest score, counting in a pass over the centroids each time.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longmem_kernels._triton import INTERPRETED, dot, ring_of_row

from .keys import KEY_LOWEST, entry_of, key_of_score, score_of_key

LANES = tl.constexpr(4)
BISECTIONS = tl.constexpr(16)  # of the groups' maxima: a bar too low by 2^-16 of their range costs nothing

# How scores are computed. DIRECT: of equal 16-bit dtypes, exactly but for the order of summation. COARSE: of float32,
# by tensor cores that read the first 11 bits of each factor; an error band says how far off a score may be. FINE: of
# float32 in three such products, as close as a float32 sum of D terms.
DIRECT, COARSE, FINE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# |coarse - exact| <= COARSE_ERROR |query| |centroid|. Cutting a factor to 11 bits changes it by less than 2^-10 of
# itself, a product by less than 2^-9 + 2^-20, and by Cauchy and Schwarz the sum of all |q_i c_i| is at most |q| |c|. The
# rest of the constant covers sums in float32 by tensor cores, which lose less than 2^-21 of the largest partial sum in each
# of at most 256 / 4 steps, norms that are rounded, and scores that a float32 sum rounds on its part.
COARSE_ERROR = tl.constexpr(2.0**-9 * 1.05)
TINY = tl.constexpr(2.0**-110)  # covers products below the smallest normal number


class Task(NamedTuple):
    """What a program searches, inside the kernel.

    Attributes:
        b_query: [BT, PIECE], the first piece of the head dim, zero where there is no query.
        p_rows, m_row: [BT], the queries in memory, and which there are.
        p_ring, s_slot: the ring's centroids of one head.
    """

    b_query: Any
    p_rows: Any
    m_row: Any
    p_ring: Any
    s_slot: Any


@triton.jit
def _load_query(p_rows, m_row, d, D: tl.constexpr, BD: tl.constexpr):
    o_d = d + tl.arange(0, BD)
    return tl.load(p_rows[:, None] + o_d[None, :], mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _cut(x):
    """What tensor cores read of a float32: for the interpreter, which multiplies all of it."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) & -(1 << 13)).to(tl.float32, bitcast=True)


@triton.jit
def _products(b_query, b_centroid, HOW: tl.constexpr):
    """[BT, BD] @ [BD, BN] -> [BT, BN] float32."""
    if HOW == DIRECT:
        return dot(b_query, b_centroid)
    elif INTERPRETED:
        if HOW == COARSE:
            b_query, b_centroid = _cut(b_query), _cut(b_centroid)
        return tl.dot(b_query.to(tl.float32), b_centroid.to(tl.float32), input_precision="ieee")
    elif HOW == COARSE:
        return tl.dot(b_query.to(tl.float32), b_centroid.to(tl.float32), input_precision="tf32")
    else:
        return tl.dot(b_query.to(tl.float32), b_centroid.to(tl.float32), input_precision="tf32x3")


@triton.jit
def _scores(
    task, first, end, HOW: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PIECE: tl.constexpr, BN: tl.constexpr
):
    """Scores [BT, BN] of the slots from `first` on, in pieces of the head dim; zero from slot `end` on."""
    o_n = tl.arange(0, BN)[None, :]
    p_slots = task.p_ring + first * task.s_slot + o_n.to(tl.int64) * task.s_slot
    m_n = o_n < end - first
    o_d = tl.arange(0, PIECE)[:, None]
    if PIECE == BD:
        b_centroid = tl.load(p_slots + o_d, mask=m_n & (o_d < D), other=0.0)
        return _products(task.b_query, b_centroid, HOW)
    else:
        b_score = tl.zeros([task.p_rows.shape[0], BN], tl.float32)
        for d in tl.range(0, D, PIECE, num_stages=2):  # unrolled, it would hold all of the query in registers
            b_query = _load_query(task.p_rows, task.m_row, d, D, PIECE)
            b_centroid = tl.load(p_slots + d + o_d, mask=m_n & (d + o_d < D), other=0.0)
            b_score += _products(b_query, b_centroid, HOW)
        return b_score


@triton.jit
def _group_maxima(b_score, NG: tl.constexpr):
    """[BT, BN] -> [BT, NG / LANES, LANES]: the largest number of each group, NaN where there is none. In one thread."""
    BT: tl.constexpr = b_score.shape[0]
    BN: tl.constexpr = b_score.shape[1]
    MEMBERS: tl.constexpr = BN // NG  # 1, or an even number: pairs of columns
    if MEMBERS == 1:
        pairs = tl.permute(tl.reshape(b_score, [BT, BN // 8, LANES, 2]), (0, 1, 3, 2))
        return tl.reshape(pairs, [BT, BN // LANES, LANES])
    else:
        parts = tl.reshape(b_score, [BT, NG // LANES, MEMBERS // 2, LANES, 2])
        return tl.max(tl.max(parts, axis=4), axis=2)


@triton.jit
def _bar(b_best, K):
    """The K-th largest of each row [BT, NG], or a little less: [BT]."""
    key = key_of_score(b_best)
    low, high = tl.min(key, axis=1), tl.max(key, axis=1)  # K or more reach `low`
    for _ in range(BISECTIONS):
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        enough = tl.sum((key >= middle[:, None]).to(tl.int32), axis=1) >= K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, tl.maximum(middle - 1, low))
    return score_of_key(low)


@triton.jit
def _octet(s):
    """[BT, LANES, 2, 2, 2] -> eight tensors [BT, LANES] in the order of their slots."""
    x, y = tl.split(s)
    x0, x1 = tl.split(x)
    y0, y1 = tl.split(y)
    s0, s4 = tl.split(x0)
    s2, s6 = tl.split(x1)
    s1, s5 = tl.split(y0)
    s3, s7 = tl.split(y1)
    return s0, s1, s2, s3, s4, s5, s6, s7


# In the code below: $0 counter; $1 counter, $2 bar, $3 list, $4 slot of the first score, $5 end of the slots, $6 room in
# the list, $7 to $14 scores. Most octets take the first jump; of the others most have room, and half of them no hit.
_OFFSETS = (0, 1, 8, 9, 16, 17, 24, 25)
_STORE = """
setp.ge.f32 p, {score}, $2;
add.u32 m, $4, {offset};
{checks}
mad.wide.u32 a, n, 8, $3;
@{stored} st.global.v2.b32 [a], {{m, {score}}};
@p add.u32 n, n, 1;
"""
_CHECKS = "setp.lt.and.s32 p, m, $5, p;\nsetp.lt.and.u32 r, n, $6, p;"


def _stores(first: int, count: int, careful: bool) -> str:
    options = {"checks": _CHECKS, "stored": "r"} if careful else {"checks": "", "stored": "p"}
    scores = range(first, first + count)
    return "".join(_STORE.format(score=f"${7 + i}", offset=_OFFSETS[i], **options) for i in scores)


APPEND = tl.constexpr(f"""{{
.reg .pred p, r;
.reg .f32 x, y, z;
.reg .u32 n, m;
.reg .u64 a;
max.f32 x, $7, $8;
max.f32 y, $9, $10;
max.f32 x, x, y;
max.f32 y, $11, $12;
max.f32 z, $13, $14;
max.f32 y, y, z;
max.f32 z, x, y;
mov.u32 n, $1;
setp.ge.f32 p, z, $2;
@!p bra DONE;
add.u32 m, $4, {_OFFSETS[-1]};
setp.lt.s32 p, m, $5;
add.u32 m, n, {len(_OFFSETS)};
setp.le.and.u32 p, m, $6, p;
@!p bra CAREFUL;
setp.ge.f32 p, x, $2;
@!p bra SECOND;
{_stores(0, 4, careful=False)}
SECOND:
setp.ge.f32 p, y, $2;
@!p bra DONE;
{_stores(4, 4, careful=False)}
bra DONE;
CAREFUL:
{_stores(0, 8, careful=True)}
DONE:
mov.u32 $0, n;
}}
""")


@triton.jit
def _append_one(length, b_bar, p_list, slot, end, s, CAPACITY: tl.constexpr):
    hit = (s >= b_bar) & (slot < end)
    tl.store(p_list + length, entry_of(s, slot), mask=hit & (length < CAPACITY))
    return length + hit.to(tl.int32)


@triton.jit
def _append(length, b_bar, p_list, slot, end, s, CAPACITY: tl.constexpr):
    """Append what reaches the bar. `length` counts on where the list is full.

    Args:
        length, b_bar, p_list, slot: [BT, LANES]; `slot` is that of the first score.
        end: slots from here on do not exist, whatever their scores.
        s: [BT, LANES, 2, 2, 2], the scores at slot + 0, 1, 8, 9, 16, 17, 24, 25.
    """
    s0, s1, s2, s3, s4, s5, s6, s7 = _octet(s)
    if INTERPRETED:
        length = _append_one(length, b_bar, p_list, slot, end, s0, CAPACITY)
        length = _append_one(length, b_bar, p_list, slot + 1, end, s1, CAPACITY)
        length = _append_one(length, b_bar, p_list, slot + 8, end, s2, CAPACITY)
        length = _append_one(length, b_bar, p_list, slot + 9, end, s3, CAPACITY)
        length = _append_one(length, b_bar, p_list, slot + 16, end, s4, CAPACITY)
        length = _append_one(length, b_bar, p_list, slot + 17, end, s5, CAPACITY)
        length = _append_one(length, b_bar, p_list, slot + 24, end, s6, CAPACITY)
        return _append_one(length, b_bar, p_list, slot + 25, end, s7, CAPACITY)
    else:
        # Stores of Triton's own would gather the scores of a row in one thread first, through shared memory. And one
        # jump over all of it is what most octets take.
        room = tl.full(length.shape, CAPACITY, tl.int32)
        end = tl.full(length.shape, end, tl.int32)
        return tl.inline_asm_elementwise(
            APPEND, "=r,r,f,l,r,r,r,f,f,f,f,f,f,f,f",
            [length, b_bar, p_list, slot, end, room, s0, s1, s2, s3, s4, s5, s6, s7],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _octets(b_score):
    """[BT, BN] -> [BT, LANES, 2, 2, 2, BN / 32]: lane, then which 16, 8 and 1 columns further, then which 32."""
    s = tl.reshape(b_score, [b_score.shape[0], b_score.shape[1] // 32, 2, 2, LANES, 2])
    return tl.permute(s, (0, 4, 2, 3, 5, 1))


@triton.jit
def _append_tile(length, b_bar, p_list, slot, end, b_score, CAPACITY: tl.constexpr):
    """`_append` of a whole tile [BT, BN]; `slot` [BT, LANES] is that of each lane's first column."""
    BN: tl.constexpr = b_score.shape[1]
    s = _octets(b_score)
    if BN == 32:
        length = _append(length, b_bar, p_list, slot, end, tl.reshape(s, s.shape[:5]), CAPACITY)
    elif BN == 64:
        s0, s1 = tl.split(s)
        length = _append(length, b_bar, p_list, slot, end, s0, CAPACITY)
        length = _append(length, b_bar, p_list, slot + 32, end, s1, CAPACITY)
    else:
        tl.static_assert(BN == 128)
        x, y = tl.split(tl.reshape(s, [s.shape[0], LANES, 2, 2, 2, 2, 2]))
        s0, s2 = tl.split(x)
        s1, s3 = tl.split(y)
        length = _append(length, b_bar, p_list, slot, end, s0, CAPACITY)
        length = _append(length, b_bar, p_list, slot + 32, end, s1, CAPACITY)
        length = _append(length, b_bar, p_list, slot + 64, end, s2, CAPACITY)
        length = _append(length, b_bar, p_list, slot + 96, end, s3, CAPACITY)
    return length


@triton.jit
def _lanes(x):
    """[BT, BN] -> [BT, BN / 8, LANES, 2]; what a lane has, it has in the order of slots."""
    return tl.reshape(x, [x.shape[0], x.shape[1] // 8, LANES, 2])


@triton.jit
def _sum_in_lanes(x):
    return tl.sum(tl.sum(_lanes(x.to(tl.int32)), axis=3), axis=1)


STORE = tl.constexpr("""{
.reg .pred p;
.reg .u64 a;
setp.ne.u32 p, $5, 0;
mad.wide.u32 a, $1, 8, $2;
@p st.global.v2.b32 [a], {$3, $4};
add.u32 $0, $1, $5;
}
""")


@triton.jit
def _take(length, ties_left, nans_left, b_low, p_list, slot, end, s):
    """Append a score that is above `b_low`, or equal to it or NaN while there is need of such."""
    tie = (s == b_low) & (ties_left > 0) & (slot < end)
    nan = (s != s) & (nans_left > 0) & (slot < end)
    hit = (((s > b_low) & (slot < end)) | tie | nan).to(tl.int32)
    if INTERPRETED:
        tl.store(p_list + length, entry_of(s, slot), mask=hit > 0)
        length += hit
    else:
        length = tl.inline_asm_elementwise(
            STORE, "=r,r,l,r,f,r", [length, p_list, slot, s, hit], dtype=tl.int32, is_pure=False, pack=1
        )
    return length, ties_left - tie.to(tl.int32), nans_left - nan.to(tl.int32)


@triton.jit
def _exact(
    task, first, end, b_bar, p_list, K,
    HOW: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PIECE: tl.constexpr, BN: tl.constexpr,
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
        b_score = _scores(task, n, end, HOW, D, BD, PIECE, BN)
        b_score = tl.where(o_n < end - n, b_score, float("nan"))
        numbers += _sum_in_lanes(b_score == b_score)
        largest = tl.maximum(largest, tl.max(tl.max(_lanes(b_score), axis=3), axis=1))
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
            b_score = _scores(task, n, end, HOW, D, BD, PIECE, BN)
            reach += _sum_in_lanes((b_score >= b_middle) & (o_n < end - n))
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
        b_score = _scores(task, n, end, HOW, D, BD, PIECE, BN)
        s0, s1, s2, s3, s4, s5, s6, s7 = _octet(tl.reshape(_octets(b_score), [BT, LANES, 2, 2, 2]))
        slot = n + o_lane
        length, ties_left, nans_left = _take(length, ties_left, nans_left, b_low, p_list, slot, end, s0)
        length, ties_left, nans_left = _take(length, ties_left, nans_left, b_low, p_list, slot + 1, end, s1)
        length, ties_left, nans_left = _take(length, ties_left, nans_left, b_low, p_list, slot + 8, end, s2)
        length, ties_left, nans_left = _take(length, ties_left, nans_left, b_low, p_list, slot + 9, end, s3)
        length, ties_left, nans_left = _take(length, ties_left, nans_left, b_low, p_list, slot + 16, end, s4)
        length, ties_left, nans_left = _take(length, ties_left, nans_left, b_low, p_list, slot + 17, end, s5)
        length, ties_left, nans_left = _take(length, ties_left, nans_left, b_low, p_list, slot + 24, end, s6)
        length, ties_left, nans_left = _take(length, ties_left, nans_left, b_low, p_list, slot + 25, end, s7)
    return length


@triton.jit
def chunk_topk_search_kernel(
    query, centroid, p_count, p_ring_index, p_norm, p_list, p_length,
    H, G, T, R, M, K, splits,
    HOW: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PIECE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    NG: tl.constexpr, SAMPLE: tl.constexpr, CAPACITY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Lists of entries [B, G, blocks * BT, splits, LANES, CAPACITY] and their lengths [B, G, blocks * BT, splits, LANES].

    The query heads of a group search the same centroids, so their queries are one list of H/G * T rows. A program takes
    BT of them and one split of the slots.

    Args:
        query, centroid: Rows [B, H, T] and [R, G, M].
        p_norm: [R, G, tiles of BN slots], the largest norm of a tile's centroids, for HOW = COARSE.
        K: at most CAPACITY and NG; CAPACITY at least BN / LANES.
    """
    rows = H // G * T
    blocks = tl.cdiv(rows, BT)
    pid = tl.program_id(0).to(tl.int64)
    i_block = pid % blocks  # fastest: programs that run together read the same centroids
    i_split = (pid // blocks % splits).to(tl.int32)
    i_g = pid // blocks // splits % G
    i_b = pid // blocks // splits // G
    i_r = ring_of_row(p_ring_index, i_b, R)

    o_row = i_block * BT + tl.arange(0, BT)
    m_row = o_row < rows
    p_rows = query.ptr + i_b * query.b + (i_g * (H // G) + o_row // T) * query.h + o_row % T * query.t
    p_ring = centroid.ptr + i_r * centroid.b + i_g * centroid.h
    b_query = _load_query(p_rows, m_row, 0, D, PIECE)
    task = Task(b_query, p_rows, m_row, p_ring, tl.cast(centroid.t, tl.int64))
    if HOW == COARSE:
        b_norm = tl.zeros([BT], tl.float32)
        for d in tl.range(0, D, PIECE, num_stages=1):
            b_wide = _load_query(p_rows, m_row, d, D, PIECE).to(tl.float32)
            b_norm += tl.sum(b_wide * b_wide, axis=1)
        b_norm = tl.sqrt(b_norm) * COARSE_ERROR
        p_norm += (i_r * G + i_g) * tl.cdiv(M, BN)

    count = tl.minimum(tl.maximum(tl.load(p_count + i_r), 0), M)
    tiles = count // BN + tl.minimum(count % BN, 1)  # not cdiv: count + BN may pass 2^31
    per_split = tl.cdiv(tiles, splits)
    first = tl.minimum(i_split * per_split, tiles)
    last = tl.minimum(first + per_split, tiles)
    end = tl.where(last == tiles, count, last * BN)

    # The bar, from whole tiles, for what a tile holds beyond the last chunk must not count. A sample of them only where
    # it leaves enough to look at.
    full = tl.minimum(last, count // BN)
    step = tl.where(full - first >= 16 * SAMPLE, SAMPLE, 1)
    PART: tl.constexpr = NG if NG <= BN else BN
    TURNS: tl.constexpr = NG // PART  # tiles in turn have groups of their own
    b_best = tl.full([BT, PART // LANES, LANES], float("-inf"), tl.float32)
    b_second, b_third, b_fourth = b_best, b_best, b_best
    for tile in tl.range(first, full, step, num_stages=STAGES):
        b_most = _group_maxima(_scores(task, tile * BN, full * BN, HOW, D, BD, PIECE, BN), PART)
        if HOW == COARSE:
            b_most -= (b_norm * tl.load(p_norm + tile) + TINY)[:, None, None]
        b_most = tl.maximum(b_best, b_most)
        if TURNS == 1:
            b_best = b_most
        elif TURNS == 2:
            b_best, b_second = b_second, b_most
        else:
            tl.static_assert(TURNS == 4)
            b_best, b_second, b_third, b_fourth = b_second, b_third, b_fourth, b_most
    if TURNS == 4:
        b_best, b_second = tl.join(b_best, b_third), tl.join(b_second, b_fourth)
    if TURNS > 1:
        b_best = tl.join(b_best, b_second)
    b_bar = _bar(tl.reshape(b_best, [BT, NG]), K)

    # What reaches it.
    o_list = ((i_b * G + i_g) * blocks * BT + o_row) * splits + i_split
    o_list = o_list[:, None] * LANES + tl.arange(0, LANES)[None, :]
    p_mine = p_list + o_list * CAPACITY
    o_lane = tl.broadcast_to(tl.arange(0, LANES)[None, :] * 2, [BT, LANES])
    b_bars = tl.broadcast_to(tl.where(m_row, b_bar, float("inf"))[:, None], [BT, LANES])
    b_low = b_bars
    length = tl.zeros([BT, LANES], tl.int32)
    for tile in tl.range(first, last, num_stages=STAGES):
        b_score = _scores(task, tile * BN, end, HOW, D, BD, PIECE, BN)
        if HOW == COARSE:
            b_low = _lowered(b_bars, b_norm, tl.load(p_norm + tile), m_row)
        length = _append_tile(length, b_low, p_mine, tile * BN + o_lane, end, b_score, CAPACITY)

    SHORT: tl.constexpr = 16 if HOW == COARSE else PIECE  # FINE takes three times the registers
    # A list that is full; or fewer found than there are, so that NaN is among the best.
    lacking = tl.sum(length, axis=1) < tl.minimum(end - first * BN, K)
    undecided = m_row & ((tl.max(length, axis=1) > CAPACITY) | lacking)
    if tl.max(undecided.to(tl.int32), axis=0) > 0:
        tl.debug_barrier()  # what follows writes to the same lists, perhaps from other threads
        length = _exact(
            task, first * BN, end, b_bar, p_mine, K,
            FINE if HOW == COARSE else HOW, D, BD, SHORT, 32, CAPACITY,
        )  # fmt: skip
    tl.store(p_length + o_list, length)


@triton.jit
def _lowered(b_bars, b_norm, norm, m_row):
    """The bar less a tile's error band; no bar where that is not a number."""
    band = b_norm * norm + TINY
    low = tl.where((band < float("inf"))[:, None], b_bars - band[:, None], float("-inf"))
    return tl.where(m_row[:, None], low, float("inf"))


@triton.jit
def chunk_topk_norm_kernel(centroid, p_count, p_norm, G, M, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """The largest norm of each tile of BN centroids, rounded upwards: [R, G, tiles]."""
    tiles = tl.cdiv(M, BN)
    pid = tl.program_id(0).to(tl.int64)
    tile, i_g, i_r = pid % tiles, pid // tiles % G, pid // tiles // G
    o_n = tile * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    mask = (o_n < tl.load(p_count + i_r))[:, None] & (o_d < D)[None, :]
    p_rows = centroid.ptr + i_r * centroid.b + i_g * centroid.h + o_n * centroid.t
    x = tl.load(p_rows[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    square = tl.sum(x * x, axis=1)
    tl.store(p_norm + pid, tl.sqrt(tl.max(square, axis=0)) * (1 + 2.0**-10))
