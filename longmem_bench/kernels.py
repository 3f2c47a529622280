"""Times of single kernels by name, by torch.profiler: on CUDA of what ran on the device, on a CPU of PyTorch's ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from .report import aligned, milliseconds
from .timing import Call, synchronised

_CALLS = 5


@dataclass(frozen=True)
class KernelTime:
    """One kernel: launches and milliseconds per call of the operation."""

    name: str
    launches: float
    ms: float


def kernel_times(run: Call, device: torch.device, repeat: int = 1, calls: int = _CALLS) -> list[KernelTime]:
    """The kernels of `run`, which does the operation `repeat` times, longest first.

    On a CPU these are PyTorch's ops without what they call: several threads of one op count once.
    """
    on_gpu = device.type == "cuda"
    call = synchronised(run, device)
    call()  # what is compiled or allocated at first is not the kernel's time
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        for _ in range(calls):
            call()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in found.key_averages() if event.device_type == kind]
    each = calls * repeat
    times = [
        KernelTime(
            event.key,
            event.count / each,
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / each,
        )
        for event in events
    ]
    return sorted((one for one in times if one.ms > 0), key=lambda one: -one.ms)


def table(title: str, times: Sequence[KernelTime], most: int = 12) -> str:
    """The `most` longest and the sum of the others."""
    total = sum(one.ms for one in times)
    lines = [["kernel", "launches", "ms", "share"]]
    shown = list(times[:most])
    if len(times) > most:
        rest = times[most:]
        shown.append(KernelTime(f"{len(rest)} others", sum(one.launches for one in rest), sum(one.ms for one in rest)))
    for one in shown:
        lines.append([_short(one.name), f"{one.launches:g}", milliseconds(one.ms), f"{one.ms / total:.0%}"])
    lines.append(["all", f"{sum(one.launches for one in times):g}", milliseconds(total), ""])
    return "\n".join([title, *aligned(lines)])


def _short(name: str, most: int = 60) -> str:
    """Without the arguments of a C++ name."""
    name = name.removeprefix("void ").split("(", 1)[0]
    return name if len(name) <= most else name[: most - 3] + "..."
