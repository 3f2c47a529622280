"""Any supported Hugging Face causal language model as a frozen Backbone, out of its own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longmem.text import stop_tokens

from .base import Backbone
from .layers import DecoderLayer, Rotary, alibi_slopes


def huggingface_backbone(model: Any, name: str | None = None) -> Backbone:
    """Wrap a `transformers` causal language model and freeze it.

    Weights are shared, not copied, but for the attention of models that project query, key and value in one matrix
    (GPT-2, GPT-NeoX, BLOOM): those are taken apart.

    Args:
        model: a loaded model with a language-model head, of a type in `SUPPORTED`.
        name: how checkpoints refer to it; default `model.name_or_path`.

    Raises:
        ValueError: the architecture, or an option of it, is not supported; with the reason, and the list of those that
            are.
        TypeError: `model` is none of transformers.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise TypeError(
            "huggingface_backbone: wanted a transformers model, as AutoModelForCausalLM.from_pretrained(name) gives it,"
            f" got {type(model).__name__}"
        )
    config = model.config
    family = FAMILIES.get(config.model_type)
    reason = f"model type {config.model_type!r} is not among them" if family is None else _why_not(config)
    if family is None or reason is not None:
        raise ValueError(f"huggingface_backbone: {reason}; supported: {', '.join(SUPPORTED)}")
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"huggingface_backbone: wanted a model with a language-model head, got {type(model).__name__}")
    backbone = Backbone(
        name or config.name_or_path or config.model_type,
        head=head,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        settings=_settings(config),
        **family(model.base_model, config),
    )
    backbone.generation_config = getattr(model, "generation_config", None)
    backbone.eos_token_id = tuple(sorted(stop_tokens(config, backbone.generation_config)))
    return backbone


def _settings(config: Any) -> dict[str, Any]:
    """The part of a configuration that its modules act on and that neither weights nor wiring show."""
    names = ("model_type", "hidden_act", "hidden_activation", "activation_function", "rope_parameters")
    found = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    if _rope_types(config) - {"default"}:
        # Scaling rules compare it with the length that the model was trained for first.
        found["max_position_embeddings"] = config.max_position_embeddings
    return found


