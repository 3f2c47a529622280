"""The drop-in memory: recorded numbers of the published one, and what retrieval hands out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fairseq_parts import causal, fairseq_settings, layer, small_memory
from official_models import DATA, recorded, recorded_text

from longmem_kernels.fairseq import External_Memory, Retrieved

CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


@pytest.mark.parametrize("script", ["ragged/float32", "ragged/float16", "chunk1/float32", "chunk1/float16"])
def test_memory_reproduces_the_published_one(script: str) -> None:
    data, about = recorded(DATA / "official_memory.npz"), recorded_text(DATA / "official_memory.npz", "scripts")[script]
    dtype = getattr(torch, script.split("/")[1])
    sizes = {"memory_size": about["memory_size"], "k": about["k"], "chunk": about["chunk"]}
    memory = External_Memory(fairseq_settings(heads=about["H"], width=about["H"] * about["D"], **sizes), dtype=dtype)
    missing = 0
    for i, operation in enumerate(about["ops"]):
        kind = operation["op"]
        inputs, results = (f"{start}/{i:02d}_{kind}" for start in (f"{script.split('/')[0]}/float32", script))
        if kind == "add":
            memory.add_index({"k": data[f"{inputs}/k"], "v": data[f"{inputs}/v"]})
        elif kind == "reset":
            memory.reset()
        else:
            found = memory.retrieve(data[f"{inputs}/q"])
            numbers = torch.stack(found["knn_index"]).view(about["H"], operation["T"], operation["B"], -1)
            wanted = data[f"{results}/knn_index"]
            assert torch.equal(numbers.permute(2, 0, 1, 3), wanted)
            missing += int((wanted < 0).sum())
            for name in "kv":
                assert torch.equal(found["tgt_index"][name], data[f"{results}/tgt_{name}"])
        if "dstore_after" in operation:
            assert memory.dstore_idx == operation["dstore_after"]
            assert {index.ntotal for index in memory.index_list} == {operation["ntotal"]}
    assert missing or "chunk1" in script
    for name in ("keys", "vals"):
        assert torch.equal(torch.stack(getattr(memory, name)), data[f"{script}/final_{name}"])
    vectors = torch.stack([index.reconstruct_n(0, index.ntotal) for index in memory.index_list])
    torch.testing.assert_close(vectors, data[f"{script}/final_index"], rtol=0, atol=1e-6)


def test_retrieved_behaves_like_the_dictionary_it_stands_for() -> None:
    memory = small_memory()
    memory.add_index({"k": torch.randn(2, 12, 24), "v": torch.randn(2, 12, 24)})
    found = memory.retrieve(torch.randn(5, 2, 24))
    assert set(found) == {"knn_index", "tgt_index"}
    assert [numbers.shape for numbers in found["knn_index"]] == [(10, 2)] * 3
    retrieved = found["tgt_index"]
    assert isinstance(retrieved, Retrieved)
    assert list(retrieved) == ["k", "v"] and len(retrieved) == 2 and "k" in retrieved and "q" not in retrieved
    assert retrieved["k"].shape == retrieved["v"].shape == (6, 5, 8, 8)
    assert {name: t.shape for name, t in retrieved.items()} == {"k": (6, 5, 8, 8), "v": (6, 5, 8, 8)}
    for row, head, step in ((0, 0, 0), (1, 2, 4)):
        number = found["knn_index"][head].view(5, 2, 2)[step, row]
        wanted = torch.cat([memory.vals[head][n] for n in number])
        assert torch.equal(retrieved["v"][row * 3 + head, step], wanted)


def test_what_was_retrieved_outlives_writes_evictions_and_resets() -> None:
    """A backward pass may come after the memory has moved on."""
    memory, attention = small_memory(), layer(24, 3)
    gradients = []
    for late in (False, True):
        memory.reset()
        torch.manual_seed(3)
        memory.add_index({"k": torch.randn(2, 12, 24), "v": torch.randn(2, 12, 24)})
        x = torch.randn(6, 2, 24, requires_grad=True)
        retrieved = memory.retrieve(attention.q_proj(x))["tgt_index"]
        before = retrieved["k"]
        out, _ = attention(x, x, x, need_weights=False, attn_mask=causal(6), long_context_retrieval=retrieved)
        if late:
            for _ in range(5):
                memory.add_index({"k": torch.randn(2, 12, 24), "v": torch.randn(2, 12, 24)})
                memory.retrieve(x)
            memory.reset()
            memory.add_index({"k": torch.randn(2, 12, 24), "v": torch.randn(2, 12, 24)})
            memory.retrieve(x)
        out.sum().backward()
        gradients.append(x.grad)
        assert torch.equal(retrieved["k"], before)
    assert gradients[0] is not None and gradients[1] is not None and torch.equal(gradients[0], gradients[1])


def test_what_was_added_is_a_copy() -> None:
    memory, key = small_memory(), torch.randn(1, 8, 24)
    kept = key.clone()
    memory.add_index({"k": key, "v": key})
    key.zero_()
    assert torch.equal(torch.stack(memory.keys)[:, :2].transpose(0, 1).transpose(1, 2).reshape(8, 24), kept[0])


def test_more_chunks_than_the_kernel_returns() -> None:
    """The published configuration may ask for any number of chunks per query."""
    wide, narrow = (small_memory(memory_size=1200, k=k, chunk=1) for k in (70, 8))
    key = torch.randn(1, 600, 24)
    for memory in (wide, narrow):
        memory.add_index({"k": key, "v": key})
    query = torch.randn(5, 1, 24)
    many, few = (torch.stack(memory.retrieve(query)["knn_index"]) for memory in (wide, narrow))
    assert many.shape == (3, 5, 70) and torch.equal(many[..., :8], few)
    index = wide.index_list[2]
    scores, ids = index.search(query[:, 0, 16:], 8)
    assert torch.equal(ids, few[2]) and index.d == 8
    torch.testing.assert_close(scores, (query[:, 0, None, 16:] * key[0, ids, 16:]).sum(-1), **CLOSE)
    x = torch.randn(5, 1, 24)
    retrieved, attention = wide.retrieve(x)["tgt_index"], layer(24, 3)
    gathered = {name: retrieved[name] for name in ("k", "v")}
    results = [attention(x, x, x, need_weights=False, long_context_retrieval=r)[0] for r in (retrieved, gathered)]
    torch.testing.assert_close(*results, **CLOSE)


def test_an_empty_memory_finds_nothing() -> None:
    memory = small_memory()
    found = memory.retrieve(torch.randn(5, 2, 24))
    assert all((numbers == -1).all() for numbers in found["knn_index"])
    assert not found["tgt_index"]["k"].any() and not found["tgt_index"]["v"].any()


def test_default_storage_is_the_published_one() -> None:
    assert small_memory(gpu=True).dtype == torch.float16 and small_memory().dtype == torch.float32
    config = fairseq_settings(heads=3, width=24, memory_size=96, k=8, chunk=4)
    del config.chunk_size
    assert External_Memory(config).chunk_size == 4
    memory = small_memory()
    assert (memory.dimension, memory.head_dim, memory.num_heads, memory.reduce_fac) == (24, 8, 3, 2)
    assert (memory.time_for_retrieve, memory.retrieve_count, memory.time_for_setup_prob) == (0.0, 0.0, 0.0)


def test_memories_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k must be a positive multiple of chunk_size, got 6 and 4"):
        small_memory(k=6)
    with pytest.raises(ValueError, match=r"multiple of decoder.attention_heads, got 24 and 5"):
        small_memory(heads=5)
    with pytest.raises(ValueError, match=r"k and v must be \[B, T, 24\], got \(1, 4, 20\)"):
        small_memory().add_index({"k": torch.zeros(1, 4, 20), "v": torch.zeros(1, 4, 20)})
