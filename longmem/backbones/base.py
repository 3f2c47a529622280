"""The frozen encoder: embeddings, a stack of decoder layers, a final norm and a head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .fingerprint import FLOATS, fingerprint
from .layers import DecoderLayer, LayerCache, Positions


@dataclass(frozen=True)
class States:
    """Backbone activations of one segment.

    Attributes:
        hidden: backbone depth i -> [B, T, E]: 0 is the embedding, i the output of layer i - 1, before the final norm.
        key, value: [B, L * G, T, D] of the L memory layers, one after another, before rotation: what a memory stores.
        positions: where the tokens stand in their segments; None: they begin them.
    """

    hidden: dict[int, Tensor]
    key: Tensor
    value: Tensor
    positions: Positions | None = None


@dataclass
class BackboneCache:
    """The backbone's keys and values of the rows' current segments, for decoding.

    All rows append to the same column, and each row's segment begins at a column of its own: what lies before it is
    padding, or an earlier segment, and neither seen nor counted.

    Attributes:
        length: columns in use. starts: the column of each row's first token; None: 0 for all.
    """

    length: int = 0
    starts: list[int] | None = None
    layers: dict[int, LayerCache] = field(default_factory=dict)

    def positions(self, tokens: int, device: torch.device) -> Positions:
        """Positions of the next `tokens` columns."""
        return Positions.in_columns(self.starts or [], self.length, self.length + tokens, device)

    def forget(self, tokens: int) -> None:
        """Drop the oldest columns, which no row's segment has."""
        self.length -= tokens
        if self.starts is not None:
            self.starts = [start - tokens for start in self.starts]
        for layer in self.layers.values():
            layer.forget(tokens)


class Backbone(nn.Module):
    """A causal language model, frozen: no parameter trains and no dropout acts.

    Args:
        name: where it comes from, for checkpoints and messages.
        embed: token ids [B, T] -> [B, T, E].
        layers: the decoder layers in order.
        norm, head: [B, T, E] -> logits [B, T, vocab_size].
        positions: learned embeddings of positions in a segment, added to those of tokens.
        embed_norm: applied to their sum.
        settings: what its modules compute beyond their weights and the wiring, such as rotary positions and activation;
            values that JSON can hold. Part of the fingerprint.
    """

    def __init__(
        self,
        name: str,
        embed: nn.Module,
        layers: Sequence[DecoderLayer],
        norm: nn.Module,
        head: nn.Module,
        *,
        vocab_size: int,
        hidden_size: int,
        positions: nn.Embedding | None = None,
        embed_norm: nn.Module | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings = dict(settings or {})
        self.name, self.vocab_size, self.hidden_size = name, vocab_size, hidden_size
        self.positions, self.embed_norm = positions, embed_norm
        self.embed, self.layers, self.norm, self.head = embed, nn.ModuleList(layers), norm, head
        self.requires_grad_(False)
        self.eval()

    # How to generate with it, as its configuration says: the tokens that end a text, and a `GenerationConfig` of
    # `transformers`.
    eos_token_id: tuple[int, ...] = ()
    generation_config: Any = None

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The format of its weights, float32 where none is of a format that models compute in."""
        return next((weight.dtype for weight in self.parameters() if weight.dtype in FLOATS), torch.float32)

    @property
    def max_segment(self) -> int | None:
        """The longest segment it has positions for; None: no limit of its own."""
        return None if self.positions is None else self.positions.num_embeddings

    def embed_at(self, tokens: Tensor, positions: Positions) -> Tensor:
        """tokens [B, T] -> [B, T, E]."""
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(positions.index)
        return x if self.embed_norm is None else self.embed_norm(x)

    def layer(self, index: int) -> DecoderLayer:
        layer = self.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer

    def logits(self, hidden: Tensor) -> Tensor:
        """Output of the last layer [B, T, E] -> logits [B, T, vocab_size]. Differentiable in `hidden`."""
        return self.head(self.norm(hidden))

    @torch.no_grad()
    def encode(
        self,
        tokens: Tensor,
        memory_layers: Sequence[int],
        depths: Collection[int],
        cache: BackboneCache | None = None,
        positions: Positions | None = None,
    ) -> States:
        """Encode segments, no further up than asked for.

        Args:
            tokens: [B, T] int64.
            memory_layers: the layers whose keys and values are returned, ascending; none: tensors without heads.
            depths: the hidden states to return, 0 to the number of layers.
            cache: the segment so far, when `tokens` continues it.
            positions: where the tokens stand, without a `cache`; default: they begin a segment.

        Raises:
            ValueError: tokens of another shape, outside the vocabulary, or more than there are positions for.
        """
        self.check_tokens(tokens)
        length = tokens.shape[1]
        if cache is not None:
            positions = cache.positions(length, tokens.device)
            longest = cache.length + length - min(cache.starts or [0])
        else:
            positions, longest = positions or Positions.first(length, tokens.device), length
        if self.max_segment is not None and longest > self.max_segment:
            raise ValueError(
                f"Backbone: {self.name} has positions for {self.max_segment} tokens, got a segment of {longest}"
            )
        x = self.embed_at(tokens, positions)
        hidden = {0: x} if 0 in depths else {}
        highest, last = max(depths, default=0), max(memory_layers, default=-1)
        stored = []
        for i in range(max(highest, last + 1)):
            layer = self.layer(i)
            if i in memory_layers:
                stored.append(layer.stored(x))
                if i == last and i >= highest:
                    break
            kept = cache.layers.setdefault(i, LayerCache()) if cache is not None else None
            x = layer(x, positions=positions, cache=kept)
            if i + 1 in depths:
                hidden[i + 1] = x
        if cache is not None:
            cache.length += length
        if not stored:
            nothing = x.new_empty(x.shape[0], 0, length, self.layer(0).head_dim)
            return States(hidden, nothing, nothing, positions)
        key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in zip(*stored, strict=True))
        return States(hidden, key, value, positions)

    @torch.no_grad()
    def resume(self, hidden: Tensor, depth: int) -> Tensor:
        """Run the layers from `depth` up on its hidden states [B, T, E]: what `logits` takes."""
        positions = Positions.first(hidden.shape[1], hidden.device)
        for i in range(depth, len(self.layers)):
            hidden = self.layer(i)(hidden, positions=positions)
        return hidden

    def fingerprint(self) -> str:
        """Identifies all weights and settings: see `longmem.backbones.fingerprint`."""
        return fingerprint(self)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raises ValueError where tokens are not int64 [B, T] of the vocabulary (values are read on the CPU alone)."""
        if tokens.dim() != 2 or tokens.shape[1] == 0 or tokens.dtype != torch.int64:
            raise ValueError(
                f"Backbone: tokens must be int64 [B, T] with T at least 1, got {tokens.dtype} {tuple(tokens.shape)}"
            )
        if tokens.device.type == "cpu" and tokens.numel():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"Backbone: tokens must be ids in [0, {self.vocab_size}), got {low} to {high}")


def check_backbone(where: str, backbone: Any) -> None:
    """Raises TypeError, naming `where`, where it is no Backbone."""
    if not isinstance(backbone, Backbone):
        raise TypeError(
            f"{where}: backbone must be a Backbone, got {type(backbone).__name__}; a transformers model becomes one by"
            " huggingface_backbone(model)"
        )
