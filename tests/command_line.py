"""The command line in this process, on a tiny backbone with a word tokenizer."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from models import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import longmem_bench.cli
from longmem import cli

WORDS = [f"w{i}" for i in range(VOCABULARY - 1)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a word tokenizer, saved as transformers saves models."""
    folder = tmp_path_factory.mktemp("backbone")
    words = {word: i for i, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(" ".join(WORDS[(i * 31 + j * 7) % 40] for j in range(200)), encoding="utf-8")
    return folder


def run(*arguments: str | Path) -> int:
    """Exit status of `longmem`; this process's environment and arguments stay as they are."""
    return _run(cli.main, "longmem", *arguments)


def bench(*arguments: str | Path) -> int:
    """Exit status of `longmem-bench`."""
    return _run(longmem_bench.cli.main, "longmem-bench", *arguments)


def _run(main: Callable[[], None], *words: str | Path) -> int:
    # The allocator of this process stays as it is as well: a command leaves it alone where the environment sets it.
    settings = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "")}
    interrupted = signal.getsignal(signal.SIGINT)
    with patch.dict(os.environ, settings), patch.object(sys, "argv", [*map(str, words)]):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            signal.signal(signal.SIGINT, interrupted)  # a command leaves it to the end of its process
    return 0


SMALL = [
    "--segment",
    "16",
    "--memory-tokens",
    "64",
    "--chunks-per-query",
    "3",
    "--steps",
    "4",
    "--precision",
    "float32",
]


def train(backbone: Path, texts: Path, out: Path, *more: str) -> int:
    return run("train", "--backbone", backbone, "--data", texts, "--out", out, *SMALL, "--rows", "2", *more)
