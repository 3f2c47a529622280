"""Backbones: the wiring of a model's own modules computes what the model computes."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, VOCABULARY, tiny_backbone, tiny_huggingface
from transformers import OPTConfig, OPTForCausalLM

from longmem import LongMem, LongMemConfig, PaperGPTConfig, huggingface_backbone, paper_gpt
from longmem.backbones import BackboneCache
from longmem.backbones.layers import Positions, alibi_slopes


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str) -> None:
    model = tiny_huggingface(family)
    backbone = huggingface_backbone(model)
    tokens = torch.randint(0, VOCABULARY, (2, 20))
    states = backbone.encode(tokens, (2,), {0, 5})
    with torch.no_grad():
        torch.testing.assert_close(backbone.logits(states.hidden[5]), model(tokens).logits, atol=1e-5, rtol=1e-5)
        expected = model(tokens, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(states.hidden[0], expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_logits_are_the_models_own_with_an_untied_head(family: str) -> None:
    model = tiny_huggingface(family, tied=False)
    tokens = torch.randint(0, VOCABULARY, (2, 20))
    backbone = huggingface_backbone(model)
    with torch.no_grad():
        logits = backbone.logits(backbone.encode(tokens, (2,), {5}).hidden[5])
        torch.testing.assert_close(logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_it_is_as_near_to_float32_as_the_model(family: str) -> None:
    model = tiny_huggingface(family)
    tokens = torch.randint(0, VOCABULARY, (2, 20))
    with torch.no_grad():
        exact = model(tokens).logits
        model.bfloat16()
        backbone = huggingface_backbone(model)
        states = backbone.encode(tokens, (2,), {5})
        error, own_error = (
            float((logits - exact).square().mean().sqrt())
            for logits in (backbone.logits(states.hidden[5]), model(tokens).logits)
        )
    assert states.key.dtype == torch.bfloat16
    assert error < 1.5 * own_error


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_memory_leaves_the_models_logits(family: str) -> None:
    model = tiny_huggingface(family)
    longmem = LongMem(huggingface_backbone(model), LongMemConfig(memory_layers=(2,), segment=20, memory_tokens=64))
    memory = longmem.new_memory(rows=2)
    tokens = torch.randint(0, VOCABULARY, (2, 20))
    with torch.no_grad():
        wanted = model(tokens).logits
        torch.testing.assert_close(longmem(tokens, memory).logits, wanted, atol=1e-4, rtol=1e-4)
        # What was written is read: the second time the same segment has a past.
        assert not torch.allclose(longmem(tokens, memory).logits, wanted, atol=1e-2)


@pytest.mark.parametrize("family", [*FAMILIES, "paper"])
def test_encoding_in_pieces_equals_encoding_at_once(family: str) -> None:
    backbone = tiny_backbone(family)
    tokens = torch.randint(0, VOCABULARY, (2, 20))
    whole = backbone.encode(tokens, (2,), {0, 5})
    cache = BackboneCache()
    pieces = [backbone.encode(piece, (2,), {0, 5}, cache) for piece in tokens.split([7, 1, 1, 11], 1)]
    for depth in (0, 5):
        joined = torch.cat([piece.hidden[depth] for piece in pieces], 1)
        torch.testing.assert_close(joined, whole.hidden[depth], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([piece.key for piece in pieces], 2), whole.key, atol=1e-4, rtol=1e-4)


def test_encoding_stops_where_nothing_more_is_asked_for() -> None:
    backbone = tiny_backbone()
    tokens = torch.randint(0, VOCABULARY, (1, 9))
    called = []
    for i, layer in enumerate(backbone.layers):
        layer.register_forward_hook(lambda *_, i=i: called.append(i))
    low = backbone.encode(tokens, (3,), {3})
    assert called == [0, 1, 2]
    high = backbone.encode(tokens, (3,), {3, 5})
    assert torch.equal(low.key, high.key) and torch.equal(low.hidden[3], high.hidden[3])
    torch.testing.assert_close(backbone.resume(high.hidden[3], 3), high.hidden[5])


def test_memory_keys_are_stored_before_rotation() -> None:
    """The same token at two positions of a segment has the same embedding, so layer 0 stores the same key twice."""
    key = tiny_backbone().encode(torch.tensor([[5, 6, 5]]), (0,), {0}).key
    torch.testing.assert_close(key[:, :, 0], key[:, :, 2])


def test_a_backbone_is_frozen() -> None:
    backbone = tiny_backbone().train()
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert not backbone.encode(torch.zeros(1, 4, dtype=torch.int64), (2,), {5}).hidden[5].requires_grad


def test_published_paper_gpt_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        backbone = paper_gpt(PaperGPTConfig())
    assert sum(p.numel() for p in backbone.parameters()) == 407_072_768


def test_paper_gpt_positions_are_relative() -> None:
    """ALiBi: a later start changes nothing, because nothing but distances is seen."""
    backbone = tiny_backbone("paper")
    x = torch.randn(1, 6, 48)
    later = Positions(torch.arange(50, 56)[None])
    torch.testing.assert_close(backbone.layer(1)(x), backbone.layer(1)(x, positions=later))


def test_alibi_slopes_of_head_counts_that_are_no_powers_of_two() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_unsupported_architecture_is_refused_with_the_list_of_supported_ones() -> None:
    model = OPTForCausalLM(
        OPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, vocab_size=11)
    )
    with pytest.raises(ValueError, match=r"'opt' is not among them; supported: llama, .*gpt2.*bloom"):
        huggingface_backbone(model)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "residuals start after the norm"),
        ("gpt2", {"add_cross_attention": True}, "attends to an encoder"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, r"scores are capped \(attn_logit_softcapping=5.0\)"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' changes"),
    ],
)
def test_options_that_the_wiring_lacks_are_refused_with_the_reason(
    family: str, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        huggingface_backbone(tiny_huggingface(family, **options))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="language-model head, got LlamaModel"):
        huggingface_backbone(tiny_huggingface("llama").model)


def test_segments_longer_than_the_learned_positions_are_refused() -> None:
    backbone = tiny_backbone("gpt2")
    assert backbone.max_segment == 128 and tiny_backbone("llama").max_segment is None
    with pytest.raises(ValueError, match="positions for 128 tokens, got a segment of 129"):
        backbone.encode(torch.zeros(1, 129, dtype=torch.int64), (2,), {5})
    with pytest.raises(ValueError, match="segment must be at most 128"):
        LongMem(backbone, LongMemConfig(memory_layers=(2,), segment=129))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[VOCABULARY]]), rf"\[0, {VOCABULARY}\), got {VOCABULARY}"),
        (torch.tensor([[-1]]), "got -1"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least 1"),
        (torch.zeros(4, dtype=torch.int64), r"\[B, T\]"),
        (torch.zeros(1, 4), "int64"),
    ],
)
def test_bad_tokens_are_named(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_backbone().encode(tokens, (2,), {5})
