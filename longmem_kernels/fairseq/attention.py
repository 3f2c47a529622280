"""JointMultiheadAttentionWeightedSum: the attention of the published memory layer."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fusion import alibi_slopes, local_attention, retrieved_attention

IncrementalState = dict[str, dict[str, Tensor | None]]


class Dropout(nn.Module):
    """Dropout that can be kept on in evaluation, as fairseq's: `apply_during_inference`."""

    def __init__(self, p: float, module_name: str | None = None) -> None:
        super().__init__()
        self.p, self.module_name, self.apply_during_inference = p, module_name, False

    @property
    def active_p(self) -> float:
        return self.p if self.training or self.apply_during_inference else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.active_p)


class JointMultiheadAttentionWeightedSum(nn.Module):
    """Local attention, gated per head with attention to what was retrieved. Arguments and parameters as published.

    The fused kernel runs where positions are ALiBi (or none), the mask is causal (or none) and memory comes from our
    `External_Memory`; any other bias or mask, and memory as a dictionary of gathered tensors, give the same numbers in
    more steps. Beyond the published class: biases work, and padding may come before anything is in memory.

    Raises:
        ValueError: sizes that do not fit, or quantisation noise, which is fairseq's own.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        self_attention: bool = False,
        encoder_decoder_attention: bool = False,
        q_noise: float = 0.0,
        qn_block_size: int = 8,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(
                f"{self._name}: embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        if q_noise > 0:
            raise ValueError(f"{self._name}: quantisation noise is not supported, got q_noise={q_noise}; wanted 0")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.qkv_same_dim = self.kdim == embed_dim and self.vdim == embed_dim
        if self_attention and not self.qkv_same_dim:
            raise ValueError(f"{self._name}: self_attention needs kdim and vdim to be {embed_dim}, got {kdim}, {vdim}")
        self.dropout_module = Dropout(dropout, module_name=self._name)
        self.head_dim = embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.self_attention, self.encoder_decoder_attention = self_attention, encoder_decoder_attention
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias=bias)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.memory_bias = nn.Parameter(torch.zeros(num_heads))
        # Read by nothing, as published; there so that parameters match.
        self.bias_k = nn.Parameter(torch.empty(1, 1, embed_dim)) if add_bias_kv else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, embed_dim)) if add_bias_kv else None
        self.add_zero_attn = add_zero_attn
        self.beam_size = 1
        self.onnx_trace = self.skip_embed_dim_check = False
        self._incremental_state_id = str(uuid.uuid4())
        self.reset_parameters()

    @property
    def _name(self) -> str:
        return type(self).__name__

    def reset_parameters(self) -> None:
        gain = 1 / math.sqrt(2) if self.qkv_same_dim else 1.0
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(projection.weight, gain=gain)
        nn.init.xavier_uniform_(self.out_proj.weight)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: IncrementalState | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
        position_encoding: Tensor | None = None,
        long_context_retrieval: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend locally and, where something was retrieved, to memory.

        Args:
            query, key, value: [T, B, E]. Without memory, keys and values are projected from `query`, as published.
            key_padding_mask: [B, S] bool, True hides a key. With memory it does nothing, as published.
            incremental_state: refused without memory and unused with it; the published class fails on the first.
            need_weights: must be False: the published class fails otherwise.
            attn_mask: [T, S], added to the local scores.
            before_softmax: without memory, return the local scores [B * H, T, S] and values [B * H, S, D] instead.
            position_encoding: B * H * S values, added to every row of a head's local scores.
            long_context_retrieval: "tgt_index" of `External_Memory.retrieve`.

        Returns:
            [T, B, E] and None.

        Raises:
            ValueError: an argument does not fit.
        """
        steps, rows, width = query.shape
        if width != self.embed_dim or key is None or value is None or key.shape[1] != rows:
            got = [None if x is None else tuple(x.shape) for x in (query, key, value)]
            raise ValueError(f"{self._name}: query, key, value must be [T, B, {self.embed_dim}], got {got}")
        if need_weights or need_head_weights:
            raise ValueError(f"{self._name}: attention weights are not available; pass need_weights=False")
        p = self.dropout_module.active_p
        if long_context_retrieval is not None:
            q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
            scheme = self._scheme(q, k, attn_mask, position_encoding, None)
            attended = retrieved_attention(q, k, v, long_context_retrieval, self.memory_bias, dropout_p=p, **scheme)
        else:
            if incremental_state is not None:
                raise ValueError(
                    f"{self._name}: the published model does not decode incrementally; feed the whole segment"
                )
            q, k, v = (self._heads(projection(query)) for projection in (self.q_proj, self.k_proj, self.v_proj))
            if self.add_zero_attn:
                k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
                attn_mask = None if attn_mask is None else F.pad(attn_mask, (0, 1))
                key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, (0, 1))
            if before_softmax:
                bias = self._bias(q, k, attn_mask, position_encoding, key_padding_mask)
                scores = q @ k.mT * self.scaling
                return (scores if bias is None else scores + bias).flatten(0, 1), v.flatten(0, 1)
            scheme = self._scheme(q, k, attn_mask, position_encoding, key_padding_mask)
            attended = local_attention(q, k, v, dropout_p=p, **scheme)
        return self.out_proj(attended.permute(2, 0, 1, 3).reshape(steps, rows, width)), None

    def _heads(self, x: Tensor) -> Tensor:
        """[T, B, H * D] -> [B, H, T, D], a view."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)

    def _scheme(
        self, query: Tensor, key: Tensor, mask: Tensor | None, positions: Tensor | None, padding: Tensor | None
    ) -> dict[str, Any]:
        """Mask and positions as options of the fused kernel, or as a bias where it has no such scheme."""
        B, H, T, S = *query.shape[:3], key.shape[2]
        fits = [torch.tensor(T == S and padding is None, device=query.device)]
        slopes = None
        if mask is not None and T == S:
            ahead = torch.full((T, S), -torch.inf, device=mask.device, dtype=mask.dtype).triu(1)
            fits.append((mask == ahead).all())
        if positions is not None:
            slopes = alibi_slopes(H).to(query.device)
            expected = slopes[:, None] * torch.arange(S, device=query.device)
            given = positions.reshape(B, H, S).float()
            # They come rounded to the model's dtype.
            fits.append(((given - expected).abs() <= 2 * torch.finfo(positions.dtype).eps * expected).all())
        if bool(torch.stack([fit.to(query.device) for fit in fits]).all()):
            return {"slopes": slopes, "causal": mask is not None}
        return {"bias": self._bias(query, key, mask, positions, padding)}

    def _bias(
        self, query: Tensor, key: Tensor, mask: Tensor | None, positions: Tensor | None, padding: Tensor | None
    ) -> Tensor | None:
        """Sum of what is added to the scores, broadcast to [B, H, T, S], or None."""
        B, H, S = *query.shape[:2], key.shape[2]
        bias = None if positions is None else positions.reshape(B, H, 1, S)
        if mask is not None:
            bias = mask if bias is None else bias + mask
        if padding is not None:
            if padding.shape != (B, S):
                raise ValueError(
                    f"{self._name}: key_padding_mask must be [B, S] = {(B, S)}, got {tuple(padding.shape)}"
                )
            hidden = query.new_zeros(B, 1, 1, S).masked_fill(padding[:, None, None].bool(), -torch.inf)
            bias = hidden if bias is None else bias + hidden
        return bias

    # What fairseq calls.

    def prepare_for_onnx_export_(self) -> None:
        self.onnx_trace = True

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> IncrementalState:
        """Reorder the rows of what is buffered, for beam search."""
        buffer = self._get_input_buffer(incremental_state)
        reordered = {name: None if x is None else x.index_select(0, new_order) for name, x in buffer.items()}
        return self._set_input_buffer(incremental_state, reordered) if buffer else incremental_state

    def get_incremental_state(
        self, incremental_state: IncrementalState | None, key: str
    ) -> dict[str, Tensor | None] | None:
        return None if incremental_state is None else incremental_state.get(f"{self._incremental_state_id}.{key}")

    def set_incremental_state(
        self, incremental_state: IncrementalState | None, key: str, value: dict[str, Tensor | None]
    ) -> Any:
        if incremental_state is not None:
            incremental_state[f"{self._incremental_state_id}.{key}"] = value
        return incremental_state

    def _get_input_buffer(self, incremental_state: IncrementalState | None) -> dict[str, Tensor | None]:
        return self.get_incremental_state(incremental_state, "attn_state") or {}

    def _set_input_buffer(self, incremental_state: IncrementalState, buffer: dict[str, Tensor | None]) -> Any:
        return self.set_incremental_state(incremental_state, "attn_state", buffer)

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Split the joint projection of very old checkpoints into its three, in place."""
        prefix = f"{name}." if name else ""
        for kind in ("weight", "bias"):
            joint = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            if joint is not None:
                for part, tensor in zip("qkv", joint.chunk(3), strict=True):
                    state_dict[f"{prefix}{part}_proj.{kind}"] = tensor
