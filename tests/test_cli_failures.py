"""How commands end: wrong options, damaged files, full disks, missing packages, signals; never in a traceback."""

from __future__ import annotations

import errno
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints
from unittest.mock import Mock

import pytest
import torch
import typer
from command_line import SMALL, backbone, bench, run, texts, train
from safetensors import safe_open
from safetensors.torch import save_file
from typer.models import OptionInfo

from longmem import config
from longmem.cli.app import app
from longmem.cli.output import json_text
from longmem.precision import PRECISIONS
from longmem_bench.cli import options as o
from longmem_bench.cli.app import app as bench_app
from longmem_bench.cli.commands import DTYPES
from longmem_bench.precompile import TRITON_OPS
from longmem_bench.shapes import MODELS
from longmem_kernels.memory_attention.api import FUSIONS

__all__ = ["backbone", "texts"]  # fixtures


class Option(NamedTuple):
    """An option of a command, as its signature has it."""

    name: str
    kinds: tuple[Any, ...]  # the types it may have, those of elements for a list
    info: Any  # typer's
    required: bool


def commands(group: typer.Typer, *path: str) -> Iterator[tuple[tuple[str, ...], list[Option]]]:
    """Every command by the words that name it, and its options."""
    for command in group.registered_commands:
        function = command.callback
        assert function is not None
        hints, found = get_type_hints(function, include_extras=True), []
        for parameter in inspect.signature(function).parameters.values():
            kind, info = get_args(hints[parameter.name])[:2]
            if isinstance(info, OptionInfo):
                union = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
                kinds = tuple(get_args(one)[0] if get_origin(one) is list else one for one in union)
                name = next(iter(info.param_decls or ()), "--" + parameter.name.replace("_", "-"))
                found.append(Option(name, kinds, info, parameter.default is parameter.empty))
        yield (*path, command.name or function.__name__), found
    for one in group.registered_groups:
        assert one.typer_instance is not None and one.name is not None
        yield from commands(one.typer_instance, *path, one.name)


def wrong_values(option: Option) -> list[str]:
    if any(get_origin(kind) is Literal for kind in option.kinds):
        return ["nosuch", ""]
    if float in option.kinds:
        return ["nan", "inf", "-inf", "-1", "much"]
    if Path in option.kinds and option.name.startswith("--"):
        return [""]
    return ["-1", "1.5", "nan", "many"] if int in option.kinds else []


MOVED = [("longmem", "bench"), ("longmem", "profile")]
COMMANDS = dict([*commands(app, "longmem"), *commands(bench_app, "longmem-bench")])
WRONG = [
    pytest.param(words, option.name, value, id=f"{' '.join(words)} {option.name} {value}")
    for words, options in COMMANDS.items()
    for option in options
    for value in wrong_values(option)
]


