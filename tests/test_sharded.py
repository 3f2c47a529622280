"""ShardedMemoryBank: over 2 and 4 processes, what one process with all of it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from factories import integers
from models import VOCABULARY, learnable_longmem
from torch import Tensor

from longmem import MemoryBank, ShardedMemoryBank
from longmem.sharded import best_of, merge_parts
from longmem_kernels import chunk_topk

WORLDS = pytest.mark.parametrize("world", [2, 4])
SCOPES = pytest.mark.parametrize("scope", ["row", "shared"])
REPLICATED = pytest.mark.parametrize("replicated", [False, True], ids=["own rows", "same rows"])
ROWS, LAYERS, KV_HEADS, HEADS, D = 2, 2, 2, 4, 8
SIZES: dict[str, Any] = {"kv_heads": KV_HEADS, "layers": LAYERS, "head_dim": D, "tokens": 48, "chunk_size": 3}


def banks(scope: str, replicated: bool, **options: Any) -> tuple[MemoryBank, ShardedMemoryBank, slice]:
    """The whole bank of all rows, one over all ranks, and which of the whole's rows are this rank's."""
    options = SIZES | {"scope": scope} | options
    first = 0 if replicated else dist.get_rank() * ROWS
    whole = MemoryBank(rows=ROWS if replicated else ROWS * dist.get_world_size(), **options)
    return whole, ShardedMemoryBank(rows=ROWS, replicated=replicated, **options), slice(first, first + ROWS)


def tokens(rows: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random keys and values."""
    key, value = torch.randn(2, rows, LAYERS * KV_HEADS, length, D, dtype=dtype)
    return key, value


# --- retrieval ---


def walks(rank: int, scope: str, replicated: bool) -> None:
    for kind in ("ties", "random", "nan"):
        walk(scope, replicated, kind)


def walk(scope: str, replicated: bool, kind: str) -> None:
    """Writes with ragged padding, resets and searches, as many as go round the ring several times."""
    torch.manual_seed(1)  # all ranks draw the inputs of all rows
    whole, sharded, own = banks(scope, replicated)
    alone = MemoryBank(rows=ROWS, **SIZES)  # for statistics: this rank's rows of a memory by row
    fullest = 0
    for step in range(24):
        new = torch.rand(whole.rows) < 0.05 if scope == "row" else torch.full((whole.rows,), step == 9)
        length = int(torch.randint(0, 20, ()))
        key, value = tokens(whole.rows, length)
        query = torch.randn(whole.rows, HEADS, 5, D)
        if kind == "ties":
            key, query = integers(*key.shape), integers(*query.shape)
        if kind == "nan" and length:
            key[0, 0, length // 2] = torch.nan
        mask = torch.rand(whole.rows, length) < 0.8 if step % 3 else None
        for bank, rows in ((whole, slice(None)), (sharded, own), (alone, own)):
            bank.reset(new[rows] if step != 5 else None)
            bank.write(key[rows], value[rows], None if mask is None else mask[rows])
        k = int(torch.randint(1, 30, ()))
        same_rows = alone if scope == "row" else whole
        for layer in range(LAYERS):
            ids, scores = whole.retrieve(query, k, layer=layer)
            got_ids, got_scores = sharded.retrieve(query[own], k, layer=layer)
            assert torch.equal(got_ids, ids[own]), (step, layer)
            torch.testing.assert_close(got_scores, scores[own], rtol=0, atol=0, equal_nan=True)
            same_rows.retrieve(query[own], k, layer=layer)
        assert sharded.stats() == same_rows.stats()
        fullest = max(fullest, int(whole.ring.cursor.max()))
    assert fullest > SIZES["tokens"]


@WORLDS
@SCOPES
@REPLICATED
def test_retrieval_equals_the_whole_banks_bit_for_bit(world: int, scope: str, replicated: bool, tmp_path: Path) -> None:
    run_ranks(world, walks, tmp_path, scope, replicated)


def test_candidates_merge_in_the_order_of_the_search() -> None:
    """Numbers before NaN before missing, equal scores by id, whatever the order they came in."""
    ids = torch.tensor([7, 2, -1, 5, 0, 9, -1, 4])
    scores = torch.tensor([1.0, 1.0, -torch.inf, torch.nan, -torch.inf, 3.0, -torch.inf, torch.nan])
    for _ in range(5):
        order = torch.randperm(8)
        got, got_scores = best_of(ids[order], scores[order], 7)
        assert got.tolist() == [9, 2, 7, 0, 4, 5, -1]
        assert got_scores[:4].tolist() == [3.0, 1.0, 1.0, -torch.inf] and got_scores[4:6].isnan().all()
    query, centroid = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 20, 4)
    whole = chunk_topk(query, centroid, 6, count=torch.tensor([20], dtype=torch.int32))
    halves = [
        chunk_topk(query, centroid[:, :, half], 6, count=torch.tensor([10], dtype=torch.int32), impl="reference")
        for half in (slice(0, 10), slice(10, 20))
    ]
    candidates = torch.cat([halves[0][0], halves[1][0] + 10], -1), torch.cat([halves[0][1], halves[1][1]], -1)
    assert torch.equal(best_of(*candidates, 6)[0], whole[0])


