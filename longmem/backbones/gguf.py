"""A language model and its tokenizer out of one GGUF file, the format of llama.cpp."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

# Kinds of byte-level BPE that take digits out first, one by one, and then split as GPT-2 does. transformers knows no
# rule of these, and takes that of GPT-2 alone: the two differ where white space meets a digit ("\n\n1" is three tokens
# by the one and two by the other).
_DIGITS_FIRST = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The causal language model in a GGUF file, dequantised, in eval mode on the CPU, and its tokenizer.

    Raises:
        ValueError: the file is damaged, or one part of several, or its architecture is none that transformers reads; a
            package that reading needs is missing.
    """
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ValueError(f"{path}: reading GGUF files needs the package {package} (pip install {package})")
    if (part := re.search(r"-\d{5}-of-(\d{5})\.gguf$", path.name)) and int(part[1]) > 1:
        raise ValueError(
            f"{path} is one of {int(part[1])} parts of a model; join them first (llama-gguf-split --merge)"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
    try:
        about = _read_fields(path, "tokenizer.ggml.pre", "tokenizer.ggml.eot_token_id")
        model, tokenizer, missing = _load(path, dtype)
    except Exception as error:  # what a damaged file ends in depends on where it is damaged
        said = str(error) or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a GGUF model: it is damaged, or of a kind that transformers does not read"
            f" ({said})"
        ) from error
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights of its model, among them {missing[0]}")
    if about["tokenizer.ggml.pre"] in _DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    if (eot := about["tokenizer.ggml.eot_token_id"]) is not None:
        model.generation_config.eos_token_id = sorted({eot, *_several(model.generation_config.eos_token_id)})
    return model.eval(), tokenizer


def _load(path: Path, dtype: torch.dtype) -> tuple[Any, Any, list[str]]:
    """The model, its tokenizer, and the weights that the file lacks."""
    # In a folder of its own: beside other files transformers takes the tokenizer from those.
    with TemporaryDirectory() as folder, quiet_transformers(), redirect_stderr(io.StringIO()):  # a bar without a switch
        (Path(folder) / "model.gguf").symlink_to(path.absolute())
        options: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    return model, tokenizer, sorted(loaded["missing_keys"])


def _several(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else ids


def _read_fields(path: Path, *names: str) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return {name: fields[name].contents() if name in fields else None for name in names}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or warnings from transformers meanwhile: they would appear in the middle of the caller's own
    output."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
