"""The two classes of the published LongMem, on these kernels: change two imports, keep the rest.

    python examples/drop_in_published.py

A memory layer as the published code wires it (time first, one memory for all rows, ALiBi), over six segments. The last
one is checked against the published formula with every score and copy written out. Neither fairseq nor FAISS is needed.
"""

from types import SimpleNamespace

import torch

# Were: fairseq.modules.dynamic_memory_with_chunk, fairseq.modules.joint_multihead_attention_sum
from longmem_kernels.fairseq import External_Memory, JointMultiheadAttentionWeightedSum

ROWS, STEPS, HEADS, WIDTH = 2, 128, 8, 512


def alibi(slopes: torch.Tensor) -> torch.Tensor:
    """ALiBi as fairseq passes it: slope times key position, one row per batch row and head."""
    return (slopes[:, None] * torch.arange(STEPS)).repeat(ROWS, 1)[:, None]


def written_out(layer, x, bias, found) -> torch.Tensor:
    """The published layer: gathered copies found["k"], found["v"] [B * H, T, k, D], two softmaxes, a gate."""

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.view(STEPS, ROWS * HEADS, -1).transpose(0, 1)  # [B * H, T, D]

    q, k, v = heads(layer.q_proj(x)) * layer.scaling, heads(layer.k_proj(x)), heads(layer.v_proj(x))
    local = (q @ k.mT + bias).softmax(-1) @ v
    remembered = ((q[:, :, None] @ found["k"].mT).softmax(-1) @ found["v"]).squeeze(-2)
    gate = layer.memory_bias.sigmoid().repeat(ROWS)[:, None, None]
    return layer.out_proj((gate * remembered + (1 - gate) * local).transpose(0, 1).reshape(STEPS, ROWS, WIDTH))


def main() -> None:
    torch.manual_seed(0)
    settings = SimpleNamespace(
        decoder=SimpleNamespace(embed_dim=WIDTH, attention_heads=HEADS),
        use_gpu_to_search=False,
        k=64,  # tokens retrieved per query and head, in chunks of 4
        chunk_size=4,
        memory_size=4096,  # tokens
        layer_reduction_factor=2,
    )
    memory = External_Memory(settings)
    attention = JointMultiheadAttentionWeightedSum(WIDTH, HEADS, self_attention=True, bias=False)
    causal = torch.full((STEPS, STEPS), -torch.inf).triu(1)
    positions = alibi(2.0 ** -torch.arange(1, HEADS + 1))

    for segment in range(6):
        x = torch.randn(STEPS, ROWS, WIDTH)  # [T, B, E], what the memory layer gets
        found = None
        if memory.dstore_idx:  # chunks stored so far
            found = memory.retrieve(attention.q_proj(x))["tgt_index"]
        options = {"attn_mask": causal, "position_encoding": positions, "need_weights": False}
        out, _ = attention(x, x, x, long_context_retrieval=found, **options)
        out.square().mean().backward()
        stored = {"k": attention.k_proj(x).transpose(0, 1), "v": attention.v_proj(x).transpose(0, 1)}  # [B, T, E]
        print(f"segment {segment}: {memory.dstore_idx} chunks searched, output {out.norm():.3f}")
        memory.add_index(stored)  # after the read, as published

    wanted = written_out(attention, x, causal + positions, found)
    print(f"largest difference from the formula: {(out - wanted).abs().max():.1e}")
    print(f"gradient of the gates: {attention.memory_bias.grad.norm():.2e}")


if __name__ == "__main__":
    main()
