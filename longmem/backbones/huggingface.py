"""Any supported Hugging Face causal language model as a frozen Backbone, out of its own modules."""

from __future__ import annotations

from typing import Any

from .base import Backbone
from .layers import DecoderLayer, Rotary

# Model types whose layer is: norm, q/k/v/o projections with rotary positions, norm, feed-forward.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


def huggingface_backbone(model: Any, name: str | None = None) -> Backbone:
    """Wrap a `transformers` causal language model. Weights are shared, not copied, and frozen.

    Args:
        model: a loaded model with a language-model head, of a type in `SUPPORTED`.
        name: how checkpoints refer to it; default `model.name_or_path`.

    Raises:
        ValueError: the architecture is not supported, with the list of those that are.
    """
    config = model.config
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"huggingface_backbone: model type {config.model_type!r} is not supported; supported:"
            f" {', '.join(SUPPORTED)}"
        )
    scaling = getattr(config, "rope_parameters", None) or {}
    if scaling.get("rope_type", "default") in ("dynamic", "longrope"):
        raise ValueError(
            f"huggingface_backbone: rope type {scaling['rope_type']!r} changes with the length of the input and is not"
            " supported"
        )
    decoder = model.model
    rotary = Rotary(decoder.rotary_emb)
    return Backbone(
        name or config.name_or_path or config.model_type,
        decoder.embed_tokens,
        [_layer(layer, config, i, rotary) for i, layer in enumerate(decoder.layers)],
        decoder.norm,
        model.lm_head,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
    )


def _layer(layer: Any, config: Any, index: int, rotary: Rotary) -> DecoderLayer:
    attention = layer.self_attn
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        window = None
    return DecoderLayer(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        input_norm=layer.input_layernorm,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        output=attention.o_proj,
        mlp=layer.mlp,
        mlp_norm=layer.post_attention_layernorm,
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        rotary=rotary,
        window=window,
    )
