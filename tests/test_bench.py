"""The instrument itself: the gate refuses wrong results, memory is really seen, rows say what was measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longmem_bench import Provider, Shape, WrongResult, measure, plot, plot_sweeps, table
from longmem_bench.case import Case
from longmem_bench.inputs import FusionInputs, WriteInputs, draw
from longmem_bench.peak_memory import peak_extra_bytes
from longmem_bench.plots import line_styles
from longmem_bench.provider import KERNEL_OPS, Prepared, Unavailable
from longmem_bench.providers import models, providers
from longmem_bench.roofline import Work, work
from longmem_bench.timing import summarise

SHAPE = Shape(B=2, T=12, H=4, G=2, D=32, M=40, C=4, K=5)
CPU = torch.device("cpu")
COMPILED = ("torch.compile composition", "FlexAttention, dense mask")


def reference(op: str) -> Provider:
    name = "longmem" if op == "memory_layer" else "longmem reference"
    return next(provider for provider in providers(op) if provider.name == name)


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
@pytest.mark.parametrize("sizes", [{}, {"T": 1, "S": 12}, {"R": 1}, {"R": 1, "T": 10, "G": 4}], ids=str)
@pytest.mark.parametrize("op", KERNEL_OPS)
def test_gate_admits_every_provider_that_can_run(op: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
    shown = [provider for provider in providers(op) if provider.name not in COMPILED]
    rows = measure(op, replace(SHAPE, dtype=dtype, **sizes), shown, rounds=2)  # type: ignore[arg-type]  # sizes
    assert [row.provider for row in rows] == [provider.name for provider in shown]
    for row in rows:
        assert (row.median_ms is None) == (row.reason is not None) and not row.wrong
    assert any(row.ours and row.median_ms for row in rows)
    # Of others at least one whole operation, but for FAISS where a batch would be no batch.
    assert any(not row.ours and not row.bound and row.median_ms for row in rows)


@pytest.mark.slow
def test_compiled_providers_pass_the_gate_too() -> None:
    shape = Shape(B=1, T=128, H=2, G=2, D=32, M=64, C=4, K=5)
    shown = [provider for provider in providers("memory_attention") if provider.name in COMPILED]
    rows = measure("memory_attention", shape, shown, rounds=2)
    assert len(rows) == len(COMPILED)
    for row in rows:
        assert (row.median_ms and "compiled in" in (row.note or "")) or "does not work here" in (row.reason or ""), row


@pytest.mark.parametrize("op", ["generate", "train_step"])
def test_whole_models_pass_their_gate(op: str) -> None:
    rows = measure(op, Shape(B=2, T=8, S=4, H=2, G=1, D=32, M=64, C=4, K=5, model="tiny"), rounds=2)
    assert all(row.median_ms for row in rows)
    assert [row.bound for row in rows] == [True, True, False]


def test_memory_of_a_model_is_filled_without_encoding_a_text_that_long(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = models.draw("train_step", Shape(B=2, T=8, H=2, G=1, D=32, M=2048, C=4, K=5, model="tiny"), CPU)
    encoded, encode = [], inputs.model.backbone.encode

    def counted(tokens: torch.Tensor, *options: Any) -> Any:
        encoded.append(tokens.numel())
        return encode(tokens, *options)

    monkeypatch.setattr(inputs.model.backbone, "encode", counted)
    ring, again = inputs.memory().ring, inputs.memory().ring
    assert torch.equal(ring.store, again.store) and ring.count().tolist() == [2048, 2048]
    assert sum(encoded) <= 2 * 256
    states = encode(inputs.past, inputs.model.config.memory_layers, ())
    spread = states.key.float().std(2)
    assert torch.allclose(ring.key.flatten(2, 3).float().std(2), spread, rtol=0.1)


@pytest.mark.parametrize(("op", "change"), [("generate", 1), ("train_step", 0.1)])
def test_whole_models_gate_refuses_another_result(op: str, change: float) -> None:
    right = next(provider for provider in providers(op) if provider.computes == "op")

    def prepare(inputs: object) -> Prepared:
        prepared = right.prepare(inputs)
        return replace(prepared, collect=lambda result: (prepared.collect(result)[0] + change,))

    shape = Shape(B=1, T=8, S=4, H=2, G=1, D=32, M=64, C=4, K=5, model="tiny")
    with pytest.raises(WrongResult, match=f"{op}: 'spoilt' failed the correctness check"):
        measure(op, shape, [Provider("spoilt", prepare)], rounds=2)


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
        ("memory_layer", 0, 1e-3),
        ("memory_layer", 1, 1e-3),
    ],
)
def test_gate_refuses_one_wrong_element(op: str, tensor: int, change: float) -> None:
    with pytest.raises(WrongResult, match=f"{op}: 'spoilt' failed the correctness check and is not timed"):
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

    with pytest.raises(WrongResult, match="returned twice"):
        measure("chunk_topk", SHAPE, [Provider("repeats", prepare)], rounds=2)


def test_providers_take_turns_and_one_that_fails_in_its_turn_leaves_the_others_timed() -> None:
    calls: list[str] = []

    def noted(name: str, fails_after: int) -> Provider:
        def prepare(inputs: object) -> Prepared:
            right = reference("chunk_topk").prepare(inputs)

            def run() -> object:
                calls.append(name)
                if calls.count(name) > fails_after:
                    raise RuntimeError("worn out")
                return right.run()

            return Prepared(run, right.collect)

        return Provider(name, prepare)

    rows = measure("chunk_topk", SHAPE, [noted("a", 100), noted("b", 6), noted("c", 100)], rounds=8, strict=False)
    # The check and the weighing, then a warm-up and two rounds a turn; b breaks off in its second turn.
    assert "".join(calls) == "aabbcc" + "aaabbbccc" + "aaabbccc" + "aaaccc" * 2
    assert [row.rounds for row in rows] == [8, 0, 8]
    assert rows[1].wrong and rows[1].reason == "RuntimeError: worn out"


def test_a_wrong_row_says_so_where_nothing_is_raised() -> None:
    rows = measure("chunk_topk", SHAPE, [spoilt("chunk_topk", 1, 1.0), reference("chunk_topk")], rounds=2, strict=False)
    assert rows[0].wrong and "refused by the correctness check: scores: worst error" in (rows[0].reason or "")
    assert rows[0].median_ms is None and rows[1].median_ms
    assert "spoilt: refused by the correctness check" in table(rows)


def test_what_others_raise_is_a_reason_and_what_ours_raise_an_error() -> None:
    def fail(inputs: object) -> Prepared:
        raise RuntimeError("first line\nsecond")

    case = Case("ring_write", SHAPE)
    with pytest.raises(Unavailable, match=r"^RuntimeError: first line$"):
        case.admit(Provider("theirs", fail))
    with pytest.raises(RuntimeError, match="second"):
        case.admit(Provider("ours", fail, ours=True))


def test_search_by_distance_serves_inner_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashLib's adapter, with a search by squared distance in its place that is exact for the inputs' dtype."""

    def flash_knn(query: torch.Tensor, stored: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert query.is_contiguous() and stored.is_contiguous() and query.dtype == stored.dtype
        distance = (query.double().unsqueeze(2) - stored.double().unsqueeze(1)).square().sum(-1)
        found = distance.topk(k, largest=False)
        return found.values.float(), found.indices.int()

    monkeypatch.setitem(sys.modules, "flashlib", SimpleNamespace(flash_knn=flash_knn))
    for shape in (SHAPE, replace(SHAPE, R=1)):
        case = Case("chunk_topk", replace(shape, dtype=torch.bfloat16))
        found = [provider for provider in providers("chunk_topk") if provider.name.startswith("flashlib")]
        assert [provider.computes for provider in found] == ["op", "distance"]
        for provider in found:
            case.admit(replace(provider, unavailable=lambda shape, device: None))


def test_drawn_ids_are_distinct_and_valid() -> None:
    inputs = draw("memory_attention", SHAPE, CPU)
    assert isinstance(inputs, FusionInputs)
    ids = inputs.chunk_ids.sort(-1).values
    assert bool((ids[..., 1:] > ids[..., :-1]).all()) and int(ids.min()) >= 0 and int(ids.max()) < SHAPE.M


def test_work_counts_what_must_move_and_multiply() -> None:
    shape = Shape(B=2, T=3, H=4, G=2, D=8, M=100, C=4, K=5, S=7)
    queries, found = 2 * 4 * 3, 2 * 4 * 3 * 5
    assert work("chunk_topk", shape) == Work(4 * 8 * (queries + 2 * 2 * 100) + 8 * found, 2 * 8 * queries * 100)
    # Every query sees 5, 6 and 7 local keys, and 20 in memory; two heads share a ring's head: 30 chunks at most.
    tokens = 2 * queries * 8 + 2 * 2 * 2 * 7 * 8 + 2 * (2 * 2 * 30) * 4 * 8
    assert work("memory_attention", shape) == Work(4 * tokens + 4 * found, 4 * 8 * (2 * 4 * 18 + 2 * 4 * 3 * 20))
    moved = 2 * 2 * 2 * 8 * 8 * 2 + 2 * 2 * 2 * 8
    assert work("ring_write", replace(shape, T=8, S=0)) == Work(4 * moved, 2 * 2 * 8 * 8)
    assert work("generate", shape) is None


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
    monkeypatch.setattr("longmem_bench.peak_memory._CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    rows = measure("ring_write", SHAPE, [reference("ring_write")], rounds=2)
    assert rows[0].peak_bytes is None
    assert "not measured" in table(rows)


def test_unavailable_providers_say_why() -> None:
    names = {provider.name: provider for provider in providers("chunk_topk")}
    assert "CUDA device" in (names["longmem triton"].unavailable(SHAPE, CPU) or "")
    assert names["faiss-gpu GpuIndexFlatIP per head"].unavailable(SHAPE, CPU) == "needs a CUDA device"
    huge = replace(SHAPE, B=4096, T=4096, H=64, M=2**24)
    assert "a specification" in (names["longmem reference"].unavailable(huge, CPU) or "")
    assert "GB are free" in (names["torch matmul + topk"].unavailable(huge, CPU) or "")
    with pytest.raises(ValueError, match="op must be one of"):
        providers("no_such_op")


def test_table_and_plot(tmp_path: Path) -> None:
    rows = measure("ring_write", SHAPE, rounds=3) + measure("chunk_topk", SHAPE, rounds=3)
    text = table(rows)
    assert "ring_write [B=2 T=12 G=2 D=32 M=40 C=4 float32]" in text
    assert "copy of the same bytes *" in text and "longmem triton: cannot run: " in text
    assert "ms at the machine's" in text and "x best" in text and rows[0].commit in text
    best = min(row.median_ms or 0.0 for row in rows[:5] if not row.ours and not row.bound and row.median_ms)
    line = next(line for line in text.splitlines() if line.startswith("longmem cpp"))
    ours = next(row for row in rows if row.provider == "longmem cpp")
    assert line.endswith(f"{best / (ours.median_ms or 0.0):.2f}")
    picture = plot(rows, tmp_path / "bars.png", date="2026-01-02").read_bytes()
    assert picture.startswith(b"\x89PNG") and b"2026-01-02" in picture
    with pytest.raises(ValueError, match="no row has a time"):
        plot([row for row in rows if row.median_ms is None], tmp_path / "none.png")


def test_sweeps_become_one_table_and_one_picture(tmp_path: Path) -> None:
    shown = [provider for provider in providers("chunk_topk") if not provider.unavailable(SHAPE, CPU)]
    rows = [
        row for size in (40, 80) for row in measure("chunk_topk", replace(SHAPE, M=size), shown, rounds=2, sweep="M")
    ]
    text = table(rows)
    assert "chunk_topk, M [B=2 T=12 H=4 G=2 D=32 K=5 M=... float32]" in text
    header = next(line for line in text.splitlines() if line.startswith("ms"))
    assert header.split() == ["ms", "M=40", "M=80"]
    assert len(next(line for line in text.splitlines() if line.startswith("ours x best")).split()) == 5
    assert plot_sweeps(rows, tmp_path / "lines.png").stat().st_size > 0
    with pytest.raises(ValueError, match="no sweep has a time"):
        plot_sweeps([replace(row, sweep=None) for row in rows], tmp_path / "none.png")


def test_no_two_lines_of_a_sweep_look_alike() -> None:
    names = [f"longmem {name}" for name in ("cpp", "triton", "reference", "c++")] + [f"other {i}" for i in range(20)]
    looks = [(style["color"], style["marker"]) for style in line_styles(names).values()]
    assert len(set(looks)) == len(names)
    assert len({colour for colour, _ in looks[:8]}) == 8


def test_summary_of_rounds() -> None:
    assert summarise([0.003, 0.001, 0.002, 0.005, 0.004, 0.006])["median_ms"] == pytest.approx(3.5)
    assert summarise([float(n) for n in range(11)])["p20_ms"] == pytest.approx(2000)
    assert summarise([1.0] * 199)["p99_ms"] is None
    many = summarise([n / 1000 for n in range(1001)])
    assert (many["p80_ms"], many["p95_ms"], many["p99_ms"]) == (
        pytest.approx(800),
        pytest.approx(950),
        pytest.approx(990),
    )
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


@pytest.mark.gpu
@pytest.mark.parametrize("op", KERNEL_OPS)
def test_cuda_rows_have_cold_warm_and_host_times(op: str) -> None:
    shape = Shape(B=2, T=128, H=4, G=4, D=64, M=512, K=16, dtype=torch.bfloat16)
    shown = [provider for provider in providers(op) if provider.unswept is None]
    rows = measure(op, shape, shown, rounds=3, device="cuda", strict=False)
    assert not [row for row in rows if row.wrong]
    for row in rows:
        if row.median_ms is not None:
            assert row.warm_ms and row.host_ms and row.host_ms > 0.5 * row.warm_ms
    assert any(row.ours and row.graph_ms for row in rows) or op.endswith("_backward")
