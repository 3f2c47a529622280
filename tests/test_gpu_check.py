"""tools/gpu_check.sh without a GPU: times, order, what is said of what was skipped, a failure that stops nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
import typer

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import gpu_check  # noqa: E402
from gpu_check import Setup, groups  # noqa: E402
from gpu_runner import Check, Group, Step, allotted, of_pytest, of_rows, of_sanitizer, of_sweeps, of_tuning  # noqa: E402

from longmem.cli.app import app  # noqa: E402
from longmem_bench.cli.app import app as bench_app  # noqa: E402

SETUP = Setup("a GPU", wheels=Path("no-wheels"), cores=16)


def python(name: str, code: str, **options: object) -> Step:
    return Step(name, [sys.executable, "-c", code], **options)  # type: ignore[arg-type]


def group(name: str, *steps: Step, least: float = 1.0, most: float = 20.0) -> Group:
    return Group(name, "", least, most, [[step] for step in steps])


# Times


def begun(minutes: float, took: Callable[[Group, float], float]) -> dict[str, float]:
    """Which of the real groups begin within `minutes` and with how much time, each taking `took` of what it may."""
    left, waiting, found = 60 * minutes, groups(SETUP), {}
    while waiting:
        first = waiting.pop(0)
        allowed = allotted(first, waiting, left)
        if allowed is not None:
            found[first.name] = allowed
            left -= took(first, allowed)
    return found


def test_five_minutes_hold_build_tests_and_base_shapes_whatever_they_take() -> None:
    for took in (lambda group, allowed: allowed, lambda group, allowed: group.least, lambda group, allowed: 1.0):
        found = begun(5, took)
        assert list(found)[:3] == ["build", "tests", "key"]
        assert found["build"] >= 90 and found["tests"] >= 120 and found["key"] >= 80
    assert list(begun(5, lambda group, allowed: allowed)) == ["build", "tests", "key"]
    assert list(begun(60, lambda group, allowed: allowed)) == [group.name for group in groups(SETUP)]


def test_a_group_gets_what_later_ones_do_not_need() -> None:
    first, second, third = (group(name, least=10, most=60) for name in "abc")
    assert allotted(first, [second, third], 100) == 60  # its most
    assert allotted(first, [second, third], 50) == 30
    assert allotted(first, [second, third], 25) == 15  # the third does not fit, so nothing is kept for it
    assert allotted(first, [second, third], 9) is None


# Running


def test_a_failure_stops_nothing_and_the_table_says_all(tmp_path: Path) -> None:
    check = Check(tmp_path / "out")
    check.run(
        [
            group("build", python("bad", "print('ok'); raise SystemExit('compiler: no such option')")),
            group(
                "tests", python("good", "print('first\\n3 passed')"), replace(python("absent", ""), command=["no-such"])
            ),
            group("tune", python("needs", "", needs=lambda: "no sanitizer")),
            group("bench", python("late", "print('late')"), least=1000),
        ],
        60,
    )
    found = [(one.group, one.step, one.status, one.lines) for one in check.outcomes]
    assert found[0] == ("build", "bad", "failed", ["compiler: no such option"])
    assert found[1] == ("tests", "good", "passed", ["3 passed"])
    assert found[2][:3] == ("tests", "absent", "failed") and "no-such" in found[2][3][0]
    assert found[3] == ("tune", "needs", "skipped", ["no sanitizer"])
    assert found[4][:3] == ("bench", "-", "skipped") and "it needs 1000" in found[4][3][0]
    assert check.failed
    table = (tmp_path / "out" / "table.txt").read_text().splitlines()
    assert table[0].split() == ["group", "step", "status", "s", "result"] and len(table) == 6
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["failed"] and [step["status"] for step in summary["steps"]] == [one[2] for one in found]
    assert "first" in (tmp_path / "out" / "gpu_check.log").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_check.log", "summary.json", "table.txt"}


def test_a_step_whose_time_is_over_prints_what_it_has_and_leaves_nothing_running(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    code = (
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "try: time.sleep(60)\nexcept KeyboardInterrupt: print('7 rows')"
    )
    begin = time.monotonic()
    check = Check(tmp_path)
    check.run([group("slow", python("step", code, most=2.0)), group("next", python("step", "print('there')"))], 60)
    assert [(one.status, one.lines) for one in check.outcomes] == [("cut", ["7 rows"]), ("passed", ["there"])]
    assert check.outcomes[0].seconds <= 2.5 and not check.failed
    time.sleep(max(0.0, begin + 5 - time.monotonic()))
    assert not mark.exists()


def test_what_does_not_heed_the_interrupt_is_killed_in_time(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    check = Check(tmp_path)
    check.run([group("slow", python("step", code, least=1.0), most=4.0)], 60)
    [one] = check.outcomes
    assert one.status == "cut" and one.seconds <= 4.5 and one.lines == ["deaf"]


def test_steps_of_a_stage_run_at_once_and_an_interrupt_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [python(name, "import time; time.sleep(1.5)") for name in "abc"]
    check = Check(tmp_path)
    begin = time.monotonic()
    check.run([Group("all", "", 1, 60, [steps])], 60)
    assert [one.status for one in check.outcomes] == ["passed"] * 3
    assert time.monotonic() - begin < 4.0

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Check, "_finish", interrupted)
    check = Check(tmp_path)
    check.run([group("first", python("a", "import time; time.sleep(60)")), group("second", python("b", ""))], 60)
    assert [(one.group, one.lines) for one in check.outcomes] == [("second", ["interrupted before it"])]
    assert all(process.poll() is not None for process in check._running)


def test_interrupted_pytest_says_what_passed_and_what_failed(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_it.py")]
    check, lean = Check(tmp_path / "out"), {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    check.run([group("tests", Step("gpu", command, most=9.0, environment=lean, report=of_pytest))], 60)
    [one] = check.outcomes
    assert one.status == "cut" and one.lines[0].startswith("1 failed, 1 passed"), one
    assert one.lines[1].endswith("test_it.py::test_b")


# Reports


def test_reports_pick_what_matters() -> None:
    text = "noise\nchunk_topk [B=1 T=1 K=2 bfloat16] longmem triton: 0.19 ms in a graph, 0.35 by the host's clock\n"
    text += "chunk_topk [B=1 T=1 K=2 bfloat16] torch matmul + topk: 0.157 ms\nWRONG: longmem triton, x: y\n"
    assert of_rows(text) == [
        "WRONG: longmem triton, x: y",
        "chunk_topk T=1: longmem triton 0.19 ms (graph; host 0.35); torch matmul + topk 0.157 ms",
    ]
    sweep = "chunk_topk, M [B=1 T=1 M=... float32] on x\nms  M=40  M=80\nlongmem 1 2\nours x best  2.00  0.50\n"
    assert of_sweeps(sweep) == ["chunk_topk, M: M=40 2.00x, M=80 0.50x"]
    ranking = "search (sm_90; D=64 rows=1) in chunk_topk [B=1 bfloat16]\n  ms x BT\nwinner  1.00  2.0 32\n"
    ranking += "        1.5\ntable  2.0 1.0 16\n"
    assert of_tuning(ranking) == ["search (D=64 rows=1): winner: 1.00 2.0 32"]
    assert of_tuning(ranking.replace("winner", "      ")) == ["search (D=64 rows=1): table stays: 2.0 1.0 16"]
    clean = "x: ran\n========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert of_sanitizer(clean) == ["ERROR SUMMARY: 0 errors"]
    absent = "ring_write cuda: not run, built without CUDA"
    assert of_sanitizer(f"{absent}\nring_write reference: not run, x\n{clean}") == ["ERROR SUMMARY: 0 errors", absent]
    bad = (
        "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 3 errors\n"
    )
    assert of_sanitizer(bad) == ["ERROR SUMMARY: 3 errors", "Invalid __global__ read of size 4"]
    failed = "\n".join(f"FAILED tests/a.py::b{i} - x" for i in range(20)) + "\n== 20 failed, 3 passed in 9.1s ==\n"
    assert of_pytest(failed)[0] == "20 failed, 3 passed in 9.1s" and of_pytest(failed)[-1] == "and 12 more"


# What is run


def steps(setup: Setup) -> list[Step]:
    return [step for group in groups(setup) for stage in group.stages for step in stage]


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_command_is_one_that_exists(rehearse: bool) -> None:
    found = [step.command for step in steps(replace(SETUP, rehearse=rehearse))]
    apps = {"longmem.cli": app, "longmem_bench": bench_app}
    ours = [list(command[2:]) for command in found if command[1] == "-m" and command[2] in apps]
    assert len(ours) > 5
    for module, *words in ours:
        command, options = typer.main.get_command(apps[module]), [word.replace("{minutes}", "1") for word in words]
        while isinstance(command, click.Group) or hasattr(command, "commands"):
            command = command.commands[options.pop(0)]
        command.make_context("longmem", options)  # raises for an option that is not there
    for command in found:
        for word in command:
            assert not word.startswith("tools/") or (TOOLS.parent / word).exists()


def test_results_are_at_most_eight_files() -> None:
    written = [word for step in steps(SETUP) for word in step.command if Path(word).parent == SETUP.out and "." in word]
    assert sorted(Path(word).name for word in written) == [
        "bench.json",
        "goals.json",
        "key.json",
        "step.json",
        "tune.json",
    ]
    assert len(written) + 3 <= 8


def test_the_extension_is_built_for_this_gpu_by_the_pip_of_this_python() -> None:
    (step,) = [step for step in steps(SETUP) if step.name == "extension"]
    assert list(step.command[:4]) == [sys.executable, "-m", "pip", "install"]
    assert step.environment["LONGMEM_BUILD"] == "cuda" and step.environment["TORCH_CUDA_ARCH_LIST"] == "9.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["5", "biuld"], "wanted [minutes] and groups of build, tests, key, goals, sanitize"),
        pytest.param(
            ["5"], "sees no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_wrong_arguments_and_no_gpu_are_said(
    arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_rehearsal_runs_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--rehearse", "4", "tests", "sanitize", "graphs", "fp8"]
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = [str(TOOLS / "gpu_check.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {step["status"] for step in summary["steps"]} == {"passed"}
    assert done.stdout.rstrip().endswith((tmp_path / "table.txt").read_text().rstrip())
