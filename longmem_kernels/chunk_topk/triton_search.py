"""The search kernel of chunk_topk: the K best groups of slots for every query. See triton.py for the whole.

Tensor cores leave a thread columns 8i + 2j and 8i + 2j + 1 of a row of scores, j = 0..3 being its lane. Centroids are
loaded in the order that makes these columns whole groups, and every lane of a row has its own list, a column of the
list tensor, so that neither maxima nor entries ever move between threads.
"""
# mypy: disallow-untyped-defs=False
# (Kernel arguments are pointers and numbers that only the Triton compiler types.)

from __future__ import annotations

import triton
import triton.language as tl

from longmem_kernels._triton import dot, ring_of_row

# Scores as int32 in their order.
KEY_MISSING = tl.constexpr(-(2**31))
KEY_NAN = tl.constexpr(-(2**31) + 1)
KEY_LOWEST = tl.constexpr(-(2**31) + 0x7FFFFF)  # of -inf
LAST = tl.constexpr(2**31 - 1)
NO_ENTRY = tl.constexpr(-1)

CHUNK = tl.constexpr(32)  # entries of a list that are looked at together
SOME = tl.constexpr(8)  # and that are moved together
# Compaction may leave this many groups more than K: a search for any number in a range ends sooner than for one.
SLACK = tl.constexpr(8)


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


# An entry is a score above the number of a group.


@triton.jit
def _entry(score_bits, number):
    return (score_bits.to(tl.int64) << 32) | number.to(tl.uint32).to(tl.int64)


