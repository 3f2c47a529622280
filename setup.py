"""Builds `longmem_kernels._C`: C++ kernels always, CUDA kernels when nvcc is present, also beside a CPU-only PyTorch.

LONGMEM_BUILD=auto|cpu|cuda|none chooses (default auto: cuda with nvcc, else cpu with a C++ compiler, else none; says
which). TORCH_CUDA_ARCH_LIST is honoured (default 8.0;9.0). LONGMEM_SANITIZE=address builds the C++ kernels with that
sanitizer (CONTRIBUTING.md). Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
WARNINGS = ["-Wall", "-Wno-unknown-pragmas"]
SANITIZE = os.environ.get("LONGMEM_SANITIZE", "")
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1"] if SANITIZE else []
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "longmem_kernels/_version.py").read_text())[1]
# The oldest PyTorch whose stable ABI the kernels use; a build made with any later one runs on all of them.
TORCH_TARGET = "0x020b000000000000"
# Vector instructions by source name: compiled always, chosen at run time.
SIMD_FLAGS = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]}


def torch_include() -> Path | None:
    """PyTorch's headers, without importing it. Under pip's build isolation `torch` cannot be imported, but the
    environment that is installed into still has it."""
    spec = importlib.util.find_spec("torch")
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    roots += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    return next((root / "include" for root in roots if (root / "include/torch/csrc/stable/library.h").exists()), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, candidates) if found), None)


def choose_build() -> str:
    """none, cpu or cuda; an explicit request that cannot be met is an error."""
    wanted = os.environ.get("LONGMEM_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"LONGMEM_BUILD must be auto, cpu, cuda or none, got {wanted!r}")
    if wanted == "none":
        return "none"
    missing = []
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        missing.append("a C++ compiler (c++, or the one CXX names)")
    if torch_include() is None:
        missing.append("PyTorch >= 2.11 (install torch first)")
    if missing and wanted == "auto":
        print(f"longmem: building no extension, missing: {', '.join(missing)}", file=sys.stderr)
        return "none"
    if missing:
        sys.exit(f"LONGMEM_BUILD={wanted} needs {' and '.join(missing)}")
    if wanted == "cuda" and find_nvcc() is None:
        sys.exit("LONGMEM_BUILD=cuda needs nvcc: put it on PATH or set CUDA_HOME")
    build = "cuda" if wanted != "cpu" and find_nvcc() else "cpu"
    print(f"longmem: building the extension for {build} (LONGMEM_BUILD={wanted})", file=sys.stderr)
    return build


def architectures() -> list[str]:
    """CUDA architectures as nvcc's numbers: "9.0a" becomes "90a"."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0"
    return [arch.replace(".", "").removesuffix("+PTX") for arch in re.split(r"[;\s]+", listed) if arch]


def nvcc_version(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    return match[1] if match else "unknown"


def cuda_library_dirs(nvcc: str) -> list[Path]:
    """Where nvcc's toolkit keeps its libraries. nvcc is asked: the one on PATH may be a wrapper somewhere else."""
    source = next(ROOT.glob("csrc/**/*.cu"))
    plan = subprocess.run([nvcc, "--dryrun", "-c", str(source)], capture_output=True, text=True, check=True).stderr
    match = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    root = Path(match[1]).resolve() if match else Path(nvcc).resolve().parent.parent
    return [folder for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib")) if folder.exists()]


class BuildKernels(build_ext):
    """build_ext that compiles .cu files with nvcc and kernels for several instruction sets with their own flags."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Objects made with other settings are not mixed: each choice has a folder, and linking is always done again.
        settings = "\n".join(str(vars(ext)) for ext in self.extensions or []) + " ".join(self.nvcc_flags())
        self.build_temp = f"{self.build_temp}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
        self.force = True

    def build_extension(self, ext: Extension) -> None:
        from pybind11.setup_helpers import ParallelCompile, naive_recompile

        self.compiler.src_extensions.append(".cu")
        compile_host = self.compiler._compile

        def compile_one(
            obj: str, src: str, ext_suffix: str, cc_args: list[str], flags: list[str], pp: list[str]
        ) -> None:
            if src.endswith(".cu"):
                self.spawn([find_nvcc(), "-c", src, "-o", obj, *pp, *self.nvcc_flags()])
                return
            level = Path(src).stem.rsplit("_", 1)[-1]
            simd = SIMD_FLAGS.get(level, []) if self.is_x86() else []
            compile_host(obj, src, ext_suffix, cc_args, [*flags, *simd], pp)

        self.compiler._compile = compile_one
        headers = max(path.stat().st_mtime for path in ROOT.glob("csrc/**/*.h"))

        def needs_recompile(obj: str, src: str) -> bool:
            return naive_recompile(obj, src) or os.stat(obj).st_mtime < headers

        with ParallelCompile("LONGMEM_BUILD_JOBS", needs_recompile=needs_recompile):
            super().build_extension(ext)

    @staticmethod
    def is_x86() -> bool:
        import platform

        return platform.machine().lower() in ("x86_64", "amd64")

    @staticmethod
    def nvcc_flags() -> list[str]:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures()]
        return ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", *targets]


def extensions(build: str) -> list[Extension]:
    if build == "none":
        return []
    import pybind11

    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
    macros = [("LONGMEM_VERSION", VERSION), ("TORCH_TARGET_VERSION", TORCH_TARGET)]
    include = torch_include()
    assert include is not None
    # Linked by name alone, found already loaded at run time.
    libraries, library_dirs = ["torch", "torch_cpu"], [str(include.parent / "lib")]
    if build == "cuda" and (include.parent / "lib/libtorch_cuda.so").exists():
        libraries.append("torch_cuda")  # where the current stream comes from
    if build == "cuda":
        nvcc = find_nvcc()
        assert nvcc is not None
        sources += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cu"))
        macros += [("LONGMEM_CUDA", "1"), ("USE_CUDA", "1"), ("LONGMEM_CUDA_VERSION", nvcc_version(nvcc))]
        macros += [("LONGMEM_CUDA_ARCHITECTURES", " ".join(architectures()))]
        # The static runtime: the extension loads on machines without CUDA.
        libraries += ["cudart_static", "rt", "dl", "pthread"]
        library_dirs += [str(folder) for folder in cuda_library_dirs(nvcc)]
    return [
        Extension(
            "longmem_kernels._C",
            sources=sources,
            include_dirs=[str(ROOT / "csrc"), str(include), pybind11.get_include()],
            define_macros=macros,
            extra_compile_args=["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", *WARNINGS, *SANITIZE_FLAGS],
            extra_link_args=["-Wl,--no-as-needed", *SANITIZE_FLAGS, *(f"-L{folder}" for folder in library_dirs)]
            + [f"-l{library}" for library in libraries],
            language="c++",
        )
    ]


setup(version=VERSION, ext_modules=extensions(choose_build()), cmdclass={"build_ext": BuildKernels})
