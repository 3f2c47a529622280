"""Every Triton kernel compiles to sm_80 and sm_90 machine code within its budget, on a machine without a GPU."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from triton_budget import (
    SHARED_BYTES,
    Launch,
    compile_for,
    disassembled,
    innermost_loops,
    launches,
    shortest_turns,
)

import longmem_kernels
from longmem_kernels import _tiles
from longmem_kernels._dispatch import _interpreted

pytestmark = pytest.mark.skipif(_interpreted, reason="TRITON_INTERPRET=1: interpreted kernels cannot be compiled")

CASES = {
    "base": {"slopes": True},
    "grouped": {"G": 1, "D": 96},
    "head_dim_128": {"D": 128},
    "head_dim_256": {"D": 256},
    "float32": {"dtype": torch.float32},
    "float32_head_dim_256": {"dtype": torch.float32, "D": 256},
    "float32_bank": {"bank_dtype": torch.float32, "D": 80, "C": 3},
    "float8_bank": {"bank_dtype": torch.float8_e4m3fn, "D": 128},
    "decode": {"T": 1, "R": 1, "B": 1, "G": 1, "causal": False},
    "decode_several": {"T": 16, "G": 1, "D": 128, "bank_dtype": torch.float8_e4m3fn, "window": 99, "dropout_p": 0.1},
    "decode_float32_head_dim_256": {"T": 4, "dtype": torch.float32, "D": 256, "key_mask": True, "slopes": True},
    "joint_window": {"fusion": "joint", "window": 128, "slopes": True, "K": 64, "C": 64, "G": 1},
    "dropout": {"dropout_p": 0.1, "slopes": True, "key_mask": True, "G": 1},
    "dropout_head_dim_128": {"dropout_p": 0.7, "fusion": "joint", "D": 128},
    "key_mask": {"key_mask": True, "causal": False, "slopes": True},
}


def on_capability(capability: int) -> AbstractContextManager[object]:
    """Launches of the block are those for a GPU sm_`capability`."""
    return mock.patch.object(_tiles, "capability", lambda _: divmod(capability, 10))


def op_launches(
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
    bank_dtype: torch.dtype | None = None,
    B: int = 2,
    T: int = 64,
    S: int = 256,
    R: int = 2,
    G: int = 2,
    D: int = 64,
    K: int = 16,
    C: int = 4,
    fusion: str = "gated",
    causal: bool = True,
    window: int | None = None,
    slopes: bool = False,
    key_mask: bool = False,
    dropout_p: float = 0.0,
) -> list[Launch]:
    """What chunk_topk and memory_attention, forward and backward, launch at these sizes on sm_`capability`."""
    H, M = 4, 1024
    bank_dtype = bank_dtype or dtype

    def local(heads: int, tokens: int) -> torch.Tensor:
        return torch.zeros(B, heads, tokens, D, dtype=dtype)

    bank = torch.zeros(R, G, M, 2, C, D, dtype=bank_dtype).select(3, 0)  # laid out as in a Ring
    scale = torch.ones(R, G, M, 2) if bank_dtype == torch.float8_e4m3fn else None
    centroid = torch.zeros(R, G, M, D, dtype=dtype if scale is not None else bank_dtype)
    ids = torch.zeros(B, H, T, K, dtype=torch.int32)
    gate = torch.zeros(H) if fusion == "gated" else None
    vectors = (gate, torch.zeros(H) if slopes else None, torch.ones(B, S, dtype=torch.bool) if key_mask else None)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    inputs = (local(H, T), local(G, S), local(G, S), local(H, T), bank, bank, ids, scale, None, *vectors, seed)
    options = (fusion, D**-0.5, causal, window, dropout_p)
    ops = torch.ops.longmem
    with launches() as found, on_capability(capability):
        ops.chunk_topk_triton(local(H, T), centroid, torch.zeros(R, dtype=torch.int32), None, K)
        _, *saved = ops.memory_attention_triton(*inputs, *options)
        ops.memory_attention_backward_triton(local(H, T), saved[1], saved[3], *inputs, *options, *saved)
    return found


@pytest.mark.parametrize("capability", sorted(SHARED_BYTES))
@pytest.mark.parametrize("case", CASES)
def test_compiles_within_budget(case: str, capability: int, record_property: pytest.RecordProperty) -> None:
    over = []
    for launch in op_launches(capability, **CASES[case]):
        usage = compile_for(launch, capability)
        record_property(launch.name, str(usage))
        print(f"{case:22} sm_{capability} {launch.name:42} {usage}")
        if not usage.fits(capability):
            over.append(f"{launch.name}: {usage}")
    assert not over, "\n".join(over)


@pytest.mark.parametrize(
    ("tokens", "kernels"),
    [(1, {"decode", "memory_query_grad", "query_grad", "key_value_grad"}),
     (64, {"memory", "local", "memory_query_grad", "query_grad", "key_value_grad"})],
    ids=["decode", "prefill"],
)  # fmt: skip
def test_a_call_like_an_earlier_one_plans_nothing(
    tokens: int, kernels: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one with more local keys, as each decoding step has; and it is launched as the earlier one was."""
    looked_up: list[str] = []
    choose = _tiles.choose
    monkeypatch.setattr(
        _tiles, "choose", lambda kernel, *a, **facts: looked_up.append(kernel) or choose(kernel, *a, **facts)
    )
    calls = []
    for keys in (256, 256, 257):
        looked_up.clear()
        found = op_launches(96 + tokens % 2, T=tokens, S=keys)  # GPUs that no other test asks for
        calls.append(({name for name in looked_up if "memory_attention" in name}, [launch.options for launch in found]))
    (first, options), *later = calls
    assert first == {f"memory_attention_{kernel}_kernel" for kernel in kernels}
    assert later == [(set(), options)] * 2


