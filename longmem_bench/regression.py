"""Has a CPU kernel become slower? Two answers that hold on a loaded machine.

Ratios: our time over a baseline's in the same run, calls of both in turn, one thread, the minimum of many. What slows
the machine slows both, and a call of a millisecond or less often runs undisturbed. Ten to fifteen repeats on two cores
under a load of seven to eight stayed within a fifth of their mean. Another processor with the same instruction set
shifts ratios as well. `MARGIN` allows for both: noise passes, a kernel that got twice as slow does not.

Instructions: what the kernels execute under valgrind, which counts exactly, whatever else runs; it knows no AVX-512, so
the AVX2 kernels are counted. Only another compiler changes the count where the code did not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longmem.files import check_fields, load_json, save_text
from longmem_kernels.info import report

from .case import Case
from .provider import Unavailable
from .providers import providers
from .shapes import Shape

MARGIN = 0.5  # of a stored ratio: less is slower
KINDS = ("ratios", "instructions")
ALLOWANCE = 0.02  # more instructions than stored: more is slower
_OURS = "longmem cpp"
_REPEATS = 3  # of a ratio that is stored
_SEEK, _LIMIT = 1.0, 6.0  # seconds that a ratio is measured for, and at most when it looks too low


@dataclass(frozen=True)
class RatioCase:
    """How many times faster than `baseline` our C++ kernel is."""

    op: str
    shape: Shape
    baseline: str

    @property
    def name(self) -> str:
        return f"{self.op} [{self.shape.describe(self.op)}] over {self.baseline}"


_SEARCH = Shape(B=1, T=64, H=2, G=2, D=64, M=4096)
_ATTEND = Shape(B=1, T=32, H=2, G=2, D=64, M=1024)
_WRITE = Shape(B=1, T=256, H=4, G=4, D=64, M=1024)
# What is decided by the call itself, by long rows, and by many winners.
_ONE_TOKEN = Shape(B=1, T=1, H=4, G=4, D=64, M=1024)
_ATTEND_ONE = Shape(B=1, T=1, S=256, H=8, G=8, D=64, M=1024)
_LONG_ROWS = Shape(B=1, T=64, H=2, G=2, D=128, M=4096)
_MANY_WINNERS = Shape(B=1, T=1, H=4, G=4, D=64, M=16384, K=64)
RATIOS = (
    RatioCase("chunk_topk", _ONE_TOKEN, "faiss-cpu IndexFlatIP per head"),
    RatioCase("chunk_topk", _ONE_TOKEN, "torch matmul + topk"),
    RatioCase("chunk_topk", _LONG_ROWS, "faiss-cpu IndexFlatIP per head"),
    RatioCase("chunk_topk", _MANY_WINNERS, "torch matmul + topk"),
    RatioCase("memory_attention", _ATTEND_ONE, "eager composition"),
    RatioCase("chunk_topk", _SEARCH, "faiss-cpu IndexFlatIP per head"),
    RatioCase("chunk_topk", _SEARCH, "torch matmul + topk"),
    RatioCase("memory_attention", _ATTEND, "eager composition"),
    RatioCase("memory_attention_backward", _ATTEND, "eager composition"),
    RatioCase("ring_write", _WRITE, "eager index_copy"),
)
COUNTED = {
    "chunk_topk": Shape(B=1, T=32, H=2, G=2, D=64, M=1024),
    "memory_attention": Shape(B=1, T=32, H=2, G=2, D=64, M=256),
    "memory_attention_backward": Shape(B=1, T=32, H=2, G=2, D=64, M=256),
    "ring_write": Shape(B=1, T=64, H=2, G=2, D=64, M=256),
}


def stored(file: Path, kind: str, key: str) -> dict[str, float]:
    """The "ratios" of an instruction set, or "instructions" of a compiler, that `file` holds; empty without any."""
    found: dict[str, float] = _all_stored(file).get(kind, {}).get(key, {})
    return found


def _all_stored(file: Path) -> dict[str, Any]:
    """Raises ValueError where the file is damaged."""
    if not file.exists():
        return {}
    what = f"stored measurements: {file}"
    content = load_json(file, "stored measurements")
    check_fields(what, content, dict.fromkeys(KINDS, dict), optional=KINDS)
    for kind in content:
        check_fields(what, content[kind], dict.fromkeys(content[kind], dict))
        for key, numbers in content[kind].items():
            check_fields(f"{what}, {key}", numbers, dict.fromkeys(numbers, float))
    return content


def simd() -> str:
    """The instruction set that our CPU kernels use here, or "none" without the extension."""
    return str(report()["extension"].get("simd", "none"))


def compiler() -> str:
    return str(report()["extension"].get("compiler", "none"))


def _admitted(case: Case, name: str) -> Callable[[], object]:
    return case.admit(next(provider for provider in providers(case.op) if provider.name == name)).run


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def ratio(case: RatioCase, wanted: float = 0.0) -> float:
    """The baseline's least time over ours. Calls go on beyond the usual second while the ratio is below `wanted`:
    minima can only come closer to the undisturbed time.

    Raises:
        Unavailable: one of the two cannot run here.
    """
    with one_thread():
        shared = Case(case.op, case.shape)
        ours, theirs = _admitted(shared, _OURS), _admitted(shared, case.baseline)
        least = [float("inf"), float("inf")]
        begin = time.perf_counter()
        while True:
            for number, call in enumerate((ours, theirs)):
                start = time.perf_counter()
                call()
                least[number] = min(least[number], time.perf_counter() - start)
            spent, found = time.perf_counter() - begin, least[1] / least[0]
            if spent > _LIMIT or (spent > _SEEK and found >= wanted):
                return found


def why_no_counter() -> str | None:
    """The reason why instructions cannot be counted here; None when they can."""
    if shutil.which("valgrind") is None or shutil.which("callgrind_annotate") is None:
        return "valgrind is not installed"
    return None if simd() != "none" else "the C++ kernels were not built"


def instructions() -> dict[str, int]:
    """Instructions of one call of every C++ kernel, counted by callgrind in a process of its own.

    Raises:
        Unavailable: no counter, or it failed.
    """
    reason = why_no_counter()
    if reason is not None:
        raise Unavailable(reason)
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "counts"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={dump}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, sys.executable, "-m", __name__], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise Unavailable(f"valgrind failed: {done.stderr.strip()[-300:]}")
        return {op: _counted(dump.with_name(f"counts.{number}")) for number, op in enumerate(COUNTED, start=1)}


def _counted(dump: Path) -> int:
    """Instructions inside our extension in one dump."""
    command = ["callgrind_annotate", "--threshold=100", str(dump)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ours = [line for line in text.splitlines() if re.search(r"\[.*/longmem_kernels/_C\.", line)]
    counts = [int(line.split()[0].replace(",", "")) for line in ours]
    if not counts:
        raise Unavailable(f"callgrind found no instruction of the extension in {dump.name}")
    return sum(counts)


def _run_counted() -> None:
    """The program run under valgrind: every kernel once to warm up and once counted, with a dump of its own."""
    torch.set_num_threads(1)

    def control(*arguments: str) -> None:
        subprocess.run(["callgrind_control", *arguments, str(os.getpid())], check=True, capture_output=True)

    for op, shape in COUNTED.items():
        provider = next(one for one in providers(op) if one.name == _OURS)
        run = provider.prepare(Case(op, shape).inputs).run
        run()
        control("-i", "on")
        run()
        control("-i", "off")
        control("-d", op)


def beside(file: Path, kinds: tuple[str, ...] = KINDS) -> Iterator[str]:
    """Lines of what is measured here beside what `file` holds."""
    if "ratios" in kinds:
        kept = stored(file, "ratios", simd())
        for case in RATIOS:
            yield f"{ratio(case):8.2f}  stored {kept.get(case.name, float('nan')):.2f}  {case.name}"
    if "instructions" in kinds:
        counts = stored(file, "instructions", compiler())
        try:
            for op, count in instructions().items():
                yield f"{count:12,}  stored {counts.get(op, float('nan')):,.0f}  instructions of {op}"
        except Unavailable as why:
            yield f"instructions: {why}"


def update(file: Path, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """Measure and store what can be measured here; what is stored for other instruction sets and compilers stays.
    Worth it on an otherwise idle machine, after a change that is meant to cost something."""
    content = _all_stored(file)
    if "ratios" in kinds:
        # Load makes eager PyTorch, which allocates more, seem slower than it is: the least of several ratios is right.
        found = {case.name: round(min(ratio(case) for _ in range(_REPEATS)), 3) for case in RATIOS}
        content.setdefault("ratios", {})[simd()] = found
    if "instructions" in kinds:
        content.setdefault("instructions", {})[compiler()] = instructions()
    save_text(file, json.dumps(content, indent=1) + "\n")
    return content


if __name__ == "__main__":
    _run_counted()
