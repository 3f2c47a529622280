"""Cached states: they are the states, computed once, and only those at hand are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, learnable_longmem
from safetensors.torch import load_file, save_file

from longmem import LongMem
from longmem.data.stream import SegmentStream
from longmem.states import StateCache, encode_now

SEGMENT = 6


def fresh_model(**options: Any) -> LongMem:
    torch.manual_seed(7)
    return learnable_longmem(segment=SEGMENT, **options)


def random_documents(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(0, VOCABULARY, (length,)) for length in lengths]


@pytest.mark.parametrize("sidenet", ["none", "exact"])
def test_cached_states_are_the_states(sidenet: str, tmp_path: Path) -> None:
    model = fresh_model(sidenet=sidenet, reduction=1)
    documents = random_documents(50, 12, 31)
    live, cache = encode_now(model), StateCache(model, documents, tmp_path, rows=2, precision="float32")
    seen: list[int] = []
    cache.fill(seen.append)
    assert sum(seen) == 50 + 12 + 31
    for batch in SegmentStream(documents, rows=2, segment=SEGMENT):
        now, kept = live(batch), cache(batch)
        mask = batch.mask[:, None, :, None]
        torch.testing.assert_close(kept.key * mask, now.key * mask, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(kept.value * mask, now.value * mask, atol=1e-5, rtol=1e-4)
        for depth, hidden in now.hidden.items():
            expected = hidden * batch.mask[..., None]
            torch.testing.assert_close(kept.hidden[depth] * batch.mask[..., None], expected, atol=1e-5, rtol=1e-4)


def test_cached_states_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents = fresh_model(), random_documents(40, 40)
    StateCache(model, documents, tmp_path, precision="float32").fill()
    monkeypatch.setattr(model.backbone, "encode", lambda *_: pytest.fail("encoded again"))
    StateCache(model, documents, tmp_path, precision="float32").fill()


def test_documents_that_are_done_are_let_go(tmp_path: Path) -> None:
    """Over shuffled epochs that repeat, what is read is right and no more files are open than rows had documents."""
    model, documents = fresh_model(), random_documents(*range(13, 53))
    live, cache = encode_now(model), StateCache(model, documents, tmp_path, precision="float32")
    held = []
    for _, batch in zip(
        range(150), SegmentStream(documents, rows=2, segment=SEGMENT, seed=0, repeat=True), strict=False
    ):
        now, kept = live(batch), cache(batch)
        mask = batch.mask[:, None, :, None]
        torch.testing.assert_close(kept.key * mask, now.key * mask, atol=1e-5, rtol=1e-4)
        held.append(len(cache._open))
    assert max(held) <= 4, held


def test_rows_without_a_document_have_no_states_and_open_nothing(tmp_path: Path) -> None:
    model, documents = fresh_model(), random_documents(10, 30)
    cache = StateCache(model, documents, tmp_path, precision="float32")
    *_, last = SegmentStream(documents, rows=3, segment=SEGMENT)
    assert last.document.tolist() == [-1, 1, -1]
    states = cache(last)
    assert set(cache._open) == {1}
    assert states.key[1].any() and not states.key[[0, 2]].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_states_are_found_whatever_keeps_the_tokens(dtype: torch.dtype, tmp_path: Path) -> None:
    model, documents = fresh_model(), random_documents(20)
    cache = StateCache(model, [ids.to(dtype) for ids in documents], tmp_path, precision="float32")
    cache.fill()
    wide = StateCache(model, documents, tmp_path, precision="float32")
    assert cache.path(0) == wide.path(0) and cache.path(0).exists()


def test_a_file_of_other_states_is_refused(tmp_path: Path) -> None:
    model, documents = fresh_model(), random_documents(20)
    cache = StateCache(model, documents, tmp_path, precision="float32")
    cache.fill()
    path = cache.path(0)
    tensors = load_file(path)
    for change in (
        {"key": tensors["key"][:-1].clone()},
        {"value": tensors["value"][:, :-1].clone()},
        {"more": torch.ones(1)},
    ):
        save_file(tensors | change, path, {"longmem states": "{}"})
        with pytest.raises(ValueError, match=path.name):
            StateCache(model, documents, tmp_path, precision="float32")(
                next(iter(SegmentStream(documents, rows=1, segment=6)))
            )
    for content, kind in ((b"", "no whole safetensors file"), (path.read_bytes()[:-9], "no whole safetensors file")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name} is {kind}"):
            StateCache(model, documents, tmp_path, precision="float32")(
                next(iter(SegmentStream(documents, rows=1, segment=6)))
            )
    save_file(tensors, path)
    with pytest.raises(ValueError, match="a safetensors file, but not a longmem states"):
        StateCache(model, documents, tmp_path, precision="float32")(
            next(iter(SegmentStream(documents, rows=1, segment=6)))
        )
