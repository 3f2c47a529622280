"""The instrument itself: the gate refuses wrong results, memory is really seen, reports say what they must."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longmem.bench import GateError, Provider, Shape, measure, plot, providers, table
from longmem.bench.inputs import WriteInputs
from longmem.bench.measure import Case, summarise
from longmem.bench.memory import peak_extra_bytes
from longmem.bench.providers import OPS, Prepared

SHAPE = Shape(B=2, T=12, H=4, G=2, D=32, M=40, C=4, K=5)
CPU = torch.device("cpu")


def reference(op: str) -> Provider:
    return next(provider for provider in providers(op) if provider.name == "longmem reference")


def spoilt(op: str, tensor: int, change: float) -> Provider:
    """The reference with one element of one result tensor changed."""

    def prepare(inputs: object) -> Prepared:
        right = reference(op).prepare(inputs)

        def collect(result: object) -> tuple[torch.Tensor, ...]:
            tensors = [part.clone() for part in right.collect(result)]
            tensors[tensor].view(-1)[0] += change
            return tuple(tensors)

        return Prepared(right.run, collect)

    return Provider("spoilt", prepare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [12, 1])
@pytest.mark.parametrize("op", OPS)
def test_gate_admits_every_provider_that_can_run(op: str, tokens: int, dtype: torch.dtype) -> None:
    rows = measure(op, replace(SHAPE, T=tokens, S=12, dtype=dtype), rounds=2)
    assert [row.provider for row in rows] == [provider.name for provider in providers(op)]
    for row in rows:
        assert (row.median_ms is None) == (row.reason is not None)
    assert any(row.ours and row.median_ms for row in rows)


@pytest.mark.parametrize(
    ("op", "tensor", "change"),
    [
        ("chunk_topk", 0, 1),  # another id with the old score
        ("chunk_topk", 1, 1e-3),
        ("chunk_topk", 1, float("nan")),
        ("memory_attention", 0, 1e-5),
        ("memory_attention", 0, float("nan")),
        ("memory_attention_backward", 2, 1e-4),
        ("memory_attention_backward", 4, 1e-3),
        ("ring_write", 0, 1e-3),
        ("ring_write", 1, 1e-3),
        ("ring_write", 3, 1),
    ],
)
def test_gate_refuses_one_wrong_element(op: str, tensor: int, change: float) -> None:
    with pytest.raises(GateError, match=f"{op}: 'spoilt' failed the correctness gate and is not timed"):
        measure(op, SHAPE, [reference(op), spoilt(op, tensor, change)], rounds=2)


def test_gate_refuses_an_id_returned_twice() -> None:
    def prepare(inputs: object) -> Prepared:
        right = reference("chunk_topk").prepare(inputs)

        def collect(result: object) -> tuple[torch.Tensor, ...]:
            ids, scores = right.collect(result)
            ids = ids.clone()
            ids[..., 1] = ids[..., 0]
            return ids, scores

        return Prepared(right.run, collect)

    with pytest.raises(GateError, match="returned twice"):
        measure("chunk_topk", SHAPE, [Provider("repeats", prepare)], rounds=2)


def test_peak_memory_sees_a_short_native_allocation() -> None:
    size = 200_000_000

    def call() -> None:
        torch.full((size // 4,), 1.0)  # freed before the call returns

    call()  # freed pages must not hide the next call's
    peak = peak_extra_bytes(call, CPU)
    if peak is None:
        pytest.skip("this system does not let a process reset its peak memory (/proc/self/clear_refs)")
    assert abs(peak - size) < 0.1 * size


def test_peak_memory_says_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("longmem.bench.memory._CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    rows = measure("ring_write", SHAPE, [reference("ring_write")], rounds=2)
    assert rows[0].peak_bytes is None
    assert "not measured" in table(rows)


def test_unavailable_providers_say_why() -> None:
    names = {provider.name: provider for provider in providers("chunk_topk")}
    assert "CUDA device" in (names["longmem triton"].unavailable(SHAPE, CPU) or "")
    assert names["faiss-gpu GpuIndexFlatIP per head"].unavailable(SHAPE, CPU) == "needs a CUDA device"
    huge = replace(SHAPE, B=4096, T=4096, H=64, M=2**24)
    assert "GB are free" in (names["longmem reference"].unavailable(huge, CPU) or "")
    with pytest.raises(ValueError, match="op must be one of"):
        providers("no_such_op")


def test_table_and_plot(tmp_path: Path) -> None:
    rows = measure("ring_write", SHAPE, rounds=3) + measure("chunk_topk", SHAPE, rounds=3)
    text = table(rows)
    assert "ring_write [B=2 T=12 G=2 D=32 M=40 C=4 float32]" in text
    assert "copy of the same bytes *" in text and "cannot run: " in text
    assert "1.00" in text and rows[0].commit in text
    picture = plot(rows, tmp_path / "bars.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no row has a time"):
        plot([row for row in rows if row.median_ms is None], tmp_path / "none.png")


def test_summary_of_rounds() -> None:
    assert summarise([0.003, 0.001, 0.002, 0.005, 0.004, 0.006])["median_ms"] == pytest.approx(3.5)
    assert summarise([float(n) for n in range(11)])["p20_ms"] == pytest.approx(2000)
    with pytest.raises(ValueError, match="at least 2 rounds"):
        summarise([1.0])


def test_providers_leave_the_shared_inputs_alone() -> None:
    case = Case("ring_write", SHAPE)
    assert isinstance(case.inputs, WriteInputs)
    before = case.inputs.ring.store.clone()
    for provider in providers("ring_write"):
        if provider.unavailable(SHAPE, CPU) is None:
            case.admit(provider).run()
    assert torch.equal(case.inputs.ring.store, before)
