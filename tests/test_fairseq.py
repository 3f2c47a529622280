"""The drop-in attention: recorded numbers of the published one, alone and together with the drop-in memory."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from fairseq_parts import alibi, causal, explicit, fairseq_settings, layer, small_memory
from official_models import DATA, recorded, recorded_text
from torch import Tensor, nn

from longmem_kernels import memory_attention
from longmem_kernels.fairseq import External_Memory, JointMultiheadAttentionWeightedSum, fusion
from longmem_kernels.fairseq.attention import IncrementalState

CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


class Fused:
    """Counts the calls of the fused kernel, and those that had a bank to read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.banks: list[Tensor] = []

        def spy(query: Tensor, key: Tensor, value: Tensor, bank: Tensor, *arguments: Any, **options: Any) -> Tensor:
            self.banks.append(bank)
            return memory_attention(query, key, value, bank, *arguments, **options)

        monkeypatch.setattr(fusion, "memory_attention", spy)


@pytest.mark.parametrize("gathered", [False, True], ids=["both ours", "dictionary of gathered tensors"])
def test_layer_and_memory_reproduce_the_published_ones(gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory layer as it is called by the published code, over segments of two rows with an eviction."""
    path = DATA / "official_case_a_memory_layer.npz"
    data, config = recorded(path), recorded_text(path, "config")
    sizes = {name: config[name] for name in ("heads", "memory_size", "k", "chunk")}
    memory = External_Memory(fairseq_settings(width=config["embed"], **sizes))
    attention = layer(config["embed"], config["heads"])
    weights = {name.removeprefix("param/"): t for name, t in data.items() if name.startswith("param/")}
    attention.load_state_dict(weights)
    positions = data["alibi"].expand(2, -1, -1)[:, :, None]
    fused = Fused(monkeypatch)
    for s in range(5):
        x = data[f"seg{s}/memlayer_ln_out"].transpose(0, 1)
        retrieved = None
        if memory.dstore_idx:
            found = memory.retrieve(attention.q_proj(x))
            numbers = torch.stack(found["knn_index"]).view(config["heads"], x.shape[0], 2, -1).permute(2, 0, 1, 3)
            assert torch.equal(numbers, data[f"seg{s}/knn_index"])
            retrieved = found["tgt_index"]
            if gathered:
                retrieved = {name: retrieved[name].clone() for name in ("k", "v")}
        out, weights_of_keys = attention(
            query=x,
            key=x,
            value=x,
            key_padding_mask=None,
            incremental_state=None,
            need_weights=False,
            attn_mask=causal(x.shape[0]),
            position_encoding=positions,
            long_context_retrieval=retrieved,
        )
        assert weights_of_keys is None
        torch.testing.assert_close(out.transpose(0, 1), data[f"seg{s}/memlayer_attn_out"], **CLOSE)
        if s < 4:
            memory.add_index({"k": data[f"seg{s}/mem_k"], "v": data[f"seg{s}/mem_v"]})
            assert memory.dstore_idx == data[f"seg{s}/mem_counts"][2]
    # The fused path reads the memory itself and makes no copy.
    bank = memory.keys[0]
    assert (fused.banks[-1].data_ptr() == bank.data_ptr()) is not gathered


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("part", ["local", "joint"])
@pytest.mark.parametrize("case", ["np2", "k1"])
def test_layer_reproduces_the_published_gradients(case: str, part: str, differentiable: bool) -> None:
    start = f"{case}/"
    data = recorded(DATA / "official_joint_attention.npz")
    data = {name.removeprefix(start): t for name, t in data.items() if name.startswith(start)}
    steps, _, width = data["x"].shape
    attention = layer(width, len(data["memory_bias"]))
    projections = {f"{name}_proj.weight": data[f"{name}_proj"] for name in ("q", "k", "v", "out")}
    attention.load_state_dict(projections | {"memory_bias": data["memory_bias"]})
    x = data["x"].requires_grad_()
    retrieved = {name: data[f"retrieval_{name}"].requires_grad_(differentiable) for name in "kv"}
    out, _ = attention(
        x,
        x,
        x,
        need_weights=False,
        attn_mask=causal(steps),
        position_encoding=data["alibi"][:, :, None],
        long_context_retrieval=retrieved if part == "joint" else None,
    )
    torch.testing.assert_close(out, data[f"{part}/out"], **CLOSE)
    (out * data["cotangent"]).sum().backward()
    gradients = {f"{name}_proj": getattr(attention, f"{name}_proj").weight.grad for name in ("q", "k", "v", "out")}
    gradients["x"] = x.grad
    if part == "joint":
        gradients["memory_bias"] = attention.memory_bias.grad
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, data[f"{part}/grad_{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("scheme", ["ALiBi", "no positions", "neither", "other positions", "other mask", "biases"])
def test_any_mask_and_positions(scheme: str, with_memory: bool) -> None:
    module = layer(24, 3, bias=scheme == "biases")
    if scheme == "biases":
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    x, memory = torch.randn(7, 2, 24, requires_grad=True), small_memory()
    memory.add_index({"k": torch.randn(2, 12, 24), "v": torch.randn(2, 12, 24)})
    retrieved = memory.retrieve(module.q_proj(x))["tgt_index"] if with_memory else None
    positions = None if scheme in ("no positions", "neither") else alibi(2, 3, 7)
    mask = None if scheme == "neither" else causal(7)
    if scheme == "other positions":
        positions = torch.randn(2, 3, 1, 7)
    if scheme == "other mask":
        mask = causal(7).masked_fill(torch.arange(7)[:, None] - torch.arange(7) > 3, -torch.inf)
    bias = torch.zeros(7, 7) if mask is None else mask
    bias = bias if positions is None else positions + bias
    out, _ = module(
        x,
        x,
        x,
        need_weights=False,
        attn_mask=mask,
        position_encoding=positions,
        long_context_retrieval=retrieved,
    )
    wanted = explicit(module, x, bias, retrieved)
    torch.testing.assert_close(out, wanted, **CLOSE)
    parameters = [x, *(p for p in module.parameters() if with_memory or p is not module.memory_bias)]
    for mine, other in zip(
        torch.autograd.grad(out.sum(), parameters), torch.autograd.grad(wanted.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_gathered_tensors_may_be_differentiated() -> None:
    module, x = layer(24, 3), torch.randn(5, 2, 24)
    retrieved = {name: torch.randn(6, 5, 4, 8, requires_grad=True) for name in ("k", "v")}
    options: dict[str, Any] = {"need_weights": False, "attn_mask": causal(5), "position_encoding": alibi(2, 3, 5)}
    out, _ = module(x, x, x, long_context_retrieval=retrieved, **options)
    wanted = explicit(module, x, alibi(2, 3, 5) + causal(5), retrieved)
    tensors = list(retrieved.values())
    for mine, other in zip(
        torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(wanted.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(mine, other, **CLOSE)


def test_padding_is_hidden_without_memory_and_ignored_with_it() -> None:
    module, x, memory = layer(24, 3), torch.randn(7, 2, 24), small_memory()
    memory.add_index({"k": torch.randn(2, 12, 24), "v": torch.randn(2, 12, 24)})
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    options: dict[str, Any] = {"need_weights": False, "attn_mask": causal(7), "position_encoding": alibi(2, 3, 7)}
    out, _ = module(x, x, x, key_padding_mask=padding, **options)
    hidden = torch.zeros(2, 1, 1, 7).masked_fill(padding[:, None, None], -torch.inf)
    torch.testing.assert_close(out, explicit(module, x, alibi(2, 3, 7) + causal(7) + hidden), **CLOSE)
    retrieved = memory.retrieve(module.q_proj(x))["tgt_index"]
    with_padding, without = (
        module(x, x, x, key_padding_mask=p, long_context_retrieval=retrieved, **options)[0] for p in (padding, None)
    )
    assert torch.equal(with_padding, without)


def test_scores_before_the_softmax() -> None:
    module, x = layer(24, 3, add_zero_attn=True), torch.randn(5, 2, 24)
    options: dict[str, Any] = {"need_weights": False, "attn_mask": causal(5), "position_encoding": alibi(2, 3, 6)}
    scores, values = module(x, x, x, before_softmax=True, **options)
    assert scores.shape == (6, 5, 6) and values.shape == (6, 6, 8)
    assert not values[:, -1].any() and not torch.isinf(scores[:, 0, -1]).any() and torch.isinf(scores[:, 0, 1]).all()
    out = module(x, x, x, **options)[0]
    attended = (scores.softmax(-1) @ values).unflatten(0, (2, 3)).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(out, module.out_proj(attended), **CLOSE)


def test_half_precision_positions_do_not_cost_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision training rounds ALiBi to the model's dtype; the kernel uses what was meant."""
    module, x, fused = layer(24, 3).bfloat16(), torch.randn(300, 1, 24).bfloat16(), Fused(monkeypatch)
    module(x, x, x, need_weights=False, attn_mask=causal(300), position_encoding=alibi(1, 3, 300).bfloat16())
    assert len(fused.banks) == 1
    module(x, x, x, need_weights=False, attn_mask=causal(300), position_encoding=alibi(1, 3, 300).bfloat16() * 1.1)
    assert len(fused.banks) == 1


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 16, "vdim": 20}])
def test_parameters_have_the_published_names_and_shapes(options: dict[str, Any]) -> None:
    module = JointMultiheadAttentionWeightedSum(24, 3, **options)
    kdim, vdim = options.get("kdim", 24), options.get("vdim", 24)
    wanted: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (24, 24),
        "k_proj.weight": (24, kdim),
        "v_proj.weight": (24, vdim),
    }
    wanted |= {"out_proj.weight": (24, 24), "memory_bias": (3,)}
    if options.get("bias", True):
        wanted |= {f"{name}_proj.bias": (24,) for name in ("q", "k", "v", "out")}
    if "add_bias_kv" in options:
        wanted |= {"bias_k": (1, 1, 24), "bias_v": (1, 1, 24)}
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == wanted
    again = JointMultiheadAttentionWeightedSum(24, 3, **options)
    again.load_state_dict(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert not module.memory_bias.any()


def test_old_checkpoints_with_a_joint_projection_are_upgraded() -> None:
    module = layer(24, 3, bias=True)
    state = {f"layers.1.self_attn.{name}": t for name, t in module.state_dict().items()}
    for kind in ("weight", "bias"):
        parts = [state.pop(f"layers.1.self_attn.{part}_proj.{kind}") for part in "qkv"]
        state[f"layers.1.self_attn.in_proj_{kind}"] = torch.cat(parts)
    module.upgrade_state_dict_named(state, "layers.1.self_attn")
    again = copy.deepcopy(module)
    again.load_state_dict({name.removeprefix("layers.1.self_attn."): t for name, t in state.items()})
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_incremental_buffers_work_as_in_fairseq() -> None:
    module, state = layer(24, 3), IncrementalState()
    assert module._get_input_buffer(None) == {} and module._get_input_buffer(state) == {}
    module._set_input_buffer(state, {"prev_key": torch.arange(3.0)[:, None], "prev_value": None})
    module.reorder_incremental_state(state, torch.tensor([2, 0]))
    buffer = module._get_input_buffer(state)
    assert buffer["prev_key"] is not None and buffer["prev_key"].flatten().tolist() == [2.0, 0.0]
    assert layer(24, 3)._get_input_buffer(state) == {}


def test_what_the_published_layer_cannot_do_is_refused_in_words() -> None:
    module, x = layer(24, 3), torch.randn(5, 2, 24)
    for arguments, options, message in (
        ((x, x, x), {}, "pass need_weights=False"),
        ((x, None, x), {"need_weights": False}, r"must be \[T, B, 24\]"),
        ((x, x[:, :1], x), {"need_weights": False}, r"must be \[T, B, 24\]"),
        ((x, x, x), {"need_weights": False, "incremental_state": {}}, "does not decode incrementally"),
        (
            (x, x, x),
            {"need_weights": False, "key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)},
            r"key_padding_mask must be \[B, S\] = \(2, 5\), got \(2, 4\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            module(*arguments, **options)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"num_heads": 3, "q_noise": 0.1}, "q_noise=0.1"),
        ({"num_heads": 3, "self_attention": True, "kdim": 8}, "needs kdim and vdim to be 24"),
    )
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            JointMultiheadAttentionWeightedSum(24, **options)


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("scheme", ["other positions", "ALiBi"])
def test_dropout_leaves_the_average_and_follows_the_mode(scheme: str, with_memory: bool) -> None:
    module, x, memory = layer(24, 3, dropout=0.3), torch.randn(5, 2, 24), small_memory()
    positions = alibi(2, 3, 5) if scheme == "ALiBi" else torch.randn(2, 3, 1, 5)
    options: dict[str, Any] = {"need_weights": False, "attn_mask": causal(5), "position_encoding": positions}
    if with_memory:
        memory.add_index({"k": torch.randn(2, 12, 24), "v": torch.randn(2, 12, 24)})
        options["long_context_retrieval"] = memory.retrieve(module.q_proj(x))["tgt_index"]
    out = module.eval()(x, x, x, **options)[0]
    torch.testing.assert_close(module(x, x, x, **options)[0], out)
    module.train()
    drawn = torch.stack([module(x, x, x, **options)[0] for _ in range(400)])
    assert drawn.std(0).min() > 0
    assert (drawn.mean(0) - out).abs().max() < 5 * drawn.std(0).max() / 20
    module.eval().dropout_module.apply_during_inference = True
    assert not torch.equal(module(x, x, x, **options)[0], out)


class SideNetLayer(nn.Module):
    """A memory layer around whichever attention and memory it is given, as the published code wires it."""

    def __init__(self, attention: Any, width: int) -> None:
        super().__init__()
        self.self_attn, self.ln_1 = attention, nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor, external_memory: Any) -> Tensor:
        y = self.ln_1(x)
        retrieved = None
        if external_memory.dstore_idx != 0:
            retrieved = external_memory.retrieve(self.self_attn.q_proj(y))["tgt_index"]
        attended, _ = self.self_attn(
            query=y,
            key=y,
            value=y,
            need_weights=False,
            attn_mask=mask,
            position_encoding=positions,
            long_context_retrieval=retrieved,
        )
        return self.fc2(torch.relu(self.fc1(y))) + attended + x


class PlainAttention(nn.Module):
    """What reads "tgt_index" as the published layer does: as two tensors, moved and cast."""

    def __init__(self, of: JointMultiheadAttentionWeightedSum) -> None:
        super().__init__()
        self.of, self.q_proj = of, of.q_proj

    def forward(self, *, query: Tensor, attn_mask: Tensor, position_encoding: Tensor, **options: Any) -> Any:
        retrieved = options["long_context_retrieval"]
        if retrieved is not None:
            retrieved = {name: retrieved[name].to(query.device).type(query.dtype) for name in ("k", "v")}
        return explicit(self.of, query, position_encoding + attn_mask, retrieved), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_training_with_both_classes_and_with_the_memory_alone_agree(dtype: torch.dtype) -> None:
    """Three optimiser steps, memory carried along: ours together against ours beside another reader."""
    config = fairseq_settings(heads=3, width=24, memory_size=96, k=8, chunk=4)
    ours = SideNetLayer(layer(24, 3), 24)
    other = copy.deepcopy(ours)
    attention = other.self_attn
    assert isinstance(attention, JointMultiheadAttentionWeightedSum)
    other.self_attn = PlainAttention(attention)
    models = [ours, other]
    memories = [External_Memory(config, dtype=dtype) for _ in models]
    optimisers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    for _ in range(6):
        x, key, value = torch.randn(12, 2, 24), torch.randn(2, 12, 24), torch.randn(2, 12, 24)
        outputs = []
        for model, memory, optimiser in zip(models, memories, optimisers, strict=True):
            out = model(x, causal(12), alibi(2, 3, 12), memory)
            memory.add_index({"k": key, "v": value})
            optimiser.zero_grad()
            out.square().mean().backward()
            optimiser.step()
            outputs.append(out)
        torch.testing.assert_close(*outputs, **CLOSE)
    for mine, theirs in zip(ours.self_attn.parameters(), attention.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_neither_fairseq_nor_faiss_nor_the_model_layer_is_imported() -> None:
    code = (
        "import sys, longmem_kernels.fairseq\n"
        "assert not {'fairseq', 'faiss', 'longmem', 'numpy.testing'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
