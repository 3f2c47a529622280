"""The decoder layer that backbones and SideNets are made of, its positions and its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fuse(Protocol):
    """Attention that replaces local attention in a layer that reads memory. Shapes as in `memory_attention`."""

    def __call__(
        self,
        normed: Tensor,
        query: Tensor,
        unrotated_query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: DecoderLayer,
        positions: Positions,
    ) -> Tensor: ...


@dataclass
class Positions:
    """Positions of one call's tokens in their segments. All layers share one, so that masks and angles are computed
    once.

    Attributes:
        index: [B, T] int64, or [1, T] where all rows are alike.
        key_mask: [B, S] bool, the keys that a row may see, its own included; None: all.
    """

    index: Tensor
    key_mask: Tensor | None = None
    _angles: dict[tuple[str | None, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _visible: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    @classmethod
    def first(cls, length: int, device: torch.device) -> Positions:
        """Positions of tokens that begin a segment."""
        return cls(torch.arange(length, device=device)[None])

    @classmethod
    def in_columns(cls, starts: Sequence[int], begin: int, end: int, device: torch.device) -> Positions:
        """Positions of the columns from `begin` to `end`, of rows that begin in the columns `starts`."""
        columns = torch.arange(end, device=device)
        if not any(starts):
            return cls(columns[None, begin:])
        first = torch.tensor(starts, device=device)[:, None]
        return cls((columns[begin:] - first).clamp(min=0), columns >= first)

    def angles(self, rotary: Rotary, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1 or B, 1, T, rotated dims]; a model has one way to make them per kind of layer."""
        place = (rotary.kind, x.dtype)
        if place not in self._angles:
            more = () if rotary.kind is None else (rotary.kind,)
            cos, sin = rotary.angles(x, self.index, *more)
            self._angles[place] = cos[:, None], sin[:, None]
        return self._angles[place]

    def visible(self, keys: int, window: int | None) -> Tensor:
        """Mask of the S = `keys` keys, the last T of them their own, that the tokens see: bool [B or 1, 1, T, S].
        Padding sees itself, for a softmax over nothing is NaN."""
        place = (keys, window)
        if place not in self._visible:
            distance = self.distance(keys)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            if self.key_mask is not None:
                seen = seen & (self.key_mask[:, None, None, :] | (distance == 0))
            self._visible[place] = seen.expand(1, 1, -1, -1) if seen.dim() == 2 else seen
        return self._visible[place]

    def distance(self, keys: int) -> Tensor:
        """[T, S], from each key to the token that looks back at it."""
        columns, tokens = torch.arange(keys, device=self.index.device), self.index.shape[1]
        return columns[keys - tokens :, None] - columns


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021), rotate-half convention, on the first dimensions that `angles` covers.

    `angles(x, positions [B, T]) -> (cos, sin) [B, T, rotated dims]`: a Hugging Face rotary embedding module. With
    `kind`, one that is also told the kind of the layer.
    """

    def __init__(self, angles: nn.Module, kind: str | None = None) -> None:
        super().__init__()
        self.angles, self.kind = angles, kind

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Frequencies keep their format when a model is cast: 8 bits of one are a radian at position 500."""
        exact = dict(self.named_buffers(remove_duplicate=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            owner, _, leaf = name.rpartition(".")
            moved = self.get_submodule(owner)._buffers[leaf]
            if moved is not None and moved.dtype != buffer.dtype:
                self.get_submodule(owner)._buffers[leaf] = buffer.to(moved.device)
        return self

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Rotate x [B, H, T, D]."""
        cos, sin = positions.angles(self, x)
        rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        low, high = rotated.chunk(2, -1)
        rotated = rotated * cos + torch.cat([-high, low], -1) * sin
        return torch.cat([rotated, rest], -1) if rest.shape[-1] else rotated


def alibi_slopes(heads: int) -> Tensor:
    """[heads] float32 slopes of ALiBi (Press et al. 2022), with its rule for head counts that are not powers of two."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 / power * (i + 1)) for i in range(power)]
    slopes += [2 ** (-8 / (2 * power) * (2 * i + 1)) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


class LayerCache:
    """Keys and values of the current segment that one layer has seen, for decoding, in buffers that have room to grow:
    a token costs a copy of itself."""

    def __init__(self) -> None:
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._first, self._end = 0, 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, G, T, D] and return all there is, [B, G, S, D]: views, good until the next call."""
        end = self._end + key.shape[2]
        if self._key is None or self._value is None or end > self._key.shape[2]:
            self._make_room(key, value)
            end = self._end + key.shape[2]
        assert self._key is not None and self._value is not None
        self._key[:, :, self._end : end] = key
        self._value[:, :, self._end : end] = value
        self._end = end
        return self._key[:, :, self._first : end], self._value[:, :, self._first : end]

    def forget(self, tokens: int) -> None:
        """Drop the oldest `tokens`."""
        self._first += tokens
        if self._first == self._end:
            self._first = self._end = 0

    def _make_room(self, key: Tensor, value: Tensor) -> None:
        """Moves the cached tokens to buffers twice as large: amortised O(1) per token; views handed out stay valid."""
        kept = self._end - self._first
        room = max(2 * (kept + key.shape[2]), 64)
        moved = []
        for old, new in ((self._key, key), (self._value, value)):
            buffer = new.new_empty(*new.shape[:2], room, new.shape[3])
            if old is not None:
                buffer[:, :, :kept] = old[:, :, self._first : self._end]
            moved.append(buffer)
        self._key, self._value = moved
        self._first, self._end = 0, kept


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
        self,
        x: Tensor,
        *,
        positions: Positions | None = None,
        cache: LayerCache | None = None,
        fuse: Fuse | None = None,
    ) -> Tensor:
        """x [B, T, E] -> [B, T, E]. Without `positions` the tokens begin a segment."""
        if positions is None:
            positions = Positions.first(x.shape[1], x.device)
        normed = self.input_norm(x)
        unrotated = self.project_query(normed)
        unrotated_key, value = self.project_memory(normed)
        query, key = unrotated, unrotated_key
        if self.rotary is not None:
            query, key = self.rotary(query, positions), self.rotary(key, positions)
        if cache is not None:
            key, value = cache.extend(key, value)
        if fuse is None:
            attended = self.output(merge_heads(self.local_attention(query, key, value, positions)))
        else:
            attended = fuse(normed, query, unrotated, key, value, self, positions)
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
        """Keys and values [B, G, T, D] that a memory stores for the layer's input [B, T, E]."""
        return self.project_memory(self.input_norm(x))

    def local_attention(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions) -> Tensor:
        """Causal attention of [B, H, T, D] to [B, G, S, D], whose last T tokens are its own."""
        T, S = query.shape[2], key.shape[2]
        everything = positions.key_mask is None and (self.window is None or self.window >= S)
        if self.slopes is None and T == 1:
            # The query heads that share a key/value head become the queries of that head: nothing is repeated.
            grouped = query.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)
            mask = None if everything else positions.visible(S, self.window)
            attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=self.scale)
            return attended.flatten(1, 2)[:, :, None]
        if self.slopes is None and T == S and everything:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=True)
        mask = positions.visible(S, self.window)
        if self.slopes is not None:
            bias = -self.slopes[:, None, None] * positions.distance(S)
            mask = torch.where(mask, bias, -torch.inf).to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=True)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * D] -> [B, heads, T, D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, H * D]."""
    return x.transpose(1, 2).flatten(2)
