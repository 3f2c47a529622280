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
from pathlib import Path

import pytest
import torch
from factories import integers

import longmem_kernels
from longmem_kernels import _dispatch, _extension, chunk_topk, info

ROOT = Path(__file__).parent.parent
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


def test_an_unknown_build_is_refused() -> None:
    pytest.importorskip("setuptools")
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT, env={**os.environ, "LONGMEM_BUILD": "bogus"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0 and "LONGMEM_BUILD must be auto, cpu, cuda or none, got 'bogus'" in run.stderr


def test_setup_imports_nothing_that_reaches_the_network() -> None:
    allowed = {
        "__future__",
        "hashlib",
        "importlib",
        "os",
        "pathlib",
        "platform",
        "pybind11",
        "re",
        "setuptools",
        "shutil",
    }
    allowed |= {"subprocess", "sys", "sysconfig"}
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
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
        assert "longmem_kernels._C was not built" in said and "pip install ." in said
    assert error.startswith("chunk_topk: impl='cpp' cannot run: ")
    assert all(entry["auto"]["cpu"] == "reference" for entry in report["ops"].values())


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
