"""The ring buffer that holds a long-term memory: chunks of keys and values, their mean keys, and the open tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import COMPUTE_DTYPES, QUANTISED_DTYPE, Sizes, check_device, check_dtype, check_integer

MAX_CHUNK_SIZE = 64
MAX_CURSOR = 2**48  # tokens ever written stay below: the CUDA kernel counts blocks in the bits above
LARGEST = {"chunks": 2**31 - 1, "chunk_size": MAX_CHUNK_SIZE}  # of the sizes of a ring


def rings_of_rows(ring_index: Tensor | None, rings: int, rows: int, device: torch.device) -> Tensor:
    """[rows] int64, the ring of each batch row: as `ring_index` says; without one, the row's own, or the only one.
    -1 for a ring that does not exist."""
    if ring_index is not None:
        exists = (ring_index >= 0) & (ring_index < rings)
        return torch.where(exists, ring_index, -1).long()
    if rings == rows:
        return torch.arange(rows, device=device)
    return torch.zeros(rows, dtype=torch.int64, device=device)


def token_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that tokens arrive in at a store of `dtype`: the scale of a chunk is known only when it closes."""
    return torch.bfloat16 if dtype == QUANTISED_DTYPE else dtype


@dataclass(frozen=True)
class Ring:
    """R rings of M chunks of C tokens for G key/value heads. `ring_write` changes the tensors in place.

    A chunk becomes searchable when its C-th token is written; chunk number n lives in slot n % M. Tokens of the chunk
    that is still open wait in `tail`, whose positions from `cursor % C` on hold nothing meaningful.

    A float8_e4m3fn store is half a bfloat16 one. Tokens are bfloat16 until their chunk closes; then its keys, and its
    values, are divided by `scale` = max(largest magnitude / 448, 2^-126) and rounded to the nearest, ties to even.
    `store.float() * scale[..., None, None]` reads them back: to 1/16 of each number, or to 1/458752 of the largest one
    of the chunk. A chunk with a value that is not finite reads back as NaN, its keys and its values each on their own.

    Attributes:
        store: [R, G, M, 2, C, D], key (0) and value (1) of a chunk beside each other: one contiguous gather per chunk.
        centroid: [R, G, M, D], mean key of each chunk, summed in float32 over its tokens, of `token_dtype`.
        tail: [R, G, 2, C, D], the open chunk, of `token_dtype`.
        cursor: [R] int64, tokens ever written, in [0, 2^48).
        scale: [R, G, M, 2] float32, of the keys (0) and the values (1) of each chunk; None unless the store is float8.
    """

    store: Tensor
    centroid: Tensor
    tail: Tensor
    cursor: Tensor
    scale: Tensor | None = None

    @classmethod
    def new(
        cls,
        *,
        rings: int,
        kv_heads: int,
        chunks: int,
        chunk_size: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Ring:
        """An empty Ring.

        Raises:
            ValueError: a size below 1, `chunk_size` above 64, more than 2^31 - 1 chunks, or no device.
            TypeError: a size that is no integer, or a dtype that memory cannot be stored in.
        """
        sizes = {"rings": rings, "kv_heads": kv_heads, "chunks": chunks, "chunk_size": chunk_size, "head_dim": head_dim}
        for name, size in sizes.items():
            sizes[name] = check_integer("Ring.new", name, size, 1, LARGEST.get(name))
        if dtype not in (*COMPUTE_DTYPES, QUANTISED_DTYPE):
            raise TypeError(
                f"Ring.new: dtype must be float32, bfloat16, float16, float64 or float8_e4m3fn, got {dtype}"
            )

        try:
            device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"Ring.new: device must be a device of PyTorch, got {device!r} ({error})") from None

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            with torch.inference_mode(False):  # a memory may be made there and trained with elsewhere
                return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            store=zeros(dtype, rings, kv_heads, chunks, 2, chunk_size, head_dim),
            centroid=zeros(token_dtype(dtype), rings, kv_heads, chunks, head_dim),
            tail=zeros(token_dtype(dtype), rings, kv_heads, 2, chunk_size, head_dim),
            cursor=zeros(torch.int64, rings),
            scale=zeros(torch.float32, rings, kv_heads, chunks, 2) if dtype == QUANTISED_DTYPE else None,
        )

    @property
    def rings(self) -> int:
        return self.store.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.store.shape[1]

    @property
    def chunks(self) -> int:
        return self.store.shape[2]

    @property
    def chunk_size(self) -> int:
        return self.store.shape[4]

    @property
    def head_dim(self) -> int:
        return self.store.shape[5]

    @property
    def key(self) -> Tensor:
        """[R, G, M, C, D] view of the stored keys, without their scale."""
        return self.store[:, :, :, 0]

    @property
    def value(self) -> Tensor:
        """[R, G, M, C, D] view of the stored values, without their scale."""
        return self.store[:, :, :, 1]

    def count(self) -> Tensor:
        """[R] int32 in [0, M] whatever `cursor` holds, chunks searchable now (on the ring's device, no host sync)."""
        return self.cursor.floor_divide(self.chunk_size).clamp_(0, self.chunks).to(torch.int32)

    def reset(self, rings: Tensor | None = None) -> None:
        """Empty all rings, or those where `rings` [R] bool is true. In place, no host sync; data stays, unread.

        Raises:
            ValueError: `rings` has another shape, dtype or device.
        """
        if rings is None:
            self.cursor.zero_()
            return
        sizes = Sizes("Ring.reset")
        sizes.bind("cursor", self.cursor, "R")
        sizes.bind("rings", rings, "R")
        check_dtype("Ring.reset", "rings", rings, (torch.bool,))
        check_device("Ring.reset", self.cursor.device, rings=rings)
        self.cursor.masked_fill_(rings, 0)
