"""What nvcc makes of the CUDA ring_write kernel: accesses of 16 bytes, registers for enough threads, no spills."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REGISTERS = 96  # five blocks of 128 threads on a multiprocessor
INPUTS, STORAGE, WIDTHS = ("f", "__nv_bfloat16", "__half"), ("f", "__nv_bfloat16", "__half", "E4m3"), (1, 8)


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit; Triton's wheel brings some of them along."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    triton = importlib.util.find_spec("triton")
    wheels = [str(Path(triton.origin).parent / "backends/nvidia/bin" / name)] if triton and triton.origin else []
    return next((found for found in map(shutil.which, [name, f"{home}/bin/{name}", *wheels]) if found), None)


def instance(mangled: str) -> tuple[str, str, int]:
    """Input, storage and width of a kernel, from its mangled name."""
    match = re.search(r"ring_write_kernelI(f|6__half|13__nv_bfloat16)(.+?)Li(\d)E", mangled)
    assert match is not None, mangled
    names = {"6__half": "__half", "13__nv_bfloat16": "__nv_bfloat16", "f": "f", "NS0_4E4m3E": "E4m3"}
    storage = names.get(match[2], names[match[1]])  # S2_ and its like: the input's type again
    return names[match[1]], storage, int(match[3])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The compiler's report, and the machine code for sm_90."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        pytest.skip("NOT TESTED: no nvcc on PATH or in CUDA_HOME")
    cubin = tmp_path_factory.mktemp("ring_write") / "kernel.cubin"
    command = [nvcc, "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas=-v", "-arch=sm_90"]
    command += [f"-I{ROOT / 'csrc'}", "-cubin", str(ROOT / "csrc/ring_write/ring_write_cuda.cu"), "-o", str(cubin)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stderr, cubin


def test_no_kernel_spills_and_registers_leave_room_for_enough_threads(compiled: tuple[str, Path]) -> None:
    reports = re.split(r"Compiling entry function '", compiled[0])[1:]
    found = {instance(report.split("'")[0]): report for report in reports}
    assert found.keys() == {(a, b, width) for a in INPUTS for b in STORAGE for width in WIDTHS}
    for name, report in found.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, (name, report)
        registers = re.search(r"Used (\d+) registers", report)
        assert registers and int(registers[1]) <= REGISTERS, (name, report)


def test_wide_kernels_load_and_store_16_bytes_at_once(compiled: tuple[str, Path]) -> None:
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("NOT TESTED: no cuobjdump, neither CUDA's nor Triton's")
    code = subprocess.run([cuobjdump, "-sass", str(compiled[1])], capture_output=True, text=True, check=True).stdout
    kernels = {instance(part.split("\n")[0]): part for part in code.split("Function : ")[1:]}
    assert len(kernels) == len(INPUTS) * len(STORAGE) * len(WIDTHS)
    for (source, storage, width), assembly in kernels.items():
        loads, stores = (len(re.findall(rf"\b{access}\.E\.128\b", assembly)) for access in ("LDG", "STG"))
        quantised = len(re.findall(r"\bSTG\.E\.64 ", assembly))  # eight float8
        if width == 1:
            assert loads == stores == 0, (source, storage)
        else:
            # Four tokens are loaded before the first is used; a float32 vector of eight takes two loads.
            assert loads >= 4 * (2 if source == "f" else 1), (source, storage)
            assert (quantised if storage == "E4m3" else stores) >= 4, (source, storage)
        assert "LDL" not in assembly and "STL" not in assembly, (source, storage, width)
