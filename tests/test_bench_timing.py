"""The timers: what a device and its host take are told apart, on ones whose clocks are counters; kernels by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from longmem_bench import Row, table, timing
from longmem_bench.kernels import kernel_times
from longmem_bench.kernels import table as kernel_table
from longmem_bench.report import best_of_ours, brief, times_faster

CPU = torch.device("cpu")


class FakeDevice:
    """A device and a host whose clocks are counters, in milliseconds; a replay of a graph takes 0.125, and 0.25 more
    after a flush of the cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = self.host = 0.0
        self.flushed = False
        self.replays = 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.clock

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                device.replays += 1
                device.clock += 0.125 + 0.25 * device.flushed

        quiet = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "Event": Event, "CUDAGraph": Graph, "Stream": lambda: quiet, "current_stream": lambda: quiet,
            "synchronize": lambda *device: None, "stream": lambda one: nullcontext(),
            "device": lambda device: nullcontext(), "graph": lambda graph: nullcontext(),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(timing.torch, "empty", lambda *size, **options: SimpleNamespace(zero_=self.flush))
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host / 1e3)

    def flush(self) -> None:
        self.clock += 100.0
        self.flushed = True

    def call(self, device: float, host: float) -> Callable[[], None]:
        """Takes so long of either; half as long again on the device after a flush."""

        def run() -> None:
            self.clock += device * (1 + 0.5 * self.flushed)
            self.host += host
            self.flushed = False

        return run


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


def test_device_timer_flushes_before_cold_calls_alone(fake_device: FakeDevice) -> None:
    run = fake_device.call(device=0.0625, host=0.01)
    times = timing.cuda_times(run, CPU, 4, graphable=True)
    assert times.cold == [pytest.approx(0.09375e-3)] * 4
    assert times.warm == [pytest.approx(0.0625e-3)] * 4
    assert times.graph == [pytest.approx(0.375e-3)] * 4 and fake_device.replays == 4
    assert times.launch == pytest.approx(0.01e-3)
    assert timing.cuda_times(run, CPU, 2, graphable=False).graph is None


@pytest.mark.parametrize(("device", "host", "graph"), [(0.25, 0.35, True), (6.0, 5.0, True), (6.0, 0.35, False)])
def test_what_the_host_holds_up_is_timed_as_a_graph(
    fake_device: FakeDevice, device: float, host: float, graph: bool
) -> None:
    times = timing.cuda_times(fake_device.call(device, host), CPU, 3, graphable=True)
    assert (times.graph is not None) == graph and times.launch == pytest.approx(host / 1e3)


def test_what_cannot_be_captured_says_so(fake_device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nlong story")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    times = timing.cuda_times(fake_device.call(0.1, 0.1), CPU, 3, graphable=True)
    assert times.graph is None and times.no_graph == "operation not permitted when stream is capturing"


def timed(provider: str, median: float, graph: float | None, **options: object) -> Row:
    shared = {"op": "chunk_topk", "shape": "B=1 T=1", "dtype": "bfloat16", "device": "cuda", "device_name": "x"}
    numbers = {"threads": 1, "commit": "c", "p20_ms": 0.9 * median, "p80_ms": 1.1 * median, "host_ms": median}
    return Row(provider=provider, median_ms=median, graph_ms=graph, **{**shared, **numbers, **options})  # type: ignore[arg-type]


def test_rows_that_both_have_a_graph_are_compared_by_it() -> None:
    ours = timed("longmem triton", 0.36, 0.03, ours=True, launch_ms=0.33)
    rows = [ours, timed("torch", 0.2, 0.15, launch_ms=0.05), timed("faiss", 0.3, None)]
    assert [row.held_up for row in rows] == [True, False, False]
    text = table(rows)
    line = next(line for line in text.splitlines() if line.startswith("longmem triton"))
    header = next(line for line in text.splitlines() if line.startswith("provider"))
    cells = dict(zip(header.replace(" ms", "").replace(" - ", "-").replace("x best", "x").split()[1:],
                     line.removeprefix("longmem triton").replace(" - ", "-").split(), strict=False))  # fmt: skip
    assert (cells["graph"], cells["host"], cells["launch"]) == ("0.0300", "0.360", "0.330")
    assert cells["x"] == "0.83"  # of FAISS, as called: 0.3 / 0.36; of torch as graphs it is 5
    assert best_of_ours(rows) is ours and times_faster(ours, rows[1:2]) == pytest.approx(5)
    assert brief(ours) == "0.0300 ms in a graph, 0.360 by the host's clock"


def test_kernels_by_name_add_up() -> None:
    left = torch.randn(64, 64)
    times = kernel_times(lambda: [left @ left for _ in range(6)], CPU, repeat=2)
    product = next(one for one in times if one.name == "aten::mm")
    assert product.launches == 3 and 0 < product.ms <= sum(one.ms for one in times)
    assert [one.ms for one in times] == sorted((one.ms for one in times), reverse=True)
    text = kernel_table("a title", times, most=1).splitlines()
    assert text[0] == "a title" and text[1].split() == ["kernel", "launches", "ms", "share"]
    assert text[-1].startswith("all") and "others" in text[-2]
