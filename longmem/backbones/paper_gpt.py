"""PaperGPT: the decoder of the paper's experiments, with ALiBi and GPT-J style parallel layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from .base import Backbone
from .layers import DecoderLayer, alibi_slopes


@dataclass(frozen=True)
class PaperGPTConfig:
    """Defaults are the published backbone's (LongMem, section 3.1): 407 M parameters."""

    vocab_size: int = 51_200
    layers: int = 24
    hidden_size: int = 1024
    heads: int = 16
    ffn_size: int = 4096

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"PaperGPTConfig: {name} must be at least 1, got {value}")
        if self.hidden_size % self.heads:
            raise ValueError(
                f"PaperGPTConfig: hidden_size must be a multiple of heads, got {self.hidden_size} and {self.heads}"
            )


def paper_gpt(config: PaperGPTConfig) -> Backbone:
    """A randomly initialised PaperGPT, as a frozen Backbone.

    One LayerNorm (eps 1e-6) per layer before attention and feed-forward in parallel, attention without biases, tanh
    GELU, an untied head with bias.
    """
    backbone = Backbone(
        "paper-gpt",
        nn.Embedding(config.vocab_size, config.hidden_size),
        [_layer(config) for _ in range(config.layers)],
        nn.LayerNorm(config.hidden_size, eps=1e-6),
        nn.Linear(config.hidden_size, config.vocab_size),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        settings={"model_type": "paper-gpt", "activation_function": "gelu_tanh"},
    )
    for module in backbone.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return backbone


def _layer(config: PaperGPTConfig) -> DecoderLayer:
    size = config.hidden_size

    def projection() -> nn.Linear:
        return nn.Linear(size, size, bias=False)

    return DecoderLayer(
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=size // config.heads,
        input_norm=nn.LayerNorm(size, eps=1e-6),
        query=projection(),
        key=projection(),
        value=projection(),
        output=projection(),
        mlp=nn.Sequential(nn.Linear(size, config.ffn_size), nn.GELU("tanh"), nn.Linear(config.ffn_size, size)),
        parallel=True,
        slopes=alibi_slopes(config.heads),
    )
