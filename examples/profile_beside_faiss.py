"""How long does exact retrieval take beside FAISS, and do both find the same?

    python examples/profile_beside_faiss.py --chunks 16384 --queries 1024
    python examples/profile_beside_faiss.py --chunks 65536 --queries 1      # decoding

Needs faiss-cpu (`pip install -e ".[bench]"`). One index per head, as the published code has; both sides get the same
threads. For tables behind a correctness check, sweeps and profiles by kernel, see docs/bench.md.
"""

import argparse
import statistics
import time

import faiss
import torch

from longmem_kernels import chunk_topk


def milliseconds(function, rounds: int) -> str:
    """Median and spread of `rounds` calls after one that warms up."""
    function()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - begin))
    return f"{statistics.median(times):8.2f} ms ({min(times):.2f} to {max(times):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in {"chunks": 16384, "queries": 1024, "heads": 4, "head-dim": 64, "k": 16, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    sizes = parser.parse_args()
    H, M, T, D, k = sizes.heads, sizes.chunks, sizes.queries, sizes.head_dim, sizes.k

    torch.manual_seed(0)
    # Small integers: inner products are exact in float32, so that both must find the same scores to the bit.
    centroid = torch.randint(-4, 5, (1, H, M, D)).float()
    query = torch.randint(-4, 5, (1, H, T, D)).float()
    count = torch.tensor([M], dtype=torch.int32)

    faiss.omp_set_num_threads(torch.get_num_threads())
    indices = [faiss.IndexFlatIP(D) for _ in range(H)]
    for index, vectors in zip(indices, centroid[0], strict=True):
        index.add(vectors.numpy())

    def ours() -> torch.Tensor:
        return chunk_topk(query, centroid, k, count=count)[1]

    def theirs() -> torch.Tensor:
        found = [index.search(mine.numpy(), k)[0] for index, mine in zip(indices, query[0], strict=True)]
        return torch.stack([torch.from_numpy(scores) for scores in found])[None]

    def plain() -> torch.Tensor:
        return (query @ centroid.mT).topk(k).values

    print(f"{H} heads, {M} chunks, {T} queries each, k = {k}, {torch.get_num_threads()} threads")
    for name, search in {"longmem": ours, "faiss-cpu": theirs, "torch": plain}.items():
        assert torch.equal(search(), plain()), f"{name} found other scores"
        print(f"{name:10}{milliseconds(search, sizes.rounds)}")


if __name__ == "__main__":
    main()
