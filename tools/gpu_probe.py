"""What no test on a CPU can show, each in a minute or less on a GPU; tools/gpu_check.sh runs them.

    python tools/gpu_probe.py graphs        a decoding step, captured as a CUDA graph and not: the same results
    python tools/gpu_probe.py fp8           a float8 memory: written, searched, read, against the reference; timed
    python tools/gpu_probe.py distributed   training on one process, under DDP and under FSDP: the same losses

With --device cpu the same without a graph and without NCCL: a rehearsal. Exits 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from longmem_bench.timing import cuda_times, median_ms, wall_times
from longmem_kernels import Ring, chunk_topk, memory_attention, ring_write

LOSS_ROUNDING = 2e-3  # nats: sums of other orders


def graphs(device: torch.device) -> None:
    """Write a token, search, attend: 8 replays on new inputs give what 8 calls give, bit for bit."""
    B, H, G, D, M, S = 4, 8, 4, 64, 2048, 128
    shape = {"rings": B, "kv_heads": G, "chunks": M, "chunk_size": 4, "head_dim": D}
    captured, plain = (Ring.new(**shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    gate, static = torch.zeros(H, device=device), _drawn(0, B, H, G, S, D, device)
    for ring in (captured, plain):
        ring_write(ring, *_drawn(1, B, H, G, 4 * M - 2, D, device)[1:])

    def step(ring: Ring, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ring_write(ring, key[:, :, -1:], value[:, :, -1:])
        ids, _ = chunk_topk(query, ring.centroid, 16, count=ring.count())
        return memory_attention(query, key, value, ring.key, ring.value, ids, gate=gate)

    replay, out = _capture(lambda: step(captured, *static), [captured, plain], device)
    for number in range(8):
        inputs = _drawn(2 + number, B, H, G, S, D, device)
        for target, new in zip(static, inputs, strict=True):
            target.copy_(new)
        got = replay() if out is None else (replay(), out)[1]
        _same(f"step {number}", got, step(plain, *inputs))
    _same("cursor", captured.cursor, plain.cursor)
    _same("store", captured.store, plain.store)
    print("graphs: 8 steps of write, search and attention are bit-equal, captured and not")


def _drawn(seed: int, B: int, H: int, G: int, S: int, D: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    sizes = ((B, H, 1, D), (B, G, S, D), (B, G, S, D))
    return [torch.randn(size, generator=generator, device=device).to(torch.bfloat16) for size in sizes]


def _capture(
    run: Callable[[], Tensor], rings: list[Ring], device: torch.device
) -> tuple[Callable[[], Tensor], Tensor | None]:
    """`run` as a graph and the tensor that its replays write, the rings as they were before; on a CPU `run` itself."""
    if device.type != "cuda":
        return run, None
    kept = [part.clone() for ring in rings for part in (ring.store, ring.centroid, ring.tail, ring.cursor)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    parts = [part for ring in rings for part in (ring.store, ring.centroid, ring.tail, ring.cursor)]
    for part, before in zip(parts, kept, strict=True):
        part.copy_(before)
    return graph.replay, out  # type: ignore[return-value]


def _same(what: str, got: Tensor, wanted: Tensor) -> None:
    if not torch.equal(got, wanted):
        raise SystemExit(f"{what}: differs by {(got.double() - wanted.double()).abs().max():.3g}")


def fp8(device: torch.device) -> None:
    """A float8 ring holds what the reference writes, attention to it agrees with it too; timed beside bfloat16."""
    B, H, G, D, T, M, K = (8, 16, 16, 64, 1024, 16384, 16) if device.type == "cuda" else (2, 4, 2, 32, 16, 64, 4)
    key, value = (torch.randn(B, G, 4 * T, D, device=device, dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(B, H, T, D, device=device, dtype=torch.bfloat16)
    shape = {"rings": 1, "kv_heads": G, "chunks": M, "chunk_size": 4, "head_dim": D, "device": device}
    index = torch.zeros(B, dtype=torch.int32, device=device)
    rings = [Ring.new(**shape, dtype=dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16)]
    for ring, impl in zip(rings, ("auto", "reference", "auto"), strict=True):
        ring_write(ring, key, value, ring_index=index, impl=impl)
    for part in ("store", "scale", "cursor"):
        got, wanted = (getattr(ring, part) for ring in rings[:2])
        _same(f"ring.{part}", got.float(), wanted.float())

    def attend(ring: Ring, rows: slice, impl: str = "auto") -> Tensor:
        ids, _ = chunk_topk(query[rows], ring.centroid, K, count=ring.count(), ring_index=index[rows])
        return memory_attention(
            query[rows], key[rows, :, :T], value[rows, :, :T], ring.key, ring.value, ids, fusion="joint",
            memory_scale=ring.scale, ring_index=index[rows], impl=impl,
        )  # fmt: skip

    one, every = slice(0, 1), slice(None)
    error = (attend(rings[0], one).float() - attend(rings[0], one, "reference").float()).abs().max().item()
    if not error < 0.02:
        raise SystemExit(f"attention to a float8 memory differs from the reference by {error:.3g}")
    coarse = (attend(rings[0], every).float() - attend(rings[2], every).float()).norm() / attend(
        rings[2], every
    ).float().norm()
    print(f"fp8: agrees with the reference within {error:.2g}; {coarse:.1%} away from a bfloat16 memory")
    for name, ring in (("float8", rings[0]), ("bfloat16", rings[2])):
        run = lambda ring=ring: attend(ring, every)  # noqa: E731
        taken = cuda_times(run, device, 10, graphable=False).cold if device.type == "cuda" else wall_times(run, 3)
        print(f"fp8: search and attention over {name}: {median_ms(taken):.3f} ms")


def distributed(device: torch.device) -> None:
    """Five steps of a tiny model: losses under DDP and FSDP, on NCCL where there is a GPU, are those of one process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _tiny_backbone(folder / "backbone")
        (folder / "texts").mkdir()
        for number in range(3):
            words = " ".join(f"w{(number * 31 + i * 7) % 40}" for i in range(400))
            (folder / "texts" / f"{number}.txt").write_text(words, encoding="utf-8")
        losses = {how: _train(folder, how, device) for how in ("single", "ddp", "fsdp")}
    for how in ("ddp", "fsdp"):
        worst = max(abs(one - other) for one, other in zip(losses[how], losses["single"], strict=True))
        if not worst < LOSS_ROUNDING:
            raise SystemExit(f"{how}: losses {losses[how]} differ from those of one process, {losses['single']}")
        print(f"distributed: {how} on one {device.type}, 5 steps, losses within {worst:.1g} of one process")


def _train(folder: Path, how: str, device: torch.device) -> list[float]:
    launcher = [] if how == "single" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [
        sys.executable, *launcher, "-m", "longmem.cli", "train", "--backbone", str(folder / "backbone"),
        "--data", str(folder / "texts"), "--out", str(folder / how), "--steps", "5", "--rows", "1", "--segment", "16",
        "--memory-tokens", "64", "--chunks-per-query", "4", "--precision", "float32", "--device", device.type,
        *(["--parallel", how] if launcher else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{how}: training ended with {done.returncode}\n{done.stderr[-2000:]}")
    lines = (folder / how / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _tiny_backbone(folder: Path) -> None:
    """A random Llama with a word tokenizer, saved as transformers saves models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<unk>": 0, **{f"w{i}": i + 1 for i in range(40)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    probes = {"graphs": graphs, "fp8": fp8, "distributed": distributed}
    parser.add_argument("probe", choices=probes)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    torch.manual_seed(0)
    probes[options.probe](torch.device(options.device))


if __name__ == "__main__":
    main()
