"""A bad call gets the documented error, and its message names the op, the argument, what was wanted and what came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from factories import new_ring, random_ring
from torch import Tensor, ones, randn, zeros

from longmem_kernels import Ring, chunk_topk, memory_attention, ring_write

B, H, G, T, S, D, R, M, C, K = 2, 4, 2, 3, 5, 8, 2, 6, 4, 3
Arguments = dict[str, Any]
Change = Callable[[Arguments], Any]


def rows(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def last_axis_strided(*shape: int) -> Tensor:
    return randn(*shape, 2)[..., 0]


def bad(name: str, error: type[Exception], pieces: list[str], **changes: Any) -> Any:
    """One row of a table: these changes to a good call must raise `error` with all `pieces` in its message."""
    return pytest.param(changes, error, pieces, id=name)


def assert_refused(op: str, call: Callable[[], object], error: type[Exception], pieces: list[str]) -> None:
    with pytest.raises(Exception) as caught:
        call()
    assert type(caught.value) is error, f"{caught.type.__name__} instead of {error.__name__}: {caught.value}"
    missing = [piece for piece in [f"{op}: ", *pieces] if piece not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


# --- Ring.new --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "pieces"),
    [
        *(
            bad(f"{name} {size}", ValueError, [name, "at least 1", f"got {size}"], **{name: size})
            for name in ("rings", "kv_heads", "chunks", "chunk_size", "head_dim")
            for size in (0, -3)
        ),
        bad("chunk_size 65", ValueError, ["chunk_size", "at most 64", "got 65"], chunk_size=65),
        bad("2^31 chunks", ValueError, ["chunks", "at most 2147483647", "got 2147483648"], chunks=2**31, device="meta"),
        bad("integer dtype", TypeError, ["dtype", "float32", "got torch.int8"], dtype=torch.int8),
    ],
)
def test_ring_new_refuses(changes: Arguments, error: type[Exception], pieces: list[str]) -> None:
    assert_refused("Ring.new", lambda: new_ring(**changes), error, pieces)


# --- ring_write ------------------------------------------------------------------------------------------------------

RING_WRITE_CALLS = [
    bad("not a ring", TypeError, ["ring must be a", "Ring", "got Tensor"], ring=zeros(3)),
    bad("not a tensor", TypeError, ["key must be a tensor", "got list"], key=[1.0]),
    bad("rank", ValueError, ["key must have 4 axes", "(3, 8)"], key=randn(T, D)),
    bad("kv heads", ValueError, ["key", "G = 2", "ring.store", "(2, 3, 3, 8)"], key=randn(B, 3, T, D)),
    bad("head dim", ValueError, ["key", "D = 8", "(2, 2, 3, 7)"], key=randn(B, G, T, 7)),
    bad("value tokens", ValueError, ["value", "T = 3", "(2, 2, 4, 8)"], value=randn(B, G, 4, D)),
    bad("integer key", TypeError, ["key must be one of float32", "got int64"], key=ones(B, G, T, D).long()),
    bad("value dtype", TypeError, ["value", "torch.float32", "torch.float16"], value=randn(B, G, T, D).half()),
    bad("key device", ValueError, ["key must be on cpu", "got meta"], key=randn(B, G, T, D, device="meta")),
    bad("mask device", ValueError, ["mask must be on cpu", "meta"], mask=ones(B, T, device="meta").bool()),
    bad(
        "last axis",
        ValueError,
        ["last axis of value", "contiguous", "(96, 48, 16, 2)"],
        value=last_axis_strided(B, G, T, D),
    ),
    bad("mask shape", ValueError, ["mask", "T = 3", "(2, 4)"], mask=ones(B, T + 1).bool()),
    bad("mask dtype", TypeError, ["mask must be one of bool", "got float32"], mask=ones(B, T)),
    bad("ring_index rows", ValueError, ["ring_index", "B = 2", "(3,)"], ring_index=rows(0, 1, 0)),
    bad("ring_index dtype", TypeError, ["ring_index", "int32", "int64"], ring_index=rows(0, 1, dtype=torch.int64)),
    bad("ring_index too large", ValueError, ["ring_index", "[0, 2)", "from 0 to 2"], ring_index=rows(0, 2)),
    bad("ring_index negative", ValueError, ["ring_index", "[0, 2)", "from -1 to 0"], ring_index=rows(-1, 0)),
    bad(
        "ring_index missing",
        ValueError,
        ["ring_index is needed", "R=2", "B=3"],
        key=randn(3, G, T, D),
        value=randn(3, G, T, D),
    ),
    bad("unknown impl", ValueError, ["impl must be one of auto, cuda, cpp, reference", "'numpy'"], impl="numpy"),
    bad("impl of another op", ValueError, ["impl must be one of", "'triton'"], impl="triton"),
    bad(
        "impl of another device",
        RuntimeError,
        ["impl='cuda' cannot run", "the cuda kernel runs on cuda tensors, not on cpu"],
        impl="cuda",
    ),
    bad(
        "float64 in a kernel",
        RuntimeError,
        ["impl='cpp' cannot run", "float64 is supported by the reference alone"],
        key=randn(B, G, T, D).double(),
        value=randn(B, G, T, D).double(),
        impl="cpp",
    ),
]


@pytest.mark.parametrize(("changes", "error", "pieces"), RING_WRITE_CALLS)
def test_ring_write_refuses_and_leaves_the_ring_as_it_was(
    changes: Arguments, error: type[Exception], pieces: list[str]
) -> None:
    ring = random_ring(7, rings=R, kv_heads=G, chunks=M, chunk_size=C, head_dim=D)
    parts = (ring.store, ring.centroid, ring.tail, ring.cursor)
    before = [part.clone() for part in parts]
    call = {"ring": ring, "key": randn(B, G, T, D), "value": randn(B, G, T, D), **changes}
    assert_refused("ring_write", lambda: ring_write(**call), error, pieces)
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part.nan_to_num(nan=7e7), old.nan_to_num(nan=7e7))


@pytest.mark.parametrize(
    ("change", "error", "pieces"),
    [
        (
            lambda r: {"store": r.store.transpose(2, 3).contiguous().transpose(2, 3)},
            ValueError,
            ["ring.store", "contiguous"],
        ),
        (lambda r: {"store": r.store[:, :, :, :1].contiguous()}, ValueError, ["ring.store", "(2, 2, 5, 1, 4, 8)", "2"]),
        (lambda r: {"centroid": r.centroid.half()}, TypeError, ["ring.centroid", "float32", "float16"]),
        (lambda r: {"centroid": r.centroid[:, :, 1:]}, ValueError, ["ring.centroid", "M = 5", "(2, 2, 4, 8)"]),
        (
            lambda r: {"store": zeros(2, 2, 5, 2, 65, 8), "tail": zeros(2, 2, 2, 65, 8)},
            ValueError,
            ["at most 64", "65"],
        ),
        (lambda r: {"tail": r.tail.double()}, TypeError, ["ring.tail", "float32", "float64"]),
        (lambda r: {"tail": r.tail[:1]}, ValueError, ["ring.tail", "R = 2", "(1, 2, 2, 4, 8)"]),
        (lambda r: {"cursor": r.cursor.int()}, TypeError, ["ring.cursor", "int64", "int32"]),
        (lambda r: {"cursor": r.cursor[:1]}, ValueError, ["ring.cursor", "R = 2", "(1,)"]),
        (lambda r: {"cursor": r.cursor.to("meta")}, ValueError, ["ring.cursor", "cpu", "meta"]),
        *(
            (
                lambda r, n=n: {"cursor": r.cursor + n},
                ValueError,
                ["ring.cursor must lie in [0, 2814", f"from {n} to {n}"],
            )
            for n in (-1, -50, -(10**11), 2**48 - 2, 2**48, 2**63 - 1, -(2**63))
        ),
        (lambda r: {"scale": zeros(2, 2, 5, 2)}, ValueError, ["ring.scale must be None", "float32", "a tensor"]),
        (
            lambda r: {"store": r.store.to(torch.float8_e4m3fn)},
            ValueError,
            ["ring.scale must be a tensor [R, G, M, 2]", "float8_e4m3fn", "None"],
        ),
        (
            lambda r: {"store": r.store.to(torch.float8_e4m3fn), "scale": zeros(2, 2, 5, 2)},
            TypeError,
            ["ring.centroid", "bfloat16", "float32"],
        ),
        (
            lambda r: {"store": r.store.to(torch.float8_e4m3fn), "scale": zeros(2, 2, 5, 1)},
            ValueError,
            ["ring.scale", "(2, 2, 5, 1)"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_ring_write_refuses_a_ring_whose_parts_do_not_fit(
    change: Callable[[Ring], Arguments], error: type[Exception], pieces: list[str]
) -> None:
    ring = new_ring()
    broken = replace(ring, **change(ring))
    key = randn(2, 2, 3, 8)
    assert_refused("ring_write", lambda: ring_write(broken, key, key), error, pieces)


# --- chunk_topk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "pieces"),
    [
        bad("not a tensor", TypeError, ["centroid must be a tensor", "got NoneType"], centroid=None),
        bad("query rank", ValueError, ["query must have 4 axes", "(4, 3, 8)"], query=randn(H, T, D)),
        bad("centroid rank", ValueError, ["centroid must have 4 axes", "(6, 8)"], centroid=randn(M, D)),
        bad("head dim", ValueError, ["centroid", "D = 8", "query", "(2, 2, 6, 9)"], centroid=randn(R, G, M, 9)),
        bad("count size", ValueError, ["count", "R = 2", "(3,)"], count=rows(1, 1, 1)),
        bad("count dtype", TypeError, ["count", "int32", "int64"], count=rows(1, 1, dtype=torch.int64)),
        bad("count too large", ValueError, ["count", "[0, 7)", "from 1 to 7"], count=rows(1, M + 1)),
        bad("count negative", ValueError, ["count", "[0, 7)", "from -1 to 1"], count=rows(1, -1)),
        bad("no slots", ValueError, ["M must be at least 1", "0 in centroid"], centroid=randn(R, G, 0, D)),
        bad("head groups", ValueError, ["H must be a multiple", "H=5, G=2"], query=randn(B, 5, T, D)),
        *(
            bad(f"k = {k!r}", error, ["k must be an integer of at least 1 and at most 64", f"got {k!r}"], k=k)
            for k, error in ((0, ValueError), (65, ValueError), (-1, ValueError), (1.5, TypeError), (None, TypeError))
        ),
        bad("query dtype", TypeError, ["query must be one of float32", "got int32"], query=ones(B, H, T, D).int()),
        bad("centroid dtype", TypeError, ["centroid must be one of", "int8"], centroid=ones(R, G, M, D).to(torch.int8)),
        bad(
            "centroid device",
            ValueError,
            ["centroid must be on cpu", "meta"],
            centroid=randn(R, G, M, D, device="meta"),
        ),
        bad("count device", ValueError, ["count must be on cpu", "meta"], count=rows(1, 1).to("meta")),
        bad("query last axis", ValueError, ["last axis of query", "contiguous"], query=last_axis_strided(B, H, T, D)),
        bad(
            "centroid last axis",
            ValueError,
            ["last axis of centroid", "contiguous"],
            centroid=last_axis_strided(R, G, M, D),
        ),
        bad("ring_index rows", ValueError, ["ring_index", "B = 2", "(1,)"], ring_index=rows(0)),
        bad("ring_index dtype", TypeError, ["ring_index", "int32", "int64"], ring_index=rows(0, 0, dtype=torch.int64)),
        bad("ring_index too large", ValueError, ["ring_index", "[0, 2)", "from 0 to 9"], ring_index=rows(9, 0)),
        bad("ring_index negative", ValueError, ["ring_index", "[0, 2)", "from -1 to 1"], ring_index=rows(-1, 1)),
        bad("ring_index missing", ValueError, ["ring_index is needed", "R=2", "B=3"], query=randn(3, H, T, D)),
        bad("unknown impl", ValueError, ["impl must be one of auto, triton, cpp, reference", "'faiss'"], impl="faiss"),
        bad(
            "float64 in a kernel",
            RuntimeError,
            ["impl='cpp' cannot run", "float64"],
            query=randn(B, H, T, D).double(),
            impl="cpp",
        ),
    ],
)
def test_chunk_topk_refuses(changes: Arguments, error: type[Exception], pieces: list[str]) -> None:
    call = {"query": randn(B, H, T, D), "centroid": randn(R, G, M, D), "k": K, "count": rows(M, M), **changes}
    assert_refused("chunk_topk", lambda: chunk_topk(**call), error, pieces)


# --- memory_attention ------------------------------------------------------------------------------------------------


def ids_with(value: int) -> Tensor:
    ids = zeros(B, H, T, K, dtype=torch.int32)
    ids[1, 2, 1, 0] = value
    return ids


FLOAT8 = torch.float8_e4m3fn


def float8() -> Tensor:
    return zeros(R, G, M, C, D).to(FLOAT8)


def quantised(scale: object) -> Arguments:
    return {"memory_key": float8(), "memory_value": float8(), "memory_scale": scale}


@pytest.mark.parametrize(
    ("changes", "error", "pieces"),
    [
        bad("not a tensor", TypeError, ["chunk_ids must be a tensor", "got list"], chunk_ids=[0]),
        bad("query rank", ValueError, ["query must have 4 axes", "(2, 3, 8)"], query=randn(B, T, D)),
        bad("bank rank", ValueError, ["memory_key must have 5 axes", "(2, 2, 6, 8)"], memory_key=randn(R, G, M, D)),
        bad("rows", ValueError, ["key", "B = 2", "(3, 2, 5, 8)"], key=randn(3, G, S, D)),
        bad("value keys", ValueError, ["value", "S = 5", "key", "(2, 2, 4, 8)"], value=randn(B, G, 4, D)),
        bad("bank heads", ValueError, ["memory_key", "G = 2", "(2, 4, 6, 4, 8)"], memory_key=randn(R, H, M, C, D)),
        bad(
            "bank value size",
            ValueError,
            ["memory_value", "C = 4", "(2, 2, 6, 3, 8)"],
            memory_value=randn(R, G, M, 3, D),
        ),
        bad("ids heads", ValueError, ["chunk_ids", "H = 4", "(2, 2, 3, 3)"], chunk_ids=zeros(B, G, T, K).int()),
        bad("memory_query size", ValueError, ["memory_query", "T = 3", "(2, 4, 5, 8)"], memory_query=randn(B, H, S, D)),
        bad("K = 0", ValueError, ["K must be at least 1", "0 in chunk_ids"], chunk_ids=zeros(B, H, T, 0).int()),
        bad(
            "head groups",
            ValueError,
            ["H must be a multiple", "H=3, G=2"],
            query=randn(B, 3, T, D),
            chunk_ids=zeros(B, 3, T, K).int(),
            gate=zeros(3),
        ),
        bad(
            "fewer keys than queries",
            ValueError,
            ["S must be 0 or at least T", "S=2", "T=3"],
            key=randn(B, G, 2, D),
            value=randn(B, G, 2, D),
        ),
        bad("id too large", ValueError, ["chunk_ids", "[-1, 6)", "from 0 to 6"], chunk_ids=ids_with(M)),
        bad("id below -1", ValueError, ["chunk_ids", "[-1, 6)", "from -2 to 0"], chunk_ids=ids_with(-2)),
        bad("ids dtype", TypeError, ["chunk_ids", "int32", "int64"], chunk_ids=ids_with(0).long()),
        bad("ids of floats", TypeError, ["chunk_ids", "int32", "float32"], chunk_ids=ids_with(0).float()),
        bad("ids of truth values", TypeError, ["chunk_ids", "int32", "bool"], chunk_ids=ids_with(0).bool()),
        bad("ring_index too large", ValueError, ["ring_index", "[0, 2)", "from 0 to 2"], ring_index=rows(2, 0)),
        bad(
            "ring_index missing",
            ValueError,
            ["ring_index is needed", "R=3", "B=2"],
            memory_key=randn(3, G, M, C, D),
            memory_value=randn(3, G, M, C, D),
        ),
        bad("integer query", TypeError, ["query must be one of float32", "int64"], query=ones(B, H, T, D).long()),
        bad("key dtype", TypeError, ["key", "torch.float32", "torch.bfloat16"], key=randn(B, G, S, D).bfloat16()),
        bad(
            "bank dtype",
            TypeError,
            ["memory_key must be one of", "int8"],
            memory_key=ones(R, G, M, C, D).to(torch.int8),
        ),
        bad(
            "bank value dtype",
            TypeError,
            ["memory_value", "torch.float32", "torch.float16"],
            memory_value=randn(R, G, M, C, D).half(),
        ),
        bad(
            "bank requires grad",
            ValueError,
            ["memory_value must not require grad", "frozen"],
            memory_value=randn(R, G, M, C, D, requires_grad=True),
        ),
        bad("key device", ValueError, ["key must be on cpu", "meta"], key=randn(B, G, S, D, device="meta")),
        bad(
            "bank device",
            ValueError,
            ["memory_key must be on cpu", "meta"],
            memory_key=randn(R, G, M, C, D, device="meta"),
        ),
        bad("gate device", ValueError, ["gate must be on cpu", "meta"], gate=zeros(H, device="meta")),
        bad("ids device", ValueError, ["chunk_ids must be on cpu", "meta"], chunk_ids=ids_with(0).to("meta")),
        bad("query last axis", ValueError, ["last axis of query", "contiguous"], query=last_axis_strided(B, H, T, D)),
        bad(
            "bank last axis",
            ValueError,
            ["last axis of memory_value", "contiguous"],
            memory_value=last_axis_strided(R, G, M, C, D),
        ),
        bad("fusion", ValueError, ["fusion must be one of gated, joint", "'sum'"], fusion="sum"),
        bad("gate missing", ValueError, ["fusion='gated' needs gate [H]", "none"], gate=None),
        bad("gate superfluous", ValueError, ["fusion='joint' takes no gate", "one"], fusion="joint"),
        bad("gate size", ValueError, ["gate", "H = 4", "(2,)"], gate=zeros(G)),
        bad("gate dtype", TypeError, ["gate", "float32", "int64"], gate=zeros(H).long()),
        bad("alibi size", ValueError, ["alibi_slopes", "H = 4", "(5,)"], alibi_slopes=ones(5)),
        bad("alibi dtype", TypeError, ["alibi_slopes", "float32", "int64"], alibi_slopes=ones(H).long()),
        bad(
            "window without causal",
            ValueError,
            ["window", "needs causal=True", "window=2, causal=False"],
            window=2,
            causal=False,
        ),
        bad("window of nothing", ValueError, ["window must be an integer of at least 1", "got 0"], window=0),
        bad("unknown impl", ValueError, ["impl must be one of auto, triton", "'flash'"], impl="flash"),
        bad("query of no kind", TypeError, ["query must be a tensor", "got NoneType"], query=None),
        bad(
            "float8 memory without scale",
            ValueError,
            ["float8_e4m3fn memory needs memory_scale [R, G, M, 2]", "got none"],
            memory_key=float8(),
            memory_value=float8(),
        ),
        bad(
            "scale without float8 memory",
            ValueError,
            ["float32 memory takes no memory_scale", "got one"],
            memory_scale=ones(R, G, M, 2),
        ),
        *(
            bad(f"memory_scale {what}", error, ["memory_scale", *pieces], **quantised(scale))
            for what, error, pieces, scale in (
                ("chunks", ValueError, ["M = 6", "(2, 2, 5, 2)"], ones(R, G, M - 1, 2)),
                ("parts", ValueError, ["[R, G, M, 2]", "(2, 2, 6, 1)"], ones(R, G, M, 1)),
                ("dtype", TypeError, ["float32", "float64"], ones(R, G, M, 2).double()),
                ("device", ValueError, ["must be on cpu", "meta"], ones(R, G, M, 2, device="meta")),
                ("kind", TypeError, ["must be a tensor", "float"], 1.0),
            )
        ),
        bad(
            "float8 value alone",
            TypeError,
            ["memory_value must have the dtype of memory_key", "float32", "float8"],
            memory_value=float8(),
        ),
        bad("float8 query", TypeError, ["query must be one of", "float8"], query=zeros(B, H, T, D).to(FLOAT8)),
        bad("key_mask shape", ValueError, ["key_mask", "S = 5", "(2, 3)"], key_mask=ones(B, T).bool()),
        bad("key_mask rank", ValueError, ["key_mask must have 2 axes", "(5,)"], key_mask=ones(S).bool()),
        bad("key_mask dtype", TypeError, ["key_mask must be one of bool", "got float32"], key_mask=ones(B, S)),
        bad(
            "key_mask device",
            ValueError,
            ["key_mask must be on cpu", "meta"],
            key_mask=ones(B, S, device="meta").bool(),
        ),
        *(
            bad(f"dropout_p = {p}", ValueError, ["dropout_p must lie in [0, 1)", f"got {p}"], dropout_p=p)
            for p in (1.0, -0.1)
        ),
        bad("dropout_p of words", TypeError, ["dropout_p must be a number", "got '0.1'"], dropout_p="0.1"),
        *(
            bad(f"dropout_seed {what}", error, ["dropout_seed", *pieces], dropout_p=0.1, dropout_seed=seed)
            for what, error, pieces, seed in (
                ("too large", ValueError, ["64 bits", str(2**63)], 2**63),
                ("too small", ValueError, ["64 bits", str(-(2**63) - 1)], -(2**63) - 1),
                ("of a fraction", TypeError, ["an integer or int64 [1]", "float"], 0.5),
                ("tensor's shape", ValueError, ["[1]", "(2,)"], torch.tensor([1, 2])),
                ("tensor's dtype", ValueError, ["int64", "int32"], torch.tensor([1], dtype=torch.int32)),
                ("tensor's device", ValueError, ["on cpu", "meta"], torch.tensor([1], device="meta")),
            )
        ),
    ],
)
def test_memory_attention_refuses(changes: Arguments, error: type[Exception], pieces: list[str]) -> None:
    call = {
        "query": randn(B, H, T, D),
        "key": randn(B, G, S, D),
        "value": randn(B, G, S, D),
        "memory_key": randn(R, G, M, C, D),
        "memory_value": randn(R, G, M, C, D),
        "chunk_ids": ids_with(-1),
        "gate": zeros(H),
        **changes,
    }
    assert_refused("memory_attention", lambda: memory_attention(**call), error, pieces)


def test_good_calls_of_the_same_sizes_are_not_refused() -> None:
    """What the tables above change is good before the change."""
    ring = new_ring(rings=R, kv_heads=G, chunks=M, chunk_size=C, head_dim=D)
    ring_write(ring, randn(B, G, T, D), randn(B, G, T, D), mask=ones(B, T).bool(), ring_index=rows(1, 1))
    chunk_topk(randn(B, H, T, D), ring.centroid, K, count=rows(M, 0), ring_index=rows(0, 1))
    local = randn(B, G, S, D)
    memory_attention(
        randn(B, H, T, D), local, local, ring.key, ring.value, ids_with(M - 1),
        gate=zeros(H), window=2, alibi_slopes=ones(H), key_mask=ones(B, S).bool(), dropout_p=0.1, dropout_seed=-1,
        return_lse=True, return_memory_share=True,
    )  # fmt: skip
    memory_attention(
        randn(B, H, T, D), local, local, float8(), float8(), ids_with(M - 1),
        fusion="joint", memory_scale=ones(R, G, M, 2), dropout_p=0.1, dropout_seed=torch.tensor([1]),
    )  # fmt: skip
