"""Nothing but clear errors or right results comes out of hostile calls and damaged files, nothing outside is written.

LONGMEM_FUZZ is the number of inputs of all tests here together (default 600), LONGMEM_FUZZ_FROM the first seed:
`tools/fuzz.sh 10000` runs as many with the C++ kernels under AddressSanitizer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from damage import Kinds, damage
from hostile import Hostile, call_by_hand, call_public

COUNT, FIRST = int(os.environ.get("LONGMEM_FUZZ", 600)), int(os.environ.get("LONGMEM_FUZZ_FROM", 0))
SEEDS = range(FIRST, FIRST + COUNT // 3)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """A failure says which input it was."""
    try:
        yield
    except Exception as error:
        error.add_note(what) if hasattr(error, "add_note") else print(what)
        raise


@pytest.mark.parametrize("call", [call_public, call_by_hand])
def test_hostile_calls_are_refused_or_right(call: Callable[[int], str]) -> None:
    outcomes: Counter[str] = Counter()
    for seed in SEEDS:
        with told(f"{call.__name__}({seed})"):
            outcomes[call(seed)] += 1
    print(call.__name__, dict(outcomes))
    assert len(outcomes) == 2, outcomes


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    kinds, sound = Kinds(), tmp_path / "sound"
    for name, kind in kinds.all.items():
        (sound / name).mkdir(parents=True)
        kind.make(sound / name)
        kind.read(sound / name)
    refused: Counter[str] = Counter()
    for seed in SEEDS:
        name = list(kinds.all)[seed % len(kinds.all)]
        kind, folder = kinds.all[name], tmp_path / "damaged"
        shutil.copytree(sound / name, folder)
        others = [sound / other / kinds.all[other].name for other in kinds.all if other != name]
        how = damage(folder / kind.name, others, seed)
        with told(f"{name}, seed {seed}: {how}"):
            try:
                kind.read(folder)
            except ValueError as error:
                assert str(folder) in str(error) and "\n" not in str(error), str(error)
                refused[name] += 1
        shutil.rmtree(folder)
    print(f"refused of {len(SEEDS)}:", dict(refused))
    assert refused.keys() == kinds.all.keys()


@pytest.mark.parametrize("part", ["mask", "ring_index", "chunk_ids", "count"])
def test_values_may_change_while_a_kernel_runs(part: str) -> None:
    """Kernels use what they have checked, whoever writes to the tensor meanwhile."""
    hostile = Hostile(4)
    hostile.B, hostile.R, hostile.G, hostile.H, hostile.T, hostile.S, hostile.C = 2, 3, 1, 1, 256, 256, 4
    ring, stop = hostile.ring(), threading.Event()
    ring.cursor.zero_()
    good = torch.tensor([0, 2], dtype=torch.int32)
    write, search = hostile.ring_write_arguments(ring), hostile.chunk_topk_arguments(ring)
    attend = hostile.memory_attention_arguments(ring)
    write[7], search[3], attend[8] = good, good.clone(), good.clone()
    write[8], search[2] = torch.ones(2, 256, dtype=torch.bool), torch.ones(3, dtype=torch.int32)
    attend[6].zero_()
    attend[16] = None
    op, arguments, changing = {
        "mask": ("ring_write", write, write[8]),
        "ring_index": ("ring_write", write, write[7]),
        "chunk_ids": ("memory_attention", attend, attend[6]),
        "count": ("chunk_topk", search, search[2]),
    }[part]

    def change() -> None:
        sound, other = changing.clone(), torch.zeros_like(changing)
        other.fill_(False if part == "mask" else 10**6)
        while not stop.is_set():
            changing.copy_(other)
            changing.copy_(sound)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(100):
            with contextlib.suppress(RuntimeError):  # refused, where the check saw it
                getattr(torch.ops.longmem, f"{op}_cpp")(*arguments)
            ring.cursor.zero_()
    finally:
        stop.set()
        thread.join()
    hostile.guarded.check()
