"""The command line on a tiny model: train, eval, generate, and what bad input gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import WORDS, backbone, run, texts, train

from longmem.backbones.load import load_backbone
from longmem.cli.commands import kept_of_training
from longmem.quickstart import next_commands

__all__ = ["WORDS", "backbone", "run", "texts", "train"]  # fixtures, and what other tests take from here


def test_train_then_eval_then_generate(
    backbone: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(backbone, texts, out, "--cache-states") == 0
    shown = capsys.readouterr()
    assert "chunk_topk: cpp" in shown.err and "frozen parameters" in shown.err and "memory=" in shown.err
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]

    assert run("eval", "--run", out, "--data", texts, "--score-from", "64", "--document-tokens", "160") == 0
    assert "memory - other memory" in capsys.readouterr().out
    report = json.loads((out / "eval" / "perplexity.json").read_text())
    assert report["scores"].keys() == {"backbone", "empty memory", "memory", "other memory"}
    assert (out / "eval" / "perplexity.png").read_bytes().startswith(b"\x89PNG")

    arguments = ["--run", out, "--prompt", "w1 w2", "--remember", texts / "0.txt", "--max-new-tokens", "20"]
    assert run("generate", *arguments) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("w1 w2") and len(shown.out.split()) == 22
    assert "memory: 64 tokens, 100% full" in shown.err


def test_probed_layers_can_be_trained(
    backbone: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probe"
    small = ["--segment", "16", "--memory-tokens", "64", "--chunks-per-query", "3", "--steps", "2", "--rows", "1"]
    measured = ["--held-out", "2", "--score-from", "64", "--document-tokens", "128", "--precision", "float32"]
    assert run("probe-layers", "--backbone", backbone, "--data", texts, "--out", out, *small, *measured) == 0
    shown = capsys.readouterr().out
    assert "own - other memory" in shown and ("--memory-layer" in shown or "no layer reads" in shown)
    winner = json.loads((out / "probe.json").read_text())["winner"]
    assert train(backbone, texts, tmp_path / "run", "--memory-layer", str(winner)) == 0
    too_many = [*measured, "--held-out", "3"]
    assert run("probe-layers", "--backbone", backbone, "--data", texts, "--out", out, *small, *too_many) != 0
    assert "wanted more than 3 documents" in capsys.readouterr().err


def test_training_goes_on_where_it_was(
    backbone: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert train(backbone, texts, tmp_path / "run") == 0
    assert "continuing from step 4" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_trains_together_and_only_the_first_process_speaks(
    backbone: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--segment", "16", "--memory-tokens", "64", "--chunks-per-query", "3", "--steps", "3", "--rows", "1"]
    options += ["--parallel", "fsdp", "--accumulate", "2", "--checkpoint-activations", "--shard-memory"]
    options += ["--scope", "shared", "--reset", "never", "--usage-weight", "0.1", "--precision", "float32"]
    result = subprocess.run(
        [*torchrun, "-m", "longmem.cli", "train", "--backbone", backbone, "--data", texts, "--out", out, *options],
        capture_output=True, text=True, timeout=300, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("frozen parameters") == result.stdout.count("saved ") == 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["tokens"] == 2 * 2 * 16 and lines[-1]["memory_found"] == 1
    assert run("generate", "--run", out, "--prompt", "w1 w2", "--max-new-tokens", "2") == 0


def test_an_interrupted_run_says_how_to_go_on(
    backbone: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("longmem.cli.commands.train_with_bar", interrupt)
    assert train(backbone, texts, tmp_path / "run") == 130
    assert capsys.readouterr().err.endswith("interrupted\nnothing was kept: there was no checkpoint yet\n")
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    assert "the same command goes on from there" in kept_of_training(tmp_path / "run")


def test_skipped_files_are_named_with_the_reason(
    backbone: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (texts / "empty.txt").write_text("")
    (texts / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (texts / "short.txt").write_text("w1 w2 w3")
    assert train(backbone, texts, tmp_path / "run") == 0
    shown = capsys.readouterr().err
    for name, reason in (("empty.txt", "empty"), ("latin.txt", "UTF-8"), ("short.txt", "3 tokens, wanted at least 17")):
        assert any(name in line and reason in line for line in shown.splitlines()), (name, shown)


def test_the_quick_start_runs_and_says_what_to_type_next(
    backbone: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_backbone(str(backbone))
    monkeypatch.setattr("longmem.quickstart.load_backbone", lambda *_: loaded)
    monkeypatch.setattr("longmem.quickstart.SCORE_FROM", 512)
    monkeypatch.setattr("longmem.quickstart.DOCUMENT_TOKENS", 800)
    for i in range(4):
        (texts / f"{i}.txt").write_text(" ".join(WORDS[(i * 31 + j * 7) % 40] for j in range(900)), encoding="utf-8")
    assert run("quickstart", "--data", texts, "--out", tmp_path / "out", "--steps", "2") == 0
    shown = capsys.readouterr()
    assert "memory - other memory" in shown.out
    assert "rows: 1 instead of 4" in shown.err
    assert f"longmem generate --run {tmp_path / 'out'} --remember" in shown.err
    for name in ("perplexity.png", "longmem.safetensors"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_the_next_command_is_the_one_that_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    for called, wanted in ((".venv/bin/longmem", ".venv/bin/longmem"), ("/x/longmem/__main__.py", "python -m longmem")):
        monkeypatch.setattr(sys, "argv", [called])
        assert f"  {wanted} eval --run out" in next_commands(Path("out"))
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/longmem")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/longmem"])
    assert "  longmem eval --run out" in next_commands(Path("out"))
