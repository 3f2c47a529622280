"""README and docs: what they show, runs; the files and options they name, exist."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import WORDS, backbone
from typer.main import get_command

from longmem.cli.app import app
from longmem_bench import Row, readme
from longmem_bench.results import Result
from longmem_kernels import __version__

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
__all__ = ["backbone"]  # a fixture


def run(code: str, folder: Path) -> None:
    """Runs `code` in `folder`, in this process: what it imports is loaded already."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(code, "example", "exec"), {"__name__": "example"})
    finally:
        os.chdir(before)


def test_readme_is_short_and_shows_four_examples_of_at_most_a_dozen_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 220
    assert len(EXAMPLES) == 4
    for example in EXAMPLES:
        assert len([line for line in example.splitlines() if line.strip() and "import" not in line]) <= 11


def test_the_kernel_example_equals_what_stands_beside_it(tmp_path: Path) -> None:
    equal = "assert torch.allclose(out, expected, atol=1e-5) and ids.sort().values.equal(chunk_ids.sort().values)\n"
    differentiable = "out.sum().backward()\nassert gate.grad.abs().sum() > 0\n"
    run(EXAMPLES[0] + EXAMPLES[1] + equal + differentiable, tmp_path)


def test_the_hugging_face_examples_train_save_and_generate(backbone: Path, tmp_path: Path) -> None:
    for book in ("book.txt", "another.txt"):
        (tmp_path / book).write_text(" ".join(WORDS * 10), encoding="utf-8")
    name = re.search(r'name = "(.+?)"', EXAMPLES[2])
    assert name is not None
    training = (
        EXAMPLES[2]
        .replace(name[1], str(backbone))
        .replace("for i in", "before = model(tokens[:, :256]).logits\nfor i in")
    )
    trained = "assert model(tokens[:, :256]).logits.ne(before).any() and memory.stats()['tokens'] > 0\n"
    used = EXAMPLES[3].replace("It was", "w1 w2") + "assert memory.stats()['tokens'] > 900\n"
    run(training + trained + used, tmp_path)
    assert (tmp_path / "another.memory").exists()


