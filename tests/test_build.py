"""What the build made, what it says about itself, and what remains without it."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from factories import integers

import longmem_kernels
from longmem_kernels import _build_record, _dispatch, _extension, chunk_topk, info

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))
import torch_matrix as matrix  # noqa: E402

CUDA_SOURCES = sorted((ROOT / "csrc").glob("**/*.cu"))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


# --- CUDA sources ----------------------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_sources_compile_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("NOT TESTED: no nvcc on PATH or in CUDA_HOME")
    command = [nvcc, "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-Xptxas=-v"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", f"-I{ROOT / 'csrc'}"]
    run = subprocess.run([*command, "-cubin", str(source), "-o", str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    kernels = re.findall(r"Compiling entry function '(\w+)'", run.stderr)
    assert kernels and len(spills) >= len(kernels), run.stderr
    assert set(spills) == {("0", "0")}, run.stderr


def test_there_are_cuda_sources_to_compile() -> None:
    assert CUDA_SOURCES


# --- the extension ---------------------------------------------------------------------------------------------------


@pytest.fixture
def extension() -> dict[str, str]:
    if _extension.extension is None:
        pytest.skip(f"NOT TESTED: {_extension.load_error}")
    return _extension.build_info()


def test_extension_and_package_have_the_same_version(extension: dict[str, str]) -> None:
    assert extension["version"] == longmem_kernels.__version__


# --- setup.py --------------------------------------------------------------------------------------------------------

COMPILER = """#!/bin/sh
case "$*" in
  --version) echo "fakecc 1.0" ;;
  *{fails}*)
    echo "In file included from x.h:1:"; echo "x.cpp:7:1: error: 'nonsense' was not declared"
    echo "x.cpp:9:1: error: more"
    exit 1 ;;
  *) while [ "$1" != -o ]; do shift; done; : >"$2" ;;
