"""Builds `longmem_kernels._C`: C++ kernels always, CUDA kernels when nvcc is present, also beside a CPU-only PyTorch.

LONGMEM_BUILD=auto|cpu|cuda|none chooses (default auto: cuda with nvcc, else cpu). What it needs and does not find, and
what does not compile, ends the installation with one line that says so: only LONGMEM_BUILD=none installs without
kernels. `_build.json` beside the package keeps what was built, with what, and why not, for `longmem_kernels.info`.

CXX, CXXFLAGS, CPPFLAGS, LDFLAGS, CUDA_HOME and TORCH_CUDA_ARCH_LIST (default 8.0;9.0) are honoured; LONGMEM_BUILD_JOBS
sets how many compilers run at once. LONGMEM_SANITIZE=address builds the C++ kernels with that sanitizer
(CONTRIBUTING.md). Nothing is downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
PACKAGE = "longmem_kernels"
RECORD = "_build.json"
LOG = ROOT / "build" / "longmem_kernels.log"
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / PACKAGE / "_version.py").read_text())[1]
# The oldest PyTorch whose stable ABI the kernels use; a build made with any later one runs on all of them.
OLDEST_TORCH, TORCH_TARGET = (2, 11), "0x020b000000000000"
# Python's limited API of 3.10: one binary for every later Python. Python without the GIL has none.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
# Integers wrap around on overflow, as in Python's own extensions.
COMPILE_FLAGS = ["-O3", "-g0", "-std=c++17", "-pthread", "-fPIC", "-fwrapv", "-fvisibility=hidden", "-DNDEBUG"]
WARNINGS = ["-Wall", "-Wno-unknown-pragmas"]
SANITIZE = os.environ.get("LONGMEM_SANITIZE", "")
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1"] if SANITIZE else []
# Vector instructions by source name: compiled always, chosen at run time.
SIMD_FLAGS = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]}


class BuildError(BaseError):
    """Ends setup.py with one line instead of a traceback."""


# --- what is on this machine -----------------------------------------------------------------------------------------


class Torch(NamedTuple):
    version: str
    root: Path


def torch_folders() -> list[Path]:
    """Where PyTorch may lie. Under pip's build isolation `torch` cannot be imported, but the environment that is
    installed into still has it."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(folder) / "torch" for folder in (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"))]
    if site.ENABLE_USER_SITE:
        folders.append(Path(site.getusersitepackages()) / "torch")
    return list(dict.fromkeys(folders))


def find_torch() -> Torch | None:
    """PyTorch of any version, without importing it."""
    for root in torch_folders():
        version = root / "version.py"
        match = re.search(r"__version__ = ['\"](.+)['\"]", version.read_text()) if version.exists() else None
        if match:
            return Torch(match[1], root)
    return None


def other_python() -> str:
    """A remark on the `python3` on PATH when it is another installation and has PyTorch: pip often belongs to a Python
    that nobody had in mind."""
    found = shutil.which("python3")
    if found is None:
        return ""
    code = "import platform, sys; from importlib.util import find_spec as find"
    code += "; print(sys.prefix, platform.python_version(), find('torch'))"
    run = subprocess.run([found, "-c", code], capture_output=True, text=True)
    prefix, version, spec = run.stdout.strip().split(" ", 2) if run.returncode == 0 else (sys.prefix, "", "None")
    if prefix == sys.prefix or spec == "None":
        return ""
    return f" `python3` is another installation ({found}, {version}) and has PyTorch: `python3 -m pip` installs there."


def why_no_torch(torch: Torch | None) -> str | None:
    if torch is None:
        places = ", ".join(str(folder.parent) for folder in torch_folders())
        pip = f"{sys.executable} -m pip install torch"
        return (
            f"PyTorch, which the kernels are built against, is not installed for {this_python()}; looked in {places}."
            f" `{pip}` comes first (without a GPU `{pip} --index-url https://download.pytorch.org/whl/cpu`)."
            " If the installer made that Python for the build alone, as uv does, it wants --no-build-isolation instead,"
            f" with setuptools installed.{other_python()}"
        )
    numbers = re.match(r"(\d+)\.(\d+)", torch.version)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        return f"PyTorch 2.11 or later is needed, {torch.root} is {torch.version}, of {this_python()}.{other_python()}"
    return None


def this_python() -> str:
    return f"{sys.executable} ({platform.python_version()})"


def find_compiler() -> list[str] | None:
    wanted = shlex.split(os.environ.get("CXX", ""))
    candidates = [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, candidates) if found), None)


@functools.cache
def output_of(*command: str) -> str:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return run.stdout.strip()


def first_line(*command: str) -> str:
    return output_of(*command).partition("\n")[0]


def nvcc_version(nvcc: str) -> str:
    match = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    return match[1] if match else "unknown"


