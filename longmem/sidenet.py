"""SideNet: the light network beside the frozen backbone, and the layers in it that read memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backbones.base import Backbone, States
from .backbones.layers import DecoderLayer, LayerCache, Positions, merge_heads, split_heads
from .config import LongMemConfig, sidenet_source
from .memory import MemoryBank
from .precision import multiply_as, trained_dtype


class MemoryRead(nn.Module):
    """Retrieval and fusion at one layer (LongMem, section 2.3).

    Every token and head searches memory with its unrotated query, by inner product with the chunks' mean keys, and
    attends to what it found together with its local context.

    Args:
        bank: which of the memory's layers it reads.
        layer: the decoder layer that reads; its projections are where the read's own ones start.
        own_projections: search, attend and project with trainable copies of the layer's query and output projections;
            otherwise with the layer's own.
    """

    def __init__(self, bank: int, layer: DecoderLayer, config: LongMemConfig, own_projections: bool) -> None:
        super().__init__()
        self.bank = bank
        self.k, self.fusion = config.chunks_per_query, config.fusion
        self.query = copy.deepcopy(layer.query) if own_projections else None
        self.output = copy.deepcopy(layer.output) if own_projections else None
        self.log_temperature = nn.Parameter(torch.zeros(layer.heads))
        gate = torch.full((layer.heads,), config.gate_start)
        self.gate = nn.Parameter(gate) if config.fusion == "gated" else None

    def per_head(self) -> list[nn.Parameter]:
        """The parameters that are one number per head."""
        return [self.log_temperature] if self.gate is None else [self.log_temperature, self.gate]

    def forward(
        self,
        memory: MemoryBank | None,
        normed: Tensor,
        query: Tensor,
        unrotated_query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: DecoderLayer,
        positions: Positions,
        on_share: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """normed [B, T, E], query [B, H, T, D], key and value [B, G, S, D] -> [B, T, E]. `on_share` is told how much of
        the attention went to memory, [B, H, T]."""
        if memory is None:
            return self._project(merge_heads(layer.local_attention(query, key, value, positions)), layer)
        if self.query is not None:
            with multiply_as(normed):
                unrotated_query = split_heads(self.query(normed), layer.heads)
            if layer.query_norm is not None:
                unrotated_query = layer.query_norm(unrotated_query)
        unrotated_query = (unrotated_query * self.log_temperature.exp()[:, None, None]).to(query.dtype)
        chunk_ids, _ = memory.retrieve(unrotated_query, self.k, layer=self.bank)
        fused = memory.attend(
            query,
            key,
            value,
            chunk_ids,
            layer=self.bank,
            memory_query=unrotated_query,
            gate=self.gate,
            fusion=self.fusion,
            scale=layer.scale,
            alibi_slopes=layer.slopes,
            window=layer.window,
            key_mask=positions.key_mask,
            return_memory_share=on_share is not None,
        )
        if on_share is not None:
            fused, share = fused
            on_share(share)
        return self._project(merge_heads(fused), layer)

    def _project(self, attended: Tensor, layer: DecoderLayer) -> Tensor:
        """[B, T, H * D] -> [B, T, E]; the layer's own norm, if any, is for the layer to apply."""
        if self.output is None:
            projected: Tensor = layer.output(attended)
            return projected
        with multiply_as(attended):
            return self.output(attended)


