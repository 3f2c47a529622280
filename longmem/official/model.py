"""OfficialLongMem: the model of the published code out of this package's layers and kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from longmem.backbones.layers import DecoderLayer, Fuse, Positions, alibi_slopes, merge_heads
from longmem.backbones.paper_gpt import PaperGPTConfig, paper_gpt
from longmem_kernels.fairseq import External_Memory
from longmem_kernels.fairseq.fusion import local_attention, retrieved_attention

from .loss import head_loss

PAD = 1


@dataclass(frozen=True)
class OfficialConfig:
    """Sizes under the names of the published configuration.

    Attributes:
        vocab, layers, embed, ffn, heads: of the backbone; the SideNet's layers have the same sizes.
        tokens_per_sample: T, tokens per segment.
        memory_size: capacity in tokens, of all rows together.
        k, chunk: tokens retrieved per query, in chunks of `chunk`.
        retrieval_layer_index: the backbone layer whose keys and values are stored, 0-based. The SideNet layer
            `retrieval_layer_index // layer_reduction_factor` reads them.
        layer_reduction_factor: f, backbone layers per SideNet layer.
        sidenet_layers: default `layers // layer_reduction_factor`.
        dropout, attention_dropout: of feed-forward outputs and of local attention probabilities in the SideNet; 0.1
            each in the published training.
    """

    vocab: int = 51_200
    layers: int = 24
    embed: int = 1024
    ffn: int = 4096
    heads: int = 16
    tokens_per_sample: int = 1024
    memory_size: int = 65_536
    k: int = 64
    chunk: int = 4
    retrieval_layer_index: int = 17
    layer_reduction_factor: int = 2
    sidenet_layers: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        wrong = [
            f"{field.name} must be at least 1, got {getattr(self, field.name)}"
            for field in fields(self)
            if field.name not in ("retrieval_layer_index", "sidenet_layers", "dropout", "attention_dropout")
            and getattr(self, field.name) < 1
        ]
        if not wrong and not self.sidenet_layers:
            object.__setattr__(self, "sidenet_layers", self.layers // self.layer_reduction_factor)
        if not wrong and not 1 <= self.sidenet_layers * self.layer_reduction_factor <= self.layers:
            wrong.append(
                f"layer_reduction_factor {self.layer_reduction_factor} times sidenet_layers {self.sidenet_layers} must"
                f" lie in [1, layers = {self.layers}]"
            )
        if not 0 <= self.retrieval_layer_index < self.layers:
            wrong.append(f"retrieval_layer_index must lie in [0, {self.layers}), got {self.retrieval_layer_index}")
        elif not wrong and self.memory_layer >= self.sidenet_layers:
            wrong.append(f"retrieval_layer_index {self.retrieval_layer_index} lies above the last SideNet layer")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if wrong:
            raise ValueError("OfficialConfig: " + "; ".join(wrong))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OfficialConfig:
        """Takes the sizes out of a larger dictionary. Raises ValueError naming those that are missing."""
        known = {field.name for field in fields(cls)}
        missing = known - {"sidenet_layers", "dropout", "attention_dropout"} - set(values)
        if missing:
            raise ValueError(f"OfficialConfig: missing {', '.join(sorted(missing))}")
        return cls(**{name: values[name] for name in known & set(values)})

    @property
    def memory_layer(self) -> int:
        """The SideNet layer that reads memory."""
        return self.retrieval_layer_index // self.layer_reduction_factor

    def as_fairseq(self) -> Any:
        """Settings in the form that `External_Memory` takes its sizes from."""
        return SimpleNamespace(
            decoder=SimpleNamespace(embed_dim=self.embed, attention_heads=self.heads),
            use_gpu_to_search=False,
            k=self.k,
            chunk_size=self.chunk,
            memory_size=self.memory_size,
            layer_reduction_factor=self.layer_reduction_factor,
        )


@dataclass(frozen=True)
class _Encoded:
    """One encoded segment: embeddings [B, T, E], what each SideNet layer adds, memory keys and values [B, T, E]."""

    embedded: Tensor
    residuals: list[Tensor]
    key: Tensor
    value: Tensor


class OfficialLongMem(nn.Module):
    """The published model and its memory (Victorwz/LongMem).

    The backbone is frozen; the SideNet trains. One memory serves all rows and lives across calls, as in the published
    code; `memory.reset()` empties it.

    Attributes:
        memory: see `External_Memory`; `memory.dstore_idx` chunks are stored.
        knn_index: [B, H, T, k // chunk] int64, the chunks that the last segment read, best first: 0 was the oldest one
            then, -1 stands for none. None when there was no memory to read.

    Args:
        config: sizes.
        storage: what memory keys and values are stored in; the published code runs with float16.
    """

    def __init__(self, config: OfficialConfig, *, storage: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        sizes = PaperGPTConfig(config.vocab, config.layers, config.embed, config.heads, config.ffn)
        self.backbone = paper_gpt(sizes)
        self.layers = nn.ModuleList(_sidenet_layer(config) for _ in range(config.sidenet_layers))
        self.norm = nn.LayerNorm(config.embed, eps=1e-5)
        self.memory_bias = nn.Parameter(torch.zeros(config.heads))
        self.memory = External_Memory(config.as_fairseq(), dtype=storage)
        self.knn_index: Tensor | None = None

    def forward(self, tokens: Tensor, memory_write: bool = True) -> Tensor:
        """Logits [B, T, vocab] for tokens [B, T], 1 being padding.

        More than `config.tokens_per_sample` tokens are walked segment by segment. Every segment reads the memory as it
        was before it, and is then written to it; with `memory_write=False` (`disable_add_index`) it only reads.

        Raises:
            ValueError: tokens of another shape or outside the vocabulary, or a memory too small for the batch.
        """
        return self.backbone.head(self.features(tokens, memory_write))

    def loss(self, tokens: Tensor, targets: Tensor, memory_write: bool = True) -> Tensor:
        """Mean negative log likelihood in nats of targets [B, T] that are not padding.

        The cross entropy of `forward`'s logits, which are never held all at once.
        """
        head = self.backbone.head
        assert isinstance(head, nn.Linear)
        return head_loss(self.features(tokens, memory_write), head.weight, head.bias, targets, ignore=PAD)

    def features(self, tokens: Tensor, memory_write: bool = True) -> Tensor:
        """Hidden states for the vocabulary head, [B, T, E]. Arguments as in `forward`."""
        if not tokens.is_floating_point():
            tokens = tokens.long()
        self.backbone.check_tokens(tokens)
        segments = tokens.split(self.config.tokens_per_sample, 1)
        return torch.cat([self._segment(segment, memory_write) for segment in segments], 1)

    @torch.no_grad()
    def initialise_from_backbone(self) -> None:
        """The published start: SideNet layer i copies backbone layer f * i + 1; gates are half open."""
        for i in range(len(self.layers)):
            source = self.config.layer_reduction_factor * i + 1
            if source >= self.config.layers:
                raise ValueError(
                    f"OfficialLongMem: SideNet layer {i} would start from backbone layer {source} of"
                    f" {self.config.layers}"
                )
            self.layers[i].load_state_dict(self.backbone.layer(source).state_dict())
        self.norm.load_state_dict(self.backbone.norm.state_dict())
        self.memory_bias.zero_()

    def _segment(self, tokens: Tensor, memory_write: bool) -> Tensor:
        padding = tokens == PAD
        bias, unmasked = None, None
        if bool(padding.any()):
            unmasked = _position_bias(padding, self.config.heads)
            bias = unmasked.masked_fill(padding[:, None, None], torch.finfo(torch.float32).min)
        encoded = self._encode(tokens, bias)
        x, self.knn_index = encoded.embedded, None
        for i, residual in enumerate(encoded.residuals):
            reads = i == self.config.memory_layer and self.memory.dstore_idx > 0
            # With memory the published layer forgets about padding.
            x = self.layers[i](x, fuse=self._read(unmasked) if reads else self._attend(bias)) + residual
        if memory_write:
            self.memory.add_index({"k": encoded.key, "v": encoded.value})
        return self.norm(x)

    @torch.no_grad()
    def _encode(self, tokens: Tensor, bias: Tensor | None) -> _Encoded:
        config, backbone = self.config, self.backbone
        x = embedded = before = backbone.embed(tokens)
        attend = self._attend(bias, frozen=True)
        residuals: list[Tensor] = []
        stored: dict[str, Tensor] = {}

        def attend_and_keep(*arguments: Any) -> Tensor:
            stored["k"], stored["v"] = arguments[3:5]
            return attend(*arguments)

        depth = max(config.sidenet_layers * config.layer_reduction_factor, config.retrieval_layer_index + 1)
        for i in range(depth):
            x = backbone.layer(i)(x, fuse=attend_and_keep if i == config.retrieval_layer_index else attend)
            if (i + 1) % config.layer_reduction_factor == 0 and len(residuals) < config.sidenet_layers:
                after = backbone.norm(x) if i + 1 == config.layers else x
                residuals.append(after - before)
                before = x
        return _Encoded(embedded, residuals, merge_heads(stored["k"]), merge_heads(stored["v"]))

    def _attend(self, bias: Tensor | None, frozen: bool = False) -> Fuse:
        """Local attention, causal with ALiBi, or with all of that in `bias`."""
        dropout_p = self._attention_dropout(frozen)

        def fuse(
            normed: Tensor,
            query: Tensor,
            unrotated_query: Tensor,
            key: Tensor,
            value: Tensor,
            layer: DecoderLayer,
            positions: Positions,
        ) -> Tensor:
            slopes = layer.slopes if bias is None else None
            attended = local_attention(query, key, value, slopes=slopes, bias=bias, dropout_p=dropout_p)
            return layer.output(merge_heads(attended))

        return fuse

    def _read(self, bias: Tensor | None) -> Fuse:
        """Attention of the memory layer."""
        dropout_p = self._attention_dropout()

        def fuse(
            normed: Tensor,
            query: Tensor,
            unrotated_query: Tensor,
            key: Tensor,
            value: Tensor,
            layer: DecoderLayer,
            positions: Positions,
        ) -> Tensor:
            rows, heads, steps, _ = query.shape
            found = self.memory.retrieve(query.permute(2, 0, 1, 3).flatten(2))
            numbers = torch.stack(found["knn_index"]).view(heads, steps, rows, -1)
            self.knn_index = numbers.permute(2, 0, 1, 3)
            slopes = layer.slopes if bias is None else None
            attended = retrieved_attention(
                query,
                key,
                value,
                found["tgt_index"],
                self.memory_bias,
                slopes=slopes,
                bias=bias,
                dropout_p=dropout_p,
            )
            return layer.output(merge_heads(attended))

        return fuse

    def _attention_dropout(self, frozen: bool = False) -> float:
        return self.config.attention_dropout if self.training and not frozen else 0.0


def _sidenet_layer(config: OfficialConfig) -> DecoderLayer:
    """Makes a layer like the backbone's, but with another epsilon, the exact GELU and dropout."""
    size = config.embed
    query, key, value, output = (nn.Linear(size, size, bias=False) for _ in range(4))
    mlp = [nn.Linear(size, config.ffn), nn.GELU(), nn.Linear(config.ffn, size), nn.Dropout(config.dropout)]
    return DecoderLayer(
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=size // config.heads,
        input_norm=nn.LayerNorm(size, eps=1e-5),
        query=query,
        key=key,
        value=value,
        output=output,
        mlp=nn.Sequential(*mlp),
        parallel=True,
        slopes=alibi_slopes(config.heads),
    )


def _position_bias(padding: Tensor, heads: int) -> Tensor:
    """[B, H, T, T] float32: ALiBi that does not count padding, and the causal mask."""
    steps = padding.shape[1]
    seen = (~padding).long()
    positions = (seen.cumsum(1) - 1) * seen
    bias = alibi_slopes(heads).to(padding.device)[:, None, None] * positions[:, None, None]
    ahead = torch.ones(steps, steps, dtype=torch.bool, device=padding.device).triu(1)
    return bias.masked_fill(ahead, torch.finfo(torch.float32).min)
