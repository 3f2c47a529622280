"""`python -m longmem_kernels.info [--json]`: versions, devices, and which implementations of each op run here.

Availability is what `_dispatch` decides when an op is called; this module only asks it and prints.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from . import _build_record, _dispatch, _extension
from ._version import __version__

DEVICE_TYPES = ("cpu", "cuda")


def implementations(op: str) -> tuple[str, ...]:
    """The names that `impl=` of `op` takes beside "auto", the preferred one first."""
    return _dispatch.PREFERENCE[op]


def why_not(op: str, impl: str, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why `impl` of `op` cannot run on this device type with this dtype and head dim; None when it can."""
    return _dispatch.why_unavailable(op, impl, device) or _dispatch.why_unsupported(impl, (dtype,), head_dim)


def report() -> dict[str, Any]:
    """Everything that `python -m longmem_kernels.info` prints, ready for JSON.

    Keys: `versions`; `paths` (where longmem, Python, PyTorch and the extension are); `extension` (its build information
    or `missing`: why there is none); `build` (what setup.py kept of the last build, see `_build_record`; empty when
    there was none); `devices` (`cpu`, and `cuda` with a list of `devices` and, when that is empty, the reason under
    `missing`); `ops` (per op `implementations`: name -> device type -> null when it runs there, else the reason why
    not, and `auto`: device type -> the choice).
    """
    absent = _why_no_cuda()
    missing = {} if absent is None else {"cuda": absent}
    return {
        "versions": {
            "longmem": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _installed_version("triton"),
        },
        "paths": {
            "longmem": str(Path(__file__).parent),
            "python": sys.executable,
            "torch": str(Path(torch.__file__).parent),
            "extension": getattr(_extension.extension, "__file__", None),
        },
        "build": _build_record.build_record(),
        "extension": _extension.build_info() or {"missing": _extension.load_error},
        "devices": {
            "cpu": {"model": _cpu_model(), "threads": torch.get_num_threads()},
            "cuda": {"devices": _cuda_devices()} if absent is None else {"devices": [], "missing": absent},
        },
        "ops": {op: _op_report(op, missing) for op in _dispatch.PREFERENCE},
    }


def _op_report(op: str, missing_devices: dict[str, str]) -> dict[str, Any]:
    implementations = {
        impl: {
            device: _dispatch.why_unavailable(op, impl, device) or missing_devices.get(device)
            for device in DEVICE_TYPES
        }
        for impl in _dispatch.PREFERENCE[op]
    }
    # For the dtype and a head dim that every kernel takes.
    auto = {
        device: _dispatch.choose(op, "auto", torch.device(device), (torch.float32,), head_dim=64)
        for device in DEVICE_TYPES
        if device not in missing_devices
    }
    return {"implementations": implementations, "auto": auto}


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _why_no_cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"no CUDA device: PyTorch {torch.__version__} was built without CUDA"
    return "no CUDA device: PyTorch finds none (no GPU, no driver, or CUDA_VISIBLE_DEVICES hides it)"


def _cuda_devices() -> list[dict[str, Any]]:
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": device.name, "capability": f"{device.major}.{device.minor}", "memory_bytes": device.total_memory}
        for device in found
    ]


def render(info: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{name:<10} {version or 'not installed'}{_in_brackets(info['paths'].get(name))}"
        for name, version in info["versions"].items()
    ]
    lines += [f"{'extension':<10} {_describe_extension(info['extension'])}", *_describe_build(info)]
    cpu, cuda = info["devices"]["cpu"], info["devices"]["cuda"]
    lines += [f"{'cpu':<10} {cpu['model']}, {cpu['threads']} threads"]
    lines += [
        f"{f'cuda:{index}':<10} {device['name']}, sm_{device['capability'].replace('.', '')},"
        f" {device['memory_bytes'] / 2**30:.0f} GiB"
        for index, device in enumerate(cuda["devices"])
    ]
    if "missing" in cuda:
        lines += [f"{'cuda':<10} {cuda['missing']}"]
    return "\n".join([*lines, "", *_table(info["ops"])])


def _describe_extension(extension: dict[str, str]) -> str:
    if "missing" in extension:
        return extension["missing"]
    cuda = f"CUDA {extension['cuda']} for sm {extension['cuda_architectures']}" if extension["cuda"] else "without CUDA"
    return f"{extension['version']}, {extension['compiler']}, SIMD {extension['simd']}, {cuda}"


def _describe_build(info: dict[str, Any]) -> list[str]:
    build = info["build"]
    if not build:
        return []
    found = [f"{key} {build[key]}" for key in ("python", "torch", "compiler", "nvcc") if build.get(key)]
    lines = [f"{'last build':<10} {build['result']} (LONGMEM_BUILD={build['wanted']}), {', '.join(found)}"]
    if build["result"] == "failed" and "missing" not in info["extension"]:
        lines += [f"{'':<10} {build['reason']}: the extension is of an earlier build"]
    return lines


def _in_brackets(path: str | None) -> str:
    return f" ({path})" if path else ""


def _table(ops: dict[str, Any]) -> list[str]:
    """One line per implementation; reasons are numbered and follow below."""
    reasons: list[str] = []
    lines = [f"{'op':<18}{'implementation':<16}" + "".join(f"{device:<8}" for device in DEVICE_TYPES)]
    for op, entry in ops.items():
        for impl, availability in entry["implementations"].items():
            cells = []
            for device in DEVICE_TYPES:
                reason = availability[device]
                if reason is not None and reason not in reasons:
                    reasons.append(reason)
                here = "auto" if entry["auto"].get(device) == impl else "yes"
                cells.append(here if reason is None else f"no [{reasons.index(reason) + 1}]")
            lines.append(f"{op:<18}{impl:<16}" + "".join(f"{cell:<8}" for cell in cells))
    lines += ["", "auto: available, and what impl='auto' takes for float32 and head dim 64"]
    return [line.rstrip() for line in lines] + [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m longmem_kernels.info", description="What runs here, and why not.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    as_json = parser.parse_args().json
    info = report()
    try:
        print(json.dumps(info, indent=2) if as_json else render(info), flush=True)
    except BrokenPipeError:  # the reader, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