class SideNet(nn.Module):
    """The layers above (or beside) the frozen encoder, one or some of which read memory.

    With `sidenet="none"` they are the backbone's own layers from the first memory layer up. Otherwise layer i copies a
    backbone layer, the first starts from the embedding, and cross-network residuals join them to the backbone:
    `x <- layer(x) + (H[b] - H[a])` with the depths (a, b) of `jumps[i]` (LongMem, section 2.2). Layers that do not
    train are the backbone's, not copies; and where, by the exact start, those below the first read would only say again
    what the backbone says, they are left out.

    With `checkpointing`, the activations of layers that read no memory are computed again in the backward pass.
    """

    checkpointing = False

    def __init__(self, backbone: Backbone, config: LongMemConfig) -> None:
        super().__init__()
        depth, f = len(backbone.layers), config.reduction
        self.jumps: list[tuple[int, int]] = []
        self.norm = None
        if config.sidenet == "none":
            self.first = config.memory_layers[0]
            layers = [backbone.layer(i) for i in range(self.first, depth)]
            places = [layer - self.first for layer in config.memory_layers]
        else:
            skipped_from = 1 if config.sidenet == "exact" else 0
            lowest = config.memory_layers[0] // f if (config.sidenet, config.trainable) == ("exact", "read") else 0
            layers = [backbone.layer(sidenet_source(config.sidenet, f, i)) for i in range(lowest, depth // f)]
            self.jumps = [(f * i + skipped_from, f * i + f) for i in range(lowest, depth // f)]
            if config.sidenet == "exact":
                # Layers left over when f does not divide the depth are carried by the last residual.
                self.jumps[-1] = (self.jumps[-1][0], depth)
            self.first = f * lowest
            places = [layer // f - lowest for layer in config.memory_layers]
        # A tuple, because these layers belong to the backbone: they are neither moved, saved nor trained from here.
        self._borrowed = tuple(layers)
        if config.trainable == "all":
            self._borrowed = ()
            self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
            self.norm = copy.deepcopy(backbone.norm)
        own_projections = config.trainable == "read"
        self.requires_grad_(config.trainable == "all")
        self.reads = nn.ModuleDict(
            {str(i): MemoryRead(bank, self.stack[i], config, own_projections) for bank, i in enumerate(places)}
        )
        self._check_trained()
        self.reads.requires_grad_(True)
        # What trains: small updates vanish in low precision.
        self.to(trained_dtype(backbone.dtype))

    def _check_trained(self) -> None:
        """Raises ValueError where what is to train are quantised weights, which do not."""
        reads = {f"reads.{place}": read for place, read in self.reads.items()}
        copies = {f"{name}.{part}": getattr(read, part) for name, read in reads.items() for part in ("query", "output")}
        copies |= {f"layers.{i}": layer for i, layer in enumerate(self.stack) if not self._borrowed}
        for name, module in copies.items():
            if module is None:
                continue
            own = list(module.parameters())
            if not own or not all(parameter.is_floating_point() for parameter in own):
                raise ValueError(
                    f"LongMem: {name} is to train, and must have floating-point weights of its own, got"
                    f" {type(module).__name__} (a quantised backbone?); load the backbone without quantisation"
                )

    @property
    def stack(self) -> tuple[DecoderLayer, ...]:
        return self._borrowed or tuple(self.layers)  # type: ignore[arg-type]

    @property
    def depths(self) -> set[int]:
        """The depths of the backbone's hidden states that `forward` needs."""
        return {self.first}.union(*self.jumps)

    def forward(
        self,
        states: States,
        memory: MemoryBank | None,
        *,
        caches: list[LayerCache] | None = None,
        shares: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of one segment -> output of the last layer [B, T, E], before the final norm.

        `caches`, one per layer, hold the segment so far when the states continue it. To `shares` is appended, for each
        memory layer, how much of its attention went to memory, [B, H, T].
        """
        on_share = None if shares is None else shares.append  # FSDP hands modules copies of lists
        x = states.hidden[self.first]
        positions = states.positions or Positions.first(x.shape[1], x.device)
        with nullcontext() if self._borrowed else multiply_as(x):
            for i, layer in enumerate(self.stack):
                fuse = partial(self.reads[str(i)], memory, on_share=on_share) if str(i) in self.reads else None
                if self.checkpointing and fuse is None and torch.is_grad_enabled():
                    x = checkpoint(layer, x, positions=positions, use_reentrant=False)
                else:
                    x = layer(x, positions=positions, cache=caches[i] if caches is not None else None, fuse=fuse)
                if self.jumps:
                    before, after = self.jumps[i]
                    x = x + (states.hidden[after] - states.hidden[before])
        return x