# --- attention ---


def attend_everywhere(rank: int, scope: str, replicated: bool, fusion: str) -> None:
    torch.manual_seed(2)
    whole, sharded, own = banks(scope, replicated, dtype=torch.float64)
    rows, T = whole.rows, 5
    for length in (7, 30, 11):
        key, value = tokens(rows, length, torch.float64)
        mask = torch.rand(rows, length) < 0.9
        whole.write(key, value, mask)
        sharded.write(key[own], value[own], mask[own])
    inputs = {name: torch.randn(rows, HEADS, T, D, dtype=torch.float64) for name in ("query", "memory_query")}
    inputs |= {name: torch.randn(rows, KV_HEADS, T + 2, D, dtype=torch.float64) for name in ("key", "value")}
    gate = {"gate": torch.randn(HEADS, dtype=torch.float64)} if fusion == "gated" else {}
    weights = [torch.randn(rows, HEADS, T, d, dtype=torch.float64).squeeze(-1) for d in (D, 1, 1, 1)]
    options = {
        "layer": 1, "fusion": fusion, "scale": 0.4, "window": 4, "alibi_slopes": torch.rand(HEADS),
        "return_lse": True, "return_memory_share": True,
    }  # fmt: skip

    def run(bank: MemoryBank, part: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
        leaves = {name: x[part].clone().requires_grad_() for name, x in inputs.items()}
        leaves |= {name: x.clone().requires_grad_() for name, x in gate.items()}
        ids, _ = bank.retrieve(leaves["memory_query"], 4, layer=1)
        ids[0, 0, 0] = -1  # of the whole's first row on rank 0 alone, unless replicated
        if bank is whole and not replicated:
            ids[::ROWS, 0, 0] = -1
        results = bank.attend(chunk_ids=ids, **leaves, **options)
        found = results[2] > -torch.inf
        loss = sum((w[part] * torch.where(found[..., None] if r.dim() == 4 else found, r, 0.0)).sum()
                   for r, w in zip(results, weights, strict=True))  # fmt: skip
        loss.backward()
        return list(results), {name: leaf.grad for name, leaf in leaves.items()}

    wanted, wanted_grads = run(whole, slice(None))
    got, grads = run(sharded, own)
    close = {"rtol": 1e-11, "atol": 1e-12}
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other[own], **close)
    for name, grad in grads.items():
        if name != "gate":
            torch.testing.assert_close(grad, wanted_grads[name][own], **close)
            continue
        if not replicated:
            dist.all_reduce(grad)
        torch.testing.assert_close(grad, wanted_grads[name], **close)
    assert grads["memory_query"].abs().max() > 0.01


@WORLDS
@SCOPES
@REPLICATED
@pytest.mark.parametrize("fusion", ["gated", "joint"])
def test_attention_and_its_gradients_equal_the_whole_banks(
    world: int, scope: str, replicated: bool, fusion: str, tmp_path: Path
) -> None:
    run_ranks(world, attend_everywhere, tmp_path, scope, replicated, fusion)


