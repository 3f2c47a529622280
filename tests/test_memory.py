"""MemoryBank: the state of a walk through documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longmem import MemoryBank
from longmem.files import save_tensors


def bank(**options: Any) -> MemoryBank:
    return MemoryBank(**({"rows": 2, "kv_heads": 1, "head_dim": 4, "tokens": 16, "chunk_size": 4} | options))


def segment(tokens: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 1, tokens, 4), torch.randn(rows, 1, tokens, 4)


def test_what_was_written_is_retrieved() -> None:
    memory = bank()
    directions = torch.eye(4)[None, None, :3].expand(2, 1, 3, 4)
    memory.write(directions.repeat_interleave(4, 2), torch.randn(2, 1, 12, 4))
    ids, _ = memory.retrieve(directions, 1)
    assert ids[..., 0].tolist() == [[[0, 1, 2]], [[0, 1, 2]]]


def test_rows_are_apart_and_a_shared_memory_is_not() -> None:
    key, value = segment(8)
    key[1] = 100 * key[0]
    apart, shared = bank(), bank(scope="shared")
    for memory in (apart, shared):
        memory.write(key, value)
    assert apart.retrieve(key[:, :, :1], 4)[0].tolist()[0][0][0].count(-1) == 2
    assert shared.ring.count().tolist() == [4] and (shared.retrieve(key[:, :, :1], 4)[0] >= 0).all()


def test_layers_of_a_memory_are_apart() -> None:
    """Two layers in one bank are what two banks of one layer are."""
    key, value = torch.randn(2, 6, 8, 4), torch.randn(2, 6, 8, 4)
    query, local = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    both = bank(kv_heads=3, layers=2)
    both.write(key, value)
    for layer, heads in enumerate((slice(3), slice(3, 6))):
        one = bank(kv_heads=3)
        one.write(key[:, heads], value[:, heads])
        (ids, scores), (wanted_ids, wanted_scores) = both.retrieve(query, 2, layer=layer), one.retrieve(query, 2)
        assert torch.equal(ids, wanted_ids) and torch.equal(scores, wanted_scores)
        got = both.attend(query, local, local, ids, layer=layer, fusion="joint")
        assert torch.equal(got, one.attend(query, local, local, ids, fusion="joint"))
    with pytest.raises(ValueError, match="layer must be an integer of at least 0 and at most 1, got 2"):
        both.retrieve(query, 2, layer=2)


def test_a_write_waits_until_the_memory_is_next_used() -> None:
    """So that the backward pass of a read, which gathers again, finds what its forward pass found."""
    memory = bank(tokens=4)
    memory.write(*segment(4))
    query, (key, value) = torch.randn(2, 1, 3, 4, requires_grad=True), segment(3)
    ids, _ = memory.retrieve(query, 1)
    out = memory.attend(query, key, value, ids, fusion="joint")
    before = memory._ring.store.clone()
    memory.write(*segment(4))
    out.sum().backward()
    assert torch.equal(memory._ring.store, before)
    assert not torch.equal(memory.ring.store, before)


def test_reset_forgets_the_rows_named() -> None:
    memory = bank()
    memory.write(*segment(8))
    memory.reset(torch.tensor([True, False]))
    assert memory.ring.count().tolist() == [0, 2]
    memory.reset()
    assert memory.stats()["fill"] == 0.0


def test_a_shared_memory_cannot_forget_one_row() -> None:
    memory = bank(scope="shared")
    memory.reset(torch.tensor([True, True]))
    memory.reset(torch.tensor([False, False]))
    with pytest.raises(ValueError, match="shared"):
        memory.reset(torch.tensor([True, False]))


def test_stats_say_how_full_and_how_old() -> None:
    memory = bank()
    assert memory.stats() == {"fill": 0.0, "tokens": 0.0}
    key, value = segment(24)  # 6 chunks into 4 slots
    key[:, :, 8:12], key[:, :, 12:] = 1.0, -1.0
    memory.write(key, value)
    memory.retrieve(torch.ones(2, 1, 1, 4), 1)  # finds the oldest that is left: three chunks before the newest
    assert memory.stats() == {"fill": 1.0, "tokens": 16.0, "full_k": 1.0, "age": 12.0}
    memory.retrieve(key[:, :, :1], 5)
    assert memory.stats()["full_k"] == 0.0


def test_padding_is_not_remembered() -> None:
    memory = bank()
    mask = torch.tensor([[True] * 8, [True] * 3 + [False] * 5])
    memory.write(*segment(8), mask)
    assert memory.ring.cursor.tolist() == [8, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_saved_memory_comes_back_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    memory = bank(fingerprint="model/layer2", dtype=dtype)
    memory.write(*segment(10))
    memory.save(tmp_path / "memory.safetensors")
    again = MemoryBank.load(tmp_path / "memory.safetensors", "model/layer2")
    state = memory.state_dict()
    assert ("scale" in state) == (dtype == torch.float8_e4m3fn) and again.state_dict().keys() == state.keys()
    for name, tensor in state.items():
        assert again.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(again.state_dict()[name].float(), tensor.float())
    assert repr(again) == repr(memory)


def test_memory_of_another_model_is_refused(tmp_path: Path) -> None:
    bank(fingerprint="this/layer2").save(tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match=r"written by another model: it is this/layer2, wanted other/layer2"):
        MemoryBank.load(tmp_path / "memory.safetensors", "other/layer2")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.safetensors"
    bank(fingerprint="x").save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        bank(fingerprint="y").save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    memory, larger = bank(), bank(tokens=32)
    memory.write(*segment(8))
    before = memory.state_dict()
    with pytest.raises(ValueError, match="store must be"):
        memory.load_state_dict(larger.state_dict())
    assert all(torch.equal(memory.state_dict()[name], before[name]) for name in before)


def test_a_quantised_memory_needs_its_scale() -> None:
    memory = bank(dtype=torch.float8_e4m3fn)
    memory.write(*segment(8))
    state = memory.state_dict()
    del state["scale"]
    with pytest.raises(ValueError, match=r"scale must be torch\.float32 \(2, 1, 4, 2\), got nothing"):
        memory.load_state_dict(state)


def test_a_quantised_memory_finds_what_a_bfloat16_memory_finds_and_reads_nearly_the_same() -> None:
    """Centroids are means of the tokens before they are quantised; a number keeps four significant bits."""
    key, value = torch.randn(2, 2, 16, 4), torch.randn(2, 2, 16, 4)
    key[:, 1], value[:, 1] = 30 * key[:, 1], 30 * value[:, 1]  # scales of the two layers far apart
    query, local = torch.randn(2, 1, 3, 4), torch.zeros(2, 1, 3, 4)
    for layer, size in ((0, 1), (1, 30)):
        found, read = [], []
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            memory = bank(dtype=dtype, layers=2)
            memory.write(key, value)
            found.append(memory.retrieve(query, 2, layer=layer))
            ids = found[0][0]
            read.append(
                memory.attend(
                    query, local, local, ids, layer=layer, fusion="gated", gate=torch.full((1,), 20.0), scale=0.1 / size
                )
            )
            assert memory.stats()["fill"] == 1.0
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert 0 < (read[0] - read[1]).abs().max() < 2**-3 * value[:, layer].abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 15}, "multiple of chunk_size"),
        ({"tokens": 0}, "multiple of chunk_size"),
        ({"rows": 0}, "rows"),
        ({"scope": "world"}, "one of row, shared, got 'world'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bank(**options)


def test_a_write_that_does_not_fit_is_refused_at_once() -> None:
    memory = bank()
    with pytest.raises(ValueError, match=r"mask \[2, T\] must have T = 4 .*, got shape \(2, 3\)"):
        memory.write(*segment(4), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be one of bool, got float32"):
        memory.write(*segment(4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="must be on cpu like the memory, got meta"):
        memory.write(*(x.to("meta") for x in segment(4)))
    with pytest.raises(TypeError, match="rows must be one of bool, got int64"):
        memory.reset(torch.tensor([0, 1]))
    assert memory.ring.cursor.tolist() == [0, 0]


def test_a_file_that_is_no_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    with pytest.raises(ValueError, match="there is no file"):
        MemoryBank.load(path, "x")
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        MemoryBank.load(path, "x")
    save_tensors(path, {"a": torch.zeros(1)}, "something else", {})
    with pytest.raises(ValueError, match="not a longmem memory"):
        MemoryBank.load(path, "x")


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"key must be \[2, 1, T, 4\], got shape"):
        bank().write(*segment(4, rows=3))
    with pytest.raises(ValueError, match=r"rows must be \[2\], got shape \(1,\)"):
        bank().reset(torch.tensor([True]))