@triton.jit
def score_of_entry(entry):
    """NaN for NO_ENTRY."""
    return (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _reaches(entry, key, last):
    """A higher key than `key`, or the same in a group up to `last`."""
    number = entry.to(tl.int32)
    its_key = key_of_score(score_of_entry(entry))
    return (number >= 0) & ((its_key > key) | ((its_key == key) & (number <= last)))


@triton.jit
def _columns(N: tl.constexpr):
    """0..N-1, for a tensor of columns. To claim that no two are neighbours keeps loads from giving a thread two."""
    return tl.max_contiguous(tl.arange(0, N), 1)


@triton.jit
def _sum_of_row(x, LANES: tl.constexpr):
    """Column tensor [rows * LANES] -> the same, every lane holding the sum of its row."""
    total = tl.sum(tl.reshape(x, [x.shape[0] // LANES, LANES]), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], [x.shape[0] // LANES, LANES]), x.shape)


@triton.jit
def _max_of_row(x, LANES: tl.constexpr):
    most = tl.max(tl.reshape(x, [x.shape[0] // LANES, LANES]), axis=1)
    return tl.reshape(tl.broadcast_to(most[:, None], [x.shape[0] // LANES, LANES]), x.shape)


@triton.jit
def _load_entries(p_list, first, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """Entries `first` to `first + ENTRIES` of every list [ENTRIES, COLUMNS]."""
    return tl.load(p_list + (first + tl.arange(0, ENTRIES))[:, None] * COLUMNS + _columns(COLUMNS)[None, :])


@triton.jit
def _clear(p_list, length, COLUMNS: tl.constexpr, CAPACITY: tl.constexpr):
    """NO_ENTRY in every list from `length` on."""
    for i in tl.static_range(CAPACITY):
        tl.store(p_list + i * COLUMNS + _columns(COLUMNS), tl.full([COLUMNS], NO_ENTRY, tl.int64), mask=i >= length)


@triton.jit
def _compact(p_list, K, most, COLUMNS: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr):
    """Drop entries until each row has K to `most` left, its best, or all it has, and set the bar.

    Length and bar come and go through memory, behind the entries: returned, they would drag the layouts of this
    function into the loop that calls it.
    """
    o_column = _columns(COLUMNS)
    p_state = p_list + CAPACITY * COLUMNS + o_column
    tl.debug_barrier()  # all that was appended is there
    length = tl.load(p_state).to(tl.int32)
    least = tl.full([COLUMNS], float("inf"), tl.float32)
    largest = tl.full([COLUMNS], float("-inf"), tl.float32)
    numbers = tl.zeros([COLUMNS], tl.int32)
    for first in tl.static_range(0, CAPACITY, CHUNK):
        score = score_of_entry(_load_entries(p_list, first, CHUNK, COLUMNS))
        least = tl.minimum(least, tl.min(score, axis=0))
        largest = tl.maximum(largest, tl.max(score, axis=0))
        numbers += tl.sum((score == score).to(tl.int32), axis=0)
    numbers = _sum_of_row(numbers, LANES)
    m_numbers = numbers >= K  # else NaN stays, too
    found = tl.where(m_numbers, numbers, _sum_of_row(length, LANES))
    low = tl.where(m_numbers, key_of_score(-_max_of_row(-least, LANES)), KEY_NAN)
    high = key_of_score(_max_of_row(largest, LANES))

    # Bisect for a key that K to `most` entries reach. At least K reach `low`, or all do; fewer reach `high + 1`.
    m_search = m_numbers & (found > most) & (low < high)
    while tl.max(m_search.to(tl.int32), axis=0) > 0:
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        reach = tl.zeros([COLUMNS], tl.int32)
        for first in tl.static_range(0, CAPACITY, CHUNK):
            score = score_of_entry(_load_entries(p_list, first, CHUNK, COLUMNS))
            reach += tl.sum((score >= score_of_key(middle)[None, :]).to(tl.int32), axis=0)
        reach = _sum_of_row(reach, LANES)
        m_enough = m_search & (reach >= K)
        high = tl.where(m_search & (reach < K), middle - 1, high)
        low = tl.where(m_enough, middle, low)
        found = tl.where(m_enough, reach, found)
        m_search = m_search & (found > most) & (low < high)

    # What is still too many has the key `low`: bisect for the last group of it that stays.
    last = tl.full([COLUMNS], LAST // 2, tl.int32)
    before = tl.full([COLUMNS], -1, tl.int32)  # fewer than K stay up to this one
    while tl.max(found, axis=0) > most:
        middle = (before + last) >> 1
        reach = tl.zeros([COLUMNS], tl.int32)
        for first in tl.static_range(0, CAPACITY, CHUNK):
            entry = _load_entries(p_list, first, CHUNK, COLUMNS)
            reach += tl.sum(_reaches(entry, low[None, :], middle[None, :]).to(tl.int32), axis=0)
        reach = _sum_of_row(reach, LANES)
        m_search = found > most
        before = tl.where(m_search & (reach < K), middle, before)
        last = tl.where(m_search & (reach >= K), middle, last)
        found = tl.where(m_search & (reach >= K), reach, found)

    # Close the gaps, in place: an entry moves to where entries have been read already.
    o_some = tl.arange(0, SOME)
    left = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, CAPACITY, SOME):
        some = _load_entries(p_list, first, SOME, COLUMNS)
        for i in tl.static_range(SOME):
            entry = tl.sum(tl.where(o_some[:, None] == i, some, 0), axis=0)
            m_stay = _reaches(entry, low, last)
            tl.store(p_list + left * COLUMNS + o_column, entry, mask=m_stay)
            left += m_stay.to(tl.int32)
    _clear(p_list, left, COLUMNS, CAPACITY)
    bar = score_of_key(tl.maximum(low + 1, KEY_LOWEST))
    tl.store(p_state, _entry(bar.to(tl.int32, bitcast=True), left))
    tl.debug_barrier()


@triton.jit
def slots_in_use(p_count, i_r, M):
    """Of a ring of M slots."""
    return tl.minimum(tl.maximum(tl.load(p_count + i_r), 0), M)


@triton.jit
def _search(
    task, p_query, p_centroid, p_count, p_ring_index, p_list, p_group,
    s_query_b, s_query_h, s_query_t, s_centroid_r, s_centroid_g, s_centroid_m,
    H, G, T, R, M, K, splits,
    D: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """One block of queries, one split of the slots; see chunk_topk_search_kernel."""
    COLUMNS: tl.constexpr = BT * LANES
    IN_TILE: tl.constexpr = BM // GROUP // LANES  # groups of one tile in a column
    rows = H // G * T
    blocks = tl.cdiv(rows, BT)
    i_block = task % blocks  # fastest: programs that run together read the same centroids
    i_split = (task // blocks % splits).to(tl.int32)
    i_g = task // blocks // splits % G
    i_b = task // blocks // splits // G
    i_r, M = ring_of_row(p_ring_index, i_b, R, M)

    # A warp has 16 rows of a tile, a thread rows t and t + 8 of them. In this order a thread has queries q and
    # q + BT / 2 of the block, and four threads and their lists follow each other in memory.
    o_t = tl.arange(0, BT)
    o_row = i_block * BT + (o_t // 8 % 2) * (BT // 2) + o_t // 16 * 8 + o_t % 8
    o_d = tl.arange(0, BD)
    m_row = o_row < rows
    m_d = o_d < D
    o_h = i_g * (H // G) + o_row // T
    p_rows = p_query + i_b * s_query_b + o_h * s_query_h + o_row % T * s_query_t
    b_query = tl.load(p_rows[:, None] + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)  # [BT, BD]

    # Tile column ((part * IN_TILE + i) * LANES + lane) * 2 + e holds member part * 2 + e of group i * LANES + lane.
    o_c = tl.arange(0, BM)
    o_group = o_c // (2 * LANES) % IN_TILE * LANES + o_c // 2 % LANES
    o_slot = o_group * GROUP + o_c // (2 * LANES * IN_TILE) * 2 + o_c % 2
    o_i = tl.arange(0, IN_TILE)
    o_first = o_i[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]

    count = slots_in_use(p_count, i_r, M)
    tiles = count // BM + tl.minimum(count % BM, 1)  # not cdiv: count + BM may pass 2^31
    per_split = tl.cdiv(tiles, splits)
    first_tile = tl.minimum(i_split * per_split, tiles)
    end_tile = tl.minimum(first_tile + per_split, tiles)
    s_tile = tl.cast(s_centroid_m, tl.int64) * BM

    o_column = _columns(COLUMNS)
    length = tl.zeros([COLUMNS], tl.int32)
    bar = tl.zeros([COLUMNS], tl.float32)
    p_state = p_list + CAPACITY * COLUMNS + o_column  # bar above length, while `_compact` works
    tl.debug_barrier()  # nobody reads the lists of the task before
    _clear(p_list, length, COLUMNS, CAPACITY)
    tl.debug_barrier()
    everything = True  # is appended until there is a bar
    # Past the end the last slot is scored again, which changes no maximum of its group.
    p_tile = p_centroid + i_r * s_centroid_r + i_g * s_centroid_g + first_tile * s_tile + o_d[:, None]
    p_tile = p_tile + tl.minimum(o_slot, count - first_tile * BM - 1).to(tl.int64)[None, :] * s_centroid_m
    b_next = tl.load(p_tile, mask=tl.where(first_tile < end_tile, m_d, False)[:, None], other=0.0)
    for tile in range(first_tile, end_tile):
        b_centroid = b_next  # [BD, BM]
        # The next tile is on its way while this one is worked on: Triton does not pipeline loops with barriers.
        left = count - tile * BM  # not tile * BM + slot < count: it may pass 2^31
        p_tile += s_tile
        if left < 2 * BM:
            p_tile -= tl.maximum(o_slot - (left - BM - 1), 0).to(tl.int64)[None, :] * s_centroid_m
        b_next = tl.load(p_tile, mask=tl.where(tile + 1 < end_tile, m_d, False)[:, None], other=0.0)

        b_score = tl.reshape(dot(b_query, b_centroid), [BT, GROUP // 2, IN_TILE, LANES, 2])
        b_best = tl.max(tl.max(b_score, axis=4), axis=1)  # [BT, IN_TILE, LANES]; a number if there is one
        if left < BM:  # groups that hold no slot: NaN is appended only with everything, and comes after what exists
            b_best = tl.where(o_first * GROUP < left, b_best, float("nan"))
        b_best = tl.reshape(b_best, [BT // 16, 2, 8, IN_TILE, LANES]).trans(1, 0, 2, 4, 3)
        b_bits = tl.reshape(b_best, [COLUMNS, IN_TILE]).to(tl.int32, bitcast=True)

        o_number = tile * (BM // GROUP) + o_column % LANES
        for i in tl.static_range(IN_TILE):
            bits = tl.sum(tl.where(o_i[None, :] == i, b_bits, 0), axis=1)  # column i: no work, it lies in registers
            m_append = (bits.to(tl.float32, bitcast=True) >= bar) | everything
            p_entry = p_list + length.to(tl.uint32) * COLUMNS + o_column
            tl.store(p_entry, _entry(bits, o_number + i * LANES), mask=m_append)
            length += m_append.to(tl.int32)

        is_last = tile + 1 == end_tile
        if (tl.max(length, axis=0) > CAPACITY - IN_TILE) | is_last:
            most = tl.where(is_last, K, K + SLACK)
            tl.store(p_state, length.to(tl.int64))
            _compact(p_list, K, most, COLUMNS, LANES, CAPACITY)
            state = tl.load(p_state)
            length = state.to(tl.int32)
            bar = score_of_entry(state)
            everything = False

    # The lists of a row one after the other.
    in_lanes = tl.reshape(length, [BT, LANES])
    o_place = tl.reshape(tl.cumsum(in_lanes, axis=1) - in_lanes, [COLUMNS])
    found = _sum_of_row(length, LANES)
    o_query = i_block * BT + o_column // LANES
    m_query = o_query < rows
    p_best = p_group + (((i_b * G + i_g) * rows + o_query) * splits + i_split) * BK
    for i in range(K):
        entry = tl.load(p_list + i * COLUMNS + o_column, mask=i < length, other=NO_ENTRY)
        tl.store(p_best + o_place + i, entry, mask=m_query & (i < length))
    for i in range(BK):
        tl.store(p_best + i, tl.full([COLUMNS], NO_ENTRY, tl.int64), mask=m_query & (i >= found))


@triton.jit
def chunk_topk_search_kernel(
    p_query, p_centroid, p_count, p_ring_index, p_list, p_group,
    s_query_b, s_query_h, s_query_t, s_centroid_r, s_centroid_g, s_centroid_m,
    H, G, T, R, M, K, splits, tasks,
    D: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The K best groups of each split, in no order: entries [B, H, T, splits, BK], NO_ENTRY where there are fewer.

    The query heads of a group search the same centroids, so their queries are one list of H/G * T rows. Programs take
    more than one task, so that their lists, p_list [programs, CAPACITY + 1, BT * LANES], stay few and in the cache.
    """
    pid = tl.program_id(0).to(tl.int64)
    p_list += pid * ((CAPACITY + 1) * BT * LANES)
    for task in range(pid, tasks, tl.num_programs(0)):
        _search(
            task, p_query, p_centroid, p_count, p_ring_index, p_list, p_group,
            s_query_b, s_query_h, s_query_t, s_centroid_r, s_centroid_g, s_centroid_m,
            H, G, T, R, M, K, splits, D, BT, BM, BD, BK, GROUP, LANES, CAPACITY,
        )  # fmt: skip