esac
"""
NO_COMPILER, FAILS, PASSES = "", "ring_write.cpp", "passes"
HIDE_TORCH = """
import runpy, sys, sysconfig
import setuptools, setuptools.command.build_ext, setuptools.command.build_py
sys.path[:] = [{folder!r}, *(path for path in sys.path if not path.endswith("-packages"))]
sysconfig.get_path = lambda *_: "/nowhere"
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What setup.py reads, in a folder of its own."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path / "longmem"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for package in ("longmem", "longmem_kernels"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.so", "_build.json"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(
    sources: Path, compiler: str, *command: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run a command of setup.py with a compiler that fails on sources with `compiler` in their name."""
    fake = sources / "c++"
    fake.write_text(COMPILER.format(fails=compiler or PASSES))
    fake.chmod(0o755)
    run = subprocess.run(
        [sys.executable, *(command or ("setup.py", "build_ext", "--inplace"))],
        cwd=sources, capture_output=True, text=True, timeout=120,
        env={**os.environ, "CXX": str(fake) if compiler else "/no/such/c++", "LONGMEM_BUILD": "cpu", **environment},
    )  # fmt: skip
    record = sources / "longmem_kernels/_build.json"
    return run, json.loads(record.read_text()) if record.exists() else {}


def last_line(run: subprocess.CompletedProcess[str]) -> str:
    return run.stderr.strip().splitlines()[-1]


def test_what_does_not_compile_ends_the_build_with_the_first_error(sources: Path) -> None:
    run, record = build(sources, FAILS)
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "c++ failed, x.cpp:7:1: error: 'nonsense' was not declared." in last_line(run)
    assert "LONGMEM_BUILD=none installs without kernels" in last_line(run) and "more" not in last_line(run)
    assert record["result"] == "failed" and record["reason"] in last_line(run)
    assert record["compiler"] == f"{sources / 'c++'} (fakecc 1.0)" and torch.__version__ in record["torch"]
    assert "x.cpp:9:1: error: more" in Path(record["log"]).read_text()


@pytest.mark.parametrize("found", [None, "2.10.1"])
def test_a_missing_or_old_torch_ends_the_build_and_is_named(found: str | None, sources: Path, tmp_path: Path) -> None:
    if found:
        (tmp_path / "old/torch").mkdir(parents=True)
        (tmp_path / "old/torch/__init__.py").touch()
        (tmp_path / "old/torch/version.py").write_text(f"__version__ = '{found}'\n")
    run, record = build(sources, PASSES, "-c", HIDE_TORCH.format(folder=str(tmp_path / "old")))
    wanted = (
        f"PyTorch 2.11 or later is needed, {tmp_path / 'old/torch'} is 2.10.1"
        if found
        else f"is not installed for {sys.executable} ({platform.python_version()}); looked in /nowhere."
    )
    assert run.returncode != 0 and wanted in last_line(run) and wanted in record["reason"]
    assert (
        found
        or f"{sys.executable} -m pip install torch --index-url https://download.pytorch.org/whl/cpu" in last_line(run)
    )


def test_a_missing_compiler_ends_the_build_and_is_named(sources: Path) -> None:
    run, record = build(sources, NO_COMPILER)
    assert run.returncode != 0 and record["result"] == "failed"
    assert "a C++ compiler is needed, /no/such/c++, which CXX names, is not on PATH." in last_line(run)


def test_a_build_leaves_one_extension_and_says_with_what_it_was_made(sources: Path) -> None:
    stale = sources / "longmem_kernels/_C.cpython-39-x86_64-linux-gnu.so"
    stale.touch()
    run, record = build(sources, PASSES)
    assert run.returncode == 0, run.stderr
    assert [path.name for path in sources.glob("longmem_kernels/_C*")] == ["_C.abi3.so"]
    assert record["result"] == record["wanted"] == "cpu" and "reason" not in record
    assert record["python"] == f"{sys.executable} ({platform.python_version()})" and record["python"] in run.stderr


def test_only_changed_sources_are_compiled_again(sources: Path) -> None:
    def objects() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in sources.glob("build/objects/*/*.o")}

    build(sources, PASSES)
    first = objects()
    (sources / "csrc/module.cpp").touch()
    build(sources, PASSES)
    changed = {name for name, when in objects().items() if when != first[name]}
    assert changed == {"csrc-module.cpp.o"} and len(first) == len(list(sources.glob("csrc/**/*.cpp")))
    build(sources, PASSES, CXXFLAGS="-DOTHER")
    assert len(objects()) == len(first) and len(list(sources.glob("build/objects/*/*.o"))) == 2 * len(first)


EDITABLE = "import setuptools.build_meta as b; print(b.build_editable({out!r}))"


def test_an_editable_install_is_a_path_that_wins_over_a_folder_of_the_same_name(sources: Path, tmp_path: Path) -> None:
    """A script beside the cloned folder finds the package, not the folder; type checkers read paths, not hooks."""
    out = tmp_path / "site"
    out.mkdir()
    run, record = build(sources, PASSES, "-c", EDITABLE.format(out=str(out)), LONGMEM_BUILD="none")
    assert run.returncode == 0, run.stderr
    assert record["result"] == "none"
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        files = [name for name in wheel.namelist() if ".dist-info/" not in name]
        wheel.extractall(out)
    assert len(files) == 1 and files[0].endswith(".pth")
    assert (out / files[0]).read_text().strip() == str(sources)
    code = (
        f"import site; site.addsitedir({str(out)!r})\n"
        "from importlib.util import find_spec\n"
        "print(find_spec('longmem').origin, find_spec('longmem_kernels').origin)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    beside = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert beside.stdout.split() == [str(sources / name / "__init__.py") for name in ("longmem", "longmem_kernels")]


def test_an_unknown_build_is_refused() -> None:
    pytest.importorskip("setuptools")
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT, env={**os.environ, "LONGMEM_BUILD": "bogus"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0 and "LONGMEM_BUILD must be auto, cpu, cuda or none, got 'bogus'" in run.stderr


def imports_of(path: Path) -> set[str]:
    """Top-level names of what a file imports from outside its package, wherever in the file it does."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add((node.module or "").split(".")[0])
    return imported


def extra(name: str) -> set[str]:
    """The packages that an extra installs, those of the extras it names included."""
    toml = pytest.importorskip("tomllib")  # of Python 3.11
    tables = toml.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {re.match(r"[\w-]+(?:\[\w+\])?", line)[0] for line in tables[name]}  # type: ignore[index]
    return set().union(*(extra(item[8:-1]) if item.startswith("longmem[") else {item} for item in packages))


def test_extras_hold_what_their_parts_import() -> None:
    needed = {
        part: set().union(*(imports_of(path) for path in (ROOT / part).rglob("*.py"))) - sys.stdlib_module_names
        for part in ("longmem_kernels", "longmem", "longmem_bench")
    }
    optional = {"torch", "triton", "longmem", "longmem_kernels"}
    assert needed["longmem_kernels"] <= optional
    # transformers brings tokenizers, PyTorch typing_extensions. flashlib is measured when it is there, on GPUs alone.
    assert needed["longmem_bench"] - optional <= extra("bench") - {"faiss-cpu"} | {"faiss", "flashlib"}
    rest = needed["longmem"] - optional - {"tokenizers", "typing_extensions"}
    assert rest <= extra("model") | extra("parquet") | extra("tensorboard") and "typer" in extra("bench")


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    setup, project = (ROOT / "setup.py").read_text(), (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r"OLDEST_TORCH, TORCH_TARGET = \((\d+), (\d+)\), \"(0x\w+)\"", setup)
    assert oldest is not None
    major, minor = int(oldest[1]), int(oldest[2])
    assert int(oldest[3], 16) == major << 56 | minor << 48
    assert f'dependencies = ["torch>={major}.{minor}"]' in project
    tried = re.findall(r"^\| (\d+\.\d+)\.\d+", (ROOT / "docs/install.md").read_text(), re.MULTILINE)
    assert tried[0] == f"{major}.{minor}" and {release.rpartition(".")[0] for release in matrix.RELEASES} <= {*tried}


def test_the_matrix_shows_what_failed(tmp_path: Path) -> None:
    tried = matrix.Matrix(tmp_path, before=[])
    assert tried.step("2.11.0", "build cpu", ["echo", "12 passed"]) and tried.step("2.11.0", "install", ["true"])
    assert not tried.step("2.14.1:python3.12", "build cpu", ["false"], ["echo", "3 passed"])
    assert tried.table(["2.11.0", "2.14.1:python3.12"]).splitlines() == [
        "| PyTorch | build cpu |", "| --- | --- |", "| 2.11.0 | 12 passed |", "| 2.14.1:python3.12 | FAILED |",
    ]  # fmt: skip
    assert "$ false" in (tmp_path / "2.14.1-python3.12-build-cpu.log").read_text()


def test_setup_imports_nothing_that_reaches_the_network() -> None:
    allowed = {"__future__", "collections", "concurrent", "functools", "hashlib", "importlib", "json", "os", "pathlib"}
    allowed |= {"platform", "re", "setuptools", "shlex", "shutil", "site", "subprocess", "sys", "sysconfig", "typing"}
    imported = imports_of(ROOT / "setup.py")
    assert imported and imported <= allowed, imported - allowed


# --- without the extension, without Triton ---------------------------------------------------------------------------

WITHOUT = """
import json, sys
sys.modules[{missing!r}] = None  # importing it fails from here on
import torch
from longmem_kernels import Ring, chunk_topk, info, memory_attention, ring_write

ring = Ring.new(rings=1, kv_heads=1, chunks=4, chunk_size=2, head_dim=32)
key = torch.randn(1, 1, 6, 32)
ring_write(ring, key, key)
ids, _ = chunk_topk(key, ring.centroid, 2, count=ring.count())
out = memory_attention(key, key, key, ring.key, ring.value, ids, gate=torch.zeros(1))
assert ring.cursor.tolist() == [6] and (ids >= 0).all() and out.isfinite().all()
try:
    chunk_topk(key, ring.centroid, 2, count=ring.count(), impl={impl!r})
except RuntimeError as error:
    print(json.dumps([str(error), info.report(), info.render(info.report())]))
"""


def test_without_the_extension_references_run_and_the_reason_is_told() -> None:
    run = python(WITHOUT.format(missing="longmem_kernels._C", impl="cpp"))
    assert run.returncode == 0, run.stderr
    error, report, text = json.loads(run.stdout)
    for said in (error, report["extension"]["missing"], text):
        assert "longmem_kernels._C was not built" in said and f"{sys.executable} -m pip install" in said
    assert error.startswith("chunk_topk: impl='cpp' cannot run: ")
    assert all(entry["auto"]["cpu"] == "reference" for entry in report["ops"].values())


FAILED = {"result": "failed", "wanted": "auto", "reason": "c++ failed, x.cpp:7: error: nonsense.", "log": "/tmp/log"}


@pytest.mark.parametrize(
    ("record", "beside", "told"),
    [
        (FAILED, "", "was not built: c++ failed, x.cpp:7: error: nonsense. (the whole log: /tmp/log)"),
        ({"result": "none"}, "", "was not built: it was installed with LONGMEM_BUILD=none"),
        (None, "_C.cpython-39-x86_64-linux-gnu.so", "_C.cpython-39-x86_64-linux-gnu.so is for another one"),
        (None, "", "none was installed for this Python, "),
        ("{broken", "", "none was installed for this Python, "),
    ],
)
def test_why_the_extension_is_missing(
    record: object, beside: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "longmem_kernels"
    package.mkdir()
    if record is not None:
        (package / "_build.json").write_text(record if isinstance(record, str) else json.dumps(record))
    if beside:
        (package / beside).touch()
    monkeypatch.setattr(_build_record, "PACKAGE", package)
    monkeypatch.setattr(sys, "path", [])
    reason = _build_record.why_missing("longmem_kernels._C")
    assert told in reason and f"{sys.executable} -m pip install" in reason
    assert "install a C++ compiler" not in reason


def test_sources_that_hide_the_installed_package_are_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, installed = (tmp_path / name / "longmem_kernels" for name in ("sources", "installed"))
    for folder in (sources, installed):
        folder.mkdir(parents=True)
    (installed / "_C.abi3.so").touch()
    monkeypatch.setattr(_build_record, "PACKAGE", sources)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "sources"), str(tmp_path / "installed")])
    assert f"in {sources}, which this Python finds before {installed}" in _build_record.why_missing(
        "longmem_kernels._C"
    )


