"""Files of every kind that this package reads, damaged in every way: cut, empty, forged. Every damage is made from a
seed; see test_fuzz.py."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hostile import NUMBERS
from models import VOCABULARY, tiny_longmem
from official_models import random_model, small_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from longmem import LongMem, MemoryBank
from longmem.data.stream import SegmentStream
from longmem.official import load_official, official_state
from longmem.states import StateCache, encode_now
from longmem.training.config import TrainConfig
from longmem.training.trainer import Trainer
from longmem_bench.results import Result
from longmem_bench.row import Row

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 1.5, -0.0, 10**12, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "row", "shared",
    "12", "\n", "x" * 3000, [], [[]], {}, {"": None}, [1, "a"], *NUMBERS,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of file: `name` in a folder, written by `make(folder)` and read by `read(folder)`."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]


def _memory_kind(**options: Any) -> Kind:
    sizes = {"rows": 2, "kv_heads": 3, "head_dim": 8, "tokens": 32, "chunk_size": 4, "layers": 2}

    def make(folder: Path) -> None:
        bank = MemoryBank(**(sizes | options), fingerprint="model")
        bank.write(*torch.randn(2, 2, 6, 50, 8))
        bank.save(folder / "memory.safetensors")

    def read(folder: Path) -> None:
        bank = MemoryBank.load(folder / "memory.safetensors", "model")
        heads, size = bank.ring.kv_heads, bank.ring.head_dim
        for _ in range(3):
            key = torch.randn(bank.rows, heads, 16, size)
            bank.write(key, key)
            query = key[:, : heads // bank.layers]
            ids, _ = bank.retrieve(query, 3)
            bank.attend(query, query, query, ids, fusion="joint")

    return Kind("memory.safetensors", make, read)


class Kinds:
    """All kinds, with what they share."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = tiny_longmem()
        self.documents = [torch.randint(0, VOCABULARY, (n,)) for n in (60, 40)]
        self.official = random_model(small_config())
        self.all = {
            "memory": _memory_kind(),
            "shared memory": _memory_kind(scope="shared"),
            "float8 memory": _memory_kind(dtype=torch.float8_e4m3fn),
            "model": Kind("longmem.safetensors", self.model.save_pretrained, self._load_model),
            "states": Kind("states.safetensors", self._make_states, self._read_states),
            "checkpoint": Kind("checkpoint.safetensors", self._train, self._continue),
            "metrics": Kind("metrics.jsonl", self._train, self._continue),
            "result": Kind("result.json", _make_result, lambda folder: Result.load(folder / "result.json")),
            "official": Kind("official.pt", self._make_official, self._load_official),
        }

    def _load_model(self, folder: Path) -> None:
        LongMem.from_pretrained(folder, self.model.backbone)

    def _cache(self, folder: Path) -> StateCache:
        cache = StateCache(self.model, self.documents, folder, precision="float32")
        cache.path = lambda _: folder / "states.safetensors"  # type: ignore[method-assign]
        return cache

    def _make_states(self, folder: Path) -> None:
        cache = self._cache(folder)
        cache._document(0)

    def _read_states(self, folder: Path) -> None:
        batch = next(iter(SegmentStream(self.documents[:1], rows=1, segment=12)))
        self._cache(folder)(batch)

    def _trainer(self, folder: Path) -> Trainer:
        stream = SegmentStream(self.documents, rows=2, segment=12, repeat=True, seed=0)
        config = TrainConfig(steps=2, rows=2, save_every=1, precision="float32")
        return Trainer(self.model, stream, encode_now(self.model), config, folder)

    def _train(self, folder: Path) -> None:
        self._trainer(folder).run()

    def _continue(self, folder: Path) -> None:
        state, before = torch.get_rng_state(), copy.deepcopy(self.model.sidenet.state_dict())
        try:
            self._trainer(folder)
        finally:
            torch.set_rng_state(state)
            self.model.sidenet.load_state_dict(before)

    def _make_official(self, folder: Path) -> None:
        torch.save({"args": None, "model": official_state(self.official)}, folder / "official.pt")

    def _load_official(self, folder: Path) -> None:
        load_official(folder / "official.pt", self.official.config)


def _make_result(folder: Path) -> None:
    row = Row("chunk_topk", "ours", "B=1", "float32", "cpu", "some CPU", 2, "abc", median_ms=1.5, tokens=3)
    Result({"device": "some CPU", "threads": "2", "commit": "abc"}, "2026-01-01", [row]).save(folder / "result.json")


# --- Damage ----------------------------------------------------------------------------------------------------------


def damage(path: Path, others: list[Path], seed: int) -> str:
    """Damages the file `path`, and says how. `others`: sound files of other kinds."""
    chance = random.Random(seed)
    structured = {".safetensors": _forge_tensors, ".json": _forge_json, ".jsonl": _forge_lines, ".pt": _forge_pickle}
    raw = (_cut, _empty, _flip, _flip, _append, _text, _folder, _nothing)
    if chance.random() < 0.15:
        shutil.copy(chance.choice(others), path)
        return "another kind of file"
    change = chance.choice(raw) if chance.random() < 0.4 else structured[path.suffix]
    return change.__name__.strip("_") + (change(path, chance) or "")


