"""The tables of tiles, and tuning: which row a launch gets, and how candidates are checked, ranked and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from longmem.cli.bench import bench_app
from typer.testing import CliRunner

from longmem_bench import Provider, Shape, measure
from longmem_bench import tune as tuning
from longmem_bench.provider import Prepared
from longmem_bench.providers import providers
from longmem_bench.tune import save, table, tune, update
from longmem_kernels import _tiles
from longmem_kernels._dispatch import KERNEL_HEAD_DIMS

SHAPE = Shape(B=1, T=4, H=2, G=2, D=32, M=40, K=5)
FACTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "chunk_topk_search_kernel": {"how": ("direct", "coarse", "fine"), "rows": (1, 17, 4096), "K": (16, 32, 64)},
    "memory_attention_memory_kernel": {"bytes": (1, 2, 4), "tokens": (1, 4096)},
    "memory_attention_memory_query_grad_kernel": {"bytes": (1, 2, 4), "tokens": (1, 4096)},
    "memory_attention_local_kernel": {"dtype": ("float32", "half"), "dropout": (False, True)},
    "memory_attention_query_grad_kernel": {"dtype": ("float32", "half")},
    "memory_attention_key_value_grad_kernel": {"dtype": ("float32", "half"), "dropout": (False, True)},
    "memory_attention_decode_kernel": {"dtype": ("float32", "half"), "rows": (1, 17, 1024), "tokens": (1, 4096)},
}


@pytest.mark.parametrize("number", _tiles.ARCHITECTURES)
def test_every_launch_finds_a_row_and_every_row_a_launch(number: int) -> None:
    content = _tiles.table(number)
    assert set(content) == set(FACTS)
    for kernel, facts in FACTS.items():
        used = []
        for head_dim, *values in product(KERNEL_HEAD_DIMS, *facts.values()):
            found = {**dict(zip(facts, values, strict=True)), "D": head_dim}
            use = _tiles.choose(kernel, divmod(number, 10), **found)
            tried = _tiles.candidates(kernel, number, found)
            assert tried[0] == use and len(tried) > 4
            assert all(set(one) >= set(use) - {"maxnreg"} for one in tried), kernel
            used.append(use)
        assert all(row["use"] in used for row in content[kernel]["rows"]), kernel
    path = _tiles.FOLDER / f"sm_{number}.json"
    assert _tiles.as_text(content) == path.read_text(encoding="utf-8")


def test_a_gpu_has_the_newest_table_that_is_not_newer_than_itself() -> None:
    assert [_tiles.architecture(one) for one in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0))] == [80, 80, 80, 90, 90]


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a file that LONGMEM_TILES names."""

    def write(text: str) -> Path:
        path = tmp_path / "tiles.json"
        path.write_text(text)
        monkeypatch.setenv("LONGMEM_TILES", str(path))
        _tiles._own.cache_clear()
        _tiles._chosen.cache_clear()
        return path

    yield write
    _tiles._own.cache_clear()
    _tiles._chosen.cache_clear()


def test_own_rows_come_first(own_tables: Callable[[str], Path]) -> None:
    use = {"BJ": 2, "num_warps": 4}
    rows = {"memory_attention_memory_kernel": {"rows": [{"D": 64, "bytes": 2, "use": use}]}}
    own_tables(json.dumps({"tiles": {"sm_90": rows}}))

    def chosen(capability: tuple[int, int], size: int, head_dim: int) -> _tiles.Use:
        return _tiles.choose("memory_attention_memory_kernel", capability, bytes=size, D=head_dim, tokens=8)

    assert chosen((9, 0), 2, 64) == use
    assert chosen((9, 0), 2, 128) == chosen((8, 0), 2, 64) == {"BJ": 8, "num_warps": 1}


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"sm_90": []}', '{"sm_90": {"k": {}}}', '{"sm_90": {"k": {"rows": [{"use": {"BT": "a"}}]}}}']
)
def test_own_tables_of_another_form_are_named(own_tables: Callable[[str], Path], text: str) -> None:
    path = own_tables(text)
    with pytest.raises(ValueError, match=f"LONGMEM_TILES: {path} holds no tables of tiles"):
        _tiles.choose("memory_attention_memory_kernel", (9, 0), bytes=2, D=64, tokens=8)


# Tuning: a kernel "search" whose time depends on its tiles, and that is wrong with some.