@pytest.mark.parametrize(("words", "name", "value"), WRONG)
def test_every_option_refuses_what_makes_no_sense(
    words: tuple[str, ...], name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    required = [word for one in COMMANDS[words] if one.required for word in (one.name, "there")]
    code = (bench if words[0] == "longmem-bench" else run)(*words[1:], *required, name, value)
    shown = capsys.readouterr().err
    assert code == 2 and shown.startswith("error: ") and name in shown, shown
    assert shown.count("\n") == 1 and "--help shows" in shown


def test_every_option_is_explained() -> None:
    assert len(COMMANDS) == 25 and len(WRONG) > 200
    for words, options in COMMANDS.items():
        for option in options:
            assert (option.info.help or "").endswith("."), (words, option.name)
            if int in option.kinds:
                assert option.info.min is not None, (words, option.name)


def test_choices_are_those_of_the_code_behind_them() -> None:
    assert get_args(o.Model) == MODELS and get_args(o.Dtype) == tuple(DTYPES)
    assert get_args(o.TritonOp) == TRITON_OPS
    assert set(get_args(config.Fusion)) == set(FUSIONS) and config.PRECISIONS == PRECISIONS


def test_help_and_version_need_no_pytorch() -> None:
    programs = ["longmem", "longmem-bench"]
    asked = [[*words, "--help"] for words in COMMANDS if words not in MOVED]
    asked += [["longmem", "--version"], *([name, *more] for name in programs for more in ([], ["--help"]))]
    code = f"""
import sys
import longmem.cli, longmem_bench.cli
for words in {asked!r}:
    sys.argv = words
    try:
        (longmem if words[0] == "longmem" else longmem_bench).cli.main()
    except SystemExit as stop:
        assert stop.code in (0, 2), words
heavy = {{"torch", "numpy", "transformers", "tqdm", "matplotlib"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "none|exact|paper" in done.stdout and "joint|gated" in done.stdout


def test_commands_that_moved_say_where_to(capsys: pytest.CaptureFixture[str]) -> None:
    for words, new in (
        ("bench retrieval --sweep M=32", "retrieval --sweep M=32"),
        ("profile retrieval --steps 3", "profile --steps 3"),
    ):
        assert run(*words.split()) == 1
        assert f"a command of its own: longmem-bench {new}\n" in capsys.readouterr().err


def test_python_m_longmem_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "longmem", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("longmem 0.")


SAFETENSORS: Any = type("SafetensorError", (Exception,), {})
UNALLOCATED = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 450359 bytes."
ENDS: dict[str, tuple[BaseException, int, str]] = {
    "disk full": (OSError(errno.ENOSPC, "", "x/metrics.jsonl"), 1, "x/metrics.jsonl: no room left"),
    "quota": (OSError(errno.EDQUOT, ""), 1, "quota"),
    "permission": (PermissionError(errno.EACCES, "", "x"), 1, "x: permission denied"),
    "read-only": (OSError(errno.EROFS, "", "x"), 1, "x: the file system is read-only"),
    "folder": (IsADirectoryError(errno.EISDIR, "", "x"), 1, "x: it is a folder"),
    "in Rust": (SAFETENSORS("I/O error: (os error 28)"), 1, "no room left on the disk"),
    "in torch.save": (RuntimeError("PytorchStreamWriter failed writing file"), 1, "no room left"),
    "memory": (MemoryError(), 1, "the machine has no memory while training"),
    "allocator": (RuntimeError(UNALLOCATED), 1, "no memory for 450359 bytes"),
    "GPU memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 1, "GPU has no memory"),
    "GPU": (RuntimeError("CUDA error: device-side assert triggered\nCompile"), 1, "the GPU, or its driver, failed"),
    "extra": (ModuleNotFoundError("", name="matplotlib"), 1, "extra 'model'"),
    "extra of a submodule": (ModuleNotFoundError("", name="pyarrow.parquet"), 1, "extra 'parquet'"),
    "extra of another name": (ModuleNotFoundError("", name="faiss"), 1, "extra 'bench'"),
    "no extra": (ModuleNotFoundError("", name="sentencepiece"), 1, "pip install sentencepiece"),
    "network": (OSError("We couldn't connect to 'https://...' to load\nthe files"), 1, "network could not be reached"),
    "value": (ValueError("wanted this,\ngot that"), 1, "training: wanted this, got that"),
    "bug": (KeyError("x"), 1, "unexpected KeyError while training: 'x'. This is a bug; LONGMEM_TRACEBACK=1"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted"),
    "closed pipe": (BrokenPipeError(errno.EPIPE, ""), 141, ""),
}


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("traced", [False, True])
def test_whatever_happens_is_said_in_words(
    kind: str,
    traced: bool,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error, code, words = ENDS[kind]

    monkeypatch.setattr("longmem.cli.commands.load_named", Mock(side_effect=error))
    monkeypatch.setenv("LONGMEM_TRACEBACK", "1" if traced else "0")
    assert run("train", "--data", texts, "--out", tmp_path / "run") == code
    shown = capsys.readouterr().err
    assert (words in shown and shown.count("\n") <= (2 if words else 0)) or traced
    assert ("Traceback" in shown) == (traced and bool(words))
    if code == 1 and not traced:
        assert shown.startswith("error: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_in_words(
    number: signal.Signals,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr("longmem.cli.commands.load_named", lambda *_: os.kill(os.getpid(), number))
    assert run("train", "--data", texts, "--out", tmp_path / "run") == 128 + number
    assert capsys.readouterr().err.startswith(f"stopped by {number.name}\nnothing was kept")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("module", ["typer", "transformers"])
def test_without_an_extra_one_line_names_it(module: str, texts: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{module!r}] = None\nfrom longmem.cli import main\nmain()"
    command = [sys.executable, "-c", code, "train", "--backbone", "x", "--data", texts, "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    wanted = f"error: {module} is not installed; it comes with the extra 'model': pip install 'longmem[model]'\n"
    assert done.stderr == wanted


def test_a_pipe_that_closes_early_ends_quietly() -> None:
    command = [sys.executable, "-m", "longmem", "train", "--help"]
    reader, writer = os.pipe()
    os.close(reader)  # before anything is written: what `head` does in time, every time
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert done.returncode in (1, 141) and done.stderr == ""  # 1 where rich prints the help
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: no room left on the disk")


def test_a_full_disk_names_what_could_not_be_written_and_keeps_what_there_was(
    backbone: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(backbone, texts, out) == 0
    assert run("eval", "--run", out, "--data", texts, "--score-from", "64", "--document-tokens", "160") == 0
    before = (out / "eval" / "perplexity.json").read_bytes()
    small, hard = 500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    capsys.readouterr()
    for arguments in (
        ["eval", "--run", out, "--data", texts, "--score-from", "64", "--document-tokens", "160"],
        ["train", "--backbone", backbone, "--data", texts, "--out", tmp_path / "other", *SMALL],
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, hard))
        try:
            assert run(*arguments) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        shown = capsys.readouterr().err
        assert "larger than the system allows" in shown or "File too large" in shown, shown
        assert "Traceback" not in shown, shown
    assert (out / "eval" / "perplexity.json").read_bytes() == before
    assert not list(out.glob("**/*.part")) and not list((tmp_path / "other").glob("*.part"))


def test_what_needs_no_model_is_checked_before_one_is_loaded(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("longmem.console.load_backbone", load)
    monkeypatch.setattr("longmem.quickstart.load_backbone", load)
    file, out, run_folder = tmp_path / "file", tmp_path / "out", tmp_path / "trained"
    file.write_text("")
    run_folder.mkdir()
    about = {"backbone": "x", "config": {"segment": 16, "memory_layers": [1]}, "fingerprint": "x"}
    (run_folder / "config.json").write_text(json.dumps(about))
    trained = ["--run", run_folder]
    wrong: list[tuple[list[Any], str]] = [
        (["train", "--data", "/nope", "--out", out], "no file or folder /nope"),
        (["train", "--data", texts, "--out", file], "cannot be a folder"),
        (["train", "--data", texts, "--out", file / "below"], f"{file} is a file"),
        (["train", "--data", texts, "--out", out, "--memory-tokens", "1002"], "memory_tokens"),
        (["train", "--data", texts, "--out", out, "--trainable", "all"], "needs a SideNet"),
        (["train", "--data", texts, "--out", out, "--document-tokens", "256"], "must be more than --segment 256"),
        (["train", "--data", texts, "--out", out, "--shard-memory"], "needs several processes: torchrun"),
        (["probe-layers", "--data", "/nope", "--out", out], "no file or folder /nope"),
        (["probe-layers", "--data", texts, "--out", out, "--score-from", "9000"], "--document-tokens must be at least"),
        (["eval", "--run", tmp_path / "none", "--data", texts], "no trained LongMem in"),
        (["eval", "--run", file, "--data", texts], "no trained LongMem in"),
        (["eval", *trained, "--data", "/nope"], "no file or folder /nope"),
        (["eval", *trained, "--data", texts, "--out", file], "cannot be a folder"),
        (["eval", *trained, "--data", texts, "--document-tokens", "99"], "nothing would be scored"),
        (["eval", *trained, "--data", texts, "--full-context", "63"], "at least four segments, 64, got 63"),
        (["eval", *trained, "--data", texts, "--memory-tokens", "3"], "memory_tokens must be a multiple"),
        (["generate", *trained, "--prompt", "w1", "--remember", "/nope"], "no file or folder /nope"),
        (["generate", *trained, "--prompt", "w1", "--memory-tokens", "3"], "memory_tokens must be a multiple"),
        (["generate", *trained, "--prompt", "w1", "--stop", ""], "a stop string must not be empty"),
        (["generate", *trained, "--prompt", "w\udcff"], "the prompt is not UTF-8, from character 1 on"),
        (["recall", "--out", file], "cannot be a folder"),
        (["quickstart", "--data", "/nope"], "no file or folder /nope"),
        (["quickstart", "--out", file], "cannot be a folder"),
        (["train", "--data", texts, "--out", out, "--device", "cuda"], "no CUDA device"),
    ]
    for arguments, words in wrong:
        if words == "no CUDA device" and torch.cuda.is_available():
            continue
        assert run(*arguments) == 1, arguments
        shown = capsys.readouterr().err
        assert shown.startswith("error: ") and words in shown and "Traceback" not in shown, (arguments, shown)
    assert not out.exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"backbone": 3, "config": {}}', b'{"backbone": "x"}']
)
@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_damaged_run_is_named(
    command: str, content: bytes, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    more = ["--data", texts] if command == "eval" else ["--prompt", "w1"]
    assert run(command, "--run", tmp_path, *more) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and f"{tmp_path}/config.json" in shown and shown.count("\n") == 1


def test_weights_of_another_kind_are_named(
    backbone: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(backbone, texts, tmp_path / "run") == 0
    weights = tmp_path / "run" / "longmem.safetensors"
    whole = weights.read_bytes()
    capsys.readouterr()
    with safe_open(weights, framework="pt") as file:
        wrong = {name: file.get_tensor(name) / 0 for name in file.keys()}  # noqa: SIM118
        save_file(wrong, tmp_path / "not finite", file.metadata())
    for damaged in (b"", whole[:40], whole[:-9], b"\x00" * 64, (tmp_path / "not finite").read_bytes()):
        weights.write_bytes(damaged)
        assert run("generate", "--run", tmp_path / "run", "--prompt", "w1") == 1
        shown = capsys.readouterr().err
        assert str(weights) in shown and "Traceback" not in shown and "bug" not in shown, shown
    save_file({"x": torch.zeros(2)}, weights)
    assert run("generate", "--run", tmp_path / "run", "--prompt", "w1") == 1
    assert str(weights) in capsys.readouterr().err


def test_a_backbone_that_cannot_be_had_is_named(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run("train", "--backbone", "no/such-model", "--data", texts, "--out", tmp_path / "run") == 1
    shown = capsys.readouterr().err
    assert "loading the backbone 'no/such-model'" in shown and shown.count("\n") == 1, shown
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "nothing", tmp_path / "empty"):
        assert run("train", "--backbone", name, "--data", texts, "--out", tmp_path / "run") == 1
        shown = capsys.readouterr().err
        assert str(name) in shown and shown.count("\n") == 1 and "bug" not in shown, shown


def test_results_as_json_stand_alone_on_stdout(
    backbone: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(backbone, texts, out, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["step"] == 4 and content["metrics"]["step"] == 4 and Path(content["files"]["model"]).exists()
    scored = ["--score-from", "64", "--document-tokens", "160"]
    assert run("eval", "--run", out, "--data", texts, *scored, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((out / "eval" / "perplexity.json").read_text())
    said = ["--prompt", "w1 w2", "--remember", texts, "--max-new-tokens", "5"]
    assert run("generate", "--run", out, *said, "--json") == 0
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    assert content["prompt"] == "w1 w2" and len(content["text"].split()) == 5
    assert content["memory"] == {"tokens_read": 600, "tokens_kept": 64}
    assert "remembered the last 64 of 600 tokens" in shown.err
    assert run("generate", "--run", out, *said, "--memory-tokens", "640") == 0
    shown = capsys.readouterr()
    assert "memory: 600 tokens" in shown.err and "remembered the last" not in shown.err
    probing = [*SMALL, "--steps", "1", "--held-out", "2", "--score-from", "64", "--document-tokens", "128", "--json"]
    assert run("probe-layers", "--backbone", backbone, "--data", texts, "--out", out / "probe", *probing) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((out / "probe" / "probe.json").read_text())


def test_json_has_no_numbers_that_parsers_refuse() -> None:
    assert json.loads(json_text({"a": [float("nan"), 1.5], 2: float("inf")})) == {"a": [None, 1.5], "2": None}


def test_rows_are_no_more_than_documents_unless_asked_for(
    backbone: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--backbone", backbone, "--data", texts / "0.txt", *SMALL, "--json"]
    assert run(*arguments, "--out", tmp_path / "one") == 0
    shown = capsys.readouterr()
    assert "rows: 1 instead of 4, one for each document" in shown.err
    assert json.loads(shown.out)["metrics"]["tokens"] == 16
    assert run(*arguments, "--out", tmp_path / "two", "--rows", "2") == 0
    shown = capsys.readouterr()
    assert shown.err.count("side by side") == 1 and "warning: SegmentStream: 2 rows over 1 document" in shown.err
    assert json.loads(shown.out)["metrics"]["tokens"] == 32


def test_threads_are_quiet_and_memory_is_reused_unless_the_user_says_otherwise() -> None:
    code = """
import ctypes, os, resource, sys
import longmem.cli
assert "torch" not in sys.modules  # it would have read the variable
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def work():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        place = libc.malloc(48 << 20)
        ctypes.memset(place, 1, 48 << 20)
        libc.free(place)
    print(os.environ["OMP_WAIT_POLICY"], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
longmem.cli._run = work
longmem.cli.main()
"""
    names = ("OMP_WAIT_POLICY", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    chosen = environment | {"OMP_WAIT_POLICY": "active", "MALLOC_MMAP_THRESHOLD_": "33554432"}

    def found(command: str, environment: dict[str, str]) -> tuple[str, int]:
        done = subprocess.run(
            [sys.executable, "-c", code, command],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
            check=True,
        )
        policy, faults = done.stdout.split()
        return policy, int(faults)

    quiet, reused = found("train", environment)
    usual, returned = found("train", chosen)
    measuring, untouched = found("generate", environment)
    assert (quiet, usual, measuring) == ("PASSIVE", "active", "PASSIVE")
    pages = 8 * (48 << 20) // resource.getpagesize()
    assert returned >= pages and untouched >= pages and reused < pages / 4, (returned, untouched, reused)


def _failing() -> Iterator[str]:
    raise MemoryError
    yield


@pytest.mark.parametrize("command", ["train", "generate"])
def test_an_error_begins_on_a_line_of_its_own(
    command: str,
    backbone: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if command == "train":
        monkeypatch.setattr("longmem.training.trainer.MetricsLog.write", Mock(side_effect=[None, MemoryError()]))
        assert train(backbone, texts, tmp_path / "run") == 1
        shown = capfd.readouterr()
        assert "1/4 [" in shown.err and "\nerror: the machine has no memory while training" in shown.err
        return
    assert train(backbone, texts, tmp_path / "run") == 0
    capfd.readouterr()
    monkeypatch.setattr("longmem.cli.commands.generate_text", lambda *_, **__: chain([" w3"], _failing()))
    assert run("generate", "--run", tmp_path / "run", "--prompt", "w1") == 1
    shown = capfd.readouterr()
    assert shown.out == "w1 w3\n" and "\nerror: the machine has no memory while generating" in shown.err
