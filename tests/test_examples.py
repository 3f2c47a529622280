"""Every file in examples/ runs as its docstring says, and what it prints of itself is right."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from command_line import WORDS, backbone

from longmem import LongMem

EXAMPLES = Path(__file__).parent.parent / "examples"
__all__ = ["backbone"]  # a fixture


def run(name: str, *arguments: object) -> None:
    with patch.object(sys, "argv", [name, *map(str, arguments)]):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def difference(printed: str) -> float:
    found = re.search(r"largest difference.*: (\S+)", printed)
    assert found is not None, printed
    return float(found[1])


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_an_example_is_short_says_how_to_run_it_and_is_tested_here(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(text)) or ""
    assert f"\n    python examples/{file.name}" in about
    assert len(text.splitlines()) < 80
    assert f'run("{file.name}"' in Path(__file__).read_text(encoding="utf-8"), "no test runs it"


def test_kernels_alone_equal_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    run("kernels_only.py")
    assert 0 < difference(capsys.readouterr().out) < 1e-5


def test_the_drop_in_classes_equal_the_published_formula(capsys: pytest.CaptureFixture[str]) -> None:
    run("drop_in_published.py")
    printed = capsys.readouterr().out
    assert "segment 5: 320 chunks searched" in printed
    assert 0 < difference(printed) < 1e-5


def test_search_beside_faiss_finds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss", reason="NOT TESTED: needs faiss-cpu")
    run("profile_beside_faiss.py", "--chunks", 512, "--queries", 8, "--rounds", 1)  # it compares the scores itself
    assert re.findall(r"^(\S+) +[\d.]+ ms", capsys.readouterr().out, re.M) == ["longmem", "faiss-cpu", "torch"]


def test_a_loop_of_ones_own_trains_a_run_that_generates_with_a_book(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book, run_folder = tmp_path / "book.txt", tmp_path / "run"
    book.write_text(" ".join(WORDS * 3), encoding="utf-8")
    run("own_training_loop.py", book, "--model", backbone, "--steps", 6, "--segment", 64, "--out", run_folder)
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step \d+: (\S+) nats", printed, re.M)]
    assert len(losses) == 6
    without, with_memory = (float(loss) for loss in re.findall(r"^last part, .*: (\S+) nats", printed, re.M))
    assert with_memory != without
    trained = LongMem.from_pretrained(run_folder)
    untrained = LongMem(trained.backbone, trained.config).trainable()
    assert all(not weight.equal(untrained[name]) for name, weight in trained.trainable().items())

    for held in ("256", "256"):  # the second time out of the file
        run("generate_with_a_book.py", run_folder, book, "w1 w2", "--tokens", 5, "--memory-tokens", 256)
        printed = capsys.readouterr().out
        assert printed.startswith(f"{held} tokens of book.txt in memory")
        assert len(printed.split("\n\n")[1].split()) == 2 + 5
    assert book.with_suffix(".memory").exists()
