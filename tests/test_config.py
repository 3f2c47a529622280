"""LongMemConfig and what a LongMem is made with: every field x every way to be wrong, and defaults that fit."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_backbone, tiny_huggingface, tiny_longmem

from longmem import LongMem, LongMemConfig, default_memory_layers
from longmem.backbones.load import MEASURED_MEMORY_LAYERS

NUMBERS = [True, 2.0, float("nan"), float("inf"), "4", None, [4], torch.tensor([4, 4]), 0, -1]
CHOICES = [True, 1, None, "", "None", ["none"], "NONE"]
LAYERS = [20, True, 2.5, "1", None, (), (1.0,), (True,), ("1",), (-1,), (1, 1), (3, 2), {1, 2}, ((1,),), (None,)]
REALS = [True, float("nan"), float("inf"), "0", None, [0.0], 1j]
WRONG: dict[str, list[Any]] = {
    "memory_layers": LAYERS,
    "gate_start": REALS,
    **dict.fromkeys(("sidenet", "trainable", "fusion", "scope", "special_tokens"), CHOICES),
    **dict.fromkeys(("reduction", "segment"), NUMBERS),
    "chunk_size": [*NUMBERS, 65, 1000],
    "chunks_per_query": [*NUMBERS, 65, 1000],
    "memory_tokens": [*NUMBERS, 1001, 4 * 2**31],
}


def test_the_table_of_wrong_values_knows_every_field() -> None:
    assert set(WRONG) == {field.name for field in fields(LongMemConfig)}


@pytest.mark.parametrize("name", WRONG)
def test_each_field_is_checked_by_type_and_range(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=rf"^LongMemConfig: {name} must be .*, got ") as refused:
            LongMemConfig(**({"memory_layers": (1,)} | {name: value}))
        if name != "memory_layers":
            assert str(refused.value).endswith(f"got {value!r}")
        with pytest.raises(ValueError, match=f"^LongMemConfig: {name} must be"):
            LongMemConfig.from_dict({"memory_layers": [1]} | {name: value})


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"sidenet must be .*; chunk_size must be .* 1 to 64, got 65; .*gate_start"):
        LongMemConfig(memory_layers=(1,), sidenet="twin", chunk_size=65, gate_start=float("nan"))
    with pytest.raises(ValueError, match=r"a tuple of integers, as in \(20,\), got 20"):
        LongMemConfig(memory_layers=20)  # type: ignore[arg-type]


@pytest.mark.parametrize(("values", "message"), [({}, "memory_layers is missing"), ([1], "must be an object")])
def test_files_that_hold_no_configuration(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongMemConfig.from_dict(values)


def test_integers_of_any_kind_are_taken_and_kept_as_json_has_them() -> None:
    config = LongMemConfig(memory_layers=range(1, 3), segment=np.int64(12), gate_start=1)  # type: ignore[arg-type]
    assert config == LongMemConfig(memory_layers=(1, 2), segment=12, gate_start=1.0)
    assert LongMemConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_largest_chunks_and_most_of_them_run() -> None:
    model = tiny_longmem(chunk_size=64, chunks_per_query=64, memory_tokens=256)
    memory = model.new_memory(1)
    model.remember(torch.randint(0, 97, (1, 200)), memory)
    model(torch.randint(0, 97, (1, 12)), memory, targets=torch.randint(0, 97, (1, 12))).loss.backward()


def test_what_is_no_backbone_is_told_how_to_become_one() -> None:
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM; .* by huggingface_backbone\(model\)"):
        LongMem(tiny_huggingface("llama"), LongMemConfig(memory_layers=(1,)))
    with pytest.raises(TypeError, match="config must be a LongMemConfig, got dict"):
        LongMem(tiny_backbone(), {"memory_layers": (1,)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "options"),
    [(1, {"tokens": 0}), (1, {"tokens": -4}), (1, {"tokens": 6}), (1, {"tokens": 8.0}), (0, {}), (1.0, {}), (True, {})],
)
def test_a_memory_of_no_size_is_refused(rows: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="MemoryBank: wanted"):
        tiny_longmem().new_memory(rows, **options)


def test_a_memory_of_no_format_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype must be float32, .* got torch.int8"):
        tiny_longmem().new_memory(1, dtype=torch.int8)


@pytest.mark.parametrize("sidenet", ["exact", "paper"])
@pytest.mark.parametrize("reduction", [1, 2, 3, 4, 5])
def test_default_memory_layers_fit_the_sidenet(sidenet: str, reduction: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    for measured in ({}, {"llama": (1, 2, 3, 4)}):
        monkeypatch.setattr("longmem.backbones.load.MEASURED_MEMORY_LAYERS", measured)
        layers = default_memory_layers(backbone, sidenet, reduction)
        for trainable in ("read", "all"):
            config = LongMemConfig(memory_layers=layers, sidenet=sidenet, reduction=reduction, trainable=trainable)
            model = LongMem(backbone, config)
        for place, read in model.sidenet.reads.items():
            copied = model.sidenet.stack[int(place)]
            stored = backbone.layer(config.memory_layers[read.bank])
            assert torch.equal(copied.key.weight, stored.key.weight), "a layer reads the keys of the one it copies"


def test_default_memory_layers_of_smollm2() -> None:
    backbone = tiny_backbone()
    backbone.name, backbone.layers = "smollm2", torch.nn.ModuleList(list(backbone.layers) * 6)
    assert default_memory_layers(backbone) == MEASURED_MEMORY_LAYERS["smollm2"] == tuple(range(10, 25))
    assert default_memory_layers(backbone, "exact") == tuple(range(10, 25, 2))
    assert default_memory_layers(backbone, "paper") == tuple(range(11, 24, 2))
