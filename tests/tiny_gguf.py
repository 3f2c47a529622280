"""A tiny random Llama as a GGUF file, as llama.cpp writes them, with a SentencePiece tokenizer that puts BOS first."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

BOS, EOS, EOT = 1, 2, 3
_WIDTH, _FFN, _LAYERS, _HEADS, _KV_HEADS = 32, 48, 3, 4, 2
TOKENS = [
    "<unk>", "<s>", "</s>", "<end_of_turn>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁",
    *"abcdefghijklmnopqrstuvwxyz", *(f"▁w{i}" for i in range(33)),
]  # fmt: skip


def write_gguf(path: Path, architecture: str = "llama", without: Collection[str] = ()) -> None:
    """`without`: weights that are left out."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FFN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    writer.add_token_types([2, 3, 3, 3, *[6] * 256, *[1] * (len(TOKENS) - 260)])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(EOT)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    random = np.random.default_rng(0)
    for name, shape in _shapes().items():
        weights = np.ones(shape) if len(shape) == 1 else random.normal(0, 0.2, shape)
        if name not in without:
            writer.add_tensor(name, weights.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes() -> dict[str, tuple[int, ...]]:
    keys = _WIDTH // _HEADS * _KV_HEADS
    block = {
        "attn_norm": (_WIDTH,), "ffn_norm": (_WIDTH,), "attn_q": (_WIDTH, _WIDTH), "attn_k": (keys, _WIDTH),
        "attn_v": (keys, _WIDTH), "attn_output": (_WIDTH, _WIDTH), "ffn_gate": (_FFN, _WIDTH), "ffn_up": (_FFN, _WIDTH),
        "ffn_down": (_WIDTH, _FFN),
    }  # fmt: skip
    blocks = {f"blk.{i}.{name}.weight": shape for i in range(_LAYERS) for name, shape in block.items()}
    ends = {"token_embd": (len(TOKENS), _WIDTH), "output_norm": (_WIDTH,), "output": (len(TOKENS), _WIDTH)}
    return blocks | {f"{name}.weight": shape for name, shape in ends.items()}
