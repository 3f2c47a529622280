"""Put a book into memory, keep the memory in a file, and go on writing.

    python examples/generate_with_a_book.py out/quickstart BOOK.txt "It was" --tokens 60

The first argument is the folder of a trained run (`longmem train`, `make quickstart`, or `LongMem.save_pretrained`).
The second call finds BOOK.memory and reads no book. The same on the command line:
`longmem generate --run out/quickstart --remember BOOK.txt --prompt "It was"`.
"""

import argparse
import json
from pathlib import Path

import torch

from longmem import LongMem, MemoryBank
from longmem.backbones.load import load_backbone
from longmem.text import generate_text, stop_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("book", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--memory-tokens", type=int, default=65_536)
    options = parser.parse_args()

    name = json.loads((options.run / "config.json").read_text(encoding="utf-8"))["backbone"]
    backbone, tokenizer = load_backbone(name)
    model = LongMem.from_pretrained(options.run, backbone)

    kept = options.book.with_suffix(".memory")
    if kept.exists():
        memory = MemoryBank.load(kept, model.fingerprint)  # refused when another model made it
    else:
        memory = model.new_memory(rows=1, tokens=options.memory_tokens)
        book = tokenizer(options.book.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
        model.remember(book, memory)
        memory.save(kept)
    print(f"{memory.stats()['tokens']:.0f} tokens of {options.book.name} in memory ({kept})\n")

    print(options.prompt, end="", flush=True)
    for piece in generate_text(
        model,
        tokenizer,
        options.prompt,
        memory,
        ends=stop_tokens(tokenizer, backbone),
        max_new_tokens=options.tokens,
        temperature=0.7,
        top_p=0.95,
        generator=torch.Generator().manual_seed(0),
    ):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
