"""Train a memory around a frozen model in a loop of your own, on one text file.

    python examples/own_training_loop.py BOOK.txt --model smollm2 --steps 12 --out runs/mine

`--model` is a folder or hub name of a transformers model, a GGUF file, or smollm2. The loop reads the book from its
beginning to its last part in consecutive segments, and measures that part without and with memory. A dozen steps show
the mechanics; a read that helps needs some hundred steps over many books (docs/training.md).
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from longmem import LongMem, LongMemConfig, MemoryBank, default_memory_layers
from longmem.backbones.load import load_backbone


def segments(tokens: Tensor, length: int):
    """Yields consecutive pieces [1, length] and their next tokens: the memory of one holds those before."""
    for begin in range(0, len(tokens) - length, length):
        yield tokens[None, begin : begin + length], tokens[None, begin + 1 : begin + length + 1]


@torch.no_grad()
def held_out_loss(model: LongMem, tokens: Tensor, memory: MemoryBank | None) -> float:
    """Nats per token, without writing: every segment reads the same memory."""
    losses = [model(part, memory, targets=y, write=False).loss for part, y in segments(tokens, model.config.segment)]
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/mine"))
    options = parser.parse_args()

    backbone, tokenizer = load_backbone(options.model)
    tokens = torch.tensor(tokenizer(options.book.read_text(encoding="utf-8"))["input_ids"])
    held_out, tokens = tokens[-2 * options.segment - 1 :], tokens[: -2 * options.segment - 1]

    torch.manual_seed(0)
    config = LongMemConfig(memory_layers=default_memory_layers(backbone), segment=options.segment, memory_tokens=4096)
    model = LongMem(backbone, config)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=2e-3)  # the backbone stays frozen
    memory = model.new_memory(rows=1)
    step = 0
    while step < options.steps:
        memory.reset()  # a new reading of the book begins with an empty memory
        for part, targets in segments(tokens, options.segment):
            loss = model(part, memory, targets=targets).loss
            loss.backward()  # before the memory is used again
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            print(f"step {step}: {loss.item():.3f} nats, {memory.stats()['tokens']:.0f} tokens in memory", flush=True)
            if step == options.steps:
                break
        if step == 0:
            raise SystemExit(f"{options.book}: too short for segments of {options.segment} tokens")

    memory.reset()
    model.remember(tokens[None], memory)
    print(f"last part, without memory: {held_out_loss(model, held_out, None):.3f} nats a token")
    print(f"last part, all before it in memory: {held_out_loss(model, held_out, memory):.3f} nats a token")
    model.save_pretrained(options.out)
    print(f"saved to {options.out}: longmem generate --run {options.out} --remember {options.book} --prompt ...")


if __name__ == "__main__":
    main()