SPEED = {(16, 1): 4.0, (32, 1): 2.0, (64, 1): 8.0, (16, 2): 3.96, (32, 2): 1.0, (64, 2): 0.5}
WRONG, FAILS = (64, 2), (64, 1)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A table with the one kernel, and a provider that launches it."""
    rows = [{"D": 64, "use": {"BT": 16, "num_warps": 1}}, {"use": {"BT": 32, "num_warps": 1}}]
    content = {"search": {"rows": rows, "candidates": [{"try": {"BT": [16, 32, 64], "num_warps": [1, 2]}}]}}
    (tmp_path / "sm_90.json").write_text(_tiles.as_text(content))
    monkeypatch.setattr(_tiles, "table", lambda number: content)
    _tiles._chosen.cache_clear()
    reference = next(one for one in providers("chunk_topk") if one.name == "longmem reference")

    def prepare(inputs: Any) -> Prepared:
        right = reference.prepare(inputs)

        def run() -> object:
            use = _tiles.choose("search", (9, 0), D=inputs.shape.D)
            ids, scores = right.run()
            if (use["BT"], use["num_warps"]) == FAILS:
                raise RuntimeError("out of resources\nlong story")
            return ids, scores + ((use["BT"], use["num_warps"]) == WRONG)

        return Prepared(run)

    monkeypatch.setattr(tuning, "triton_provider", lambda op: Provider("longmem triton", prepare, ours=True))


def clock(call: Callable[[], object], rounds: int) -> list[float]:
    call()
    use = _tiles._forced["search"]
    return [SPEED[use["BT"], use["num_warps"]] / 1e3] * rounds


def test_candidates_are_ranked_behind_the_gate(kernel: None, tmp_path: Path) -> None:
    [ranking] = tune("chunk_topk", SHAPE, "cpu", rounds=8, clock=clock)
    assert [one.use["BT"] for one in ranking.tried if one.ms] == [32, 32, 16, 16]
    assert ranking.in_use.use == {"BT": 16, "num_warps": 1} and ranking.in_use.ms == pytest.approx(4)
    assert ranking.winner.use == {"BT": 32, "num_warps": 2}
    text = table(ranking)
    assert "search (sm_90; D=32) in chunk_topk [B=1 T=4" in text
    assert "1 refused: refused by the correctness check: scores" in text
    assert "1 refused: RuntimeError: out of resources" in text
    winner = next(line for line in text.splitlines() if line.startswith("winner"))
    assert winner.split() == ["winner", "1.000", "4.00", "32", "2"]

    kept = json.loads(save([ranking], torch.device("cpu"), tmp_path / "tune.json").read_text())
    assert kept["tiles"]["sm_90"]["search"]["rows"] == [{"D": 64, "use": {"BT": 32, "num_warps": 2}}]
    assert [one["ms"] for one in kept["rankings"][0]["tried"]][-2:] == [None, None]

    assert update([ranking], tmp_path) == [tmp_path / "sm_90.json"]
    rows = json.loads((tmp_path / "sm_90.json").read_text())["search"]["rows"]
    assert rows == [{"D": 64, "use": {"BT": 32, "num_warps": 2}}, {"use": {"BT": 32, "num_warps": 1}}]
    assert update([ranking], tmp_path) == []


def test_what_is_as_fast_does_not_take_the_place_of_what_is_in_use(
    kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for use in ((32, 1), (32, 2)):
        monkeypatch.setitem(SPEED, use, 9.0)
    [ranking] = tune("chunk_topk", SHAPE, "cpu", rounds=8, clock=clock)
    assert ranking.tried[0].use == {"BT": 16, "num_warps": 2}  # by 1 %
    assert ranking.winner.use == ranking.in_use.use == {"BT": 16, "num_warps": 1}


def test_tuning_stops_in_time_and_ranks_no_launch_twice(kernel: None) -> None:
    known: set[_tiles.Lookup] = set()
    [ranking] = tune("chunk_topk", SHAPE, "cpu", rounds=8, clock=clock, until=0.0, known=known)
    assert len(ranking.tried) == 1 and "5 not begun: the time limit was reached" in table(ranking)
    assert tune("chunk_topk", SHAPE, "cpu", rounds=8, clock=clock, known=known) == []
    assert tune("chunk_topk", SHAPE, "cpu", rounds=8, clock=clock, kernels=["other"]) == []
    [ranking] = tune("chunk_topk", replace(SHAPE, D=128), "cpu", rounds=8, clock=clock, known=known)
    assert ranking.lookup.conditions == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a CUDA device")
def test_without_a_gpu_the_command_says_so() -> None:
    done = CliRunner().invoke(bench_app, ["tune", "chunk_topk"])
    assert isinstance(done.exception, ValueError) and "tuned on a CUDA device, and PyTorch" in str(done.exception)
    done = CliRunner().invoke(bench_app, ["tune", "ring_write"])
    assert done.exit_code == 2 and "'ring_write' is not one of" in " ".join(done.output.split())


@pytest.mark.gpu
def test_tuning_on_a_gpu_ranks_what_the_table_has_and_its_candidates() -> None:
    shape = Shape(B=1, T=128, H=2, G=2, D=64, M=512, dtype=torch.bfloat16)
    rankings = tune("memory_attention", shape, "cuda", kernels=["memory_kernel"], rounds=3)
    assert [ranking.lookup.kernel for ranking in rankings] == ["memory_attention_memory_kernel"]
    assert rankings[0].in_use.ms and len([one for one in rankings[0].tried if one.ms]) > 4
    assert measure("memory_attention", shape, rounds=2, device="cuda", strict=False)
