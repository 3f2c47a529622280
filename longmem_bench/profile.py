"""Time of each part of a memory layer, by torch.profiler with named ranges; on CUDA they are NVTX ranges as well."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .case import Case
from .provider import Span, Unavailable
from .providers import providers
from .report import aligned
from .shapes import Shape

PARTS = ("score", "select", "score + select", "gather", "fuse", "gather + fuse", "write")
_PREFIX = "memory layer: "


@dataclass(frozen=True)
class Profile:
    """Milliseconds per step of each named part of one layer, and of the whole step."""

    name: str
    parts: dict[str, float]
    step: float
    trace: Path


def spans(device: torch.device) -> Span:
    """Named ranges for the profiler. On CUDA each waits for the device at its end, so that a range's time on the host
    is the device's time for it: the parts do not overlap then, and the step is a little slower than without."""

    @contextmanager
    def span(name: str) -> Iterator[None]:
        with record_function(_PREFIX + name):
            if device.type == "cuda":
                torch.cuda.nvtx.range_push(name)
            try:
                yield
            finally:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                    torch.cuda.nvtx.range_pop()

    return span


def profile_layer(name: str, run: Callable[[Span], object], device: torch.device, steps: int, trace: Path) -> Profile:
    """Profile `steps` calls of `run(span)` after two to warm up."""
    span = spans(device)
    for _ in range(2):
        run(span)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        for _ in range(steps):
            with span("step"):
                run(span)
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))
    # The same ranges show up a second time as annotations of the GPU's time line; the host's are complete.
    times = {
        event.key.removeprefix(_PREFIX): event.cpu_time_total / 1e3 / steps
        for event in found.key_averages()
        if event.key.startswith(_PREFIX) and event.cpu_time_total > 0
    }
    return Profile(name, {part: times[part] for part in PARTS if part in times}, times["step"], trace)


def profile_layers(shape: Shape, device: torch.device, *, steps: int, out: Path) -> str:
    """Profile every provider of "memory_layer" and return a table of where their time goes.

    Raises:
        ValueError: fewer than one step.
        WrongResult: a layer's result is wrong.
    """
    if steps < 1:
        raise ValueError(f"profile: steps must be at least 1, got {steps}")
    case = Case("memory_layer", shape, device)
    found, missing = [], []
    for provider in providers("memory_layer"):
        try:
            layer = case.admit(provider).layer
        except Unavailable as why:
            missing.append(f"{provider.name}: cannot run: {why}")
            continue
        assert layer is not None  # every provider of a layer has one
        file = re.sub(r"[^a-z0-9]+", "-", provider.name.lower()).strip("-") + ".json"
        found.append(profile_layer(provider.name, layer.step, device, steps, out / file))
    heading = f"memory layer [{shape.describe('memory_layer')} {shape.dtype_name}] on {device}, {steps} steps"
    traces = [f"{one.name}: {one.trace}" for one in found]
    return "\n".join([heading, *_table(found), *missing, "", "Chrome traces (chrome://tracing, Perfetto):", *traces])


def _table(found: list[Profile]) -> list[str]:
    lines = [["ms per step (share)", *(one.name for one in found)]]
    for part in PARTS:
        if any(part in one.parts for one in found):
            lines.append([part, *(_cell(one.parts.get(part), one.step) for one in found)])
    lines.append(["between the parts", *(_cell(one.step - sum(one.parts.values()), one.step) for one in found)])
    lines.append(["whole step", *(f"{one.step:.2f}" for one in found)])
    return aligned(lines)


def _cell(milliseconds: float | None, step: float) -> str:
    return "" if milliseconds is None else f"{milliseconds:.2f} ({milliseconds / step:.0%})"
