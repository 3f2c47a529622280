"""A few PTX instructions on a CPU: inline assembly of Triton kernels, which the interpreter cannot run."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence

Value = float | int


def run(code: str, operands: Sequence[Value], memory: dict[int, int]) -> int:
    """The result, `$0`, of inline assembly whose `$1`, `$2`, ... are `operands`. Stores go to `memory`, 32 bits a word.

    Registers hold floats or unsigned integers, as their use says; an instruction not known here raises ValueError.
    """
    registers: dict[str, Value] = {f"${i}": value for i, value in enumerate(operands, 1)}
    lines = [line.strip().rstrip(";") for line in code.splitlines()]
    lines = [line for line in lines if line and line not in "{}" and not line.startswith(".reg")]
    labels = {line.rstrip(":"): number for number, line in enumerate(lines) if line.endswith(":")}

    def value(name: str) -> Value:
        return registers[name] if name in registers else int(name)

    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.endswith(":"):
            continue
        if guard := re.match(r"@(!?)(\w+)\s+", line):
            if bool(registers[guard[2]]) == (guard[1] == "!"):
                continue
            line = line[guard.end() :]
        name, rest = line.split(None, 1)
        if name == "bra":
            at = labels[rest]
            continue
        if name == "st.global.v2.b32":
            address, words = re.fullmatch(r"\[(\w+)\], \{(.+)\}", rest).groups()  # type: ignore[union-attr]
            for i, word in enumerate(words.split(", ")):
                memory[int(value(address)) + 4 * i] = bits_of(value(word))
            continue
        to, *sources = rest.split(", ")
        registers[to] = _result(name, [value(source) for source in sources])
    return int(registers["$0"])


def bits_of(word: Value) -> int:
    return struct.unpack("<I", struct.pack("<f", word))[0] if isinstance(word, float) else word & 0xFFFFFFFF


def _result(name: str, x: list[Value]) -> Value:
    if name == "max.f32":  # of a number and NaN the number
        return x[1] if math.isnan(x[0]) else x[0] if math.isnan(x[1]) else max(x)
    if name == "mov.u32":
        return x[0]
    if name == "add.u32":
        return (int(x[0]) + int(x[1])) & 0xFFFFFFFF
    if name == "mad.wide.u32":
        return int(x[0]) * int(x[1]) + int(x[2])
    if found := re.fullmatch(r"setp\.(ge|lt|le|ne)\.(and\.)?(f32|s32|u32)", name):
        a, b = (_signed(int(y)) if found[3] == "s32" else y for y in x[:2])
        holds = {"ge": a >= b, "lt": a < b, "le": a <= b, "ne": a != b}[found[1]]
        return int(holds and (found[2] is None or bool(x[2])))
    raise ValueError(f"no such instruction here: {name}")


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
