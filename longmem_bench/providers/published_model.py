"""The published model as a composition of ordinary operations over its parameters, on the memory of `published`.

It is the baseline of the published training step, and in the tests what `OfficialLongMem` is held against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .faiss_search import FaissIndex
from .published import Index, PublishedMemory, attend_gathered, gather_heads

_PAD = 1
_GPT = "decoder.pretrained_model.decoder.model"


class PublishedModel:
    """The published model over a dictionary of parameters under their official names, on their device.

    Args:
        parameters: those that require grad are trained.
        config: sizes under the official names, as attributes (`OfficialConfig`).
        storage: what memory keys and values are stored in.
        index: what searches.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], config: Any, *, storage: torch.dtype, index: type[Index] = FaissIndex
    ) -> None:
        self.parameters, self.config = parameters, config
        self.device = parameters["decoder.embed_tokens.weight"].device
        # One memory for all rows.
        capacity, size = config.memory_size // config.chunk, config.embed // config.heads
        self.memory = PublishedMemory(config.heads, capacity, config.chunk, size, storage, self.device, index)
        self.chunk_numbers: Tensor | None = None

    def __call__(self, tokens: Tensor, memory_write: bool = True) -> Tensor:
        """Logits [B, T, vocab] of one segment, which then goes to memory."""
        with torch.no_grad():
            hidden, key, value, alibi = self._backbone(tokens)
        f, x = self.config.layer_reduction_factor, hidden[0].transpose(0, 1)
        steps, padding = tokens.shape[1], tokens == _PAD
        mask = torch.full((steps, steps), -math.inf, device=self.device).triu(1)
        for i in range(self.config.sidenet_layers):
            residual = (hidden[f * i + f] - hidden[f * i]).transpose(0, 1) + x
            y = self._norm(x, f"decoder.layers.{i}.ln_1", 1e-5)
            if i == self.config.memory_layer and self.memory.stored:
                attended = self._joint_attention(y, i, alibi, mask)
            else:
                attended = self._local_attention(y, i, alibi, mask, padding)
            wide = F.gelu(self._linear(y, f"decoder.layers.{i}.fc1"))
            x = self._linear(wide, f"decoder.layers.{i}.fc2") + attended + residual
            if i == self.config.memory_layer and memory_write:
                with torch.autocast(self.device.type, enabled=False):
                    self.write(key, value)
        return self._linear(self._norm(x, "decoder.layer_norm", 1e-5).transpose(0, 1), f"{_GPT}.lm_head")

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        log_probabilities = F.log_softmax(self(tokens), -1, dtype=torch.float32)
        total = F.nll_loss(log_probabilities.flatten(0, 1), targets.flatten(), ignore_index=_PAD, reduction="sum")
        return total / (targets != _PAD).sum()

    def write(self, key: Tensor, value: Tensor) -> None:
        """Append key, value [B, T, E] to the memory, one row after another."""
        heads = (part.flatten(0, 1).unflatten(-1, (self.config.heads, -1)).transpose(0, 1) for part in (key, value))
        self.memory.write(*heads)

    def read(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query [T, B, E] -> keys, values [B * H, T, k, D] and chunk numbers [B, H, T, k // c]."""
        (steps, rows, _), heads = query.shape, self.config.heads
        query = query.detach().float().reshape(steps * rows, heads, -1).transpose(0, 1)
        found = self.memory.search(query, self.config.k // self.config.chunk)

        def gather(stored: Tensor) -> Tensor:
            return gather_heads(stored, found).view(steps, rows * heads, -1, query.shape[-1]).transpose(0, 1)

        numbers = found.view(heads, steps, rows, -1).permute(2, 0, 1, 3)
        return gather(self.memory.keys), gather(self.memory.values), numbers

    def _backbone(self, tokens: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Hidden states, the last one normed; keys and values for memory; ALiBi [B, H, 1, T]."""
        config, steps = self.config, tokens.shape[1]
        seen = (tokens != _PAD).long()
        positions = (seen.cumsum(-1) - 1) * seen
        alibi = _slopes(config.heads).to(self.device)[:, None] * positions[:, None]
        alibi = alibi[:, :, None]
        hide = torch.ones(steps, steps, dtype=torch.bool, device=self.device).triu(1) | (seen == 0)[:, None, None]
        x = F.embedding(tokens, self.parameters["decoder.embed_tokens.weight"])
        hidden, key, value = [x], x, x
        for i in range(config.layers):
            name = f"{_GPT}.transformer.h.{i}"
            y = self._norm(x, f"{name}.ln_1", 1e-6)
            q, k, v = (self._linear(y, f"{name}.attn.{part}_proj").float() for part in "qkv")
            if i == config.retrieval_layer_index:
                key, value = k, v
            q, k, v = (part.unflatten(-1, (config.heads, -1)).transpose(1, 2) for part in (q, k, v))
            scores = q @ k.mT / math.sqrt(q.shape[-1]) + alibi
            scores = scores.masked_fill(hide, torch.finfo(scores.dtype).min)
            attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).to(y.dtype)
            wide = F.gelu(self._linear(y, f"{name}.mlp.fc_in"), approximate="tanh")
            x = self._linear(attended, f"{name}.attn.out_proj") + self._linear(wide, f"{name}.mlp.fc_out") + x
            hidden.append(x)
        hidden[-1] = self._norm(x, f"{_GPT}.transformer.ln_f", 1e-6)
        self._linear(hidden[-1], f"{_GPT}.lm_head")  # the published backbone's own logits, which nobody reads
        return hidden, key, value, alibi

    def _local_attention(self, y: Tensor, layer: int, alibi: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        name = f"decoder.layers.{layer}.self_attn"
        q, k, v = (self._time_first_heads(self._linear(y, f"{name}.{part}_proj")) for part in "qkv")
        scores = q * q.shape[-1] ** -0.5 @ k.mT + alibi.flatten(0, 1) + mask
        if padding.any():
            hide = padding[:, None, None].expand(-1, self.config.heads, -1, -1).flatten(0, 1)
            scores = scores.masked_fill(hide, -math.inf)
        return self._linear(_time_first(scores.softmax(-1) @ v, y.shape[1]), f"{name}.out_proj")

    def _joint_attention(self, y: Tensor, layer: int, alibi: Tensor, mask: Tensor) -> Tensor:
        name = f"decoder.layers.{layer}.self_attn"
        searched = self._linear(y, f"{name}.q_proj")
        with torch.autocast(self.device.type, enabled=False):
            memory_key, memory_value, self.chunk_numbers = self.read(searched)
        memory_key, memory_value = memory_key.type(y.dtype), memory_value.type(y.dtype)
        q, k, v = (self._time_first_heads(self._linear(y, f"{name}.{part}_proj")) for part in "qkv")
        q = q * q.shape[-1] ** -0.5
        local = (q @ k.mT + alibi.flatten(0, 1) + mask).softmax(-1) @ v
        memory = attend_gathered(q, memory_key, memory_value)
        share = self.parameters[f"{name}.memory_bias"].sigmoid().repeat(y.shape[1])[:, None, None]
        fused = local * (1 - share) + memory * share
        return self._linear(_time_first(fused, y.shape[1]), f"{name}.out_proj")

    def _time_first_heads(self, x: Tensor) -> Tensor:
        """[T, B, E] -> [B * H, T, D]."""
        return x.reshape(x.shape[0], x.shape[1] * self.config.heads, -1).transpose(0, 1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"], eps)


def _time_first(x: Tensor, rows: int) -> Tensor:
    """[B * H, T, D] -> [T, B, E]."""
    return x.transpose(0, 1).reshape(x.shape[1], rows, -1)


def _slopes(heads: int) -> Tensor:
    """ALiBi's geometric slopes; heads beyond a power of two take every other slope of the next power."""
    power = 2 ** int(math.log2(heads))

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    return torch.tensor(geometric(power) + geometric(2 * power)[::2][: heads - power])
