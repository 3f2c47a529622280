"""Runs every GPU kernel once on small odd shapes: the program that tools/gpu_check.sh puts under compute-sanitizer.

    python tools/sanitize.py                  CUDA and Triton kernels
    python tools/sanitize.py --device cpu     C++ kernels, for a host sanitizer; Triton's too with TRITON_INTERPRET=1

Results are only required to be finite where they should be; correctness is for tests/. Exits 1 if no kernel could run.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from longmem_kernels import Ring, chunk_topk, memory_attention, ring_write
from longmem_kernels._dispatch import PREFERENCE, why_unavailable

# Neither T nor M a multiple of any tile; H / G = 3; C and K odd; the ring wraps.
B, T, H, G, D, M, C, K = 2, 37, 6, 2, 64, 21, 3, 5


def run_ring_write(impl: str, device: str, dtype: torch.dtype) -> None:
    """A segment that wraps, single tokens, padding, and two rows in one ring; kept as it comes and in float8."""
    index = torch.tensor([1, 1], dtype=torch.int32, device=device)
    for stored in (dtype, torch.float8_e4m3fn):
        ring = Ring.new(rings=2, kv_heads=G, chunks=M, chunk_size=C, head_dim=D, dtype=stored, device=device)
        for tokens in (T, 1, T):
            key, value = torch.randn(2, B, G, tokens, D, device=device, dtype=dtype)
            mask = torch.rand(B, tokens, device=device) < 0.7
            ring_write(ring, key, value, impl=impl)
            ring_write(ring, key, value, ring_index=index, mask=mask, impl=impl)
        assert ring.centroid[1].isfinite().all()


def run_chunk_topk(impl: str, device: str, dtype: torch.dtype) -> None:
    """A full, a nearly empty memory; a segment and a single query."""
    centroid = torch.randn(B, G, M, D, device=device, dtype=dtype)
    count = torch.tensor([M, 2], dtype=torch.int32, device=device)
    for tokens in (T, 1):
        query = torch.randn(B, H, tokens, D, device=device, dtype=dtype)
        _, scores = chunk_topk(query, centroid, K, count=count, impl=impl)
        assert scores[0].isfinite().all()


def run_memory_attention(impl: str, device: str, dtype: torch.dtype) -> None:
    """A segment and a single query, after a cache: every option, every output and its gradient, missing ids."""
    memory = torch.randn(2, B, G, M, C, D, device=device)
    scale = memory.abs().amax((4, 5)).movedim(0, -1).contiguous() / 448
    float8 = (memory / scale.movedim(-1, 0)[..., None, None]).to(torch.float8_e4m3fn)
    shared = {"alibi_slopes": torch.rand(H, device=device), "return_lse": True, "return_memory_share": True}
    mask = torch.rand(B, T + 8, device=device) < 0.7
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("gated", {}),
        ("joint", {"window": 11, "key_mask": mask}),
        ("gated", {"dropout_p": 0.3, "dropout_seed": 7}),
        ("joint", {"memory_scale": scale}),
    )
    for tokens in (T, 1):
        for fusion, options in cases:
            query = torch.randn(B, H, tokens, D, device=device, dtype=dtype, requires_grad=True)
            key = torch.randn(B, G, T + 8, D, device=device, dtype=dtype, requires_grad=True)
            value = torch.randn_like(key, requires_grad=True)
            gate = torch.randn(H, device=device, requires_grad=True) if fusion == "gated" else None
            ids = torch.randint(-1, M, (B, H, tokens, K), device=device, dtype=torch.int32)
            stored = float8 if "memory_scale" in options else memory.to(dtype)
            results = memory_attention(
                query, key, value, *stored, ids, fusion=fusion, gate=gate, **shared, **options, impl=impl
            )
            sum(torch.where(result == -torch.inf, 0.0, result).sum() for result in results).backward()
            assert results[0].isfinite().all() and query.grad is not None and query.grad.isfinite().all()


RUNS = {"ring_write": run_ring_write, "chunk_topk": run_chunk_topk, "memory_attention": run_memory_attention}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--op", choices=tuple(RUNS), help="one operation alone")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    torch.manual_seed(0)
    ran = 0
    for op, run in RUNS.items():
        if options.op not in (None, op):
            continue
        for impl in PREFERENCE[op]:
            reason = "the reference is no kernel" if impl == "reference" else why_unavailable(op, impl, device)
            if reason is not None:
                print(f"{op} {impl}: not run, {reason}")
                continue
            for dtype in (torch.float32, torch.bfloat16):
                run(impl, device, dtype)
                if device == "cuda":
                    torch.cuda.synchronize()
                print(f"{op} {impl} {dtype}: ran", flush=True)
                ran += 1
    return 0 if ran else 1


if __name__ == "__main__":
    raise SystemExit(main())
