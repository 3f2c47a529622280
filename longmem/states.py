"""Sources of the backbone's states of a batch: computed now, or computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .backbones import States
from .data.stream import Batch
from .files import check_tensors, open_tensors, save_tensors, tensors_like
from .model import LongMem
from .padding import fill_padding
from .precision import autocast, resolve_precision

_KIND = "longmem states"


class StateSource(Protocol):
    """Batch -> the backbone's states of its segments."""

    def __call__(self, batch: Batch) -> States: ...


def encode_now(model: LongMem) -> StateSource:
    """Encode every batch when it comes: for texts seen once."""

    def states(batch: Batch) -> States:
        tokens = fill_padding(batch.tokens, batch.mask, [0] * len(batch.tokens))  # padding is on the right
        return model.backbone.encode(tokens, model.config.memory_layers, model.sidenet.depths)

    return states


class StateCache:
    """The backbone's states of whole documents, one safetensors file each, computed once.

    The backbone is frozen and sees one segment at a time, so its states depend on the document and the segment length
    alone: training over them costs only the layers above. A file takes at most 4 * (depths * E + 2 * G * D) bytes per
    token. Of a file only the segments at hand are read, and only the files of the documents at hand are open.

    Args:
        model: whose backbone encodes, and whose depths are kept.
        documents: token ids of each document, [n] int32 or int64; `batch.document` and `batch.start` index them.
        folder: where the files go. They are named by content, so texts and models can share it.
        rows: segments encoded at once.
        precision: of the encoder's matrix products, see `longmem.precision`.
        dtype: that files hold; None: as they were computed. States come out as the backbone's.
    """

    def __init__(
        self,
        model: LongMem,
        documents: Sequence[Tensor],
        folder: str | Path,
        *,
        rows: int = 4,
        precision: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.documents, self.folder, self.rows = model, documents, Path(folder), rows
        self.precision = resolve_precision(precision, model.backbone.device, model.backbone.dtype)
        self.dtype = dtype
        self._open: dict[int, Any] = {}
        self._before: set[int] = set()  # the documents of the call before
        self._paths: dict[int, Path] = {}

    def fill(self, progress: Callable[[int], object] | None = None) -> None:
        """Encode what is not on disk yet. `progress` is told the number of tokens after each step."""
        fill_together([self], progress)

    def __call__(self, batch: Batch) -> States:
        length = batch.tokens.shape[1]
        places = list(zip(batch.document.tolist(), batch.start.tolist(), strict=True))
        found = {row: self._segment(*place, length) for row, place in enumerate(places) if place[0] >= 0}
        if not found:
            raise ValueError("StateCache: wanted a batch with a document in one of its rows at least, got none")
        nothing = {name: torch.zeros_like(tensor) for name, tensor in next(iter(found.values())).items()}
        rows = [found.get(row, nothing) for row in range(len(places))]
        self._let_go({document for document, _ in places})
        device = self.model.backbone.device
        stacked = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        if self.dtype is not None:
            stacked = {name: tensor.to(self.model.backbone.dtype) for name, tensor in stacked.items()}
        hidden = {depth: stacked[f"hidden_{depth}"] for depth in self.model.sidenet.depths}
        return States(hidden, stacked["key"].transpose(1, 2), stacked["value"].transpose(1, 2))

    def _segment(self, document: int, start: int, length: int) -> dict[str, Tensor]:
        """The states of one row, padded with zeros to `length` tokens."""
        file = self._document(document)
        rows = {name: file.get_slice(name)[start : start + length] for name in file.keys()}  # noqa: SIM118
        missing = length - len(rows["key"])
        if missing:
            rows = {name: torch.cat([row, row.new_zeros(missing, *row.shape[1:])]) for name, row in rows.items()}
        return rows

    def _document(self, index: int) -> Any:
        """The open file of a document's states, which are computed first where there is none."""
        if index not in self._open:
            path = self.path(index)
            if not path.exists():
                _encode([self], index, None)
            file = open_tensors(path, _KIND)
            found = tensors_like(file, path, _KIND)
            check_tensors(f"{_KIND}: {path}", found, self._like(index), any_float=self.dtype is None)
            self._open[index] = file
        return self._open[index]

    def _like(self, index: int) -> dict[str, Tensor]:
        """Without content, the tensors that a document's file must hold."""
        config, tokens = self.model.config, len(self.documents[index])
        layer = self.model.backbone.layer(config.memory_layers[0])
        dtype, heads = self.dtype or self.model.backbone.dtype, len(config.memory_layers) * layer.kv_heads
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("key", "value"), (heads, layer.head_dim))
        shapes |= {f"hidden_{depth}": (self.model.backbone.hidden_size,) for depth in self.model.sidenet.depths}
        return {name: torch.empty(tokens, *shape, dtype=dtype, device="meta") for name, shape in shapes.items()}

    def _let_go(self, documents: set[int]) -> None:
        """Closes the files of documents that neither this call nor the one before has read: a control reads two
        documents in turn."""
        for index in self._open.keys() - documents - self._before:
            del self._open[index]
        self._before = documents

    def path(self, index: int) -> Path:
        """File of a document's states, written or not yet."""
        if index not in self._paths:
            model = self.model
            about = f"{model.fingerprint} {sorted(model.sidenet.depths)} {model.config.segment} {self.precision}"
            if self.dtype is not None:
                about += f" {self.dtype}"
            digest = hashlib.sha256(about.encode() + self.documents[index].long().numpy().tobytes())
            self._paths[index] = self.folder / f"{digest.hexdigest()[:24]}.safetensors"
        return self._paths[index]

    def pieces(self, index: int) -> list[Tensor]:
        """A document's segments, [rows, T] at a time, and what is left over."""
        tokens, segment = self.documents[index].long(), self.model.config.segment
        whole = len(tokens) // segment * segment
        pieces = list(tokens[:whole].view(-1, segment).split(self.rows)) if whole else []
        return [*pieces, tokens[None, whole:]] if whole < len(tokens) else pieces

    def kept(self, states: States, layers: Sequence[int]) -> dict[str, Tensor]:
        """Selects from states of `layers` the tensors that this cache's model needs: token axis first, rows one after
        another."""
        heads = states.key.shape[1] // len(layers)
        places = [layers.index(layer) for layer in self.model.config.memory_layers]
        found = {f"hidden_{depth}": states.hidden[depth] for depth in self.model.sidenet.depths}
        for name, tensor in (("key", states.key), ("value", states.value)):
            mine = [tensor[:, place * heads : (place + 1) * heads] for place in places]
            found[name] = torch.cat(mine, 1).transpose(1, 2)
        return {name: tensor.flatten(0, 1).to("cpu", self.dtype or tensor.dtype) for name, tensor in found.items()}


