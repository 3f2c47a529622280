"""Environment of a measurement: versions, commit, device, threads."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from longmem_kernels import __version__
from longmem_kernels.info import report


@cache
def commit() -> str:
    """Short git commit of this source tree, "+" when files differ from it, but for results that are not yet committed;
    "unknown" outside a repository."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie inside some other project's repository.
        if git("rev-parse", "--show-prefix") != f"{package.name}/":
            return "unknown"
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@cache
def device_name(device: str) -> str:
    """The processor's or the GPU's own name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, str]:
    """Everything above as text, for a results file."""
    return {
        "longmem": __version__,
        "commit": commit(),
        "device": device_name(str(device)),
        "threads": str(torch.get_num_threads()),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": _version("triton"),
        "faiss": _version("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss"),
        "compiler": report()["extension"].get("compiler", "no extension"),
    }


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return f"{package} {version(package)}" if len(packages) > 1 else version(package)
        except PackageNotFoundError:
            continue
    return "not installed"