def test_every_file_in_the_tree_is_there() -> None:
    tree = re.search(r"## Files\n\n```\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    assert tree is not None
    folder, missing = "", []
    for line in tree[1].splitlines():
        named = line[:26].strip()
        if line and not line.startswith(" "):
            folder = named.split("/")[0] if named.endswith("/") else ""
        for name in named.split():
            path = name if not line.startswith(" ") else os.path.join(folder, name)
            if "*" not in name and not (ROOT / path).exists():
                missing.append(path)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http|mailto|#)([^)#]+)[^)]*\)", text)
    paths = re.findall(r"`((?:docs|examples|tests|tools|benchmarks|longmem|longmem_kernels|csrc)/[\w./-]+)[`:]", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def examples_of(page: Path) -> str:
    """All Python of a page, one after another: later blocks use what earlier ones define."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S))


@pytest.mark.parametrize("name", ["kernels", "generation", "model", "published-code"])
def test_the_python_of_a_page_runs(name: str, backbone: Path, tmp_path: Path) -> None:
    code = examples_of(ROOT / "docs" / f"{name}.md")
    assert code, "the page has no example"
    (tmp_path / "book.txt").write_text(" ".join(WORDS * 4), encoding="utf-8")
    run(code.replace("HuggingFaceTB/SmolLM2-135M", str(backbone)), tmp_path)


def test_every_command_and_option_that_a_page_names_exists() -> None:
    commands: Any = get_command(app)
    known = {"--help"} | {
        option for command in commands.commands.values() for parameter in command.params for option in parameter.opts
    }
    named = set()
    for page in PAGES:
        for line in re.findall(r"longmem (?:train|eval|generate|probe-layers|recall) [^`\n]*", page.read_text()):
            named |= set(re.findall(r"--[a-z-]+", line))
    assert "--remember" in named and named <= known


@pytest.mark.parametrize("name", ["LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", ".ci/run"])
def test_what_a_newcomer_looks_for_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def shown(block: str) -> str:
    """What the block's page shows."""
    found = readme.block(block).search((ROOT / readme.PAGES[block]).read_text(encoding="utf-8"))
    assert found is not None, block
    return found[0]


def results_named(block: str = "measured") -> list[Path]:
    named = [ROOT / path for path in re.findall(r"(benchmarks/results/\S+?\.json)", shown(block))]
    assert named
    return named


def test_figures_are_those_of_the_results_they_name() -> None:
    results = results_named()
    leading = Result.load(results[0])
    parts = {
        "measured": readme.measured(results, ROOT),
        "plot": readme.plot(leading),
        "plots": readme.plots(leading),
        "official-step": readme.official_step(results_named("official-step")[0], ROOT),
    }
    assert parts.keys() == readme.PAGES.keys()
    for name, wanted in parts.items():
        assert shown(name) == wanted, "`longmem-bench readme` writes them anew"


def test_a_gpu_row_shows_what_the_device_and_what_the_host_takes() -> None:
    def row(provider: str, median: float, graph: float | None, ours: bool) -> Row:
        shared = {"op": "chunk_topk", "shape": "B=1 T=1", "dtype": "bfloat16", "device": "cuda", "device_name": "x"}
        times = {"median_ms": median, "graph_ms": graph, "host_ms": median, "peak_bytes": 0}
        return Row(provider=provider, ours=ours, threads=1, commit="c", **shared, **times)  # type: ignore[arg-type]

    rows = [row("longmem triton", 0.354, 0.02, True), row("torch", 0.3, 0.05, False), row("faiss", 0.708, None, False)]
    text = "\n".join(readme._table(Result({"device": "x"}, "2026-01-02", rows)))
    assert "**0.0200 (graph; host 0.354)** | faiss 0.708 (2.0x); torch 0.0500 (graph; host 0.300) (2.5x)" in text


def test_plots_were_drawn_from_the_result_that_the_page_names() -> None:
    leading = Result.load(results_named()[0])
    for name in ["measured.png", *(f"measured-{op}.png" for op in readme.LEADING)]:
        assert f"commit {leading.machine['commit']}, {leading.date}".encode() in (ROOT / "docs" / name).read_bytes()


def test_the_readme_of_tests_says_of_every_file_what_it_tests() -> None:
    table = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    patterns = re.findall(r"`(test_[\w.*]+)`", table)
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    unnamed = {name for name in files if not any(fnmatch(name, pattern) for pattern in patterns)}
    stale = {pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in files)}
    assert not unnamed and not stale


def test_the_page_of_environment_variables_has_them_all() -> None:
    read = r"(?:environ(?:\.get\(|\[)|getenv\(|setenv\(|\$\{)\s*\"?(LONGMEM_\w+)"
    sources = [
        path
        for folder in ("longmem", "longmem_kernels", "longmem_bench", "csrc", "tests", "tools")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".sh")
    ]
    used = {name for path in [ROOT / "setup.py", *sources] for name in re.findall(read, path.read_text("utf-8"))}
    page = (ROOT / "docs/environment-variables.md").read_text(encoding="utf-8")
    assert {"LONGMEM_BUILD", "LONGMEM_SIMD", "LONGMEM_CACHE"} <= used
    assert {name for name in used if f"`{name}" not in page} == set()


@pytest.mark.parametrize("package", ["longmem", "longmem_kernels"])
def test_the_api_reference_has_every_public_name(package: str) -> None:
    page = (ROOT / "docs/api" / f"{package}.md").read_text(encoding="utf-8")
    names = {name for name in import_module(package).__all__ if not name.startswith("__")}
    assert {name for name in names if not re.search(rf"(\.|[\[ ]){name}\b", page)} == set()


def test_precommit_runs_what_make_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    lint = re.search(r"^lint: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert lint is not None
    commands = [line.replace("$(BIN)/", "").split() for line in lint[1].splitlines()]
    for hook, command in zip(hooks, commands, strict=True):
        entry = hook["entry"].removeprefix(".venv/bin/").split()
        assert [word for word in entry if word != "--force-exclude"] == [
            w for w in command if w not in (".", "$(CXX_FILES)")
        ]


def test_the_citation_and_the_templates_are_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for template in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(template.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys() and all("label" in f["attributes"] for f in form["body"])
    assert "python -m longmem_kernels.info" in (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8")
