"""External_Memory: the published memory, one for all rows, its eviction arithmetic included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chunk_topk import chunk_topk
from ..chunk_topk.api import MAX_K


class Retrieved(Mapping[str, Tensor]):
    """Retrieved keys ("k") and values ("v") [B * H, T, k, D], gathered when they are asked for.

    Until then it is the slots alone: `JointMultiheadAttentionWeightedSum` reads the bank by them. It stays what it was
    when the memory changes later.

    Attributes:
        bank: [1, H, C, 2, c, D], keys (0) and values (1) of all chunks.
        slots: [B, H, T, k // c] int32; a missing chunk is the last slot, which holds zeros.
    """

    def __init__(self, bank: Tensor, slots: Tensor) -> None:
        self.bank, self.slots = bank, slots

    def __getitem__(self, name: str) -> Tensor:
        part = {"k": 0, "v": 1}[name]
        heads = torch.arange(self.slots.shape[1], device=self.slots.device)[:, None, None]
        chunks = self.bank[0, heads, self.slots.long(), part]  # [B, H, T, k // c, c, D]
        return chunks.flatten(3, 4).flatten(0, 1)

    def __iter__(self) -> Iterator[str]:
        return iter(("k", "v"))

    def __len__(self) -> int:
        return 2


@dataclass(frozen=True)
class HeadIndex:
    """Stand-in for the FAISS index that the published code keeps of one head."""

    memory: External_Memory
    head: int

    @property
    def d(self) -> int:
        return self.memory.head_dim

    @property
    def ntotal(self) -> int:
        return self.memory.dstore_idx

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best chunks for queries [n, D]: scores float32 and ids int64, [n, k]; id -1 where there are fewer."""
        heads = slice(self.head, self.head + 1)
        ids, scores = self.memory._search(queries.to(self.memory.device)[None, None], k, heads)
        return scores[0, 0], ids[0, 0].long()

    def reconstruct_n(self, start: int, count: int) -> Tensor:
        """The search vectors [count, D] from number `start` on."""
        return self.memory._vectors()[self.head, start : start + count].clone()


class External_Memory:
    """Keys and values of past segments in chunks of c tokens, searched per head by the chunks' mean keys.

    The published rules: all rows write into one memory, row after row, and tokens that fill no chunk are dropped;
    before a write of n chunks that would reach the capacity C = memory_size // chunk_size, the oldest
    (2 * rows * tokens) // chunk_size go. Reads and writes never disturb what was retrieved before, so a backward pass
    may come at any time.

    Args:
        cfg: needs `decoder.embed_dim`, `decoder.attention_heads`, `k`, `memory_size`, `layer_reduction_factor`,
            `use_gpu_to_search`; `chunk_size` if it is not 4.
        dtype: what keys and values are stored in; default as published: float16 with `cfg.use_gpu_to_search`, else
            float32. Search vectors are float32 means of the keys before rounding.

    Raises:
        ValueError: `k` is no multiple of the chunk size, or heads do not divide the width.
    """

    def __init__(self, cfg: Any, *, dtype: torch.dtype | None = None) -> None:
        self.dimension: int = cfg.decoder.embed_dim
        self.use_gpu_to_search: bool = cfg.use_gpu_to_search
        self.k: int = cfg.k
        self.reduce_fac: int = cfg.layer_reduction_factor
        self.memory_size: int = cfg.memory_size
        self.num_heads: int = cfg.decoder.attention_heads
        self.head_dim = self.dimension // self.num_heads
        self.chunk_size: int = getattr(cfg, "chunk_size", 4)
        self.dtype = dtype or (torch.float16 if self.use_gpu_to_search else torch.float32)
        if self.head_dim * self.num_heads != self.dimension:
            raise ValueError(
                "External_Memory: decoder.embed_dim must be a multiple of decoder.attention_heads, got"
                f" {self.dimension} and {self.num_heads}"
            )
        if self.k < self.chunk_size or self.k % self.chunk_size:
            raise ValueError(
                f"External_Memory: k must be a positive multiple of chunk_size, got {self.k} and {self.chunk_size}"
            )
        on_gpu = self.use_gpu_to_search and torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.index_list = [HeadIndex(self, head) for head in range(self.num_heads)]
        self.reset()

    @property
    def capacity(self) -> int:
        """C, in chunks. As published it is never reached: the last slot stays zero."""
        return self.memory_size // self.chunk_size

    @property
    def keys(self) -> list[Tensor]:
        """Per head [C, c, D], zero where nothing is stored."""
        return list(self._content()[0, :, :, 0])

    @property
    def vals(self) -> list[Tensor]:
        return list(self._content()[0, :, :, 1])

    def reset(self) -> None:
        """Forget everything."""
        self.dstore_idx = 0
        self.time_for_retrieve = self.retrieve_count = self.time_for_setup_prob = 0.0
        # Allocated when first used: a model that is only built, or loaded, needs no memory for memory.
        self._bank: Tensor | None = None
        self._mean = torch.empty(0)
        self._pending: list[tuple[Tensor, Tensor, int]] = []

    def setup_faiss(self, args: Any) -> None:
        """Nothing to do: there is no FAISS here. (The published method stops at an undefined name.)"""

    def add_index(
        self,
        qkv_val: Mapping[str, Tensor],
        retrieval_layer_index: int | None = None,
        padding_mask: Tensor | None = None,
    ) -> None:
        """Append qkv_val["k"], qkv_val["v"] [B, T, H * D]. As published, the other two arguments do nothing.

        Raises:
            ValueError: shapes that do not fit, or a memory too small for this batch.
        """
        keys, vals = qkv_val["k"].detach(), qkv_val["v"].detach()
        if keys.dim() != 3 or keys.shape[-1] != self.dimension or vals.shape != keys.shape:
            raise ValueError(
                f"External_Memory.add_index: k and v must be [B, T, {self.dimension}], got {tuple(keys.shape)} and"
                f" {tuple(vals.shape)}"
            )
        tokens = keys.shape[0] * keys.shape[1]
        added, removed = tokens // self.chunk_size, 0
        if self.dstore_idx + added >= self.capacity:
            removed = 2 * tokens // self.chunk_size
            if removed > self.dstore_idx:
                raise ValueError(
                    "External_Memory.add_index: memory_size is too small for this batch: the published rule removes"
                    f" {removed} chunks before it adds {added}, and {self.dstore_idx} are stored; memory_size ="
                    f" {self.memory_size} must be more than twice the {tokens} tokens of a batch, and batches of one"
                    " size"
                )
        if self.dstore_idx == 0 and keys.device != self.device:
            self.device, self._bank = keys.device, None
        both = torch.stack([keys, vals]).to(self.device).view(2, tokens, self.num_heads, self.head_dim)
        chunks = both[:, : added * self.chunk_size].unflatten(1, (added, self.chunk_size))  # [2, n, c, H, D]
        mean = chunks[0].mean(1).float().transpose(0, 1)  # in the dtype of the keys, as published
        # Put into place when next needed: by then the graph of the read before is mostly gone, and an eviction, which
        # leaves the old bank to that graph, is cheaper in memory.
        self._pending.append((chunks.permute(3, 1, 0, 2, 4).to(self.dtype), mean, removed))
        self.dstore_idx += added - removed

    def retrieve(self, queries: Tensor) -> dict[str, Any]:
        """The k // c best chunks for every query and head, by inner product.

        Args:
            queries: [T, B, H * D], unscaled.

        Returns:
            "knn_index": per head, [T * B, k // c] int64 chunk numbers, 0 the oldest, -1 where there are fewer.
            "tgt_index": `Retrieved`, a mapping with "k" and "v" [B * H, T, k, D].
        """
        steps, rows, _ = queries.shape
        query = queries.view(steps, rows, self.num_heads, self.head_dim).permute(1, 2, 0, 3)
        ids, _ = self._search(query.detach(), self.k // self.chunk_size, slice(None))
        slots = ids
        if self.dstore_idx < ids.shape[-1]:
            slots = ids.masked_fill(ids < 0, self.capacity - 1)
        per_head = ids.permute(1, 2, 0, 3).flatten(1, 2).long()
        return {"knn_index": list(per_head), "tgt_index": Retrieved(self._content(), slots)}

    def _search(self, query: Tensor, k: int, heads: slice) -> tuple[Tensor, Tensor]:
        """query [B, H, T, D] of the heads named -> ids int32, scores float32 [B, H, T, k]."""
        query, vectors = query.float(), self._vectors()[heads]
        if k <= MAX_K and self.dstore_idx:
            count = torch.tensor([self.dstore_idx], dtype=torch.int32, device=self.device)
            return chunk_topk(query, vectors[None], k, count=count)
        found = min(k, self.dstore_idx)
        scores, ids = (query @ vectors[:, : self.dstore_idx].mT).topk(found)
        missing = (0, k - found)
        ids = torch.nn.functional.pad(ids.to(torch.int32), missing, value=-1)
        return ids, torch.nn.functional.pad(scores, missing, value=-torch.inf)

    def _empty(self) -> tuple[Tensor, Tensor]:
        H, C, c, D = self.num_heads, self.capacity, self.chunk_size, self.head_dim
        bank = torch.zeros(1, H, C, 2, c, D, dtype=self.dtype, device=self.device)
        return bank, torch.zeros(H, C, D, device=self.device)

    def _vectors(self) -> Tensor:
        """The chunks' mean keys [H, C, D]."""
        self._content()
        return self._mean

    @torch.no_grad()
    def _content(self) -> Tensor:
        """The bank [1, H, C, 2, c, D] with what was added in its slots.

        A bank that was read may be saved in a graph. New chunks go to slots that no reader has seen, so they are
        written past autograd's version counter (`.data`); an eviction moves chunks, so it makes a new bank.
        """
        if self._bank is None:
            self._bank, self._mean = self._empty()
        bank, mean = self._bank, self._mean
        stored = self.dstore_idx - sum(chunks.shape[1] - removed for chunks, _, removed in self._pending)
        for chunks, means, removed in self._pending:
            if removed:
                old_bank, old_mean, kept = bank, mean, slice(removed, stored)
                bank, mean = self._empty()
                stored -= removed
                bank[0, :, :stored] = old_bank[0, :, kept]
                mean[:, :stored] = old_mean[:, kept]
            end = stored + chunks.shape[1]
            bank.data[0, :, stored:end] = chunks
            mean.data[:, stored:end] = means
            stored = end
        self._pending.clear()
        self._bank, self._mean = bank, mean
        return bank
