"""`longmem-bench`: what is measured, what is kept, what bad input gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import bench as command
from typer.testing import CliRunner

from longmem_bench import OPS, Row, measure, suite, table
from longmem_bench.cli.app import app
from longmem_bench.compare import compare, comparison
from longmem_bench.precompile import Variant, candidates_of, compile_variant, lookups_of
from longmem_bench.providers import providers
from longmem_bench.results import Result, newest
from longmem_bench.shapes import Shape, default_sweeps, shapes_for
from longmem_kernels import _tiles

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
SMALL = ["--shape", "T=8,M=64,K=4", "--seconds", "0.01"]


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def row(milliseconds: float, provider: str = "p", cores: float = 1.0, device: str = "cpu") -> Row:
    return Row(
        op="chunk_topk", provider=provider, shape="B=1", dtype="float32", device=device, device_name="x", threads=1,
        commit="c", median_ms=milliseconds, p20_ms=0.98 * milliseconds, p80_ms=1.02 * milliseconds, cores=cores,
    )  # fmt: skip


def result(*rows: Row) -> Result:
    return Result({"commit": "c", "device": "x", "threads": "1"}, "2026-01-02", list(rows))


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_every_kept_shape_is_one_that_providers_can_judge(op: str, paper: bool) -> None:
    sweeps = default_sweeps(op, paper=paper)
    for shape in [*shapes_for(op, paper=paper), *(shape for sweep in sweeps.values() for shape in sweep)]:
        assert shape.H % shape.G == 0 and shape.rings in (1, shape.B) and shape.K < shape.M
        reasons = [provider.unavailable(shape, CPU) for provider in providers(op) if provider.unswept is None]
        assert all(reason is None or reason for reason in reasons)
    for name, shapes in sweeps.items():
        sizes = [getattr(shape, name.split()[0]) for shape in shapes]
        assert len(set(sizes)) == len(sizes), name


def test_a_question_is_answered_kept_and_drawn(tmp_path: Path) -> None:
    output = run(
        "write", *SMALL, "--providers", "cpp,index_copy", "--json", tmp_path / "a.json", "--plots", tmp_path / "plots"
    )
    assert "ring_write [B=2 T=8 G=8 D=64 M=64 C=4 float32]" in output and "x best" in output
    kept = Result.load(tmp_path / "a.json")
    assert {one.provider for one in kept.rows} == {"longmem cpp", "eager index_copy"}
    assert kept.machine["torch"] == torch.__version__
    assert kept.rows[0].bytes and kept.rows[0].floor_ms
    assert (tmp_path / "plots" / "ring_write-bars.png").exists()


def test_names_left_out_and_kernels_by_name() -> None:
    output = run("write", *SMALL, "--providers", "cpp,copy", "--without", "index_copy", "--kernels")
    assert "eager index_copy" not in output and "copy of the same bytes" in output
    assert "longmem::ring_write_cpp" in output and output.count("ms per operation") == 4
    assert "ring_write [B=2 T=8 G=8 D=64 M=64 C=4 float32] longmem cpp: 0." in output  # said before the table


def test_an_interrupted_run_leaves_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = suite.run

    def interrupted(*args: Any, **options: Any) -> Any:
        yield next(measured(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run", interrupted)
    arguments = ["write", *SMALL, "--providers", "cpp", "--json", str(tmp_path / "a.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 130 and "interrupted after 1 of 2 rows" in done.output
    assert len(Result.load(tmp_path / "a.json").rows) == 1


def test_what_would_be_compiled_is_found_without_a_gpu() -> None:
    pytest.importorskip("triton")
    shape = Shape(B=1, T=64, H=2, G=2, D=64, M=128, dtype=torch.bfloat16)
    base = [Variant("memory_layer", shape), Variant("memory_attention_backward", shape)]
    kernels = [lookup.kernel for variant in base for lookup in lookups_of(variant, 90)]
    assert len(kernels) == 3 + 5 and set(kernels) == set(_tiles.table(90)) - {"memory_attention_decode_kernel"}
    found = candidates_of(base, 90, ["memory_kernel"])
    assert found[:2] == base and len(found) == 2 + 11  # one of 12 is what the table has
    assert {"BJ": 16, "num_warps": 4} in [variant.uses.get("memory_attention_memory_kernel") for variant in found]


@pytest.mark.slow
def test_kernels_compile_beforehand_and_say_what_does_not_fit() -> None:
    pytest.importorskip("triton")
    shape = Shape(B=1, T=64, H=2, G=2, D=64, M=128, dtype=torch.bfloat16)
    fits = compile_variant(Variant("chunk_topk", shape), 80)
    assert fits.reason is None and set(fits.shared_bytes) == {"chunk_topk_search_kernel", "chunk_topk_decide_kernel"}
    large = {"BT": 128, "BS": 128, "num_warps": 8, "num_stages": 4}
    refused = compile_variant(Variant("memory_attention", shape, {"memory_attention_local_kernel": large}), 80)
    assert "memory_attention_local_kernel needs" in (refused.reason or "")
    none = compile_variant(
        Variant("chunk_topk", shape, {"chunk_topk_search_kernel": {"BT": 24, "BM": 1, "lanes": 1}}), 80
    )
    assert none.reason


def test_a_sweep_of_ones_own(tmp_path: Path) -> None:
    output = run(
        "retrieval",
        *SMALL,
        "--sweep",
        "M=32,64",
        "--providers",
        "cpp",
        "--json",
        tmp_path / "a.json",
        "--plots",
        tmp_path,
    )
    assert "M=32" in output and "M=64" in output
    assert [one.sweep for one in Result.load(tmp_path / "a.json").rows] == ["M", "M"]
    assert (tmp_path / "chunk_topk-sweeps.png").exists()


def test_profile_names_the_parts_of_a_layer(tmp_path: Path) -> None:
    output = run("profile", "--shape", "T=8,M=64,K=4", "--steps", "2", "--out", tmp_path)
    for part in ("score + select", "gather + fuse", "score", "select", "gather", "fuse", "write", "whole step"):
        assert any(line.startswith(part) for line in output.splitlines()), part
    events = json.loads((tmp_path / "longmem.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if str(event.get("name")).startswith("memory layer: ")]
    assert names.count("memory layer: score + select") == 2 and names.count("memory layer: step") == 2


def test_a_shape_shared_by_sweeps_is_measured_once_and_late_tasks_are_not_begun() -> None:
    shape = Shape(B=1, T=4, H=2, G=2, D=32, M=32, K=4)
    points = [suite.Point("ring_write", shape, name) for name in ("M", "K")]
    work = suite.tasks(points, ["longmem cpp"])
    first, second = [one for _, one in suite.run(work, CPU, seconds=0.01)]
    assert (first.sweep, second.sweep) == ("M", "K") and replace(second, sweep="M") == first
    late = [one for _, one in suite.run(work, CPU, seconds=0.01, minutes=0)]
    assert all("time limit of 0 minutes" in (one.reason or "") for one in late)
    slow = suite.tasks([suite.Point("memory_attention", shape, "M")], [])
    reasons = {task.provider.name: one.reason for task, one in suite.run(slow, CPU, seconds=0.01)}
    assert "left out of sweeps unless asked for" in (reasons["torch.compile composition"] or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fusion", "--sweep", "Q"], "sweep: fusion has T, K, C, D, G, R"),
        (["fusion", "--sweep", "M=a"], "sweep: wanted NAME=SIZE"),
        (["fusion", "--shape", "B"], "shape: wanted NAME=SIZE"),
        (["fusion", "--shape", "Z=3"], "shape: wanted one of B T H"),
        (["fusion", "--shape", "H=3,G=2"], "H a multiple of G"),
        (["fusion", "--providers", "nobody"], "providers: wanted some of: longmem triton"),
        (["fusion", "--dtype", "int8"], "'int8' is not one of 'float32', 'bfloat16', 'float16'"),
        (["fusion", "--scale", "huge"], "'huge' is not one of 'auto', 'paper', 'small'"),
        (["train", "--model", "gpt"], "'gpt' is not one of 'tiny', 'smollm2'"),
        (["fusion", "--seconds", "nan"], "--seconds': wanted a number above 0, got nan"),
        (["all", "--minutes", "inf"], "--minutes': wanted a number of at least 0, got inf"),
        (["fusion", "--plots", "{file}/plots"], "{file} is a file"),
        (["fusion", "--json", "{file}/a.json"], "{file} is a file"),
        (["compare", "no.json", "no.json"], "does not exist"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert command(*(argument.format(file=file) for argument in arguments)) in (1, 2)
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message.format(file=file) in shown and shown.count("\n") == 1, shown


def test_changes_are_told_from_noise() -> None:
    before = result(*(row(1.0, name) for name in ("slow", "fast", "same", "wide", "busy", "gone")))
    wide = replace(row(1.2, "wide"), p20_ms=0.9)
    after = result(row(1.2, "slow"), row(0.8, "fast"), row(1.04, "same"), wide, row(2.0, "busy", cores=0.5))
    verdicts = {change.after.provider: change.verdict for change in compare(before, after)}
    assert verdicts == {"slow": "slower", "fast": "faster", "same": "same", "wide": "same", "busy": "not judged"}
    text = comparison(before, after)
    assert "slower: 1 of 5" in text and "1.20x" in text and "more than 5%" in text and "gone chunk_topk" in text
    with pytest.raises(ValueError, match="no timed row in common"):
        compare(before, result(row(1.0, "other")))


def test_graphs_are_compared_where_both_results_have_them() -> None:
    old = replace(row(0.35, device="cuda"), graph_ms=0.05)  # of a time when graphs had no spread
    new = replace(row(0.36, device="cuda"), graph_ms=0.02, graph_p20_ms=0.019, graph_p80_ms=0.021)
    [change] = compare(result(old), result(new))
    assert change.verdict == "faster" and change.factor == pytest.approx(0.4)
    assert "0.40x  0.05 -> 0.02 ms" in comparison(result(old), result(new))
    [change] = compare(result(replace(old, graph_ms=None)), result(new))
    assert change.verdict == "same"


def test_compare_exits_with_1_when_something_got_slower(tmp_path: Path) -> None:
    old, new = result(row(1.0)).save(tmp_path / "old.json"), result(row(2.0)).save(tmp_path / "new.json")
    assert CliRunner().invoke(app, ["compare", str(old), str(new)]).exit_code == 1
    assert CliRunner().invoke(app, ["compare", str(new), str(old)]).exit_code == 0


def test_kept_results_of_older_commits_are_still_read_shown_and_compared() -> None:
    kept = sorted(RESULTS.rglob("*.json"))
    assert kept
    for path in kept:
        found = Result.load(path)
        assert found.rows[0].provider in table(found.rows)
        if any(one.median_ms for one in found.rows):
            assert {change.verdict for change in compare(found, found)} == {"same"}


def test_results_are_read_back_as_written(tmp_path: Path) -> None:
    rows = measure("ring_write", Shape(B=1, T=4, H=2, G=2, D=32, M=32, K=4), rounds=2)
    written = Result.now(rows, CPU)
    path = written.keep(tmp_path)
    assert Result.load(path) == written
    assert path.parent.name.endswith(f"{written.machine['threads']}-threads") and path.name.startswith(written.date)
    assert newest(tmp_path, on_gpu=False) == path and newest(tmp_path, on_gpu=True) is None
    (tmp_path / "bad.json").write_text('{"rows": [{"op": "x", "speed": 3}]}')
    (tmp_path / "text.json").write_text("text")
    for name in ("bad.json", "text.json"):
        with pytest.raises(ValueError, match="holds no benchmark result"):
            Result.load(tmp_path / name)
