"""The kernels alone: write a memory, search it, attend to it, and the same in plain PyTorch.

    python examples/kernels_only.py
    python examples/kernels_only.py --device cuda --dtype bfloat16

Needs nothing but PyTorch and `longmem_kernels`. Prints how far the two results are apart, and what each took.
"""

import argparse
import time

import torch
from torch import Tensor

from longmem_kernels import Ring, chunk_topk, memory_attention, ring_write


def with_kernels(query: Tensor, key: Tensor, value: Tensor, ring: Ring, gate: Tensor, k: int) -> Tensor:
    ids, _ = chunk_topk(query, ring.centroid, k, count=ring.count())
    return memory_attention(query, key, value, ring.key, ring.value, ids, gate=gate)


def in_plain_pytorch(query: Tensor, key: Tensor, value: Tensor, ring: Ring, gate: Tensor, k: int) -> Tensor:
    """The same for a full ring and as many key/value heads as query heads, with every score and copy written out."""
    B, H, T, D = query.shape
    future = torch.ones(T, T, dtype=torch.bool, device=query.device).triu(1)
    local = (query @ key.mT * D**-0.5).masked_fill(future, -torch.inf).softmax(-1) @ value

    ids = (query.float() @ ring.centroid.float().mT).topk(k).indices  # [B, H, T, K], out of [B, H, T, M]
    b = torch.arange(B, device=query.device)[:, None, None, None]
    h = torch.arange(H, device=query.device)[None, :, None, None]
    found_key = ring.key[b, h, ids].flatten(3, 4)  # [B, H, T, K * C, D]
    found_value = ring.value[b, h, ids].flatten(3, 4)
    weights = (query[..., None, :] @ found_key.mT * D**-0.5).softmax(-1)
    memory = (weights @ found_value).squeeze(-2)

    share = gate.sigmoid()[:, None, None].to(query.dtype)
    return (1 - share) * local + share * memory


def timed(device: str, name: str, function, *arguments) -> Tensor:
    function(*arguments)  # warms up
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    out = function(*arguments)
    out.sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{name}: {1e3 * (time.perf_counter() - begin):.1f} ms, forward and backward")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    B, H, T, D, M, C, K = 2, 8, 128, 64, 1024, 4, 16
    like = {"device": options.device, "dtype": getattr(torch, options.dtype)}

    torch.manual_seed(0)
    ring = Ring.new(rings=B, kv_heads=H, chunks=M, chunk_size=C, head_dim=D, **like)
    for _ in range(2 * M * C // 512):  # twice what the ring holds: the newest chunks replace the oldest
        ring_write(ring, torch.randn(B, H, 512, D, **like), torch.randn(B, H, 512, D, **like))
    query, key, value = (torch.randn(B, H, T, D, **like, requires_grad=True) for _ in range(3))
    gate = torch.zeros(H, device=options.device, requires_grad=True)

    ours = timed(options.device, "longmem_kernels", with_kernels, query, key, value, ring, gate, K)
    plain = timed(options.device, "plain PyTorch", in_plain_pytorch, query, key, value, ring, gate, K)
    print(f"largest difference: {(ours - plain).abs().max():.1e}")


if __name__ == "__main__":
    main()
