"""ShardedMemoryBank: one memory over the ranks of a process group, larger than one device can hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longmem_kernels.memory_attention.reference import memory_share

from .collectives import Ranks
from .files import Whole, check_tensors, load_tensors, naming
from .memory import HEADER, KIND, MemoryBank, alike, check_values

_OF_A_PART = {"world": Whole(1, 2**31 - 1), "replicated": bool}


class ShardedMemoryBank(MemoryBank):
    """A `MemoryBank` of which every one of W ranks holds 1 / W: equal to the whole bank, in one process, of all rows.

    Chunk number n lies on rank n % W, in slot n // W of an ordinary ring there; ids are those of the whole bank, so
    slot s is on rank s % W. Each rank searches and attends to what it holds, for the queries of all ranks, and sends
    back the K best of it and one partial result with its log-sum-exp: chunks never travel. Retrieval equals the whole
    bank's bit for bit (where the kernel's score of a chunk does not depend on the slot, which holds for all but the
    reference's matrix products), attention to rounding.

    All methods except `stats` and the two for states are collective: every rank calls them, in the same order, with
    tensors of the same shape.

    Args:
        rows: B, of this rank, the same number on all. The whole bank has W * B, rank after rank.
        tokens: capacity of each ring over all ranks, a multiple of `chunk_size` * W.
        group: the ranks; default: all.
        replicated: all ranks serve the same rows, with the same inputs: one document with a memory that no device
            could hold, or a model that is itself spread over the ranks. The whole bank has B rows then.
        The others are those of `MemoryBank`.

    Raises:
        ValueError: as `MemoryBank`, or a capacity that does not divide among the ranks.
    """

    def __init__(
        self,
        *,
        rows: int,
        tokens: int,
        chunk_size: int,
        group: dist.ProcessGroup | None = None,
        replicated: bool = False,
        **options: Any,
    ) -> None:
        self.ranks = Ranks(group, replicated)
        if chunk_size >= 1 and tokens % (chunk_size * self.ranks.world):
            raise ValueError(
                f"ShardedMemoryBank: tokens must be a multiple of chunk_size * ranks = {chunk_size} *"
                f" {self.ranks.world}, got {tokens}"
            )
        super().__init__(
            rows=rows * self.ranks.sources, tokens=tokens // self.ranks.world, chunk_size=chunk_size, **options
        )
        self.rows = rows
        self._written = torch.zeros_like(self._ring.cursor)  # per ring, over all ranks

    def __repr__(self) -> str:
        chunks, size, ranks = self.progress()[1], self._ring.chunk_size, self.ranks
        return (
            f"ShardedMemoryBank(rows={self.rows}, scope={self.scope!r}, tokens={chunks * size}, chunk_size={size},"
            f" rank={ranks.rank}, world={ranks.world}, replicated={ranks.replicated})"
        )

    def reset(self, rows: Tensor | None = None) -> None:
        """Resets as `MemoryBank.reset`; None, which all ranks must give then, is all rows of all ranks.

        Raises:
            ValueError: a shared memory cannot forget some rows only, of this rank or of another.
        """
        everyone = None
        if rows is not None:
            self._check_rows(rows)
            everyone = self.ranks.gather(rows)
        if everyone is None or (self.scope == "shared" and self._all_or_none(everyone)):
            self.ring.reset()
            self._written.zero_()
        elif self.scope == "row":
            self.ring.reset(everyone)
            self._written.masked_fill_(everyone, 0)

    def write(self, key: Tensor, value: Tensor, mask: Tensor | None = None, rows: Sequence[int] | None = None) -> None:
        """Writes as `MemoryBank.write`; of all ranks' tokens each rank keeps those of its chunks.

        Raises:
            ValueError: as there, or for some of the rows alone: other ranks might write others.
        """
        if rows is not None and list(rows) != list(range(self.rows)):
            raise ValueError("ShardedMemoryBank.write: rows must be all; leave tokens of others out with mask")
        self._check_write(key, value, mask, rows)
        if mask is None:
            mask = torch.ones(self.rows, key.shape[2], dtype=torch.bool, device=key.device)
        key, value = alike(key, value)
        key, value, mask = (self.ranks.gather(x.detach()) for x in (key, value, mask))
        self._wait(key, value, mask & self._is_mine(mask), None)

    def skip(self, tokens: Sequence[int]) -> None:
        """Raises ValueError: what each rank's rings skip depends on what the others' do."""
        raise ValueError("ShardedMemoryBank.skip: a memory over several processes cannot skip tokens")

    def _is_mine(self, mask: Tensor) -> Tensor:
        """Bool [N, T], which of the kept tokens of all N rows go to chunks of this rank. Counts them as written."""
        per_ring = mask if self.scope == "row" else mask.reshape(1, -1)
        kept = per_ring.long().cumsum(1)
        position = self._written[:, None] + kept - 1
        self._written += per_ring.sum(1)
        chunk = position // self._ring.chunk_size
        return (chunk % self.ranks.world == self.ranks.rank).view_as(mask)

    def retrieve(self, query: Tensor, k: int, *, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Retrieves as `MemoryBank.retrieve`."""
        ids, scores = super().retrieve(self.ranks.gather(query.detach()), k, layer=layer)
        ids = torch.where(ids < 0, ids, ids * self.ranks.world + self.ranks.rank)
        ids, scores = (self.ranks.give_back(x).movedim(0, -2).flatten(-2) for x in (ids, scores))
        ids, scores = best_of(ids, scores, k)
        self._last_ids[layer] = ids
        return ids, scores

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chunk_ids: Tensor,
        *,
        layer: int = 0,
        memory_query: Tensor | None = None,
        gate: Tensor | None = None,
        fusion: str = "gated",
        scale: float | None = None,
        return_lse: bool = False,
        return_memory_share: bool = False,
        **options: Any,
    ) -> Any:
        """Attends as `MemoryBank.attend`, with the same gradients."""
        if (gate is not None) != (fusion == "gated"):
            wanted = "needs gate [H]" if fusion == "gated" else "takes no gate"
            raise ValueError(f"ShardedMemoryBank: fusion={fusion!r} {wanted}, got {'none' if gate is None else 'one'}")
        # Local attention here: without chunks, joint fusion is local attention alone.
        no_ids = torch.full_like(chunk_ids[..., :1], -1)
        any_ring = torch.zeros(query.shape[0], dtype=torch.int32, device=query.device)
        parts: dict[str, Any] = {"layer": layer, "fusion": "joint", "scale": scale, "return_lse": True}
        local_out, local_lse, _ = super().attend(query, key, value, no_ids, ring_index=any_ring, **parts, **options)
        memory_out, memory_lse = self._attend_to_memory(
            query if memory_query is None else memory_query, chunk_ids, key.shape[1], parts
        )
        share = memory_share(local_lse, memory_lse, gate)
        weight = share[..., None]
        out = ((1 - weight) * local_out.to(weight.dtype) + weight * memory_out).to(local_out.dtype)
        extra: tuple[Tensor, ...] = (local_lse, memory_lse) if return_lse else ()
        if return_memory_share:
            extra += (share,)
        return (out, *extra) if extra else out

    def _attend_to_memory(
        self, query: Tensor, chunk_ids: Tensor, kv_heads: int, parts: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Attention of this rank's queries to their chunks on all ranks: out [B, H, T, D] in float32, and its
        log-sum-exp [B, H, T]."""
        query, ids = self.ranks.gather(query), self.ranks.gather(chunk_ids)
        mine = (ids >= 0) & (ids % self.ranks.world == self.ranks.rank)
        held = torch.where(mine, ids // self.ranks.world, -1)
        nothing = query.new_empty(query.shape[0], kv_heads, 0, query.shape[3])  # no local keys: memory alone
        out, _, lse = super().attend(query, nothing, nothing, held, **parts)
        return merge_parts(self.ranks.give_back(out), self.ranks.give_back(lse))

    def progress(self) -> tuple[Tensor, int]:
        own = slice(None)
        if self.scope == "row" and not self.ranks.replicated:
            own = slice(self.ranks.rank * self.rows, (self.ranks.rank + 1) * self.rows)
        return self._written[own], self._ring.chunks * self.ranks.world

    def state_dict(self) -> dict[str, Tensor]:
        """State of what this rank holds."""
        return super().state_dict() | {"written": self._written.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        check_tensors("ShardedMemoryBank", state, {"written": self._written}, others=True)
        check_values(state)
        own = tokens_of_rank(state["written"], self._ring.chunk_size, self.ranks)
        if not torch.equal(own, state["cursor"].to(own.device)):
            raise ValueError(
                f"ShardedMemoryBank: of {state['written'].tolist()} tokens written, rank {self.ranks.rank} has"
                f" {own.tolist()}, got cursor {state['cursor'].tolist()}"
            )
        super().load_state_dict(state)
        self._written.copy_(state["written"])

    def save(self, path: str | Path) -> None:
        """Write what this rank holds beside what the others hold, each to its own file named after `path`. Raises as
        `MemoryBank.save`, and RuntimeError where another rank could not write."""
        problem: Exception | None = None
        try:
            super().save(_own_file(path, self.ranks))
        except (ValueError, OSError) as error:
            problem = error
        failed = self.ranks.all_gather(torch.tensor([problem is not None], device=self._written.device))
        if problem is not None:
            raise problem
        if bool(failed.any()):  # said here too: who waits for a rank that has failed waits for ever
            raise RuntimeError(
                f"ShardedMemoryBank.save: ranks {failed.nonzero()[:, 0].tolist()} could not write {path}"
            )

    def _about(self) -> dict[str, Any]:
        ranks = self.ranks
        tokens = self.progress()[1] * self._ring.chunk_size
        return super()._about() | {"tokens": tokens, "world": ranks.world, "replicated": ranks.replicated}

    @classmethod
    def load(
        cls,
        path: str | Path,
        fingerprint: str,
        device: torch.device | str = "cpu",
        *,
        group: dist.ProcessGroup | None = None,
        replicated: bool = False,
    ) -> ShardedMemoryBank:
        """Read back what as many ranks saved as `path`, or spread the memory that one `MemoryBank` saved there.

        Raises:
            ValueError: there is no such memory, another model wrote it, or it does not divide among these ranks.
        """
        ranks = Ranks(group, replicated)
        whole = Path(path).is_file()
        file = Path(path) if whole else _own_file(path, ranks)
        state, about = load_tensors(file, KIND, header=HEADER if whole else HEADER | _OF_A_PART)
        cls._check_fingerprint(file, about, fingerprint)
        if not whole and (about["replicated"], about["world"]) != (replicated, ranks.world):
            raise ValueError(
                f"ShardedMemoryBank.load: {file} was saved with replicated={about['replicated']} by {about['world']}"
                f" ranks, not with {replicated} by {ranks.world}"
            )
        with naming(f"{KIND}: {file}"):
            if whole:
                MemoryBank._options(state, about, {})
                check_values(state)
                if about["rows"] % ranks.sources:
                    raise ValueError(f"its {about['rows']} rows do not divide among {ranks.sources} ranks")
                about["rows"] //= ranks.sources
                state = shard_of(state, ranks)
            return cls._of_state(state, about, device, group=group, replicated=replicated)


def shard_of(state: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Part of a whole bank's `state_dict` that a rank holds."""
    written = state["cursor"]
    cursor = tokens_of_rank(written, state["store"].shape[4], ranks)
    shard = {
        name: tensor[:, :, ranks.rank :: ranks.world]
        for name, tensor in state.items()
        if name not in ("tail", "cursor")
    }
    return shard | {"tail": state["tail"], "cursor": cursor, "written": written}


def tokens_of_rank(written: Tensor, chunk_size: int, ranks: Ranks) -> Tensor:
    """How many of `written` tokens a rank was given."""
    closed, opened = written // chunk_size, written % chunk_size
    # Of `closed` chunks every W-th, from the rank-th on; the open one is the next one's owner's.
    whole = (closed - ranks.rank + ranks.world - 1) // ranks.world * chunk_size
    return whole + torch.where(closed % ranks.world == ranks.rank, opened, 0)


def best_of(ids: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the candidates [..., n], in the order of `chunk_topk`: descending score, lower id first, NaN after
    numbers, missing (-1) last."""
    kind = torch.where(ids < 0, 2, scores.isnan().long())
    order = ids.argsort(dim=-1, stable=True)
    for worth, descending in ((scores, True), (kind, False)):
        order = order.gather(-1, worth.gather(-1, order).argsort(dim=-1, descending=descending, stable=True))
    order = order[..., :k]
    return ids.gather(-1, order), scores.gather(-1, order)


def merge_parts(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over all parts from that over each: out [W, ..., D] and log-sum-exps [W, ...], -inf where a
    part saw nothing, to those over the first axis."""
    found = (lse != -torch.inf).any(0)
    # Where nothing was found anywhere, before a difference of infinities can make NaN gradients.
    total = torch.where(found, lse, 0.0).logsumexp(0)
    weight = torch.where(found, (lse - total).exp(), 0.0)
    return (weight[..., None] * out.to(lse.dtype)).sum(0), torch.where(found, total, -torch.inf)


def _own_file(path: str | Path, ranks: Ranks) -> Path:
    path = Path(path)
    return path.with_name(f"{path.stem}-{ranks.rank + 1:05d}-of-{ranks.world:05d}{path.suffix}")
