"""Checkpoints of a training run, replaced atomically: one file, or a folder that several processes write together."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from longmem.backbones.fingerprint import difference
from longmem.files import load_tensors, save_tensors

from .processes import Processes

_KIND = "longmem checkpoint"
_FOLDERS = "checkpoint-????????"


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds, as live tensors: saved from, and loaded into.

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
    """

    def __init__(self, folder: Path, processes: Processes, identity: dict[str, Any]) -> None:
        self.folder, self.processes, self.identity = folder, processes, identity
        self.file = folder / "checkpoint.safetensors"
        if processes.first:
            for leftover in folder.glob("checkpoint*.part"):  # of a run that was killed while it saved
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def save(self, step: int, content: Content) -> None:
        if not self.processes.distributed:
            about = {"step": step, "identity": self.identity, **content.about}
            save_tensors(self.file, content.common | content.own, _KIND, about)
            return
        target = self.folder / f"checkpoint-{step:08d}"
        unfinished = target.with_name(target.name + ".part")
        if self.processes.first:
            unfinished.mkdir()
            (unfinished / "about.json").write_text(json.dumps({"step": step, "identity": self.identity}))
        self.processes.barrier()
        dcp.save(self._named(content), checkpoint_id=unfinished)
        (unfinished / f"process-{self.processes.rank}.json").write_text(json.dumps(content.about))
        self.processes.barrier()
        if self.processes.first:
            before = self._folders()
            os.rename(unfinished, target)
            for old in before:
                shutil.rmtree(old)
        self.processes.barrier()

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
        tensors, about = load_tensors(self.file, _KIND)
        self._check(self.file, about)
        with torch.no_grad():
            for name, tensor in (content.common | content.own).items():
                tensor.copy_(tensors[name])
        return about

    def _load_folder(self, folder: Path, content: Content) -> dict[str, Any]:
        common = json.loads((folder / "about.json").read_text())
        self._check(folder, common)
        dcp.load(self._named(content), checkpoint_id=folder)
        own = json.loads((folder / f"process-{self.processes.rank}.json").read_text())
        return {"step": common["step"], **own}

    def _named(self, content: Content) -> dict[str, Any]:
        own = {f"process-{self.processes.rank}.{name}": tensor for name, tensor in content.own.items()}
        return {name: tensor.detach() for name, tensor in (content.common | own).items()}

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob(_FOLDERS))

    def _check(self, path: Path, about: dict[str, Any]) -> None:
        if about["identity"] != self.identity:
            raise ValueError(
                f"checkpoint: {path} belongs to another run"
                f" ({'; '.join(_differences(about['identity'], self.identity))}); choose another folder, or remove"
                " this one's checkpoint to start anew"
            )


def _differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(saved.keys() | wanted.keys()):
        old, new = saved.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new and key == "fingerprint":
            found.append(f"backbone: {difference(str(old), str(new)) or 'the same, in another format'}")
        elif old != new:
            found.append(f"{prefix}{key}: saved {old}, now {new}")
    return found
