"""The inline assembly of the search kernel, instruction by instruction: the interpreter runs something else there."""

from __future__ import annotations

import math
import random
import re

import ptx
import pytest

pytest.importorskip("triton")

from longmem_kernels.chunk_topk.triton.lists import _OFFSETS, APPEND, STORE

ROOM = 12


def appended(scores: list[float], bar: float, length: int, slot: int, end: int) -> tuple[dict[int, int], int]:
    """What `_append` is to do: words in memory, and the new length."""
    memory: dict[int, int] = {}
    for offset, score in zip(_OFFSETS, scores, strict=True):
        if score >= bar and slot + offset < end:
            if length < ROOM:
                memory |= {1000 + 8 * length: slot + offset, 1004 + 8 * length: ptx.bits_of(score)}
            length += 1
    return memory, length


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0], ids=lambda spread: f"bar at {spread} sigma")
def test_append(spread: float) -> None:
    draw = random.Random(spread)
    ways = set()
    for _ in range(2000):
        scores = [
            draw.choice([draw.gauss(0, 1), draw.gauss(0, 1), math.nan, math.inf, -math.inf, 0.0]) for _ in range(8)
        ]
        bar = draw.choice([draw.gauss(spread, 0.5), -math.inf, math.inf, 0.0])
        length, slot = draw.choice([0, 3, ROOM - 8, ROOM - 7, ROOM - 1, ROOM, ROOM + 5]), draw.choice([0, 70, 2**30])
        end = slot + draw.choice([-40, 0, 1, 9, 25, 26, 1000])
        memory: dict[int, int] = {}
        operands = [length, bar, 1000, slot, end & 0xFFFFFFFF, ROOM, *scores]
        after = ptx.run(APPEND.value, operands, memory)
        wanted, new_length = appended(scores, bar, length, slot, end)
        # Where it says that a list is full it may say so with any length beyond.
        assert memory == wanted and after == new_length, (operands, memory, wanted)
        ways.add((bool(wanted), length <= ROOM - 8, end >= slot + 26))
    assert len(ways) == 8


def test_take_stores_what_is_hit() -> None:
    for hit in (0, 1):
        memory: dict[int, int] = {}
        assert ptx.run(STORE.value, [5, 1000, 77, 2.5, hit], memory) == 5 + hit
        assert memory == ({1040: 77, 1044: ptx.bits_of(2.5)} if hit else {})


def test_assembly_names_every_operand_once_declared() -> None:
    """Registers are declared, and operands are those that the kernel passes."""
    for code, operands in ((APPEND.value, 15), (STORE.value, 6)):
        used = {int(number) for number in re.findall(r"\$(\d+)", code)}
        assert used == set(range(operands))
        declared = set(re.findall(r"\w+", " ".join(re.findall(r"\.reg \.\w+ (.*?);", code))))
        assert set(re.findall(r"\b[a-z]\b", re.sub(r"\.\w+|\$\d+", "", code))) <= declared
