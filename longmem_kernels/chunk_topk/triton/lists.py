"""Lists of entries that threads append to without asking each other.

Tensor cores leave a row of scores with four threads, its lanes, each with every fourth pair of columns:

    column   0 1 | 2 3 | 4 5 | 6 7 | 8 9 | ...
    lane      0     1     2     3     0    ...

Each lane has a list, a counter and a copy of the bar of its own, so that neither scores nor entries nor counts ever
move between threads, and appends need no atomics. A lane meets slots in ascending order. Elsewhere (the interpreter,
tiles whose warps share rows) the same lanes are a way to count, no more.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

import triton
import triton.language as tl

from longmem_kernels._triton import INTERPRETED

from .keys import entry_of

LANES = tl.constexpr(4)


@triton.jit
def lanes(x):
    """[BT, BN] -> [BT, BN / 8, LANES, 2]; what a lane has, it has in the order of slots."""
    return tl.reshape(x, [x.shape[0], x.shape[1] // 8, LANES, 2])


@triton.jit
def sum_in_lanes(x):
    return tl.sum(tl.sum(lanes(x.to(tl.int32)), axis=3), axis=1)


@triton.jit
def octet(s):
    """[BT, LANES, 2, 2, 2] -> eight tensors [BT, LANES] in the order of their slots."""
    x, y = tl.split(s)
    x0, x1 = tl.split(x)
    y0, y1 = tl.split(y)
    s0, s4 = tl.split(x0)
    s2, s6 = tl.split(x1)
    s1, s5 = tl.split(y0)
    s3, s7 = tl.split(y1)
    return s0, s1, s2, s3, s4, s5, s6, s7


# In the code below: $0 counter; $1 counter, $2 bar, $3 list, $4 slot of the first score, $5 end of the slots, $6 room
# in the list, $7 to $14 scores. Most octets take the first jump; the others mostly have room, and a half without a hit.
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
    s0, s1, s2, s3, s4, s5, s6, s7 = octet(s)
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
def octets(b_score):
    """[BT, BN] -> [BT, LANES, 2, 2, 2, BN / 32]: lane, then which 16, 8 and 1 columns further, then which 32."""
    s = tl.reshape(b_score, [b_score.shape[0], b_score.shape[1] // 32, 2, 2, LANES, 2])
    return tl.permute(s, (0, 4, 2, 3, 5, 1))


@triton.jit
def append_tile(length, b_bar, p_list, slot, end, b_score, CAPACITY: tl.constexpr):
    """`_append` of a whole tile [BT, BN]; `slot` [BT, LANES] is that of each lane's first column."""
    BN: tl.constexpr = b_score.shape[1]
    s = octets(b_score)
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
def take(length, ties_left, nans_left, b_low, p_list, slot, end, s):
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
