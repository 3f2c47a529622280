"""Compile the Triton kernels that an op launches, for a GPU that need not be there, and read what the code will use.

`launches` runs an op on CPU tensors and notes every kernel launch in place of running it, so that what is compiled is
what the op asks for: same tile sizes, same warps, same specialisation.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from longmem_kernels._tiles import SHARED_BYTES

REGISTERS = 255  # of a thread
# Local memory of a thread, for registers that are spilled once. The innermost loops, where the time goes, spill none.
LOCAL_BYTES = 128

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
_TYPES |= {torch.bool: "i1", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv"}


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel, its arguments by name, and its compile options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Usage:
    registers: int
    local_bytes: int  # spilled registers and stack, per thread
    loop_spills: int  # instructions of innermost loops that access local memory
    shared_bytes: int

    def fits(self, capability: int) -> bool:
        if self.registers > REGISTERS or self.shared_bytes > SHARED_BYTES[capability]:
            return False
        return self.loop_spills == 0 and self.local_bytes <= LOCAL_BYTES


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """A list that collects the kernel launches of the block instead of running them."""
    found: list[Launch] = []

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments.update((name, value) for name, value in kwargs.items() if name in kernel.arg_names)
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        found.append(Launch(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", note):
        yield found


def compile_for(launch: Launch, capability: int) -> Usage:
    """What the machine code of the launch for sm_`capability` uses."""
    compiled = _compiled(launch, capability)
    return _usage(compiled.asm["cubin"], compiled.metadata.shared)


def disassembled(launch: Launch, capability: int) -> str:
    return _read_cubin(triton.knobs.nvidia.nvdisasm.path, "--print-code", _compiled(launch, capability).asm["cubin"])


def shortest_turn(launch: Launch, capability: int) -> list[str]:
    """The instructions on the shortest way around the loop that multiplies matrices: what every turn costs at least."""
    cubin = _compiled(launch, capability).asm["cubin"]
    sass = _read_cubin(triton.knobs.nvidia.cuobjdump.path, "-sass", cubin)
    code = {
        int(address, 16): text for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    }
    addresses = sorted(code)
    after = dict(pairwise(addresses))
    target = {at: int(to[1], 16) for at in addresses if (to := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", code[at]))}
    products = [at for at in addresses if re.search(r"\bHG?MMA\b", code[at])]
    turns = [(at - to, to, at) for at, to in target.items() if to <= products[0] and products[-1] <= at]
    _, start, end = min(turns)

    came_from = {start: start}
    queue = deque([start])
    while end not in came_from:
        at = queue.popleft()
        always = at in target and not code[at].startswith("@")
        for successor in (target.get(at), None if always else after.get(at)):
            if successor is not None and successor not in came_from:
                came_from[successor] = at
                queue.append(successor)
    way = [end]
    while way[-1] != start:
        way.append(came_from[way[-1]])
    return [code[at] for at in reversed(way)]


def _compiled(launch: Launch, capability: int) -> Any:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        # As at a real launch: None and 1 are compiled in, and what 16 divides is known to be so.
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], divisible = "*" + _TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], divisible = "fp32", False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def _read_cubin(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def _usage(cubin: bytes, shared_bytes: int) -> Usage:
    report = _read_cubin(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    code = _read_cubin(triton.knobs.nvidia.nvdisasm.path, "--print-code", cubin)
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    spills = sum(len(re.findall(r"\b(?:LDL|STL)\b", line)) for loop in innermost_loops(code) for line in loop)
    return Usage(used["REG"], used["STACK"] + used["LOCAL"], spills, shared_bytes)


def innermost_loops(code: str) -> Iterator[list[str]]:
    """Lines of disassembly from a label to a jump back to it with no such jump in between."""
    lines = code.splitlines()
    labels: dict[str, int] = {}
    last_end = -1
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = number
        elif (jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
            begin = labels[jump[1]]
            if begin > last_end and number - begin > 4:  # the program's last line is a jump to itself
                yield lines[begin:number]
            last_end = number
