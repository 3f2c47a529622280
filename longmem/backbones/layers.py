"""The decoder layer that backbones and SideNets are made of, its positions and its cache."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fuse(Protocol):
    """What takes the place of local attention in a layer that reads memory. Shapes as in `memory_attention`."""

    def __call__(
        self, normed: Tensor, query: Tensor, unrotated_query: Tensor, key: Tensor, value: Tensor, layer: DecoderLayer
    ) -> Tensor: ...


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021), rotate-half convention, on the first dimensions that `angles` covers.

    `angles(x, positions [1, T]) -> (cos, sin) [1, T, rotated dims]`: a Hugging Face rotary embedding module. With
    `kind`, one that is also told the kind of the layer.
    """

    def __init__(self, angles: nn.Module, kind: str | None = None) -> None:
        super().__init__()
        self.angles, self.kind = angles, kind

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Rotate x [B, H, T, D], whose first token is at position `start`."""
        positions = torch.arange(start, start + x.shape[2], device=x.device)[None]
        cos, sin = self.angles(x, positions) if self.kind is None else self.angles(x, positions, self.kind)
        rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        low, high = rotated.chunk(2, -1)
        rotated = rotated * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
        return torch.cat([rotated, rest], -1) if rest.shape[-1] else rotated


def alibi_slopes(heads: int) -> Tensor:
    """[heads] float32 slopes of ALiBi (Press et al. 2022), with its rule for head counts that are not powers of two."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 / power * (i + 1)) for i in range(power)]
    slopes += [2 ** (-8 / (2 * power) * (2 * i + 1)) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


class LayerCache:
    """Keys and values of the tokens of the current segment that one layer has seen, for decoding."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, G, T, D] and return all of it, [B, G, S, D]."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        self.key, self.value = key, value
        return key, value


class DecoderLayer(nn.Module):
    """A pre-norm transformer decoder layer assembled from a model's own modules.

    Only the wiring is ours: norms, projections and feed-forward are whatever modules the model brings, so a layer
    computes what the model's layer computes. Attention and feed-forward follow each other, or are `parallel` (GPT-J
    style: both see the layer's input, under the same norm where there is no `mlp_norm`).

    Args:
        output_norm: what attention adds to the residual stream goes through it first.
        scale: multiplies attention scores; default D^-0.5.
    """

    slopes: Tensor | None

    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        input_norm: nn.Module,
        query: nn.Module,
        key: nn.Module,
        value: nn.Module,
        output: nn.Module,
        mlp: nn.Module,
        mlp_norm: nn.Module | None = None,
        output_norm: nn.Module | None = None,
        parallel: bool = False,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
        rotary: Rotary | None = None,
        slopes: Tensor | None = None,
        window: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.scale = head_dim**-0.5 if scale is None else scale
        self.input_norm, self.output_norm, self.mlp_norm, self.mlp = input_norm, output_norm, mlp_norm, mlp
        self.parallel = parallel
        self.query, self.key, self.value, self.output = query, key, value, output
        self.query_norm, self.key_norm, self.rotary = query_norm, key_norm, rotary
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, x: Tensor, *, start: int = 0, cache: LayerCache | None = None, fuse: Fuse | None = None
    ) -> Tensor:
        """x [B, T, E] -> [B, T, E]. `start` is the position of the first token in its segment."""
        normed = self.input_norm(x)
        unrotated = self.project_query(normed)
        unrotated_key, value = self.project_memory(normed)
        query, key = unrotated, unrotated_key
        if self.rotary is not None:
            query, key = self.rotary(query, start), self.rotary(key, start)
        if cache is not None:
            key, value = cache.extend(key, value)
        if fuse is None:
            attended = self.output(merge_heads(self.local_attention(query, key, value)))
        else:
            attended = fuse(normed, query, unrotated, key, value, self)
        if self.output_norm is not None:
            attended = self.output_norm(attended)
        if self.parallel:
            return x + attended + self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x))
        x = x + attended
        return x + self.mlp(x if self.mlp_norm is None else self.mlp_norm(x))

    def project_query(self, normed: Tensor) -> Tensor:
        """[B, H, T, D], before rotation."""
        query = split_heads(self.query(normed), self.heads)
        return query if self.query_norm is None else self.query_norm(query)

    def project_memory(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [B, G, T, D] before rotation: what a memory stores."""
        key = split_heads(self.key(normed), self.kv_heads)
        if self.key_norm is not None:
            key = self.key_norm(key)
        return key, split_heads(self.value(normed), self.kv_heads)

    def stored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a memory stores of the layer's input [B, T, E]: key and value [B, G, T, D]."""
        return self.project_memory(self.input_norm(x))

    def local_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        T, S = query.shape[2], key.shape[2]
        if self.slopes is None and self.window is None and (T == S or T == 1):
            return F.scaled_dot_product_attention(query, key, value, is_causal=T > 1, scale=self.scale, enable_gqa=True)
        distance = torch.arange(S - T, S, device=query.device)[:, None] - torch.arange(S, device=query.device)
        hidden = distance < 0
        if self.window is not None:
            hidden = hidden | (distance >= self.window)
        bias = torch.zeros(T, S, dtype=torch.float32, device=query.device)
        if self.slopes is not None:
            bias = -self.slopes[:, None, None] * distance
        bias = bias.masked_fill(hidden, -torch.inf).to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale, enable_gqa=True)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * D] -> [B, heads, T, D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D]."""
    return x.transpose(1, 2).flatten(2)