def test_parts_of_a_softmax_merge_into_it() -> None:
    scores, values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, 2).double()
    parts = (scores.softmax(-1)[..., None] * values).sum(1), scores.logsumexp(-1)
    out, lse = merge_parts(*parts)
    whole = scores.flatten().softmax(0) @ values.flatten(0, 1)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, scores.flatten().logsumexp(0))
    (one,) = torch.autograd.grad(out.sum() + lse, scores, retain_graph=True)
    (other,) = torch.autograd.grad(whole.sum() + scores.flatten().logsumexp(0), scores)
    torch.testing.assert_close(one, other)

    empty = torch.full((3,), -torch.inf, dtype=torch.float64, requires_grad=True)
    out, lse = merge_parts(torch.zeros(3, 2, dtype=torch.float64), empty)
    out.sum().backward()
    assert (out == 0).all() and lse == -torch.inf and (empty.grad == 0).all()  # type: ignore[operator]


# --- a model ---


def train_together(rank: int, scope: str, options: dict[str, Any]) -> None:
    """Some training steps on this rank's rows with a memory over all ranks, and on all rows in one process."""
    torch.manual_seed(3)
    world, segments = dist.get_world_size(), 5
    tokens = torch.randint(0, VOCABULARY, (world * ROWS, segments, 7))
    own = slice(rank * ROWS, (rank + 1) * ROWS)

    def train(part: slice, sharded: bool) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(4)
        model = learnable_longmem(scope=scope, **options).double()
        memory = model.new_memory(ROWS if sharded else world * ROWS, sharded=sharded)
        optimizer = torch.optim.SGD(model.trainable().values(), lr=0.5)
        losses = []
        for i in range(segments):
            new = torch.full((memory.rows,), i == 3)
            loss = model(tokens[part, i, :-1], memory, targets=tokens[part, i, 1:], new_document=new).loss
            assert loss is not None
            optimizer.zero_grad()
            loss.backward()
            mean = loss.detach()
            if sharded:
                for tensor in (mean, *(p.grad for p in model.trainable().values() if p.grad is not None)):
                    dist.all_reduce(tensor.div_(world))
            losses.append(float(mean))
            optimizer.step()
        return losses, {name: p.detach() for name, p in model.trainable().items()}

    losses, weights = train(own, True)
    wanted_losses, wanted = train(slice(None), False)
    assert losses == pytest.approx(wanted_losses, rel=1e-5) and losses[0] != losses[-1]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-5, atol=1e-6)  # the loss is in float32


@WORLDS
@SCOPES
def test_a_model_trains_as_with_the_whole_bank(world: int, scope: str, tmp_path: Path) -> None:
    for options in ({}, {"sidenet": "exact", "reduction": 1, "trainable": "all", "fusion": "gated"}):
        run_ranks(world, train_together, tmp_path, scope, options)


def penalise(rank: int, replicated: bool) -> None:
    """Gradients of gradients, which the reference has: of float64, or where it is asked for."""
    torch.manual_seed(2)
    whole, sharded, own = banks("row", replicated, dtype=torch.float64)
    key, value = tokens(whole.rows, 40, torch.float64)
    local = torch.randn(whole.rows, KV_HEADS, 3, D, dtype=torch.float64)
    query = torch.randn(whole.rows, HEADS, 3, D, dtype=torch.float64)
    found = []
    for bank, rows in ((whole, slice(None)), (sharded, own)):
        bank.write(key[rows], value[rows])
        leaf = query[rows].clone().requires_grad_()
        ids, _ = bank.retrieve(leaf, 2)
        out = bank.attend(leaf, local[rows], local[rows], ids, fusion="joint")
        (gradient,) = torch.autograd.grad(out.pow(2).sum(), leaf, create_graph=True)
        gradient.pow(2).sum().backward()
        found.append(leaf.grad)
    wanted, got = found
    torch.testing.assert_close(got, wanted[own])


