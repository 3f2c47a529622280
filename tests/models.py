"""Tiny random models shared by the tests of the model layer."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longmem import Backbone, LongMem, LongMemConfig, PaperGPTConfig, huggingface_backbone, paper_gpt

VOCABULARY = 97
# Sizes under the names that each family gives them: 5 layers, width 48, 6 query heads (and 2 key/value heads where a
# family can have fewer).
_LLAMA: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_NEOX = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GEMMA3 = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] + ["sliding_attention"] * 2,
    "sliding_window": 7, "head_dim": 16, "query_pre_attn_scalar": 10,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "llama biased": ("Llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 7}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 16}),
    "gemma": ("Gemma", {**_LLAMA, "head_dim": 16}),
    "gemma3": ("Gemma3", {**_LLAMA, **_GEMMA3}),
    "gpt2": ("GPT2", {"n_embd": 48, "n_layer": 5, "n_head": 6, "n_positions": 128}),
    "gpt2 scaled": (
        "GPT2",
        {"n_embd": 48, "n_layer": 5, "n_head": 6, "n_positions": 128, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt_neox": ("GPTNeoX", {**_NEOX, "rotary_pct": 0.25}),
    "gpt_neox sequential": ("GPTNeoX", {**_NEOX, "use_parallel_residual": False, "attention_bias": False}),
    "bloom": ("Bloom", {"hidden_size": 48, "n_layer": 5, "n_head": 6}),
}


def tiny_huggingface(family: str, tied: bool = True, **extra: Any) -> Any:
    """A random model of 5 layers and 6 query heads, with weights large enough that attention matters and, unless
    `tied` is off, tied embeddings, so that what a layer writes can name a token."""
    prefix, sizes = FAMILIES[family]
    config_class = getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    config = config_class(
        vocab_size=VOCABULARY, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, **(sizes | extra)
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


def tiny_backbone(family: str = "llama") -> Backbone:
    if family == "paper":
        backbone = paper_gpt(PaperGPTConfig(vocab_size=VOCABULARY, layers=5, hidden_size=48, heads=6, ffn_size=64))
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return backbone
    return huggingface_backbone(tiny_huggingface(family), family)


def tiny_longmem(family: str = "llama", **options: Any) -> LongMem:
    """Segments of 12 tokens, 64 tokens of memory, 3 chunks of 4 per query, memory layer 2 of 5."""
    defaults = {"memory_layers": (2,), "segment": 12, "memory_tokens": 64, "chunks_per_query": 3}
    return LongMem(tiny_backbone(family), LongMemConfig(**(defaults | options)))


def learnable_longmem(**options: Any) -> LongMem:
    """A random frozen model that a trained read can do something with: tokens survive its layers, and its values name
    them. Segments of 6 tokens, 64 tokens of memory."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    torch.nn.init.normal_(model.model.layers[1].self_attn.v_proj.weight, std=0.2)
    defaults = {"memory_layers": (1,), "segment": 6, "memory_tokens": 64, "chunks_per_query": 6}
    return LongMem(huggingface_backbone(model, "learnable"), LongMemConfig(**(defaults | options)))
