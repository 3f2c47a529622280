"""How commands end where something comes in between: signals at any moment, results that cannot be kept."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from command_line import SMALL, backbone, run, texts, train

from longmem.cli import failures
from longmem.cli.process import Signals, Stopped
from longmem.evaluate.perplexity import PerplexityReport
from longmem.evaluate.plots import plot_perplexity

__all__ = ["backbone", "texts"]  # fixtures
SCORED = ["--score-from", "64", "--document-tokens", "160"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_only_the_first_signal_raises(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    now, before = 100.0, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr("longmem.cli.process.time.monotonic", lambda: now)
    killed = Mock()
    try:
        with Signals() as signals:
            with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Stopped):
                os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGINT)  # an echo
            now += 2
            monkeypatch.setattr(signal, "raise_signal", killed)
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_DFL
        killed.assert_called_once_with(number)
        with Signals() as signals:
            signals.disarm()
            os.kill(os.getpid(), number)  # ends the process, without an exception
        assert killed.call_count == 2
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@pytest.mark.parametrize("where", ["_say", "_ending", "_flush", "_drop_unwritten"])
def test_a_second_signal_while_a_command_ends_is_no_traceback(
    where: str,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = getattr(failures, where)

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(failures, where, interrupted)
    monkeypatch.setattr("longmem.cli.commands.load_named", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert run("train", "--data", texts, "--out", tmp_path / "run") == 130
    assert capsys.readouterr().err.startswith("interrupted\nnothing was kept")


def test_a_signal_in_the_middle_of_an_import_is_a_signal(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:  # as transformers does
            raise ModuleNotFoundError("Could not import module 'LlamaConfig'") from error

    monkeypatch.setattr("longmem.cli.commands.load_named", load)
    assert run("train", "--data", texts, "--out", tmp_path / "run") == 128 + signal.SIGTERM
    assert capsys.readouterr().err.startswith("stopped by SIGTERM\nnothing was kept")


@pytest.mark.parametrize("command", ["eval", "probe-layers", "recall"])
def test_what_was_measured_is_shown_where_it_cannot_be_kept(
    command: str,
    backbone: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device", "x.json"))
    for module in ("longmem.console", "longmem.cli.commands"):
        monkeypatch.setattr(f"{module}.write_json", full)
    if command == "eval":
        assert train(backbone, texts, tmp_path / "run") == 0
        arguments: list[Any] = ["--run", tmp_path / "run", "--data", texts, *SCORED]
    elif command == "probe-layers":
        probing = [*SMALL, "--steps", "1", "--held-out", "2", "--score-from", "64", "--document-tokens", "128"]
        arguments = ["--backbone", backbone, "--data", texts, "--out", tmp_path / "probe", *probing]
    else:
        found = Mock(table=lambda: "", as_dict=lambda: {"accuracy": 1})
        monkeypatch.setattr("longmem.console.run_recall", lambda *_: found)
        arguments = ["--out", tmp_path / "recall"]
    capsys.readouterr()
    assert run(command, *arguments, "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) and full.called
    assert "error: x.json: no room left on the disk while" in shown.err


def test_nothing_is_said_to_be_kept_that_is_not(
    backbone: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(backbone, texts, tmp_path / "run") == 0
    probing = ["probe-layers", "--backbone", backbone, "--data", texts, "--out", tmp_path / "probe", *SMALL, *SCORED]
    evaluating = ["eval", "--run", tmp_path / "run", "--data", texts, *SCORED, "--cache-states"]
    evaluate = "longmem.console.perplexity"
    for arguments, place in ((evaluating, "longmem.console.load_backbone"), (probing, "longmem.console.load_backbone")):
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=KeyboardInterrupt))
            capsys.readouterr()
            assert run(*arguments) == 130
            assert capsys.readouterr().err.endswith("interrupted\nnothing was kept\n")
    assert run(*evaluating) == 0
    monkeypatch.setattr(evaluate, Mock(side_effect=KeyboardInterrupt))
    capsys.readouterr()
    assert run(*evaluating) == 130
    assert f"kept: states encoded so far, in {tmp_path}/run/eval/states" in capsys.readouterr().err


def test_a_prompt_is_refused_before_texts_are_read(
    backbone: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(backbone, texts, tmp_path / "run") == 0
    monkeypatch.setattr("longmem.cli.commands.load_documents", Mock(side_effect=AssertionError))
    capsys.readouterr()
    assert run("generate", "--run", tmp_path / "run", "--remember", texts, "--prompt", "") == 1
    assert "the prompt '' holds no token" in capsys.readouterr().err


@pytest.mark.parametrize("title", ["a$b_{$x", "$\\frac{", "a\udcff", "x" * 300])
def test_any_name_may_be_in_a_title(title: str, tmp_path: Path) -> None:
    nll = {name: torch.rand(4, dtype=torch.float64) for name in ("backbone", "memory", "other memory")}
    plot_perplexity(PerplexityReport(nll, 4), tmp_path / "plot.png", title)
    assert (tmp_path / "plot.png").stat().st_size > 0