def _rope_types(config: Any) -> set[str]:
    """The rules for rotary positions that its layers follow."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}


def _why_not(config: Any) -> str | None:
    """Names a setting of a supported architecture that its wiring here does not follow, or None."""
    if growing := _rope_types(config) & {"dynamic", "longrope"}:
        return f"rope type {growing.pop()!r} changes with the length of the input"
    refused = {
        "attn_logit_softcapping": "attention scores are capped",
        "final_logit_softcapping": "logits are capped",
        "use_bidirectional_attention": "attention is not causal",
        "add_cross_attention": "it attends to an encoder",
        "apply_residual_connection_post_layernorm": "residuals start after the norm",
    }
    for option, meaning in refused.items():
        if getattr(config, option, None):
            return f"{meaning} ({option}={getattr(config, option)!r})"
    return None


# Llama and what descends from it: separate projections, rotary positions.


def _llama(model: Any, config: Any) -> dict[str, Any]:
    return {
        "embed": model.embed_tokens,
        "layers": [_llama_layer(layer, config, i, model.rotary_emb) for i, layer in enumerate(model.layers)],
        "norm": model.norm,
    }


def _llama_layer(layer: Any, config: Any, index: int, angles: nn.Module) -> DecoderLayer:
    attention = layer.self_attn
    kind = config.layer_types[index] if getattr(config, "layer_types", None) else None
    window = getattr(config, "sliding_window", None)
    if kind is not None and kind != "sliding_attention":
        window = None
    # Gemma 3 has a norm on either side of attention and feed-forward; the others name the norm before the latter so.
    sandwiched = hasattr(layer, "pre_feedforward_layernorm")
    per_kind = hasattr(angles, "layer_types")
    return DecoderLayer(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        input_norm=layer.input_layernorm,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        output=attention.o_proj,
        output_norm=layer.post_attention_layernorm if sandwiched else None,
        mlp=nn.Sequential(layer.mlp, layer.post_feedforward_layernorm) if sandwiched else layer.mlp,
        mlp_norm=layer.pre_feedforward_layernorm if sandwiched else layer.post_attention_layernorm,
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        rotary=Rotary(angles, kind if per_kind else None),
        window=window,
        scale=attention.scaling,
    )


# GPT-2: learned positions, one projection for query, key and value.


def _gpt2(model: Any, config: Any) -> dict[str, Any]:
    return {
        "embed": model.wte,
        "positions": model.wpe,
        "layers": [_gpt2_layer(layer, config) for layer in model.h],
        "norm": model.ln_f,
    }


def _gpt2_layer(layer: Any, config: Any) -> DecoderLayer:
    attention = layer.attn
    weights = attention.c_attn.weight.t().chunk(3)  # Conv1D keeps [in, out]
    biases = attention.c_attn.bias.chunk(3)
    query, key, value = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return DecoderLayer(
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=attention.head_dim,
        input_norm=layer.ln_1,
        query=query,
        key=key,
        value=value,
        output=attention.c_proj,
        mlp=layer.mlp,
        mlp_norm=layer.ln_2,
        scale=attention.scaling,
    )


# GPT-NeoX: rotary positions on part of the head, attention and feed-forward in parallel.


def _gpt_neox(model: Any, config: Any) -> dict[str, Any]:
    rotary = Rotary(model.rotary_emb)
    return {
        "embed": model.embed_in,
        "layers": [_gpt_neox_layer(layer, config, rotary) for layer in model.layers],
        "norm": model.final_layer_norm,
    }


def _gpt_neox_layer(layer: Any, config: Any, rotary: Rotary) -> DecoderLayer:
    attention = layer.attention
    query, key, value = _interleaved(attention.query_key_value, config.num_attention_heads)
    return DecoderLayer(
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=attention.head_size,
        input_norm=layer.input_layernorm,
        query=query,
        key=key,
        value=value,
        output=attention.dense,
        mlp=layer.mlp,
        mlp_norm=layer.post_attention_layernorm,
        parallel=layer.use_parallel_residual,
        rotary=rotary,
        scale=attention.scaling,
    )


# BLOOM: ALiBi, a norm after the embedding.


def _bloom(model: Any, config: Any) -> dict[str, Any]:
    return {
        "embed": model.word_embeddings,
        "embed_norm": model.word_embeddings_layernorm,
        "layers": [_bloom_layer(layer, config) for layer in model.h],
        "norm": model.ln_f,
    }


def _bloom_layer(layer: Any, config: Any) -> DecoderLayer:
    attention = layer.self_attention
    query, key, value = _interleaved(attention.query_key_value, config.n_head)
    # Its own feed-forward module adds the residual; these are its parts.
    mlp = nn.Sequential(layer.mlp.dense_h_to_4h, layer.mlp.gelu_impl, layer.mlp.dense_4h_to_h)
    return DecoderLayer(
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=attention.head_dim,
        input_norm=layer.input_layernorm,
        query=query,
        key=key,
        value=value,
        output=attention.dense,
        mlp=mlp,
        mlp_norm=layer.post_attention_layernorm,
        slopes=alibi_slopes(config.n_head),
    )


def _interleaved(fused: nn.Linear, heads: int) -> list[nn.Linear]:
    """Query, key and value projections out of one whose outputs are ordered [heads, 3, D]."""
    weights = fused.weight.unflatten(0, (heads, 3, -1)).unbind(1)
    biases = [None] * 3 if fused.bias is None else fused.bias.view(heads, 3, -1).unbind(1)
    return [
        _linear(weight.flatten(0, 1), None if bias is None else bias.flatten())
        for weight, bias in zip(weights, biases, strict=True)
    ]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


FAMILIES: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma": _llama,
    "gemma3_text": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
}
SUPPORTED = tuple(FAMILIES)
