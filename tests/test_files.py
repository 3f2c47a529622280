"""Files that the package writes and reads: modes, full disks, and what is wrong with one in one line that names it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_longmem
from safetensors.torch import save_file

from longmem import LongMem, MemoryBank
from longmem.config import LongMemConfig
from longmem.console import load_run
from longmem.data.stream import SegmentStream
from longmem.files import Whole, check_fields, load_tensors, save_tensors, save_text
from longmem.training.metrics import MetricsLog
from longmem_bench import regression
from longmem_bench.results import Result
from longmem_kernels import Ring


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_have_the_mode_that_the_umask_gives(umask: None, tmp_path: Path) -> None:
    bank().save(tmp_path / "memory")
    tiny_longmem().save_pretrained(tmp_path / "model")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsLog(tmp_path, 1, False).close()
    Result({}, "2026-01-01", []).save(tmp_path / "result.json")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5 and {mode(path) for path in files} == {0o640}


FULL = """
import resource, signal, sys, torch
from longmem.files import save_tensors, save_text
from longmem.training.metrics import MetricsLog
from pathlib import Path
folder = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
saves = (
    lambda: save_tensors(folder / "tensors", {"x": torch.ones(10_000)}, "kind", {}),
    lambda: save_text(folder / "text", "x" * 10_000),
    lambda: MetricsLog(folder, 10_000, False),
)
for save in saves:
    try:
        save()
    except OSError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    save_tensors(tmp_path / "tensors", {"x": torch.zeros(3)}, "kind", {})
    (tmp_path / "text").write_text("old")
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1000)))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    told = run.stdout.splitlines()
    assert len(told) == 3 and run.stdout.count("File too large") == run.stdout.count("before is untouched") == 3
    assert all(f"{tmp_path}/{name}" in line for name, line in zip(("tensors", "text", "metrics"), told, strict=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- Memory ----------------------------------------------------------------------------------------------------------


def bank(**options: Any) -> MemoryBank:
    return MemoryBank(**({"rows": 2, "kv_heads": 1, "head_dim": 4, "tokens": 16, "chunk_size": 4} | options))


def edit(path: Path, header: dict[str, Any], change: Callable[[dict[str, Any]], object] | None = None) -> None:
    """Another header, and other tensors, in a sound memory file."""
    tensors, about = load_tensors(path, "longmem memory")
    if change is not None:
        change(tensors)
    save_file(tensors, path, {"longmem memory": json.dumps(about | header)})


ABSURD = [
    {"rows": 10**12}, {"rows": -2}, {"rows": 0}, {"rows": 1}, {"rows": 2.0}, {"rows": "2"}, {"rows": None},
    {"rows": True}, {"rows": float("nan")}, {"tokens": 10**15}, {"tokens": 2**70}, {"tokens": 15}, {"tokens": -16},
    {"chunk_size": 0},
    {"chunk_size": 2**31}, {"chunk_size": 3}, {"layers": 0}, {"layers": 2}, {"scope": "all"}, {"scope": 3},
    {"fingerprint": None}, {"world": 2},
]  # fmt: skip


@pytest.mark.parametrize("header", ABSURD, ids=str)
def test_a_header_that_makes_no_sense_is_refused_before_anything_is_allocated(
    header: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, new = tmp_path / "memory", Ring.new
    bank().save(path)
    edit(path, header)

    def no_memory(*, device: Any = "cpu", **sizes: Any) -> Ring:
        assert str(device) == "meta", f"allocates {sizes}"
        return new(device=device, **sizes)

    monkeypatch.setattr(Ring, "new", no_memory)
    with pytest.raises(ValueError, match=str(path)) as error:
        MemoryBank.load(path, "")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cursor", [-1, -50, -(10**11), -(2**63), 2**47, 2**48, 2**63 - 1])
def test_a_cursor_that_makes_no_sense_is_refused(cursor: int, tmp_path: Path) -> None:
    memory = bank()
    memory.write(*torch.randn(2, 2, 1, 10, 4))
    memory.save(tmp_path / "memory")
    edit(tmp_path / "memory", {}, lambda tensors: tensors["cursor"][1:].fill_(cursor))
    with pytest.raises(ValueError, match=rf"{tmp_path}/memory: .*cursor must lie in \[0, 2\^47\), got values from"):
        MemoryBank.load(tmp_path / "memory", "")
    before = memory.state_dict()
    with pytest.raises(ValueError, match="cursor must lie"):
        memory.load_state_dict(before | {"cursor": torch.tensor([10, cursor])})
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.state_dict().items())


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_a_scale_that_makes_no_sense_is_refused_and_not_written(scale: float, tmp_path: Path) -> None:
    memory, path = bank(dtype=torch.float8_e4m3fn), tmp_path / "memory"
    memory.save(path)
    edit(path, {}, lambda tensors: tensors["scale"].view(-1)[3:4].fill_(scale))
    with pytest.raises(ValueError, match=rf"{path}: .*scale must be finite and not negative, got 1 that"):
        MemoryBank.load(path, "")
    assert memory.ring.scale is not None
    memory.ring.scale.fill_(scale)
    with pytest.raises(ValueError, match="scale must be finite"):
        memory.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("store"), r"store must be \[R, L \* G, M, 2, C, D\] with L = 1, got nothing"),
        (lambda t: t.pop("tail"), r"tail must be torch.float32 \(2, 1, 2, 4, 4\), got nothing"),
        (lambda t: t.update(store=t["store"][0]), r"store must be .*got \(1, 4, 2, 4, 4\)"),
        (lambda t: t.update(store=t["store"].to(torch.int8)), "dtype must be float32"),
        (lambda t: t.update(centroid=t["centroid"].half()), "centroid must be torch.float32.*got torch.float16"),
        (lambda t: t.update(cursor=t["cursor"].float()), "cursor must be torch.int64"),
        (lambda t: t.update(more=torch.ones(1)), "there should be no 'more'"),
    ],
)
def test_tensors_that_are_no_memory_are_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    bank().save(tmp_path / "memory")
    edit(tmp_path / "memory", {}, change)
    with pytest.raises(ValueError, match=f"{tmp_path}/memory: .*{message}"):
        MemoryBank.load(tmp_path / "memory", "")