def architectures() -> list[str]:
    """CUDA architectures as nvcc's numbers: "9.0a" becomes "90a"."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0"
    return [arch.replace(".", "").removesuffix("+PTX") for arch in re.split(r"[;\s]+", listed) if arch]


def cuda_library_dirs(nvcc: str) -> list[Path]:
    """Where nvcc's toolkit keeps its libraries. nvcc is asked: the one on PATH may be a wrapper somewhere else."""
    source = next(ROOT.glob("csrc/**/*.cu"))
    match = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-c", str(source)), re.MULTILINE)
    root = Path(match[1]).resolve() if match else Path(nvcc).resolve().parent.parent
    return [folder for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib")) if folder.exists()]


# --- what was decided and what came of it ----------------------------------------------------------------------------


def wanted_build() -> str:
    wanted = os.environ.get("LONGMEM_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"LONGMEM_BUILD must be auto, cpu, cuda or none, got {wanted!r}")
    return wanted


class Plan(NamedTuple):
    """What is built with what."""

    build: str
    torch: Torch
    compiler: list[str]
    nvcc: str | None

    @classmethod
    def make(cls, record: dict[str, object]) -> Plan:
        """Decide, and write what was found into `record`.

        Raises:
            BuildError: something that the build needs is not there.
        """
        wanted, torch, compiler = wanted_build(), find_torch(), find_compiler()
        nvcc = find_nvcc() if wanted in ("auto", "cuda") else None
        record["torch"] = f"{torch.version} ({torch.root})" if torch else None
        record["compiler"] = f"{shlex.join(compiler)} ({first_line(*compiler, '--version')})" if compiler else None
        record["nvcc"] = f"{nvcc} ({nvcc_version(nvcc)})" if nvcc else None
        missing = [why_no_torch(torch)]
        if compiler is None:
            named = os.environ.get("CXX")
            sought = f"{named}, which CXX names, is not" if named else "none of c++, g++ and clang++ is"
            missing.append(f"a C++ compiler is needed, {sought} on PATH.")
        if sys.platform != "linux":
            missing.append(f"the kernels are built on Linux alone, this is {sys.platform}.")
        if wanted == "cuda" and nvcc is None:
            missing.append("LONGMEM_BUILD=cuda needs nvcc: put it on PATH or set CUDA_HOME.")
        if any(missing):
            raise BuildError(" ".join(filter(None, missing)))
        assert torch is not None and compiler is not None
        return cls("cuda" if nvcc else "cpu", torch, compiler, nvcc)

    def host_flags(self) -> list[str]:
        macros = {"LONGMEM_VERSION": VERSION, "TORCH_TARGET_VERSION": TORCH_TARGET}
        if LIMITED_API:
            macros["Py_LIMITED_API"] = "0x030a0000"
        if self.nvcc:
            macros |= {"LONGMEM_CUDA": "1", "USE_CUDA": "1", "LONGMEM_CUDA_VERSION": nvcc_version(self.nvcc)}
            macros["LONGMEM_CUDA_ARCHITECTURES"] = " ".join(architectures())
        folders = [ROOT / "csrc", self.torch.root / "include", sysconfig.get_path("include")]
        flags = [f"-D{name}={value}" for name, value in macros.items()] + [f"-I{folder}" for folder in folders]
        flags += [*WARNINGS, *SANITIZE_FLAGS]
        return [*COMPILE_FLAGS, *flags, *environment_flags("CPPFLAGS"), *environment_flags("CXXFLAGS")]

    def cuda_flags(self) -> list[str]:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures()]
        flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        return [*flags, *targets, f"-I{ROOT / 'csrc'}"]

    def compile_command(self, source: str) -> list[str]:
        if source.endswith(".cu"):
            assert self.nvcc is not None
            return [self.nvcc, *self.cuda_flags()]
        level = Path(source).stem.rsplit("_", 1)[-1]
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        return [*self.compiler, *self.host_flags(), *(SIMD_FLAGS.get(level, []) if x86 else [])]

    def link_command(self, objects: list[str], target: str) -> list[str]:
        # By name alone, found already loaded at run time. libtorch brings libtorch_cuda, where the current stream
        # comes from, when PyTorch has one; naming that would bind the extension to PyTorch built for CUDA.
        flags = ["-shared", "-pthread", *SANITIZE_FLAGS, *environment_flags("CXXFLAGS"), *environment_flags("LDFLAGS")]
        libraries = ["-Wl,--no-as-needed", f"-L{self.torch.root / 'lib'}", "-ltorch", "-ltorch_cpu"]
        if self.nvcc:
            # The static runtime: the extension loads on machines without CUDA.
            libraries += [f"-L{folder}" for folder in cuda_library_dirs(self.nvcc)]
            libraries += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        return [*self.compiler, *flags, "-o", target, *objects, *libraries]


def environment_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def jobs() -> int:
    wanted = os.environ.get("LONGMEM_BUILD_JOBS") or str(len(os.sched_getaffinity(0)))
    if not wanted.isdecimal() or int(wanted) == 0:
        raise BuildError(f"LONGMEM_BUILD_JOBS must be a positive number, got {wanted!r}.")
    return int(wanted)


def new_record() -> dict[str, object]:
    return {"result": "failed", "wanted": wanted_build(), "python": this_python()}


def keep_record(record: dict[str, object], build_lib: str | None) -> None:
    """Write `record` into the package that was built: the copy in `build_lib`, or None: the sources themselves."""
    folder = Path(build_lib) / PACKAGE if build_lib else ROOT / PACKAGE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    if build_lib and not extensions_in(ROOT / PACKAGE):
        (ROOT / PACKAGE / RECORD).unlink(missing_ok=True)  # of an earlier failure


def extensions_in(folder: Path) -> list[Path]:
    return list(folder.glob("_C.*so"))


def remove_extensions(folder: Path) -> None:
    """An extension of an earlier build, or for another Python, would be found instead of this one."""
    for old in extensions_in(folder):
        old.unlink()


# --- the build itself ------------------------------------------------------------------------------------------------

ERROR_LINE = re.compile(r"\berror\b|undefined reference|cannot find -l|nvcc fatal|not found", re.IGNORECASE)


def call(command: Sequence[str]) -> None:
    """Run a compiler or linker.

    Raises:
        BuildError: it failed; the first line that tells of an error is in the message, all of them are in the log.
    """
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.stdout:
        LOG.parent.mkdir(parents=True, exist_ok=True)
        with LOG.open("a") as log:
            log.write(f"$ {shlex.join(command)}\n{run.stdout}\n")
        print(run.stdout, file=sys.stderr, flush=True)
    if run.returncode != 0:
        lines = [line.strip() for line in run.stdout.splitlines() if line.strip()]
        told = next(filter(ERROR_LINE.search, lines), lines[0] if lines else f"exit status {run.returncode}")
        raise BuildError(f"{Path(command[0]).name} failed, {told.rstrip('.')}.")


class BuildKernels(build_ext):
    """build_ext that compiles .cu files with nvcc, and kernels for several instruction sets with their own flags."""

    def run(self) -> None:
        record = new_record()
        LOG.unlink(missing_ok=True)
        try:
            self.plan = Plan.make(record)
            told = f"for {self.plan.build} (LONGMEM_BUILD={record['wanted']}) with {record['python']}"
            found = [f"{name} {record[name]}" for name in ("torch", "compiler", "nvcc") if record[name]]
            print(f"longmem: building {', '.join([told, *found])}", file=sys.stderr, flush=True)
            super().run()
        except BuildError as error:
            keep_record({**record, "reason": str(error), "log": str(LOG) if LOG.exists() else None}, None)
            without = "LONGMEM_BUILD=none installs without kernels"
            if "nvcc" in str(error):
                without = f"LONGMEM_BUILD=cpu leaves the CUDA kernels out, {without}"
            raise BuildError(f"longmem was not built: {error} ({without}.)") from None
        in_place = self.editable_mode or self.inplace
        keep_record({**record, "result": self.plan.build}, None if in_place else self.build_lib)

    def build_extension(self, ext: Extension) -> None:
        sources = [source for source in ext.sources if self.plan.nvcc or not source.endswith(".cu")]
        with ThreadPoolExecutor(jobs()) as pool:
            futures = [pool.submit(self.compile, source) for source in sources]
            try:
                objects = [future.result() for future in futures]
            except BuildError:
                pool.shutdown(cancel_futures=True)
                raise
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_extensions(target.parent)
        call(self.plan.link_command(objects, str(target)))

    def compile(self, source: str) -> str:
        """Compile one source, unless its object is newer than it and all headers. Objects made by other commands or
        with other versions lie in other folders."""
        command = self.plan.compile_command(source)
        made_by = "\n".join([*command, self.plan.torch.version, output_of(command[0], "--version")])
        folder = ROOT / "build" / "objects" / hashlib.sha256(made_by.encode()).hexdigest()[:8]
        target = folder / f"{source.replace(os.sep, '-')}.o"
        newest = max(path.stat().st_mtime for path in [ROOT / source, *ROOT.glob("csrc/**/*.h")])
        if not target.exists() or target.stat().st_mtime < newest:
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(f".{os.getpid()}")
            call([*command, "-c", str(ROOT / source), "-o", str(unfinished)])
            unfinished.replace(target)
        return str(target)

    def copy_extensions_to_source(self) -> None:
        remove_extensions(ROOT / PACKAGE)
        super().copy_extensions_to_source()


class InstallWithoutKernels(build_py):
    """LONGMEM_BUILD=none, which is remembered so that nobody looks for another cause."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            remove_extensions(ROOT / PACKAGE)
        keep_record({**new_record(), "result": "none"}, None if self.editable_mode else self.build_lib)


without_kernels = wanted_build() == "none"
sources = sorted(str(path.relative_to(ROOT)) for kind in ("cpp", "cu") for path in ROOT.glob(f"csrc/**/*.{kind}"))
setup(
    version=VERSION,
    ext_modules=[] if without_kernels else [Extension(f"{PACKAGE}._C", sources, py_limited_api=LIMITED_API)],
    cmdclass={"build_ext": BuildKernels, **({"build_py": InstallWithoutKernels} if without_kernels else {})},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API and not without_kernels else {},
)
