"""What README shows, runs; what it says of the tree, is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import WORDS, backbone

from longmem_bench import Row, readme
from longmem_bench.results import Result

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
__all__ = ["backbone"]  # a fixture


def run(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_there_are_three_examples_of_at_most_a_dozen_lines() -> None:
    assert len(EXAMPLES) == 3
    for example in EXAMPLES:
        assert len([line for line in example.splitlines() if line.strip() and "import" not in line]) <= 11


def test_the_kernel_example_runs(tmp_path: Path) -> None:
    run(
        EXAMPLES[0] + "assert out.shape == query.shape\nout.sum().backward()\nassert gate.grad.abs().sum() > 0",
        tmp_path,
    )


def test_the_hugging_face_examples_train_save_and_generate(backbone: Path, tmp_path: Path) -> None:
    for book in ("book.txt", "another.txt"):
        (tmp_path / book).write_text(" ".join(WORDS * 10), encoding="utf-8")
    name = re.search(r'name = "(.+?)"', EXAMPLES[1])
    assert name is not None
    training = (
        EXAMPLES[1]
        .replace(name[1], str(backbone))
        .replace("for i in", "before = model(tokens[:, :256]).logits\nfor i in")
    )
    trained = "assert model(tokens[:, :256]).logits.ne(before).any() and memory.stats()['tokens'] > 0\n"
    used = EXAMPLES[2].replace("It was", "w1 w2") + "assert memory.stats()['tokens'] > 900\n"
    run(training + trained + used, tmp_path)
    assert (tmp_path / "another.memory").exists()


def test_every_file_that_readme_names_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    tree = re.search(r"## Files\n\n```\n(.*?)```", text, re.S)
    assert tree is not None
    folder, missing = "", []
    for line in tree[1].splitlines():
        named = line[:26].strip()
        if line and not line.startswith(" "):
            folder = named.split("/")[0] if named.endswith("/") else ""
        for name in named.split():
            path = name if not line.startswith(" ") else os.path.join(folder, name)
            if "*" not in name and not (README.parent / path).exists():
                missing.append(path)
    links = [link for link in re.findall(r"\]\((?!http)([^)#]+)\)", text) if not (README.parent / link).exists()]
    assert not missing and not links


@pytest.mark.parametrize("name", ["LICENSE", "CONTRIBUTING.md", "docs/decisions.md", ".ci/run"])
def test_what_a_newcomer_looks_for_is_there(name: str) -> None:
    assert (README.parent / name).stat().st_size > 0


def results_named(block: str = "measured") -> list[Path]:
    text = readme.block(block).search(README.read_text(encoding="utf-8"))
    assert text is not None
    named = [ROOT / path for path in re.findall(r"\]\((benchmarks/results/[^)]+\.json)\)", text[0])]
    assert named
    return named


def test_figures_are_those_of_the_results_they_name() -> None:
    text = README.read_text(encoding="utf-8")
    results = results_named()
    parts = {
        "measured": readme.measured(results, ROOT),
        "plots": readme.plots(Result.load(results[0])),
        "official-step": readme.official_step(results_named("official-step")[0], ROOT),
    }
    for name, wanted in parts.items():
        found = readme.block(name).search(text)
        assert found is not None and found[0] == wanted, "longmem-bench readme writes them anew"


def test_a_gpu_row_shows_what_the_device_and_what_the_host_takes() -> None:
    def row(provider: str, median: float, graph: float | None, ours: bool) -> Row:
        shared = {"op": "chunk_topk", "shape": "B=1 T=1", "dtype": "bfloat16", "device": "cuda", "device_name": "x"}
        times = {"median_ms": median, "graph_ms": graph, "host_ms": median, "peak_bytes": 0}
        return Row(provider=provider, ours=ours, threads=1, commit="c", **shared, **times)  # type: ignore[arg-type]

    rows = [row("longmem triton", 0.354, 0.02, True), row("torch", 0.3, 0.05, False), row("faiss", 0.708, None, False)]
    text = "\n".join(readme._table(Result({"device": "x"}, "2026-01-02", rows)))
    assert "**0.0200 (graph; host 0.354)** | faiss 0.708 (2.0x); torch 0.0500 (graph; host 0.300) (2.5x)" in text


def test_plots_were_drawn_from_the_result_that_readme_names() -> None:
    leading = Result.load(results_named()[0])
    for op in readme.LEADING:
        picture = (ROOT / "docs" / f"measured-{op}.png").read_bytes()
        assert f"commit {leading.machine['commit']}, {leading.date}".encode() in picture
