"""Pieces shared by the tests of the drop-in classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from longmem_kernels.fairseq import External_Memory, JointMultiheadAttentionWeightedSum, fusion


def fairseq_settings(*, heads: int, width: int, memory_size: int, k: int, chunk: int, gpu: bool = False) -> Any:
    return SimpleNamespace(
        decoder=SimpleNamespace(embed_dim=width, attention_heads=heads),
        use_gpu_to_search=gpu,
        k=k,
        chunk_size=chunk,
        memory_size=memory_size,
        layer_reduction_factor=2,
    )


def small_memory(**changes: Any) -> External_Memory:
    return External_Memory(
        fairseq_settings(**({"heads": 3, "width": 24, "memory_size": 96, "k": 8, "chunk": 4} | changes))
    )


def causal(steps: int) -> Tensor:
    return torch.full((steps, steps), -torch.inf).triu(1)


def alibi(rows: int, heads: int, steps: int) -> Tensor:
    return (fusion.alibi_slopes(heads)[:, None] * torch.arange(steps)).expand(rows, heads, steps)[:, :, None]


def layer(width: int, heads: int, **options: Any) -> JointMultiheadAttentionWeightedSum:
    module = JointMultiheadAttentionWeightedSum(width, heads, self_attention=True, **({"bias": False} | options))
    nn.init.normal_(module.memory_bias)
    return module


def explicit(module: JointMultiheadAttentionWeightedSum, x: Tensor, bias: Tensor, retrieved: Any = None) -> Tensor:
    """The layer with every score written out. bias broadcasts to [B, H, T, S]."""

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (module.num_heads, -1)).permute(1, 2, 0, 3)

    q, k, v = (heads(p(x)) for p in (module.q_proj, module.k_proj, module.v_proj))
    out = (q @ k.mT * module.scaling + bias).softmax(-1) @ v
    if retrieved is not None:
        key, value = (retrieved[name].unflatten(0, q.shape[:2]) for name in ("k", "v"))
        memory = ((q[..., None, :] @ key.mT * module.scaling).softmax(-1) @ value).squeeze(-2)
        share = module.memory_bias.sigmoid()[:, None, None]
        out = (1 - share) * out + share * memory
    return module.out_proj(out.permute(2, 0, 1, 3).flatten(2))