@REPLICATED
def test_gradients_of_gradients_equal_the_whole_banks(replicated: bool, tmp_path: Path) -> None:
    run_ranks(2, penalise, tmp_path, replicated)


# --- files and bad input ---


def save_and_load(rank: int, folder: Path, replicated: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    whole, sharded, own = banks("row", replicated, fingerprint="model", dtype=dtype)
    key, value = tokens(whole.rows, 70)
    mask = torch.rand(whole.rows, 70) < 0.9
    whole.write(key, value, mask)
    sharded.write(key[own], value[own], mask[own])
    whole.save(folder / "whole.safetensors") if rank == 0 else None
    sharded.save(folder / "memory.safetensors")
    for name in ("memory", "whole"):
        again = ShardedMemoryBank.load(folder / f"{name}.safetensors", "model", replicated=replicated)
        assert repr(again) == repr(sharded)
        key, value = tokens(whole.rows, 4)  # closes the open chunk
        query = torch.randn(whole.rows, HEADS, 3, D)
        other = MemoryBank.load(folder / "whole.safetensors", "model")
        for bank, rows in ((again, own), (other, slice(None))):
            bank.write(key[rows], value[rows])
        found, wanted = again.retrieve(query[own], 9), other.retrieve(query, 9)
        assert all(torch.equal(one, two[own]) for one, two in zip(found, wanted, strict=True))
        local = torch.randn(whole.rows, KV_HEADS, 3, D)
        read = again.attend(query[own], local[own], local[own], found[0], fusion="joint")
        torch.testing.assert_close(read, other.attend(query, local, local, wanted[0], fusion="joint")[own])
    with pytest.raises(ValueError, match="written by another model"):
        ShardedMemoryBank.load(folder / "memory.safetensors", "other", replicated=replicated)
    with pytest.raises(ValueError, match=r"there is no file .*nothing-0000"):
        ShardedMemoryBank.load(folder / "nothing.safetensors", "model", replicated=replicated)
    with pytest.raises(ValueError, match="saved with replicated="):
        ShardedMemoryBank.load(folder / "memory.safetensors", "model", replicated=not replicated)


@REPLICATED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bfloat16", "float8"])
def test_a_saved_memory_comes_back_and_a_whole_one_is_spread(
    replicated: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    run_ranks(2, save_and_load, tmp_path, tmp_path, replicated, dtype)


def refuse(rank: int) -> None:
    with pytest.raises(ValueError, match=r"multiple of chunk_size \* ranks = 3 \* 2, got 15"):
        ShardedMemoryBank(rows=1, **SIZES | {"tokens": 15})
    _, memory, _ = banks("shared", False)
    with pytest.raises(ValueError, match="reset all or none"):  # all of this rank's rows, none of the other's
        memory.reset(torch.full((ROWS,), rank == 0))
    with pytest.raises(TypeError, match="mask must be one of bool"):
        memory.write(*tokens(ROWS, 4), torch.ones(ROWS, 4))
    query, key = torch.randn(ROWS, HEADS, 2, D), torch.randn(ROWS, KV_HEADS, 2, D)
    ids, _ = memory.retrieve(query, 2)
    with pytest.raises(ValueError, match="fusion='gated' needs gate"):
        memory.attend(query, key, key, ids)
    state = memory.state_dict()
    with pytest.raises(ValueError, match=r"written must be torch.int64 \(1,\), got nothing"):
        memory.load_state_dict({name: tensor for name, tensor in state.items() if name != "written"})
    for change in ("written", "cursor"):
        with pytest.raises(ValueError, match="tokens written, rank"):
            memory.load_state_dict(state | {change: state[change] + 60})
    with pytest.raises(ValueError, match=r"written must lie in \[0, 2\^47\)"):
        memory.load_state_dict(state | {"written": state["written"] - 2**40})


def test_bad_input_is_refused(tmp_path: Path) -> None:
    run_ranks(2, refuse, tmp_path)


def test_without_a_group_the_reason_is_given() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        ShardedMemoryBank(rows=1, **SIZES)
