"""Where the backbone's states of a batch come from: computed now, or computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .backbones import States
from .data.stream import Batch
from .files import load_tensors, save_tensors
from .model import LongMem
from .precision import autocast, resolve_precision

_KIND = "longmem states"


class StateSource(Protocol):
    """Batch -> the backbone's states of its segments."""

    def __call__(self, batch: Batch) -> States: ...


def encode_now(model: LongMem) -> StateSource:
    """Encode every batch when it comes: for texts seen once."""

    def states(batch: Batch) -> States:
        return model.backbone.encode(batch.tokens, model.config.memory_layers, model.sidenet.depths)

    return states


class StateCache:
    """The backbone's states of whole documents, one safetensors file each, computed once.

    The backbone is frozen and sees one segment at a time, so its states depend on the document and the segment length
    alone: training over them costs only the layers above. A file takes at most 4 * (depths * E + 2 * G * D) bytes per
    token.

    Args:
        model: whose backbone encodes, and whose depths are kept.
        documents: token ids of each document, [n] int64; `batch.document` and `batch.start` index them.
        folder: where the files go. They are named by content, so texts and models can share it.
        rows: segments encoded at once.
        precision: of the encoder's matrix products, see `longmem.precision`.
    """

    def __init__(
        self,
        model: LongMem,
        documents: Sequence[Tensor],
        folder: str | Path,
        *,
        rows: int = 4,
        precision: str = "auto",
    ) -> None:
        self.model, self.documents, self.folder, self.rows = model, documents, Path(folder), rows
        self.precision = resolve_precision(precision, model.backbone.device)
        self._open: dict[int, dict[str, Tensor]] = {}

    def fill(self, progress: Callable[[int], object] | None = None) -> None:
        """Encode what is not on disk yet. `progress` is told the number of tokens after each step."""
        for index, tokens in enumerate(self.documents):
            if self._path(index).exists():
                if progress is not None:
                    progress(len(tokens))
                continue
            self._encode(index, progress)

    def __call__(self, batch: Batch) -> States:
        length = batch.tokens.shape[1]
        places = zip(batch.document.tolist(), batch.start.tolist(), strict=True)
        rows = [self._segment(document, start, length) for document, start in places]
        device = self.model.backbone.device
        stacked = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        hidden = {depth: stacked[f"hidden_{depth}"] for depth in self.model.sidenet.depths}
        return States(hidden, stacked["key"].transpose(1, 2), stacked["value"].transpose(1, 2))

    def _segment(self, document: int, start: int, length: int) -> dict[str, Tensor]:
        """The states of one row, padded with zeros to `length` tokens; all zeros for a row without a document."""
        states = self._document(max(document, 0))
        stop = start + length if document >= 0 else start
        rows = {name: tensor[start:stop] for name, tensor in states.items()}
        missing = length - len(rows["key"])
        if missing:
            rows = {name: torch.cat([row, row.new_zeros(missing, *row.shape[1:])]) for name, row in rows.items()}
        return rows

    def _document(self, index: int) -> dict[str, Tensor]:
        if index not in self._open:
            path = self._path(index)
            if not path.exists():
                self._encode(index, None)
            self._open[index], _ = load_tensors(path, _KIND)
        return self._open[index]

    def _path(self, index: int) -> Path:
        about = (
            f"{self.model.fingerprint} {sorted(self.model.sidenet.depths)} {self.model.config.segment} {self.precision}"
        )
        digest = hashlib.sha256(about.encode() + self.documents[index].numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:24]}.safetensors"

    def _encode(self, index: int, progress: Callable[[int], object] | None) -> None:
        tokens, segment = self.documents[index], self.model.config.segment
        whole = len(tokens) // segment * segment
        pieces = list(tokens[:whole].view(-1, segment).split(self.rows)) if whole else []
        if whole < len(tokens):
            pieces.append(tokens[None, whole:])
        parts: dict[str, list[Tensor]] = {}
        for piece in pieces:
            with autocast(self.precision, self.model.backbone.device):
                states = self.model.backbone.encode(
                    piece.to(self.model.backbone.device), self.model.config.memory_layers, self.model.sidenet.depths
                )
            found = {f"hidden_{depth}": hidden for depth, hidden in states.hidden.items()}
            found |= {"key": states.key.transpose(1, 2), "value": states.value.transpose(1, 2)}
            for name, tensor in found.items():  # token axis first, rows one after another
                parts.setdefault(name, []).append(tensor.flatten(0, 1).cpu())
            if progress is not None:
                progress(piece.numel())
        save_tensors(self._path(index), {name: torch.cat(tensors) for name, tensors in parts.items()}, _KIND, {})
