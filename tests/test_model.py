"""LongMem: starts at the backbone, reads what was written, decodes what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, VOCABULARY, tiny_backbone, tiny_huggingface, tiny_longmem
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BatchEncoding, PreTrainedTokenizerFast

from longmem import LongMem, LongMemConfig, default_memory_layers, huggingface_backbone
from longmem.backbones.load import load_backbone
from longmem.files import load_tensors, save_tensors


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length))


def backbone_logits(model: LongMem, ids: torch.Tensor) -> torch.Tensor:
    depth = len(model.backbone.layers)
    return model.backbone.logits(model.backbone.encode(ids, (2,), {depth}).hidden[depth])


@pytest.mark.parametrize("fusion", ["joint", "gated"])
@pytest.mark.parametrize("sidenet", ["none", "exact"])
@pytest.mark.parametrize("family", [*FAMILIES, "paper"])
def test_untrained_with_empty_memory_the_output_is_the_backbones(family: str, sidenet: str, fusion: str) -> None:
    model = tiny_longmem(family, sidenet=sidenet, fusion=fusion)
    ids = tokens(2, 12)
    for memory in (None, model.new_memory(2)):
        torch.testing.assert_close(model(ids, memory).logits, backbone_logits(model, ids), atol=2e-5, rtol=1e-4)


def test_paper_start_copies_and_adds_what_the_paper_says() -> None:
    model = tiny_longmem("paper", sidenet="paper", trainable="all", fusion="gated", memory_layers=(3,))
    assert model.sidenet.jumps == [(0, 2), (2, 4)] and list(model.sidenet.reads) == ["1"]
    copied = [model.backbone.layer(1), model.backbone.layer(3)]
    for mine, theirs in zip(model.sidenet.stack, copied, strict=True):
        assert torch.equal(mine.query.weight, theirs.query.weight)
    assert torch.equal(model.sidenet.reads["1"].gate, torch.zeros(6))
    ids = tokens(1, 12)
    states = model.backbone.encode(ids, (3,), {0, 2, 4})
    x = copied[0](states.hidden[0]) + states.hidden[2] - states.hidden[0]
    x = copied[1](x) + states.hidden[4] - states.hidden[2]
    torch.testing.assert_close(model(ids).logits, model.backbone.logits(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduction", [1, 2])
def test_layers_that_only_repeat_the_backbone_are_left_out(reduction: int) -> None:
    """A SideNet whose layers do not train begins at its first read, without copies, and computes the same."""
    options: dict[str, Any] = {"sidenet": "exact", "reduction": reduction, "memory_layers": (2,)}
    model = tiny_longmem(**options)
    whole = LongMem(model.backbone, replace(model.config, trainable="all"))
    assert len(whole.sidenet.stack) - len(model.sidenet.stack) == 2 // reduction
    assert all(any(mine is theirs for theirs in model.backbone.layers) for mine in model.sidenet.stack)
    ids, memories = tokens(1, 36), (model.new_memory(1), whole.new_memory(1))
    for piece in ids.split(12, 1):
        out, wanted = (m(piece, memory).logits for m, memory in zip((model, whole), memories, strict=True))
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("reduction", [1, 2, 3, 5])
def test_exact_start_holds_for_reductions_that_do_not_divide_the_depth(reduction: int) -> None:
    model = tiny_longmem(sidenet="exact", reduction=reduction)
    ids = tokens(1, 12)
    torch.testing.assert_close(model(ids).logits, backbone_logits(model, ids), atol=2e-5, rtol=1e-4)


def test_a_segment_does_not_retrieve_itself_but_the_next_one_does() -> None:
    model = tiny_longmem()
    memory = model.new_memory(1)
    ids = tokens(1, 12)
    without = model(ids).logits
    torch.testing.assert_close(model(ids, memory).logits, without)
    assert (model(ids, memory).logits - without).abs().max() > 1e-3


def test_reading_only_leaves_memory_alone() -> None:
    model = tiny_longmem()
    memory = model.new_memory(1)
    model(tokens(1, 12), memory)
    before = memory.state_dict()
    model(tokens(1, 12), memory, write=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in memory.state_dict().items())


def test_a_new_document_starts_with_an_empty_memory() -> None:
    model = tiny_longmem()
    memory = model.new_memory(2)
    model(tokens(2, 12), memory)
    ids = tokens(2, 12)
    out = model(ids, memory, new_document=torch.tensor([True, False])).logits
    fresh = model(ids).logits
    torch.testing.assert_close(out[0], fresh[0], atol=1e-5, rtol=1e-4)
    assert (out[1] - fresh[1]).abs().max() > 1e-3


@pytest.mark.parametrize("sidenet", ["none", "exact"])
def test_each_memory_layer_is_read(sidenet: str) -> None:
    """Several memory layers: the start is exact, and emptying any one of their memories changes the output."""
    model = tiny_longmem(sidenet=sidenet, memory_layers=(1, 3))
    memory = model.new_memory(1)
    ids = tokens(1, 12)
    torch.testing.assert_close(model(ids, memory).logits, backbone_logits(model, ids), atol=2e-5, rtol=1e-4)
    out = model(ids, memory, write=False).logits
    for layer in range(2):
        other = model.new_memory(1)
        other.load_state_dict(memory.state_dict())
        heads = model.backbone.layer(0).kv_heads
        other.ring.store[:, layer * heads : (layer + 1) * heads] = 0.0
        assert (model(ids, other, write=False).logits - out).abs().max() > 1e-3


def test_rows_do_not_see_each_other() -> None:
    model = tiny_longmem()
    together, alone = model.new_memory(2), model.new_memory(1)
    for ids in tokens(2, 36).split(12, 1):
        both, one = model(ids, together).logits, model(ids[:1], alone).logits
        torch.testing.assert_close(both[:1], one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fusion": "gated"},
        {"sidenet": "exact"},
        {"sidenet": "paper", "trainable": "all", "memory_layers": (3,), "fusion": "gated"},
        {"memory_layers": (1, 2, 4)},
        {"sidenet": "exact", "memory_layers": (0, 3), "fusion": "gated"},
    ],
)
def test_every_trained_parameter_and_no_other_gets_a_gradient(options: dict[str, Any]) -> None:
    model = tiny_longmem(**options)
    memory = model.new_memory(2)
    model(tokens(2, 12), memory)
    ids = tokens(2, 13)
    loss = model(ids[:, :-1], memory, targets=ids[:, 1:]).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.removeprefix("sidenet.") in model.trainable():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_a_backward_pass_that_comes_too_late_is_refused() -> None:
    model = tiny_longmem()
    memory = model.new_memory(1)
    losses = []
    for _ in range(3):
        ids = tokens(1, 13)
        losses.append(model(ids[:, :-1], memory, targets=ids[:, 1:]).loss)
    with pytest.raises(RuntimeError, match=r"comes too late.*Call backward"):
        losses[1].backward()
    losses[2].backward()


def test_ignored_targets_do_not_count() -> None:
    model, ids = tiny_longmem(), tokens(1, 13)
    targets = ids[:, 1:].clone()
    targets[:, 4:] = -100
    torch.testing.assert_close(model(ids[:, :-1], targets=targets).loss, model(ids[:, :4], targets=ids[:, 1:5]).loss)
    assert model(ids[:, :-1], targets=torch.full_like(targets, -100)).loss == 0


def test_remembering_equals_walking() -> None:
    model, ids = tiny_longmem(), tokens(1, 30)
    walked, remembered = model.new_memory(1), model.new_memory(1)
    for piece in ids.split(12, 1):
        model(piece, walked)
    model.remember(ids, remembered)
    for name, tensor in walked.state_dict().items():
        torch.testing.assert_close(remembered.state_dict()[name], tensor)


def test_some_rows_remember_and_the_others_stay_as_they_are() -> None:
    model, ids = tiny_longmem(memory_layers=(1, 3)), tokens(3, 30)
    some, alone = model.new_memory(3), model.new_memory(2)
    model.remember(ids, some)
    model.remember(ids[:2], alone)
    before = {name: tensor.clone() for name, tensor in some.state_dict().items()}
    more = tokens(2, 30)
    model.remember(more, some, rows=[2, 0])
    model.remember(more[1:], alone, rows=[0])
    for name, tensor in some.state_dict().items():
        assert torch.equal(tensor[1], before[name][1]), name
        torch.testing.assert_close(tensor[0], alone.state_dict()[name][0])
        assert not torch.equal(tensor[2], before[name][2]), name


@pytest.mark.parametrize(
    ("shape", "mask", "rows", "message"),
    [
        ((2, 30), None, [1], "the 1 named rows, got .2, 12."),
        ((2, 30), None, None, "the memory's 3 rows, got .2, 12."),
        ((2, 30), None, [0, 3], "different ones of 0 to 2, got .0, 3."),
        ((2, 30), None, [-1, 0], "different ones of 0 to 2, got .-1, 0."),
        ((2, 30), None, [1, 1], "different ones of 0 to 2, got .1, 1."),
        ((30,), None, None, "tokens must have 2 axes .R, n., got shape .30,."),
        ((3, 30), (3, 29), None, "mask must be bool of the shape of tokens, .3, 30., got torch.bool .3, 29."),
    ],
)
def test_what_cannot_be_remembered_is_named_and_nothing_written(
    shape: tuple[int, ...], mask: tuple[int, ...] | None, rows: list[int] | None, message: str
) -> None:
    model = tiny_longmem()
    memory = model.new_memory(3)
    model.remember(tokens(3, 12), memory)
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ids = torch.zeros(shape, dtype=torch.int64)
        model.remember(ids, memory, None if mask is None else torch.ones(mask, dtype=torch.bool), rows)
    for name, tensor in memory.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "options", [{}, {"sidenet": "exact"}, {"sidenet": "exact", "trainable": "all", "memory_layers": (1, 3)}]
)
def test_a_saved_model_comes_back_on_its_backbone_and_on_no_other(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_longmem(fusion="gated", **options)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    again = LongMem.from_pretrained(tmp_path, model.backbone)
    ids = tokens(1, 12)
    memories = [m.new_memory(1) for m in (model, again)]
    for _ in range(2):
        first, second = (m(ids, memory).logits for m, memory in zip((model, again), memories, strict=True))
        assert torch.equal(first, second)
    stored, _ = load_tensors(tmp_path / "longmem.safetensors", "longmem model")
    assert stored.keys() == model.trainable().keys(), "neither the backbone nor frozen copies of it are saved"
    with pytest.raises(ValueError, match="was trained on backbone 'llama'"):
        LongMem.from_pretrained(tmp_path, tiny_backbone("qwen2"))
    with pytest.raises(ValueError, match=r"there is no file .*longmem\.safetensors"):
        LongMem.from_pretrained(tmp_path / "nowhere", model.backbone)


def test_a_saved_model_may_read_memory_otherwise_than_in_training(tmp_path: Path) -> None:
    model = tiny_longmem()
    model.save_pretrained(tmp_path)
    again = LongMem.from_pretrained(tmp_path, model.backbone, segment=20, memory_tokens=2048, chunks_per_query=3)
    assert (again.config.segment, again.config.chunks_per_query) == (20, 3)
    memory = again.new_memory(1)
    again(tokens(1, 20), memory)
    again(tokens(1, 20), memory)
    assert memory.ring.chunks * memory.ring.chunk_size == 2048
    with pytest.raises(ValueError, match=r"of the configuration chunk_size, .* may be changed, got fusion"):
        LongMem.from_pretrained(tmp_path, model.backbone, fusion="joint")
    with pytest.raises(ValueError, match="segment must be an integer, at least 1, got 0"):
        LongMem.from_pretrained(tmp_path, model.backbone, segment=0)


def test_a_saved_model_finds_its_backbone_by_name(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    for part in (tiny_huggingface("llama"), tokenizer):
        part.save_pretrained(tmp_path / "backbone")
    backbone, _ = load_backbone(str(tmp_path / "backbone"))
    model = LongMem(backbone, LongMemConfig(memory_layers=(2,), segment=12, memory_tokens=64))
    with torch.no_grad():
        model.sidenet.reads["0"].output.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "run")
    again, ids = LongMem.from_pretrained(tmp_path / "run"), tokens(1, 12)
    assert torch.equal(again(ids).logits, model(ids).logits)
    backbone.name = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="gone', which cannot be loaded by that name; pass it as `backbone`"):
        LongMem.from_pretrained(tmp_path / "run")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = tiny_longmem()
    model.save_pretrained(tmp_path)
    stored, about = load_tensors(tmp_path / "longmem.safetensors", "longmem model")
    del stored["reads.0.log_temperature"]
    save_tensors(tmp_path / "longmem.safetensors", stored, "longmem model", about)
    with pytest.raises(ValueError, match=r"longmem.safetensors: reads\.0\.log_temperature must be .*, got nothing"):
        LongMem.from_pretrained(tmp_path, model.backbone)


def test_a_memory_of_another_model_is_refused() -> None:
    model, other = tiny_longmem(), tiny_longmem(memory_layers=(3,))
    with pytest.raises(ValueError, match="made by another model"):
        model(tokens(1, 12), other.new_memory(1))
    with pytest.raises(ValueError, match="the memory's 2 rows"):
        model(tokens(1, 12), model.new_memory(2))
    with pytest.raises(ValueError, match="at most 12 tokens"):
        model(tokens(1, 13))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_layers": (5,)}, r"at least one layer in \[0, 5\), ascending, got \(5,\)"),
        ({"sidenet": "twin"}, "one of none, exact, paper, got 'twin'"),
        ({"fusion": "sum"}, "one of joint, gated, got 'sum'"),
        ({"trainable": "all"}, "needs a SideNet"),
        ({"sidenet": "exact", "reduction": 0}, "reduction must be an integer, at least 1, got 0"),
        ({"memory_layers": ()}, "at least one layer"),
        ({"memory_layers": (3, 1)}, r"ascending, got \(3, 1\)"),
        ({"sidenet": "exact", "reduction": 6}, r"reduction must lie in \[1, 5\], got 6"),
        ({"sidenet": "exact", "memory_layers": (4,)}, "above the last SideNet layer"),
        ({"sidenet": "exact", "memory_layers": (2, 3)}, "different SideNet layers"),
        ({"memory_tokens": 63}, "multiple of chunk_size = 4, .* got 63"),
        ({"chunks_per_query": 0}, "chunks_per_query must be an integer, from 1 to 64, got 0"),
    ],
)
def test_bad_configurations_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_longmem(**options)


def test_unknown_configuration_keys_are_named() -> None:
    with pytest.raises(ValueError, match="'colour' is unknown"):
        LongMemConfig.from_dict({"memory_layers": (1,), "colour": "red"})


def test_targets_that_do_not_fit_are_named() -> None:
    model = tiny_longmem()
    with pytest.raises(ValueError, match=r"targets must have the shape of tokens, \(1, 5\), got \(1, 4\)"):
        model(tokens(1, 5), targets=tokens(1, 4))


NOT_TOKENS: dict[str, Any] = {
    "list": [[1, 2]],
    "one row without its dimension": torch.zeros(4, dtype=torch.int64),
    "what a tokenizer returns": BatchEncoding({"input_ids": torch.zeros(1, 4, dtype=torch.int64)}),
    "text": "It was",
}


@pytest.mark.parametrize("kind", NOT_TOKENS)
def test_what_is_no_tensor_of_tokens_is_refused_everywhere(kind: str) -> None:
    model, wrong = tiny_longmem(), NOT_TOKENS[kind]
    memory = model.new_memory(1)
    calls: list[Callable[[], object]] = [
        lambda: model(wrong, memory),
        lambda: model.remember(wrong, memory),
        lambda: model.generate(wrong, memory, max_new_tokens=1),
    ]
    for call in calls:
        with pytest.raises(
            (TypeError, ValueError), match=r"tokens must (be a tensor \[[BR] \w\]|have 2 axes)"
        ) as caught:
            call()
        assert ('["input_ids"]' in str(caught.value)) == isinstance(wrong, BatchEncoding)


def test_what_is_no_memory_backbone_or_target_is_refused(tmp_path: Path) -> None:
    model = tiny_longmem()
    ids = tokens(1, 4)
    model.save_pretrained(tmp_path)
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: model(ids, "memory"), r"memory must be a MemoryBank \(new_memory\), got str"),
        (lambda: model.remember(ids, None), r"remember: memory must be a MemoryBank \(new_memory\), got NoneType"),
        (lambda: model.generate(ids, {}, max_new_tokens=1), r"memory must be a MemoryBank \(new_memory\), got dict"),
        (lambda: LongMem.from_pretrained(tmp_path, "name"), "backbone must be a Backbone, got str"),
        (lambda: default_memory_layers("name"), "backbone must be a Backbone, got str"),
        (lambda: huggingface_backbone("name"), "wanted a transformers model"),
        (lambda: model(ids, targets=ids.float()), "targets must be one of int64, got float32"),
        (lambda: model(ids, targets=ids + 10**6), r"targets must lie in \[0, \d+\) or be -100, got 1000"),
        (lambda: model(ids, targets=-ids - 1), r"targets must lie in \[0, \d+\) or be -100, got -"),
        (lambda: model.generate(ids, max_new_tokens=2.5), "max_new_tokens must be an integer of at least 0, got 2.5"),
        (lambda: model.generate(ids, max_new_tokens=1, eos="x"), "eos must be an integer, got 'x'"),
        (lambda: model.generate(ids, max_new_tokens=1, temperature="1"), "temperature must be a number, got '1'"),
        (lambda: model.generate(ids, max_new_tokens=1, top_k=1.5), "top_k must be an integer of at least 0, got 1.5"),
    ]
    for call, words in wrong:
        with pytest.raises((TypeError, ValueError), match=words):
            call()
