"""Fingerprints: whatever changes keys and values changes them, and nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILIES, VOCABULARY, tiny_backbone, tiny_huggingface, tiny_longmem

from longmem import LongMem, huggingface_backbone
from longmem.backbones import Backbone
from longmem.backbones.fingerprint import difference

LAYERS = tuple(range(5))
# Fields of a configuration that hold names, where files came from, or how a model is trained, loaded or used.
ELSEWHERE = {
    "transformers_version", "architectures", "dtype", "_name_or_path", "id2label", "label2id", "return_dict",
    "output_hidden_states", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "vocab_size", "model_type",
    "hidden_size", "n_embd", "num_attention_heads", "n_head", "n_layer", "num_hidden_layers",
}  # fmt: skip


def keys_and_values(backbone: Backbone, ids: torch.Tensor) -> torch.Tensor:
    states = backbone.encode(ids, LAYERS, ())
    return torch.cat([states.key, states.value])


def changed(value: Any) -> list[Any]:
    """Other values of a configuration's field."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(value // 2, 1)]
    if isinstance(value, float):
        return [value * 3 + 0.01]
    if isinstance(value, str):
        return ["relu", "gelu"]
    if isinstance(value, dict):
        found = [{**value, name: other} for name, old in value.items() for other in changed(old)]
        if value.get("rope_type") == "default":
            found.append({**value, "rope_type": "linear", "factor": 4.0})
        return found
    if isinstance(value, list):
        return [value[1:] + value[:1], value[::-1]] if all(isinstance(part, str) for part in value) else []
    return [0.3, 3, True] if value is None else []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_that_changes_keys_and_values(family: str) -> None:
    """Each field of a configuration is changed, with the same weights: what the keys say, the fingerprint says."""
    model = tiny_huggingface(family)
    original, ids = huggingface_backbone(model), torch.randint(0, VOCABULARY, (1, 40))
    wanted, mark = keys_and_values(original, ids), original.fingerprint()
    seen, moved = 0, 0
    for name, value in model.config.to_dict().items():
        for other in changed(value) if name not in ELSEWHERE else []:
            config = copy.deepcopy(model.config)
            try:
                setattr(config, name, other)
                variant = type(model)(config).eval()
                variant.load_state_dict(model.state_dict())
                backbone = huggingface_backbone(variant)
                found = keys_and_values(backbone, ids)
            except Exception:
                continue  # no such model, or one with other weights
            seen += 1
            if found.shape != wanted.shape or (found - wanted).abs().max() > 1e-5:
                moved += 1
                assert backbone.fingerprint() != mark, (name, other)
    assert seen > 10 and moved > 0, "fields were changed, and some of them mattered"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom", "paper"])