def test_an_extension_that_does_not_load_says_who_built_it(tmp_path: Path) -> None:
    package = tmp_path / "longmem_kernels"
    shutil.copytree(ROOT / "longmem_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.abi3.so").write_text("not a library")
    (package / "_build.json").write_text(
        json.dumps({"result": "cpu", "wanted": "cpu", "python": "P", "torch": "2.99 (T)"})
    )
    code = "from longmem_kernels import info; print(info.render(info.report()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "longmem_kernels._C does not load (" in run.stdout and "built by P against PyTorch 2.99 (T)" in run.stdout
    assert "last build cpu (LONGMEM_BUILD=cpu), python P, torch 2.99 (T)" in run.stdout


def test_without_triton_the_other_implementations_run_and_the_reason_is_told() -> None:
    run = python(WITHOUT.format(missing="triton", impl="triton"))
    assert run.returncode == 0, run.stderr
    error, report, _ = json.loads(run.stdout)
    assert error == "chunk_topk: impl='triton' cannot run: Triton is not installed (pip install triton)"
    assert error.endswith(report["ops"]["chunk_topk"]["implementations"]["triton"]["cpu"])


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_agrees_with_what_runs_here() -> None:
    report = info.report()
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["longmem"] == longmem_kernels.__version__
    assert report["devices"]["cpu"]["threads"] == torch.get_num_threads()
    cuda = report["devices"]["cuda"]
    assert len(cuda["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert ("missing" in cuda) == (not cuda["devices"])
    assert report["ops"].keys() == _dispatch.PREFERENCE.keys()
    for op, entry in report["ops"].items():
        assert set(entry["implementations"]) == set(_dispatch.PREFERENCE[op])
        assert set(entry["auto"]) == ({"cpu", "cuda"} if cuda["devices"] else {"cpu"})
        for device, chosen in entry["auto"].items():
            assert entry["implementations"][chosen][device] is None
    query, centroid, count = integers(1, 1, 2, 32), integers(1, 1, 4, 32), torch.tensor([4], dtype=torch.int32)
    for impl, availability in report["ops"]["chunk_topk"]["implementations"].items():
        if availability["cpu"] is None:
            chunk_topk(query, centroid, 2, count=count, impl=impl)
        else:
            with pytest.raises(RuntimeError, match=re.escape(availability["cpu"])):
                chunk_topk(query, centroid, 2, count=count, impl=impl)


def test_info_prints_a_table_and_json() -> None:
    runs = [
        subprocess.run([sys.executable, "-m", "longmem_kernels.info", *flags], capture_output=True, text=True)
        for flags in ([], ["--json"])
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    report = json.loads(runs[1].stdout)
    table = [line.split() for line in runs[0].stdout.splitlines()]
    for op, entry in report["ops"].items():
        for impl, availability in entry["implementations"].items():
            (line,) = (words for words in table if words[:2] == [op, impl])
            wanted = "auto" if entry["auto"]["cpu"] == impl else "no" if availability["cpu"] else "yes"
            assert line[2] == wanted, line
            assert all(reason in runs[0].stdout for reason in availability.values() if reason)


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="needs g++ and nm")
@pytest.mark.parametrize("op", ["chunk_topk", "memory_attention"])
def test_code_for_one_instruction_set_is_not_shared_with_others(op: str, tmp_path: Path) -> None:
    """A function the linker may merge across objects (weak) would bring AVX-512 to CPUs that lack it."""
    if platform.machine() != "x86_64":
        pytest.skip("x86-64 only")
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]
    command = ["g++", "-c", *flags, f"-I{ROOT / 'csrc'}", str(ROOT / f"csrc/{op}/{op}_avx512.cpp"), "-o", "out.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    symbols = subprocess.run(["nm", "-C", "out.o"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    kinds = {line[17]: line for line in symbols.splitlines() if len(line) > 17}
    assert "T" in kinds and "longmem::avx512" in kinds["T"]
    assert not {"W", "u"} & kinds.keys(), kinds
