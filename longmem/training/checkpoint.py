"""Checkpoints of a training run, replaced atomically: one file, or a folder that several processes write together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from longmem.backbones.fingerprint import difference
from longmem.files import (
    Whole,
    check_fields,
    check_tensors,
    load_json,
    load_tensors,
    save_tensors,
    save_text,
    short,
    show,
)

from .processes import Processes

_KIND = "longmem checkpoint"
_HEADER = {"step": Whole(), "identity": dict}
_OPTIONAL = ("cuda_rng",)  # a run may have begun where there was no GPU
_FOLDERS = "checkpoint-????????"


@dataclass(frozen=True)
class Content:
    """Content of a checkpoint as live tensors: saved from, and loaded into.

    Attributes:
        common: the same in all processes, or cut into pieces over them: weights, optimiser.
        own: of this process: memory, random state.
        about: of this process, for JSON: position in the documents.
    """

    common: dict[str, Tensor]
    own: dict[str, Tensor]
    about: dict[str, Any]


class Checkpoints:
    """The last checkpoint of a run in `folder`. A kill at any moment leaves the one before or the new one, whole.

    Without torch.distributed it is `checkpoint.safetensors`; with it, a folder `checkpoint-<step>` written through
    torch.distributed.checkpoint, which all processes must be able to read and write.

    Args:
        identity: what must not differ between the run that saved and the one that loads.
        may_change: of a run that was saved after so many steps, the parts of `identity` that may differ all the same,
            as "train.steps".

    Attributes:
        changed: after `load`, the parts that do differ: as they were saved, and as they are now.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        identity: dict[str, Any],
        may_change: Callable[[int], Collection[str]] = lambda step: (),
    ) -> None:
        self.folder, self.processes, self.identity = folder, processes, identity
        self.may_change = may_change
        self.changed: dict[str, tuple[Any, Any]] = {}
        self.file = folder / "checkpoint.safetensors"
        if processes.first:
            for leftover in folder.glob("checkpoint*.part"):  # of a run that was killed while it saved
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def save(self, step: int, content: Content) -> None:
        """Replaces the checkpoint. Raises OSError where it cannot be written; the one before is intact then."""
        if not self.processes.distributed:
            about = {"step": step, "identity": self.identity, **content.about}
            save_tensors(self.file, content.common | content.own, _KIND, about)
            return
        target = self.folder / f"checkpoint-{step:08d}"
        unfinished = target.with_name(target.name + ".part")
        try:
            for part in (self._begin, self._write, self._replace):
                self.processes.together(partial(part, unfinished, target, step, content), OSError, str(target))
        except BaseException:
            if self.processes.first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _begin(self, unfinished: Path, target: Path, step: int, content: Content) -> None:
        if self.processes.first:
            unfinished.mkdir()
            save_text(unfinished / "about.json", json.dumps({"step": step, "identity": self.identity}))

    def _write(self, unfinished: Path, target: Path, step: int, content: Content) -> None:
        _write_tensors(unfinished, self._named(content))
        save_text(unfinished / f"process-{self.processes.rank}.json", json.dumps(content.about))

    def _replace(self, unfinished: Path, target: Path, step: int, content: Content) -> None:
        if self.processes.first:
            before = self._folders()
            os.rename(unfinished, target)
            for old in before:
                shutil.rmtree(old)

    def load(self, content: Content) -> dict[str, Any] | None:
        """Fills the tensors of `content` in place. Returns `about` and the `step`; None where there is no checkpoint.

        Raises:
            ValueError: it is no checkpoint, or that of a run with another `identity` or as another number of processes;
                names what differs.
        """
        newest = self.processes.broadcast(str(max(self._folders(), default="")))
        if self.file.exists() if self.processes.distributed else newest:
            how = "without" if self.processes.distributed else "with"
            raise ValueError(
                f"checkpoint: {self.folder} holds that of a run {how} torchrun; continue it so, or choose another"
                " folder"
            )
        if not self.processes.distributed:
            return self._load_file(content) if self.file.exists() else None
        return self._load_folder(Path(newest), content) if newest else None

    def _load_file(self, content: Content) -> dict[str, Any]:
        tensors, about = load_tensors(self.file, _KIND, header=_HEADER | _types_of(content.about))
        self._check(self.file, about)
        own = {name: tensor for name, tensor in content.own.items() if name in tensors or name not in _OPTIONAL}
        check_tensors(f"{_KIND}: {self.file}", tensors, content.common, others=True)
        # A memory in another precision is that of a run that goes on in another one.
        check_tensors(f"{_KIND}: {self.file}", tensors, own, others=True, any_float=True)
        with torch.no_grad():
            for name, tensor in (content.common | own).items():
                tensor.copy_(tensors[name])
        return about

    def _load_folder(self, folder: Path, content: Content) -> dict[str, Any]:
        common: dict[str, Any] = {}
        own: dict[str, Any] = {}

        def read_json() -> None:
            about, mine = folder / "about.json", folder / f"process-{self.processes.rank}.json"
            common.update(check_fields(f"{_KIND}: {about}", load_json(about, _KIND), _HEADER))
            self._check(folder, common)
            own.update(check_fields(f"{_KIND}: {mine}", load_json(mine, _KIND), _types_of(content.about)))

        for part in (read_json, lambda: _read_tensors(folder, self._named(content))):
            self.processes.together(part, ValueError, f"{_KIND}: {folder} could not be read")
        return {"step": common["step"], **own}

    def _named(self, content: Content) -> dict[str, Any]:
        own = {f"process-{self.processes.rank}.{name}": tensor for name, tensor in content.own.items()}
        return {name: tensor.detach() for name, tensor in (content.common | own).items()}

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob(_FOLDERS))

    def _check(self, path: Path, about: dict[str, Any]) -> None:
        found = _differences(about["identity"], self.identity)
        self.changed = {name: found[name] for name in found if name in self.may_change(about["step"])}
        refused = {name: values for name, values in found.items() if name not in self.changed}
        if not refused:
            return
        listed = "; ".join(_told(name, *values) for name, values in refused.items())
        remedy = "choose another folder, or remove this one's checkpoint to start anew"
        if refused.keys() <= set(self.may_change(-1)):
            remedy = f"it has made all its {about['step']} steps: with more of them it goes on, and these may change"
        raise ValueError(f"checkpoint: {path} belongs to another run ({listed}); {remedy}")


def _told(name: str, old: Any, new: Any) -> str:
    """One difference, in words."""
    if name == "fingerprint":
        return f"backbone: {difference(str(old), str(new)) or 'the same, in another format'}"
    old, new = (show(tuple(value) if isinstance(value, list) else value) for value in (old, new))
    return f"{show(name)[1:-1]}: saved {old}, now {new}"


def _types_of(about: dict[str, Any]) -> dict[str, Any]:
    return {name: type(value) for name, value in about.items()}


def _write_tensors(folder: Path, state: dict[str, Any]) -> None:
    """Raises OSError where torch.distributed.checkpoint, whose errors are of many types, fails."""
    try:
        dcp.save(state, checkpoint_id=folder)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise OSError(f"{folder}: {short(error, 300)}") from None


def _read_tensors(folder: Path, state: dict[str, Any]) -> None:
    """Raises ValueError where torch.distributed.checkpoint, whose errors are of many types, fails."""
    try:
        dcp.load(state, checkpoint_id=folder)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise ValueError(f"{_KIND}: {folder} is damaged or no whole checkpoint ({short(error)})") from None


def _differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Differences of two identities: what was saved, and what is wanted."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(saved.keys() | wanted.keys()):
        old, new = saved.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = old, new
    return found
