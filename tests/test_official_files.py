"""Official parameters from dictionaries and files: complete or refused in one message, and never by running code."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from official_models import random_model, small_config
from torch import Tensor

from longmem.official import OfficialLongMem, load_official, official_state

GPT = "decoder.pretrained_model.decoder.model."


def assert_equal(first: OfficialLongMem, second: OfficialLongMem) -> None:
    for (name, mine), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    """What fairseq saves around the parameters."""
    return {
        "args": None,
        "cfg": {"model": argparse.Namespace(arch="transformer_lm_sidenet", decoder=argparse.Namespace(layers=2))},
        "model": state,
        "optimizer_history": [{"num_updates": 3}],
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(2)}}},
    }


def test_state_goes_out_and_comes_back() -> None:
    model = random_model(small_config())
    state = official_state(model)
    assert_equal(load_official(state, model.config), model)
    assert state["decoder.layers.1.self_attn.memory_bias"].shape == (3,)
    assert state[f"{GPT}transformer.wte.weight"] is state["decoder.embed_tokens.weight"]
    assert state["decoder.output_projection.weight"] is state[f"{GPT}lm_head.weight"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_shared_parameter_may_come_under_either_name(wrapped: bool) -> None:
    model = random_model(small_config())
    state = official_state(model)
    del state["decoder.embed_tokens.weight"], state[f"{GPT}lm_head.weight"]
    assert_equal(load_official(checkpoint(state) if wrapped else state, model.config), model)
    assert "decoder.embed_tokens.weight" not in state


def test_buffers_of_the_published_modules_and_half_precision_are_taken() -> None:
    model = random_model(small_config())
    half = {name: t.half() for name, t in official_state(model).items()}
    half["decoder.version"] = torch.tensor([3.0])
    half[f"{GPT}transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    loaded = load_official(half, model.config)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert torch.equal(loaded.memory_bias, model.memory_bias.half().float())


def test_everything_wrong_is_in_one_message() -> None:
    model = random_model(small_config())
    state = official_state(model)
    del state["decoder.layers.0.fc1.bias"], state[f"{GPT}transformer.h.3.attn.q_proj.weight"]
    state["decoder.layers.7.fc1.bias"] = torch.zeros(3)
    state["decoder.layer_norm.weight"] = torch.zeros(25)
    state["decoder.output_projection.weight"] = torch.zeros(61, 24)
    with pytest.raises(ValueError) as error:
        load_official(state, model.config)
    assert str(error.value).removeprefix("load_official: the parameters do not fit the configuration: ").split(
        "; "
    ) == [
        f"differs from {GPT}lm_head.weight, whose other name it is: decoder.output_projection.weight",
        "missing: decoder.layers.0.fc1.bias (40,)",
        f"missing: {GPT}transformer.h.3.attn.q_proj.weight (24, 24)",
        "not of this model: decoder.layers.7.fc1.bias",
        "wrong shape: decoder.layer_norm.weight must be (24,), got (25,)",
    ]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_file_is_read(legacy: bool, tmp_path: Path) -> None:
    model, path = random_model(small_config()), tmp_path / "checkpoint_best.pt"
    torch.save(checkpoint(official_state(model)), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_official(path, model.config, storage=torch.float16)
    assert_equal(loaded, model)
    assert loaded.memory.dtype == torch.float16


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_from_a_file_is_run(legacy: bool, tmp_path: Path) -> None:
    content = checkpoint(official_state(random_model(small_config())))
    content["extra_state"] = Malicious(tmp_path / "broken into")
    torch.save(content, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"checkpoint.pt was not read.*mkdir"):
        load_official(tmp_path / "checkpoint.pt", small_config())
    assert not (tmp_path / "broken into").exists()


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        load_official(tmp_path / "none.pt", small_config())
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text.pt was not read"):
        load_official(tmp_path / "text.pt", small_config())
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt: load_official: wanted a dictionary of parameters, got list"):
        load_official(tmp_path / "list.pt", small_config())
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt: .*wanted a dictionary of parameters, got 'epoch'"):
        load_official(tmp_path / "other.pt", small_config())