@pytest.mark.parametrize(
    "change",
    [{"memory_tokens": -8}, {"memory_layers": [99]}, {"sidenet": "twin"}, {"segment": "12"}, {"new": 1}],
    ids=str,
)
def test_a_model_whose_configuration_makes_no_sense_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    model, path = tiny_longmem(), tmp_path / "longmem.safetensors"
    model.save_pretrained(tmp_path)
    weights, about = load_tensors(path, "longmem model")
    save_tensors(path, weights, "longmem model", about | {"config": about["config"] | change})
    with pytest.raises(ValueError, match=rf"{path}: LongMemConfig.*{next(iter(change))}"):
        LongMem.from_pretrained(tmp_path, model.backbone)


# --- JSON ------------------------------------------------------------------------------------------------------------

NO_JSON = ["", "{", '{"backbone": "x"', "[" * 100_000, "1" * 5000, "\x00"]


@pytest.mark.parametrize("text", [*NO_JSON, "null", "[]", "{}", '{"config": {}, "backbone": 3, "fingerprint": ""}'])
def test_a_damaged_configuration_of_a_run_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json") as error:
        load_run(tmp_path, "cpu")
    assert "\n" not in str(error.value)


def test_configurations_are_read_strictly() -> None:
    good = LongMemConfig(memory_layers=(1,)).to_dict()
    assert LongMemConfig.from_dict(good) == LongMemConfig(memory_layers=(1,))
    assert LongMemConfig.from_dict({"memory_layers": [1]}) == LongMemConfig((1,), special_tokens="none")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"memory_layers": 1}, "memory_layers must be a tuple of integers, .* got 1"),
        ({"memory_layers": ["1"]}, r"memory_layers must be a tuple of integers, got \['1'\]"),
        ({"segment": "256"}, "segment must be an integer, at least 1, got '256'"),
        ({"segment": 25.5}, "segment must be an integer, at least 1, got 25.5"),
        ({"gate_start": float("nan")}, "gate_start must be a finite number, got nan"),
        (
            {"scope": None, "fusion": 1},
            "fusion must be one of joint, gated, got 1; scope must be one of row, shared, got None",
        ),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            LongMemConfig.from_dict(good | change)
    with pytest.raises(ValueError, match="memory_layers is missing"):
        LongMemConfig.from_dict({})


