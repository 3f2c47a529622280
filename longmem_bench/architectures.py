"""Sizes of the backbones that whole models are measured with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Llama: layers, width, width of the MLP, query and key heads, their size, vocabulary, and whether the
    head is the table of embeddings."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True

    @property
    def weights(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + embeddings


# Llama 3 8B and Llama 3.2 1B; SmolLM2-135M; a model whose tests take a second.
ARCHITECTURES = {
    "smollm2": Architecture(30, 576, 1536, 9, 3, 64, 49152),
    "llama-8b": Architecture(32, 4096, 14336, 32, 8, 128, 128256, tied=False),
    "llama-1b": Architecture(16, 2048, 8192, 32, 8, 64, 128256),
    "llama-tiny": Architecture(4, 128, 256, 4, 2, 32, 512),
}