def _cut(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def _empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    reach = chance.choice((8, min(600, len(content)), len(content)))
    for _ in range(chance.choice((1, 1, 3, 20))):
        content[chance.randrange(reach)] = chance.randrange(256)
    path.write_bytes(content)


def _append(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.choice((1, 9, 5000))))


def _text(path: Path, chance: random.Random) -> None:
    deep = "[" * 100_000
    path.write_text(chance.choice(("no", "{}", "null\n", '{"a": 1}\n', deep, "9" * 5000, "\ufeff[1]", "\0\0")))


def _folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _nothing(path: Path, chance: random.Random) -> None:
    path.unlink()


def _forge_tensors(path: Path, chance: random.Random) -> str:
    """Sound safetensors files with other content."""
    tensors = load_file(path)
    header = path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]]
    metadata: dict[str, str] = json.loads(header)["__metadata__"]
    (kind,) = metadata
    how = chance.choice(("header", "header", "header text", "kind", "tensor", "tensor", "values"))
    if how == "header":
        metadata[kind] = json.dumps(forge(json.loads(metadata[kind]), chance))
    elif how == "header text":
        metadata[kind] = chance.choice(("", "{", "null", "[" * 5000, "{" * 5000, "1" * 5000, metadata[kind][:-3]))
    elif how == "kind":
        metadata = {chance.choice(("", kind + "s", "longmem memory")): metadata[kind]}
    elif how == "tensor":
        name = chance.choice(list(tensors))
        tensors[chance.choice(("other", name))] = _other(tensors.pop(name), chance)
    else:
        name = chance.choice([name for name in tensors if tensors[name].numel()])
        flat = tensors[name].view(-1)
        integer = not flat.is_floating_point()
        bad = [x for x in NUMBERS if not integer or torch.iinfo(flat.dtype).min <= x <= torch.iinfo(flat.dtype).max]
        flat[chance.randrange(len(flat))] = chance.choice(bad or [255]) if integer else chance.choice((-1.0, torch.nan))
    save_file({name: x.contiguous() for name, x in tensors.items() if x is not None}, path, metadata)
    return f" {how}"


def _other(tensor: Tensor, chance: random.Random) -> Tensor | None:
    changes: list[Callable[[Tensor], Any]] = [
        lambda x: None,
        lambda x: x[None],
        lambda x: x.flatten()[:1].clone(),
        lambda x: x[:0],
        lambda x: torch.cat([x.float(), x.float()]).to(x.dtype),
        lambda x: x.to(chance.choice((torch.float64, torch.int8, torch.int64, torch.bool, torch.bfloat16))),
        lambda x: x.view(torch.uint8) if x.dim() else x.to(torch.int16),
    ]
    change = chance.choice(changes)
    return change(tensor if tensor.dim() else tensor[None])


def forge(value: Any, chance: random.Random) -> Any:
    """JSON with one node of `value` taken away, exchanged, renamed or added."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inside or chance.random() < 0.15:
        return copy.deepcopy(chance.choice(STRANGE))
    value, place = copy.deepcopy(value), chance.choice(inside)
    how = chance.random()
    if how < 0.2:
        del value[place]
    elif how < 0.3 and isinstance(value, dict):
        value["unheard of"] = value.pop(place) if chance.random() < 0.5 else chance.choice(STRANGE)
    elif how < 0.6:
        value[place] = copy.deepcopy(chance.choice(STRANGE))
    else:
        value[place] = forge(value[place], chance)
    return value


def _forge_json(path: Path, chance: random.Random) -> None:
    path.write_text(json.dumps(forge(json.loads(path.read_text()), chance)))


def _forge_lines(path: Path, chance: random.Random) -> None:
    lines = path.read_text().splitlines()
    place = chance.randrange(len(lines))
    lines[place] = chance.choice((json.dumps(forge(json.loads(lines[place]), chance)), lines[place][:-9], "", "}"))
    path.write_text("\n".join(lines) + "\n")


def _forge_pickle(path: Path, chance: random.Random) -> None:
    content = torch.load(path, weights_only=True)
    state = content["model"]
    name = chance.choice(list(state))
    how = chance.choice(("name", "value", "tensor", "whole"))
    if how == "name":
        state[chance.choice((3, None, "", ("a",)))] = state.pop(name)
    elif how == "value":
        state[name] = copy.deepcopy(chance.choice(STRANGE))
    elif how == "tensor":
        sparse, meta = torch.zeros(2, 2).to_sparse(), torch.zeros(24, device="meta")
        state[name] = chance.choice((_other(state[name], chance), sparse, meta, state[name].to(torch.complex64)))
    else:
        content = chance.choice((state, {"model": {}}, {"model": 3}, {}, [state], None, {"model": content}))
    torch.save(content, path)
