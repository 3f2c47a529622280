"""Backbones of the questions about whole models: random ones as large as today's, and SmolLM2-135M with its weights.

Speed does not depend on what a model has learnt: random weights are drawn on the device, from no file.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longmem.backbones.huggingface import huggingface_backbone
from longmem.backbones.load import default_memory_layers
from longmem.config import LongMemConfig
from longmem.memory import MemoryBank
from longmem.model import LongMem
from longmem.precision import autocast

from .architectures import ARCHITECTURES, Architecture
from .peak_memory import too_large
from .roofline import Work
from .shapes import Shape

_SAMPLED, _WRITTEN = 256, 4096  # tokens: of the text that says how keys are spread; written to memory at once
_TINY_LAYERS, _TINY_VOCABULARY = 8, 8192
_LARGE = 2**29  # weights: above, a backbone trains in the format that its products have


def architecture(shape: Shape) -> Architecture:
    """Raises ValueError for a model that is not one of `shapes.MODELS`."""
    if shape.model == "tiny":  # as wide as the shape says
        width = shape.H * shape.D
        return Architecture(_TINY_LAYERS, width, 3 * width, shape.H, shape.G, shape.D, _TINY_VOCABULARY)
    if shape.model not in ARCHITECTURES:
        raise ValueError(f"model must be one of tiny, {', '.join(ARCHITECTURES)}, got {shape.model!r}")
    return ARCHITECTURES[shape.model]


def why_too_large(shape: Shape, device: torch.device) -> str | None:
    """The reason why model and memory do not fit; the check against wider numbers needs the weights once more."""
    sizes = architecture(shape)
    weights = sizes.weights * shape.dtype.itemsize
    held = 2 * shape.B * shape.M * shape.C * sizes.kv_heads * sizes.head_dim * sizes.layers * shape.dtype.itemsize
    return too_large(weights + 4 * sizes.weights + held, device)


def network(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformers model of `shape.model` on `device`, its weights in `dtype`."""
    sizes = architecture(shape)
    if shape.model == "smollm2":
        from longmem.backbones.smollm2 import load_smollm2

        return load_smollm2()[0].to(device=device, dtype=dtype).eval()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=2**17,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=sizes.tied,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@dataclass
class ModelInputs:
    """A model, the tokens it continues or learns from, and what its memory is filled with."""

    op: str
    shape: Shape
    network: Any  # the transformers model whose modules `model` uses
    model: LongMem
    tokens: Tensor  # generate: the prompt [B, S]; train_step: [B, T + 1]
    past: Tensor  # [B, up to 256]: keys and values of memory are spread as those of this text

    def memory(self, model: LongMem | None = None) -> MemoryBank:
        """A full memory, the same for every model: keys and values drawn channel by channel with the mean and spread
        that `past` has. To encode a text that fills it would take most of the time of a measurement."""
        bank = (model or self.model).new_memory(rows=self.shape.B)
        dtype, device = bank.ring.store.dtype, bank.ring.store.device
        generator = torch.Generator(device).manual_seed(3)
        held = self.shape.M * self.shape.C
        for begin in range(0, held, _WRITTEN):
            size = (self.shape.B, bank.ring.kv_heads, min(_WRITTEN, held - begin), self.shape.D)
            key, value = (
                (mean + std * torch.randn(size, generator=generator, device=device)).to(dtype)
                for mean, std in self._spread
            )
            bank.write(key, value)
        return bank

    @cached_property
    def _spread(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Mean and standard deviation over tokens, float32 [B, L * G, 1, D], of keys and of values."""
        with torch.no_grad():
            states = self.model.backbone.encode(self.past, self.model.config.memory_layers, ())
        return tuple(
            (part.float().mean(2, keepdim=True), part.float().std(2, keepdim=True))
            for part in (states.key, states.value)
        )  # type: ignore[return-value]  # two of them

    def precision(self) -> AbstractContextManager[object]:
        """Precision of a training step's matrix products."""
        return autocast(self.shape.dtype_name, self.tokens.device, self.model.backbone.dtype)

    def work(self) -> Work | None:
        """Generation reads every weight once per token; caches and memory are not counted. None for training."""
        if self.op != "generate":
            return None
        weights = sum(parameter.numel() for parameter in self.network.parameters())
        # A table of embeddings is read by row, unless it also is the head.
        if not self.network.config.tie_word_embeddings:
            weights -= self.network.get_input_embeddings().weight.numel()
        return Work(weights * self.shape.dtype.itemsize, 2 * self.shape.B * weights)


def draw(op: str, shape: Shape, device: torch.device, seed: int = 0) -> ModelInputs:
    """Raises ValueError for a model that is not one of `shapes.MODELS`."""
    torch.manual_seed(seed)
    # As in use: a small model trains with float32 weights and multiplies in shape.dtype; what does not fit so is kept
    # in shape.dtype, as it is for generation. Weights that train are float32 in any case.
    large = architecture(shape).weights > _LARGE
    frozen = network(shape, device, shape.dtype if op == "generate" or large else torch.float32)
    backbone = huggingface_backbone(frozen, shape.model)
    config = LongMemConfig(
        memory_layers=default_memory_layers(backbone),
        chunk_size=shape.C,
        chunks_per_query=shape.K,
        memory_tokens=shape.M * shape.C,
        # A segment that is full in mid-run: its write is part of what a token costs.
        segment=shape.S + shape.T // 2 if op == "generate" else shape.T,
    )
    length = shape.S if op == "generate" else shape.T + 1

    def words(count: int) -> Tensor:
        return torch.randint(frozen.config.vocab_size, (shape.B, count)).to(device)

    model = LongMem(backbone, config)
    if op == "generate":
        model = model.to(shape.dtype)
    return ModelInputs(op, shape, frozen, model, words(length), words(min(_SAMPLED, shape.M * shape.C)))


def filled_cache(inputs: ModelInputs, room: int) -> Any:
    """A static cache of transformers, with as many random tokens as the memory holds, and `room` for more.

    Returns:
        The same numbers at every call, as a cache that a forward pass writes its tokens into.
    """
    from transformers import StaticCache

    shape, config = inputs.shape, inputs.network.config
    held, weight = shape.M * shape.C, inputs.network.get_input_embeddings().weight
    cache = StaticCache(config=config, max_cache_len=held + room)
    cache.early_initialization(shape.B, config.num_key_value_heads, config.head_dim, weight.dtype, weight.device)
    generator = torch.Generator(weight.device).manual_seed(4)
    for layer in cache.layers:
        for part in (layer.keys, layer.values):
            part[:, :, :held].normal_(generator=generator)
    rewind(cache, held)
    return cache


def rewind(cache: Any, tokens: int) -> None:
    """Forget everything in a static cache beyond its first `tokens`."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)