def fill_together(caches: Sequence[StateCache], progress: Callable[[int], object] | None = None) -> None:
    """Fill caches of the same backbone and documents that differ in what they keep, in one pass of the encoder.

    `progress` is told the number of tokens after each step.
    """
    for index, tokens in enumerate(caches[0].documents):
        missing = [cache for cache in caches if not cache.path(index).exists()]
        if missing:
            _encode(missing, index, progress)
        elif progress is not None:
            progress(len(tokens))


def _encode(caches: Sequence[StateCache], index: int, progress: Callable[[int], object] | None) -> None:
    """Encode one document, once, and write the file of each cache."""
    backbone = caches[0].model.backbone
    layers = sorted(set().union(*(cache.model.config.memory_layers for cache in caches)))
    depths = set().union(*(cache.model.sidenet.depths for cache in caches))
    length = len(caches[0].documents[index])
    whole: list[dict[str, Tensor]] = [{} for _ in caches]
    done = 0
    for piece in caches[0].pieces(index):
        with autocast(caches[0].precision, backbone.device, backbone.dtype):
            states = backbone.encode(piece.to(backbone.device), layers, depths)
        for cache, mine in zip(caches, whole, strict=True):
            for name, tensor in cache.kept(states, layers).items():
                if name not in mine:
                    mine[name] = tensor.new_empty(length, *tensor.shape[1:])
                mine[name][done : done + len(tensor)] = tensor
        done += piece.numel()
        if progress is not None:
            progress(piece.numel())
    for cache, mine in zip(caches, whole, strict=True):
        save_tensors(cache.path(index), mine, _KIND, {})
