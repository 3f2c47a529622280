"""Both sides of docs/published-code.md that no other test shows, and that every test it names is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_parts import explicit, layer, small_memory
from models import tiny_longmem
from official_models import random_model, small_config

from longmem import MemoryBank
from longmem.official import official_state
from longmem.official.loading import official_parameters

ROOT = Path(__file__).parent.parent
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


def text(rows: int = 2, steps: int = 12) -> torch.Tensor:
    return torch.randint(4, 61, (rows, steps))


def test_rows_share_one_memory_in_the_published_model() -> None:
    """Row 0 is the same both times; only row 1's past changes."""
    model = random_model(small_config())
    past, now = text(), text()
    results = []
    for neighbour in (text(1), text(1)):
        model.memory.reset()
        model(torch.cat([past[:1], neighbour]))
        results.append(model(now)[0])
    assert not torch.allclose(results[0], results[1], atol=1e-2)


def test_the_published_memory_is_never_full() -> None:
    model = random_model(small_config(memory_size=96))  # 24 chunks, 6 a batch
    counts = []
    for _ in range(9):
        model(text())
        counts.append(model.memory.dstore_idx)
    assert counts == [6, 12, 18, 12, 18, 12, 18, 12, 18]
    assert not torch.stack(model.memory.keys)[:, -1].any()


def test_our_memory_is_full_and_stays_full() -> None:
    model = tiny_longmem(memory_tokens=24)  # segments of 12 tokens
    memory, fill = model.new_memory(rows=2), []
    for _ in range(5):
        model(torch.randint(0, 97, (2, 12)), memory)
        fill.append(memory.stats()["fill"])
    assert fill == [0.5, 1, 1, 1, 1]


def test_missing_chunks_dilute_what_the_published_model_reads() -> None:
    """One chunk of two is there: the read is its attention shrunk by four zero scores' share."""
    memory, module = small_memory(), layer(24, 3)
    torch.nn.init.constant_(module.memory_bias, 100.0)  # memory alone
    memory.add_index({"k": torch.randn(1, 4, 24), "v": torch.ones(1, 4, 24)})
    x = torch.randn(5, 1, 24)
    retrieved = memory.retrieve(module.q_proj(x))["tgt_index"]
    out, _ = module(x, x, x, need_weights=False, long_context_retrieval=retrieved)
    torch.testing.assert_close(out, explicit(module, x, torch.zeros(5, 5), retrieved), **CLOSE)
    undiluted = module.out_proj(torch.ones(5, 1, 24))
    assert not torch.allclose(out, undiluted, atol=1e-2)


def test_missing_chunks_take_no_part_in_ours() -> None:
    bank = MemoryBank(rows=1, kv_heads=3, head_dim=8, tokens=96, chunk_size=4)
    bank.write(torch.randn(1, 3, 4, 8), torch.ones(1, 3, 4, 8))
    query, key, value = (torch.randn(1, 3, 5, 8) for _ in range(3))
    ids, _ = bank.retrieve(query, 2)
    assert (ids[..., 1] == -1).all()
    out = bank.attend(query, key, value, ids, gate=torch.full((3,), 100.0))
    torch.testing.assert_close(out, torch.ones(1, 3, 5, 8), **CLOSE)


def test_the_published_memory_keeps_padding() -> None:
    model = random_model(small_config())
    model(text())
    tokens = text()
    tokens[1, 8:] = 1
    model(tokens)
    assert model.memory.dstore_idx == 12
    assert torch.stack(model.memory.keys)[:, 11].any()  # the last chunk is padding alone


def test_published_chunks_mix_rows_and_drop_the_tail() -> None:
    memory = small_memory()
    key = torch.arange(2 * 7).view(2, 7, 1).expand(2, 7, 24).float()
    memory.add_index({"k": key, "v": key})
    assert memory.dstore_idx == 3
    assert memory.keys[0][:3, :, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_the_published_memory_outlives_documents() -> None:
    """A document ends with `<s> </s>` (0, 2) among the tokens, and nothing else happens."""
    model = random_model(small_config())
    tokens = text()
    tokens[:, 5:7] = torch.tensor([0, 2])
    model(tokens)
    model(text())
    assert model.memory.dstore_idx == 12


def test_published_checkpoints_hold_no_memory() -> None:
    model = random_model(small_config())
    before = official_state(model).keys(), model.state_dict().keys()
    model(text())
    assert (official_state(model).keys(), model.state_dict().keys()) == before
    parameters = set(official_parameters(model).values())
    assert parameters == set(model.parameters())


def test_published_search_vectors_are_means_before_rounding() -> None:
    key = torch.full((1, 4, 24), 2049.0)  # float16 holds 2048 and 2050
    memory = small_memory(gpu=True)
    memory.add_index({"k": key, "v": key})
    assert memory.index_list[0].reconstruct_n(0, 1)[0, 0] == 2049 and memory.keys[0][0, 0, 0] == 2048


def test_the_published_start_is_not_the_backbone() -> None:
    model = random_model(small_config())
    model.initialise_from_backbone()
    tokens = text()
    hidden = model.backbone.encode(tokens, (0,), {4}).hidden[4]
    assert not torch.allclose(model(tokens), model.backbone.logits(hidden), atol=1e-1)


def named_tests() -> list[str]:
    return re.findall(r"`(tests/\w+\.py::\w+)`", (ROOT / "docs/published-code.md").read_text(encoding="utf-8"))


def test_every_difference_names_its_tests() -> None:
    page = (ROOT / "docs/published-code.md").read_text(encoding="utf-8")
    paragraphs = [part for part in page.split("\n\n") if part.startswith("**")]
    assert len(paragraphs) == 12
    for paragraph in paragraphs:
        assert "*Published:*" in paragraph and "*Ours:*" in paragraph and "`tests/" in paragraph, paragraph


@pytest.mark.parametrize("test", sorted(set(named_tests())))
def test_tests_named_in_differences_exist(test: str) -> None:
    path, name = test.split("::")
    assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8")