def test_no_kernel_takes_more_arguments_than_a_reader_does() -> None:
    counts = {}
    for path in Path(longmem_kernels.__file__).parent.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(one) == "triton.jit" for one in node.decorator_list
            ):
                counts[node.name] = len(node.args.args)
    assert len(counts) > 50 and {name: count for name, count in counts.items() if count > 24} == {}


def test_innermost_loops_are_found() -> None:
    jump = "        /*0010*/               @P0 BRA `(.L_x_{}) ;"
    body = ["        /*0000*/                   FADD R1, R2, R3 ;"] * 5
    code = [".L_x_0:", *body, ".L_x_1:", *body, jump.format(1), *body, jump.format(0), jump.format(9), ".L_x_9:", *body]
    assert [len(loop) for loop in innermost_loops("\n".join(code))] == [6]


def test_local_attention_multiplies_matrices_in_an_unmasked_loop() -> None:
    """On Hopper's tensor cores; the loop where causal attention spends its time has fewer instructions."""
    (launch,) = [x for x in op_launches(90) if x.name == "memory_attention_local_kernel"]
    loops = [[line for line in loop if "/*" in line] for loop in innermost_loops(disassembled(launch, 90))]
    unmasked, *others = sorted((loop for loop in loops if any("HGMMA" in line for line in loop)), key=len)
    assert len(others) == 2  # masked, and the one that results with NaN are computed in once more
    assert len(unmasked) < 0.75 * len(others[0])


def search_launch(
    capability: int, query_dtype: torch.dtype, centroid_dtype: torch.dtype, tokens: int, head_dim: int, k: int
) -> Launch:
    query = torch.zeros(1, 2, tokens, head_dim, dtype=query_dtype)
    centroid = torch.zeros(1, 2, 16384, head_dim, dtype=centroid_dtype)
    with launches() as found, on_capability(capability):
        torch.ops.longmem.chunk_topk_triton(query, centroid, torch.zeros(1, dtype=torch.int32), None, k)
    return next(launch for launch in found if launch.name == "chunk_topk_search_kernel")


def search_rows() -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row of the search's tables once, with the largest call that it is for."""
    for capability in sorted(SHARED_BYTES):
        for row in _tiles.table(capability)["chunk_topk_search_kernel"]["rows"]:
            yield capability, {"how": "direct", "rows": 4096, "D": 256, "K": 64} | row


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "row"), list(search_rows()), ids=str)
def test_every_row_of_the_search_table_compiles_within_budget(capability: int, row: dict[str, Any]) -> None:
    query = torch.bfloat16 if row["how"] == "direct" else torch.float32
    tokens = 1 if row["how"] == "fine" or row["rows"] <= 16 else 512
    launch = search_launch(capability, query, query, tokens, row["D"], row["K"])
    assert row["use"].items() <= (launch.arguments | launch.options | {"PIECE": row["use"]["PIECE"]}).items()
    usage = compile_for(launch, capability)
    print(usage)
    assert usage.fits(capability), str(usage)


@pytest.mark.parametrize("capability", sorted(SHARED_BYTES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 2048])
def test_the_decision_of_chunk_topk_compiles_within_budget(tokens: int, dtype: torch.dtype, capability: int) -> None:
    query, centroid = (torch.zeros(1, 2, n, 128, dtype=dtype) for n in (tokens, 16384))
    for k in (16, 64):
        with launches() as found, on_capability(capability):
            torch.ops.longmem.chunk_topk_triton(query, centroid, torch.zeros(1, dtype=torch.int32), None, k)
        for launch in found:
            if launch.name != "chunk_topk_search_kernel":
                usage = compile_for(launch, capability)
                assert usage.fits(capability), f"{launch.name}, K={k}: {usage}"


# Instructions that a score costs in the two loops of the search, where nothing is worth keeping.
PER_SCORE = {
    (90, 64): (2.5, 3.1),
    (90, 128): (3.0, 4.0),
    (80, 64): (3.0, 4.8),
    (80, 128): (4.5, 6.5),
}


@pytest.mark.parametrize(("capability", "head_dim"), PER_SCORE)
def test_scores_of_chunk_topk_are_cheap(capability: int, head_dim: int) -> None:
    search = search_launch(capability, torch.bfloat16, torch.bfloat16, 512, head_dim, 16)
    turns = shortest_turns(search, capability)
    scores = search.arguments["BT"] * search.arguments["BN"] / (32 * search.options["num_warps"])  # per thread
    for loop, turn, most in zip(("bar", "lists"), turns, PER_SCORE[capability, head_dim], strict=False):
        print(f"sm_{capability} D={head_dim} {loop}: {len(turn)} instructions for {scores:.0f} scores of a thread")
        assert len(turn) / scores <= most
        # Scores never leave the thread that the tensor cores gave them to: no shuffles, nothing through shared memory.
        stores = [text for text in turn if "STS" in text and "LDGSTS" not in text]
        assert not stores and not [text for text in turn if "SHFL" in text]


def test_the_search_of_chunk_topk_leaves_room_for_a_second_block() -> None:
    """While one waits for its scores, another one looks at them."""
    usage = compile_for(search_launch(90, torch.bfloat16, torch.bfloat16, 512, 64, 16), 90)
    assert usage.registers <= 128 and 2 * usage.shared_bytes <= SHARED_BYTES[90]
