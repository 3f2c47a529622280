"""Tiny random models shared by the tests of the model layer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from longmem import Backbone, LongMem, LongMemConfig, PaperGPTConfig, huggingface_backbone, paper_gpt

VOCABULARY = 97
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 7}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


def tiny_huggingface(family: str) -> Any:
    """A random model of 5 layers, 6 query and 2 key/value heads, with weights large enough that attention matters and
    tied embeddings, so that what a layer writes can name a token."""
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        **extra,
    )
    model = model_class(config).eval()
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
    defaults = {"memory_layer": 2, "segment": 12, "memory_tokens": 64, "chunks_per_query": 3}
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
    defaults = {"memory_layer": 1, "segment": 6, "memory_tokens": 64, "chunks_per_query": 6}
    return LongMem(huggingface_backbone(model, "learnable"), LongMemConfig(**(defaults | options)))
