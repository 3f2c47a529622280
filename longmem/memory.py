"""MemoryBank: the long-term memory of a batch, a ring buffer per row or one for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longmem_kernels import Ring, chunk_topk, memory_attention, ring_write
from longmem_kernels._checks import (
    COMPUTE_DTYPES,
    Sizes,
    check_device,
    check_dtype,
    check_integer,
    check_last_axis_contiguous,
)
from longmem_kernels.ring import MAX_CURSOR

from .backbones.fingerprint import difference
from .config import CHOICES
from .files import Whole, check_tensors, load_tensors, naming, save_tensors

if TYPE_CHECKING:
    from typing_extensions import Self

KIND = "longmem memory"
_SIZE = Whole(1, 2**31 - 1)
HEADER = {"fingerprint": str, "scope": str, "rows": _SIZE, "layers": _SIZE, "tokens": Whole(1), "chunk_size": _SIZE}


def _parts(ring: Ring) -> dict[str, Tensor]:
    """The ring's tensors by name; `scale` is among them where the store is quantised."""
    parts = {part.name: getattr(ring, part.name) for part in fields(ring)}
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


class MemoryBank:
    """Keys and values of past segments, written in chunks, searched and read by the memory layer.

    Not a module and not a parameter: it is the state of a walk through documents, passed to the model at every step.
    A write takes effect when the memory is next used: until then the backward pass of the read before it, which gathers
    the chunks again, still finds what the forward pass found. A backward pass that comes later is refused.

    Args:
        rows: B, the batch rows it serves.
        kv_heads, head_dim: G and D of the backbone's memory layers.
        layers: L, how many memory layers there are. They share a ring as further heads: its head `layer * G + g`.
        tokens: capacity of each ring, a multiple of `chunk_size`.
        chunk_size: C, tokens per chunk (LongMem, section 2.3; the paper uses 4).
        scope: "row": each row remembers its own documents alone. "shared": all rows write and search one ring, as the
            official code does.
        dtype, device: of the stored keys and values; float8_e4m3fn keeps a scale with each chunk (`Ring`).
        fingerprint: which backbone and layers the content comes from (`LongMem.fingerprint`).

    Raises:
        ValueError: a capacity that is not a multiple of the chunk size, an unknown scope, a size below 1.
    """

    def __init__(
        self,
        *,
        rows: int,
        kv_heads: int,
        head_dim: int,
        tokens: int,
        chunk_size: int,
        layers: int = 1,
        scope: str = "row",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        fingerprint: str = "",
    ) -> None:
        if scope not in CHOICES["scope"]:
            raise ValueError(f"MemoryBank: scope must be one of {', '.join(CHOICES['scope'])}, got {scope!r}")
        sizes = (rows, layers, tokens, chunk_size, kv_heads, head_dim)
        if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
            raise ValueError(
                "MemoryBank: wanted integers for rows, layers, tokens, chunk_size, kv_heads and head_dim, got"
                f" {', '.join(map(repr, sizes))}"
            )
        if rows < 1 or layers < 1 or chunk_size < 1 or tokens < chunk_size or tokens % chunk_size:
            raise ValueError(
                "MemoryBank: wanted rows >= 1, layers >= 1 and tokens a positive multiple of chunk_size, got"
                f" rows={rows}, layers={layers}, tokens={tokens}, chunk_size={chunk_size}"
            )
        self.rows, self.layers, self.scope, self.fingerprint = rows, layers, scope, fingerprint
        self._ring = Ring.new(
            rings=rows if scope == "row" else 1,
            kv_heads=layers * kv_heads,
            chunks=tokens // chunk_size,
            chunk_size=chunk_size,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )
        self._pending: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None
        self._versions: list[int] = []  # of what `write` was given
        self._last_ids: dict[int, Tensor] = {}

    @property
    def ring(self) -> Ring:
        """The memory's content, up to date."""
        self._flush()
        return self._ring

    def _flush(self) -> None:
        """Do the write that waits. Raises RuntimeError where what it writes has changed since."""
        if self._pending is None:
            return
        key, value, mask, ring_index = self._pending
        self._pending = None
        if _versions(key, value, mask) != self._versions:
            raise RuntimeError(
                "MemoryBank: key, value or mask of a write were changed in place before it took effect, when the memory"
                " is next used, and nothing of it was written; pass tensors that stay as they are"
            )
        ring_write(self._ring, key, value, mask=mask, ring_index=ring_index)

    def _wait(self, key: Tensor, value: Tensor, mask: Tensor | None, ring_index: Tensor | None) -> None:
        """Leave a write until the memory is next used."""
        self._flush()  # an earlier write comes first
        self._pending, self._versions = (key, value, mask, ring_index), _versions(key, value, mask)

    def __repr__(self) -> str:
        ring = self._ring
        capacity = ring.chunks * ring.chunk_size
        return f"MemoryBank(rows={self.rows}, scope={self.scope!r}, tokens={capacity}, chunk_size={ring.chunk_size})"

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget everything, or the rows where `rows` [B] bool is true.

        Raises:
            ValueError, TypeError: `rows` are no such tensor, or a shared memory cannot forget some rows only.
        """
        if rows is not None:
            self._check_rows(rows)
        if rows is None or self.scope == "row":
            self.ring.reset(rows)
        elif self._all_or_none(rows):
            self.ring.reset()

    def _check_rows(self, rows: Tensor) -> None:
        sizes = Sizes("MemoryBank.reset")
        sizes.bind("rows", rows, f"{self.rows}")
        check_dtype(sizes.op, "rows", rows, (torch.bool,))
        check_device(sizes.op, self._ring.store.device, "the memory", rows=rows)

    def _all_or_none(self, rows: Tensor) -> bool:
        """True when a shared memory is to forget everything."""
        if bool(rows.any()) and not bool(rows.all()):
            raise ValueError('MemoryBank.reset: with scope="shared" all rows are one memory; reset all or none')
        return bool(rows.all())

    def write(self, key: Tensor, value: Tensor, mask: Tensor | None = None, rows: Sequence[int] | None = None) -> None:
        """Append key, value [B, L * G, T, D], layer by layer; tokens where `mask` [B, T] bool is False are left out.

        The last axis of key and value must be contiguous; all other strides are free. The write takes effect when the
        memory is next used, and raises RuntimeError there where its tensors were changed in place meanwhile.

        Args:
            rows: the rows that the B rows given belong to; the others stay as they are. Default: all, in order.

        Raises:
            ValueError, TypeError: an argument does not fit, said now although the write takes effect later.
        """
        self._check_write(key, value, mask, rows)
        self._wait(*alike(key.detach(), value.detach()), mask, self._rings_of(rows))

    def _rings_of(self, rows: Sequence[int] | None) -> Tensor | None:
        """int32, the rings that rows write; None where that is each its own, or the only one."""
        if rows is None or self.scope == "shared" or list(rows) == list(range(self.rows)):
            return None
        return torch.tensor(list(rows), dtype=torch.int32, device=self._ring.store.device)

    def skip(self, tokens: Sequence[int]) -> None:
        """Count tokens as written, so many for each ring, that later writes are known to overwrite.

        What the rings hold makes no sense until that has happened: until as many more tokens as a ring holds are
        written, from the next chunk's beginning on.
        """
        self._flush()
        self._ring.cursor.add_(torch.tensor(list(tokens), device=self._ring.cursor.device))

    def _check_write(self, key: Tensor, value: Tensor, mask: Tensor | None, rows: Sequence[int] | None) -> None:
        count = self.rows if rows is None else len(check_rows("MemoryBank.write", rows, self.rows))
        sizes, store = Sizes("MemoryBank.write"), self._ring.store
        for name, tensor in (("key", key), ("value", value)):
            sizes.bind(name, tensor, f"{count} {self._ring.kv_heads} T {self._ring.head_dim}")
            check_dtype(sizes.op, name, tensor, COMPUTE_DTYPES)
        if mask is not None:
            sizes.bind("mask", mask, f"{count} T")
            check_dtype(sizes.op, "mask", mask, (torch.bool,))
        check_device(sizes.op, store.device, "the memory", key=key, value=value, mask=mask)
        check_last_axis_contiguous(sizes.op, key=key, value=value)

    def retrieve(self, query: Tensor, k: int, *, layer: int = 0) -> tuple[Tensor, Tensor]:
        """The k best chunks for query [B, H, T, D] among those of memory layer `layer`, 0 to L - 1.

        Returns ids int32 and scores float32, [B, H, T, k]. See `chunk_topk`.
        """
        ring = self.ring
        ids, scores = chunk_topk(query, ring.centroid[:, self._heads(layer)], k, count=ring.count())
        self._last_ids[layer] = ids
        return ids, scores

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, chunk_ids: Tensor, *, layer: int = 0, **options: Any
    ) -> Any:
        """`memory_attention` over memory layer `layer`."""
        ring, heads = self.ring, self._heads(layer)
        scale = None if ring.scale is None else ring.scale[:, heads]
        found = memory_attention(
            query, key, value, ring.key[:, heads], ring.value[:, heads], chunk_ids, memory_scale=scale, **options
        )
        if isinstance(found, tuple):
            return tuple(_in_time(part, ring) for part in found)
        return _in_time(found, ring)

    def _heads(self, layer: int) -> slice:
        layer = check_integer("MemoryBank", "layer", layer, 0, self.layers - 1)
        heads = self._ring.kv_heads // self.layers
        return slice(layer * heads, (layer + 1) * heads)

    def stats(self) -> dict[str, float]:
        """For log lines (synchronises with the device).

        fill: share of the capacity in use. tokens: tokens searchable per ring, on average. Of the last retrieval:
        full_k: share of queries that found all k chunks; age: mean age of the chunks found, in tokens.
        """
        cursor, chunks = self.progress()
        size = self._ring.chunk_size
        count = (cursor // size).clamp(max=chunks).double()
        stats = {"fill": float(count.mean() / chunks), "tokens": float(count.mean() * size)}
        if not self._last_ids:
            return stats
        ids = torch.cat(list(self._last_ids.values()), 1).long()
        found = ids >= 0
        stats["full_k"] = float(found.all(-1).double().mean()) if found.numel() else 0.0
        newest = (cursor // size - 1)[:, None, None, None]  # chunk number, per ring
        age = (newest - ids).remainder(chunks)[found]
        stats["age"] = float(age.double().mean() * size) if age.numel() else 0.0
        return stats

    def progress(self) -> tuple[Tensor, int]:
        """Tokens ever written to the rings that these rows use, int64, and the chunks that one holds."""
        self._flush()
        return self._ring.cursor, self._ring.chunks

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in _parts(self.ring).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError when a tensor is missing, has another shape or dtype, or values that make no sense; nothing
        is changed then."""
        if not isinstance(state, dict):
            raise TypeError(f"MemoryBank: state must be a dictionary of tensors, got {type(state).__name__}")
        parts = _parts(self._ring)
        check_tensors("MemoryBank", state, parts, others=True)
        check_values(state)
        self._pending = None
        for name, mine in parts.items():
            mine.copy_(state[name])
        self._last_ids = {}

    def save(self, path: str | Path) -> None:
        """Write the memory to a safetensors file, atomically.

        Raises:
            ValueError: it could not be read back, see `load`.
            OSError: it cannot be written; the old file is as it was.
        """
        state = self.state_dict()
        check_values(state)
        save_tensors(path, state, KIND, self._about())

    def _about(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "scope": self.scope,
            "rows": self.rows,
            "layers": self.layers,
            "tokens": self._ring.chunks * self._ring.chunk_size,
            "chunk_size": self._ring.chunk_size,
        }

    @classmethod
    def load(cls, path: str | Path, fingerprint: str, device: torch.device | str = "cpu") -> MemoryBank:
        """Read a memory back.

        Raises:
            ValueError: the file is no memory, is damaged (tensors and header do not fit each other, a cursor or a scale
                makes no sense), or was made by another backbone or for other layers than `fingerprint` says.
        """
        state, about = load_tensors(path, KIND, device, HEADER)
        cls._check_fingerprint(path, about, fingerprint)
        if "world" in about:
            raise ValueError(f"MemoryBank.load: {path} is a part of a memory over {about['world']!r} processes")
        with naming(f"{KIND}: {path}"):
            return cls._of_state(state, about, device)

    @classmethod
    def _of_state(
        cls, state: dict[str, Tensor], about: dict[str, Any], device: torch.device | str, **options: Any
    ) -> Self:
        """A bank of tensors and a header that came from a file."""
        bank = cls(**cls._options(state, about, options), device=device)
        bank.load_state_dict(state)
        return bank

    @classmethod
    def _options(cls, state: dict[str, Tensor], about: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Options of the bank that a file holds. No more will be allocated than its tensors show to be there: the
        sizes in the header are tried on the meta device.

        Raises:
            ValueError: its tensors do not fit its header.
        """
        store, layers = state.get("store"), about["layers"]
        if store is None or store.dim() != 6 or store.shape[1] % layers:
            got = "nothing" if store is None else tuple(store.shape)
            raise ValueError(f"store must be [R, L * G, M, 2, C, D] with L = {layers}, got {got}")
        options = options | {name: about[name] for name in HEADER}
        options |= {"kv_heads": store.shape[1] // layers, "head_dim": store.shape[5], "dtype": store.dtype}
        try:
            wanted = cls(**options, device="meta").state_dict()
        except RuntimeError:
            raise ValueError(f"no memory has rows={about['rows']} and tokens={about['tokens']}") from None
        check_tensors("its tensors do not fit its header", state, wanted)
        return options

    @staticmethod
    def _check_fingerprint(path: str | Path, about: dict[str, Any], fingerprint: str) -> None:
        if reason := difference(about["fingerprint"], fingerprint):
            raise ValueError(f"MemoryBank.load: {path} was written by another model: {reason}")


def check_values(state: dict[str, Tensor]) -> None:
    """Numbers that kernels count with. A cursor has room left for what will be written."""
    for name in ("cursor", "written"):
        if name in state and not bool(((state[name] >= 0) & (state[name] < MAX_CURSOR // 2)).all()):
            smallest, largest = (int(bound) for bound in torch.aminmax(state[name]))
            raise ValueError(f"MemoryBank: {name} must lie in [0, 2^47), got values from {smallest} to {largest}")
    scale = state.get("scale")
    wrong = 0 if scale is None else int((~((scale >= 0) & (scale < torch.inf))).sum())
    if wrong:
        raise ValueError(
            f"MemoryBank: scale must be finite and not negative, got {wrong} that are not (the file is damaged, or the"
            " model's keys or values were not finite)"
        )


def check_rows(op: str, rows: Sequence[int], count: int) -> list[int]:
    """Raises ValueError where `rows` are not different ones of `count`."""
    found = list(rows) if isinstance(rows, Sequence) else [rows]
    fits = all(type(row) is int and 0 <= row < count for row in found)
    if not isinstance(rows, Sequence) or not fits or len(set(found)) != len(found):
        raise ValueError(f"{op}: rows must be different ones of 0 to {count - 1}, got {rows!r}")
    return found


def _versions(*tensors: Tensor | None) -> list[int]:
    """How often the content of each was changed; tensors of inference mode do not count."""
    return [x._version for x in tensors if x is not None and not x.is_inference()]


def alike(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their formats: under autocast a norm of the keys leaves them wider than the values."""
    dtype = torch.promote_types(key.dtype, value.dtype)
    return key.to(dtype), value.to(dtype)


class _InTime(torch.autograd.Function):
    """Identity, whose backward pass refuses when the ring has changed since the forward pass: the gradient of a read
    gathers its chunks again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Ring) -> Tensor:
        ctx.ring, ctx.version = ring, ring.store._version
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.ring.store._version != ctx.version:
            raise RuntimeError(
                "MemoryBank: this backward pass comes too late: the memory that its forward pass read has been written"
                " since. Call backward() before the memory is used again (by the next forward, remember or generate),"
                " or give what comes in between a memory of its own"
            )
        return grad, None


def _in_time(x: Tensor, ring: Ring) -> Tensor:
    if not x.requires_grad:
        return x
    checked: Tensor = _InTime.apply(x, ring)
    return checked