def test_every_weight_counts(family: str) -> None:
    backbone = tiny_backbone(family)
    mark = backbone.fingerprint()
    marks = set()
    for parameter in backbone.parameters():
        place = tuple(torch.randint(size, ()) for size in parameter.shape)
        old = parameter[place].clone()
        with torch.no_grad():
            parameter[place] *= 1.02
        marks.add(backbone.fingerprint())
        with torch.no_grad():
            parameter[place] = old
    assert len(marks) == len(list(backbone.parameters())) and mark not in marks
    assert backbone.fingerprint() == mark


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight[[3, 5]],
        lambda weight: weight * torch.where(torch.arange(len(weight)) == 7, -1.0, 1.0)[:, None],
        lambda weight: weight.flip(1),
    ],
    ids=["rows exchanged", "a row negated", "columns exchanged"],
)
def test_where_weights_stand_counts(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    backbone = tiny_backbone()
    mark, weight = backbone.fingerprint(), backbone.embed.weight
    with torch.no_grad():
        new = change(weight.clone())
        weight[: len(new)] = new
    assert backbone.fingerprint() != mark


def test_scales_and_epsilons_changed_by_hand_count() -> None:
    model = tiny_huggingface("gemma3")
    mark = huggingface_backbone(model).fingerprint()
    changes: list[Callable[[], object]] = [
        lambda: model.model.embed_tokens.embed_scale.mul_(2),
        lambda: setattr(model.model.layers[1].self_attn, "scaling", 0.7),
        lambda: setattr(model.model.layers[4].self_attn.q_norm, "eps", 0.1),
        lambda: setattr(model.model.norm, "eps", 0.1),
    ]
    seen = {mark}
    for change in changes:
        change()
        seen.add(huggingface_backbone(model).fingerprint())
    assert len(seen) == 1 + len(changes)


def test_what_does_not_change_keys_and_values() -> None:
    model = tiny_huggingface("llama")
    mark = huggingface_backbone(model, "a").fingerprint()
    model.config.name_or_path, model.config.transformers_version, model.config.use_cache = "elsewhere", "9.9", False
    model.config.attention_dropout, model.generation_config.temperature = 0.5, 0.3
    model.config.max_position_embeddings *= 2
    model.config.bos_token_id, model.config.unsloth_version = 5, "1"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert huggingface_backbone(model.train(), "b").fingerprint() == mark
    finally:
        torch.set_num_threads(threads)


def test_one_model_in_several_formats_and_no_other() -> None:
    backbone, other = tiny_backbone(), tiny_backbone()
    nearly = copy.deepcopy(backbone)
    with torch.no_grad():
        nearly.layer(1).key.weight[0, 0] *= 1.02
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    marks, others, near = (
        {dtype: copy.deepcopy(model).to(dtype).fingerprint() for dtype in dtypes} for model in (backbone, other, nearly)
    )
    for first in dtypes:
        for second in dtypes:
            assert difference(marks[first], marks[second]) is None
            assert "weights" in str(difference(marks[first], others[second]))
            if {first, second} != {torch.bfloat16, torch.float16}:  # of which only a sample can be compared
                assert "weights" in str(difference(marks[first], near[second]))
    # Where one was loaded from the other, every weight is compared.
    for first, second in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        model = copy.deepcopy(backbone).to(first)
        assert difference(model.fingerprint(), copy.deepcopy(model).to(second).fingerprint()) is None


def test_differences_are_said_in_words() -> None:
    model = tiny_longmem()
    layers = LongMem(model.backbone, type(model.config)(memory_layers=(1, 3), segment=12, memory_tokens=64))
    assert difference(model.fingerprint, layers.fingerprint) == "its memory is that of layers 2, wanted layers 1, 3"
    old = "0123456789abcdef/layers 2"
    assert "an older version of longmem wrote it" in str(difference(old, model.fingerprint))
    assert difference("", model.fingerprint) is not None
    assert difference("x", "y") == "it is x, wanted y"
    assert difference("x", "x") is None
    damaged = model.fingerprint.replace("float32=", "float33=")
    assert difference(damaged, model.fingerprint) is not None


def test_weights_of_any_size_and_layout() -> None:
    """Blocks, rows and odd ends: the same for a copy, another for a change in the last element."""
    for count in (1, 5, 4096 * 2, 2**18, 2**18 + 3):
        norm = torch.nn.Linear(1, count, bias=False)
        storage = torch.randn(count + 3)
        marks = []
        for weight in (storage[3:], storage[3:].clone(), torch.cat([storage[3:-1], storage[-1:] + 1])):
            norm.weight = torch.nn.Parameter(weight[:, None])
            layers = [tiny_backbone().layer(0)]
            layers[0].load_state_dict({name: torch.ones_like(x) for name, x in layers[0].state_dict().items()})
            marks.append(
                Backbone(
                    "x", norm, layers, torch.nn.Identity(), torch.nn.Identity(), vocab_size=1, hidden_size=1
                ).fingerprint()
            )
        assert marks[0] == marks[1] != marks[2], count


def _patch(name: str) -> Callable[[Any], object]:
    def scale(model: Any) -> None:
        model.model.rotary_emb.attention_scaling = 0.5

    def activation(model: Any) -> None:
        model.model.layers[0].mlp.act_fn = torch.nn.ReLU()

    return {
        "frequencies": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
        "scale of rotation": scale,
        "activation": activation,
    }[name]


@pytest.mark.parametrize("name", ["frequencies", "scale of rotation", "activation"])
def test_what_is_changed_beside_the_configuration_counts(name: str) -> None:
    model = tiny_huggingface("llama")
    mark = huggingface_backbone(model).fingerprint()
    _patch(name)(model)
    assert "settings" in str(difference(mark, huggingface_backbone(model).fingerprint()))


def test_tied_weights_are_what_equal_ones_are() -> None:
    model = tiny_huggingface("llama")
    mark = huggingface_backbone(model).fingerprint()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert huggingface_backbone(model).fingerprint() == mark


@pytest.mark.filterwarnings("ignore")  # torch.ao says that it will go
def test_weights_that_are_packed_count_and_do_not_train() -> None:
    model = tiny_huggingface("llama")
    marks = []
    for factor in (1.0, 2.0):
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(factor)
        packed = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
        marks.append(huggingface_backbone(packed).fingerprint())
    assert "weights" in str(difference(*marks))
    with pytest.raises(ValueError, match="to train, and must have floating-point weights"):
        LongMem(huggingface_backbone(packed), tiny_longmem().config)


def test_casting_a_backbone_leaves_its_positions_as_they_are() -> None:
    backbone = tiny_backbone()
    before = copy.deepcopy(backbone.layer(0).rotary)
    after = backbone.to(torch.bfloat16).layer(0).rotary
    assert before is not None and after is not None
    assert torch.equal(before.angles.inv_freq, after.angles.inv_freq) and after.angles.inv_freq.dtype == torch.float32