@pytest.mark.parametrize("text", [*NO_JSON, "[]", '{"ratios": 3}', '{"ratios": {"avx2": {"x": "1"}}}', '{"other": {}}'])
def test_damaged_stored_measurements_are_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "regression.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/regression.json"):
        regression.stored(tmp_path / "regression.json", "ratios", "avx2")


@pytest.mark.parametrize(
    "text", ["{}", '{"rows": {}}', '{"benchmarks": [3], "not_timed": []}', '{"rows": [{"op": 1}]}']
)
def test_a_damaged_result_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/result.json holds no benchmark result"):
        Result.load(tmp_path / "result.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"step": 1}\nnothing}\n{"step": 2}\n', "line 2 of .* is no JSON"),
        (b'{"step": 1}\n{"loss": 2.0}\n', "line 2 of .* step is missing"),
        (b'{"step": "1"}\n', "line 1 of .* step must be an integer"),
        (b"[1]\n", "line 1 of .* must be an object"),
        (b"\xff\xfe\n", "cannot be read"),
    ],
)
def test_damaged_metrics_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        MetricsLog(tmp_path, 1, False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_a_line_of_metrics_that_a_kill_cut_off_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    MetricsLog(tmp_path, 5, False)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "change",
    [
        {"lane_document": [0]}, {"lane_document": [0, 2]}, {"lane_document": [0, -2]}, {"lane_offset": [0, 41]},
        {"lane_offset": [0, -1]}, {"lane_offset": [0, 0, 0]}, {"taken": -1}, {"taken": 1.5}, {"epoch": None},
        {"shape": 3}, {"shape": {}}, {"lane_document": "01"},
    ],
    ids=str,
)  # fmt: skip
def test_a_place_that_is_none_is_refused_by_a_stream(change: dict[str, Any]) -> None:
    stream = SegmentStream([torch.arange(40), torch.arange(40)], rows=2, segment=8)
    next(iter(stream))
    before = stream.state_dict()
    with pytest.raises(ValueError, match=r"SegmentStream\.load_state_dict: the state"):
        stream.load_state_dict(before | change)
    assert stream.state_dict() == before


def test_fields_are_checked_all_at_once() -> None:
    wanted = {"n": Whole(1, 5), "x": float, "name": str | None, "more": dict, "many": [Whole()]}
    good = {"n": 3, "x": 1, "name": None, "more": {}, "many": [1, 2]}
    assert check_fields("it", good, wanted) is good
    bad = {"n": 10**5000, "x": 10**400, "name": 3, "more": [], "many": [1, -1], "new": 0}
    with pytest.raises(ValueError) as error:
        check_fields("it", bad, wanted)
    assert str(error.value) == (
        "it does not fit: n must be an integer from 1 to 5, got an integer beyond 64 bits; x must be a finite number,"
        " got an integer beyond 64 bits; name must be text or null, got 3; more must be an object, got list; many must"
        " be a list, each an integer from 0 to 9007199254740992, got list; 'new' is unknown"
    )


def test_text_replaces_a_file_whole(tmp_path: Path) -> None:
    save_text(tmp_path / "folder" / "text", "new")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["text"]
    assert (tmp_path / "folder" / "text").read_text() == "new"
