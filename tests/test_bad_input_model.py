"""Every argument of the model layer's methods in every way to be wrong: refused in words, when it is given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_inputs import Subject
from models import VOCABULARY, tiny_longmem
from torch import randn, zeros

from longmem import MemoryBank


def subjects() -> list[Subject]:
    """A good call of every method."""
    model = tiny_longmem()
    memory, whole = model.new_memory(2), torch.ones(2, 5).bool()
    ids = torch.randint(0, VOCABULARY, (2, 5))

    @functools.wraps(model.generate)
    def generate(*args: Any, **options: Any) -> list[torch.Tensor]:
        return list(model.generate(*args, **options))

    bank = MemoryBank(rows=2, kv_heads=2, head_dim=8, tokens=32, chunk_size=4)
    query = {"query": randn(2, 4, 3, 8), "k": 3, "layer": 0}
    model_too = ("LongMem", "Backbone")
    return [
        Subject(
            "MemoryBank.write", bank.write,
            {"key": randn(2, 2, 3, 8), "value": randn(2, 2, 3, 8), "mask": torch.ones(2, 3).bool(), "rows": [1, 0]},
            packed=("mask",),
        ),
        Subject("MemoryBank.reset", bank.reset, {"rows": zeros(2).bool()}, packed=("rows",)),
        Subject(
            "MemoryBank", bank.retrieve, query, also=("chunk_topk",), any_value=("layer",), free={"query": (2,)},
            called={"query": ("query", "rows")},
        ),
        Subject(
            "LongMem", model.forward,
            {"tokens": ids, "memory": memory, "targets": ids, "new_document": zeros(2).bool(), "mask": whole,
             "write": True},
            also=("Backbone",), packed=("tokens", "targets", "mask", "new_document"),
        ),
        Subject(
            "remember", model.remember, {"tokens": ids, "memory": memory, "mask": whole, "rows": [1, 0]},
            also=model_too, packed=("tokens", "mask"), untried=("progress",),
        ),
        Subject(
            "generate", generate,
            {"tokens": ids, "memory": memory, "max_new_tokens": 2, "pad": 3, "temperature": 0.7, "top_p": 0.9,
             "top_k": 5, "repetition_penalty": 1.2},
            also=model_too, packed=("tokens",), free={"tokens": (1,)}, any_value=("max_new_tokens", "pad", "top_k"),
            untried=("mask", "eos", "generator", "logits_processor", "stopping_criteria"),
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("subject", subjects(), ids=lambda s: s.name)
def test_every_wrong_argument_is_refused_in_words(subject: Subject) -> None:
    subject.function(**subject.good)
    assert not subject.missing(), f"{subject.name}: no good value of {subject.missing()}: add one"
    failed = [f"{what}: {why}" for what, name, changes in subject.wrong() if (why := subject.refuses(name, changes))]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    "change",
    [lambda k, v, m: k.add_(1), lambda k, v, m: v.t_().t_().mul_(2), lambda k, v, m: m.zero_()],
    ids=["key", "value", "mask"],
)
def test_a_write_whose_tensors_are_changed_meanwhile_is_refused(change: Callable[..., object]) -> None:
    memory = MemoryBank(rows=1, kv_heads=1, head_dim=8, tokens=32, chunk_size=4)
    key, value, mask = randn(1, 1, 4, 8), randn(1, 1, 4, 8), torch.ones(1, 4).bool()
    memory.write(key, value, mask)
    assert memory.ring.cursor.tolist() == [4]
    memory.write(key, value, mask)
    change(key, value[0, 0], mask)
    with pytest.raises(RuntimeError, match="MemoryBank: key, value or mask of a write were changed in place"):
        memory.ring  # noqa: B018
    assert memory.ring.cursor.tolist() == [4]


def test_a_memory_of_inference_mode_can_be_trained_with() -> None:
    model, ids = tiny_longmem(), torch.randint(0, VOCABULARY, (2, 12))
    with torch.inference_mode():
        memory = model.new_memory(2)
        model.remember(ids.repeat(1, 3), memory)
    for _ in range(2):
        model(ids, memory, targets=ids).loss.backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.trainable().values())
