"""Generation and a training step of a whole LongMem model, beside what its backbone does alone.

The backbone is a random Llama as wide as the shape says, or SmolLM2-135M with its weights: speed does not depend on
what a model has learnt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longmem.backbones.huggingface import huggingface_backbone
from longmem.backbones.load import default_memory_layers
from longmem.config import LongMemConfig
from longmem.memory import MemoryBank
from longmem.model import LongMem
from longmem.precision import autocast

from ..provider import Prepared, Provider, WrongResult
from ..roofline import Work
from ..shapes import MODELS, Shape

_LAYERS, _VOCABULARY = 8, 8192
_SAMPLED, _WRITTEN = 256, 4096  # tokens: of the text that says how keys are spread; written to memory at once
# Logits of two right computations may differ by this share of the largest.
_LOGIT_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
_LOSS_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass
class ModelInputs:
    """A model, the tokens it continues or learns from, and what its memory is filled with."""

    op: str
    shape: Shape
    network: Any  # the transformers model whose modules `model` uses
    model: LongMem
    tokens: Tensor  # generate: the prompt [B, S]; train_step: [B, T + 1]
    past: Tensor  # [B, up to 256]: keys and values of memory are spread as those of this text

    def memory(self, model: LongMem | None = None) -> MemoryBank:
        """A full memory, the same for every model: keys and values drawn channel by channel with the mean and spread
        that `past` has. To encode a text that fills it would take most of the time of a measurement."""
        bank = (model or self.model).new_memory(rows=self.shape.B)
        dtype, device = bank.ring.store.dtype, bank.ring.store.device
        generator = torch.Generator(device).manual_seed(3)
        held = self.shape.M * self.shape.C
        for begin in range(0, held, _WRITTEN):
            size = (self.shape.B, bank.ring.kv_heads, min(_WRITTEN, held - begin), self.shape.D)
            key, value = (
                (mean + std * torch.randn(size, generator=generator, device=device)).to(dtype)
                for mean, std in self._spread
            )
            bank.write(key, value)
        return bank

    @cached_property
    def _spread(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Mean and standard deviation over tokens, float32 [B, L * G, 1, D], of keys and of values."""
        with torch.no_grad():
            states = self.model.backbone.encode(self.past, self.model.config.memory_layers, ())
        return tuple(
            (part.float().mean(2, keepdim=True), part.float().std(2, keepdim=True))
            for part in (states.key, states.value)
        )  # type: ignore[return-value]  # two of them

    def precision(self) -> AbstractContextManager[object]:
        """Precision of a training step's matrix products."""
        return autocast(self.shape.dtype_name, self.tokens.device)

    def work(self) -> Work | None:
        """Generation reads every weight once per token; caches and memory are not counted. None for training."""
        if self.op != "generate":
            return None
        weights = sum(parameter.numel() for parameter in self.network.parameters())
        # A table of embeddings is read by row, unless it also is the head.
        if not self.network.config.tie_word_embeddings:
            weights -= self.network.get_input_embeddings().weight.numel()
        return Work(weights * self.shape.dtype.itemsize, 2 * self.shape.B * weights)


def draw(op: str, shape: Shape, device: torch.device, seed: int = 0) -> ModelInputs:
    """Raises ValueError for a model that is not one of `MODELS`."""
    torch.manual_seed(seed)
    # As in use: training keeps float32 weights and multiplies in shape.dtype, generation keeps weights in shape.dtype.
    dtype = shape.dtype if op == "generate" else torch.float32
    network = _network(shape).to(device=device, dtype=dtype).eval()
    backbone = huggingface_backbone(network, shape.model)
    config = LongMemConfig(
        memory_layers=default_memory_layers(backbone),
        chunk_size=shape.C,
        chunks_per_query=shape.K,
        memory_tokens=shape.M * shape.C,
        # A segment that is full in mid-run: its write is part of what a token costs.
        segment=shape.S + shape.T // 2 if op == "generate" else shape.T,
    )
    length = shape.S if op == "generate" else shape.T + 1

    def words(count: int) -> Tensor:
        return torch.randint(network.config.vocab_size, (shape.B, count)).to(device)

    model = LongMem(backbone, config).to(dtype)
    return ModelInputs(op, shape, network, model, words(length), words(min(_SAMPLED, shape.M * shape.C)))


def _network(shape: Shape) -> Any:
    if shape.model == "smollm2":
        from longmem.backbones.smollm2 import load_smollm2

        return load_smollm2()[0]
    if shape.model != "tiny":
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {shape.model!r}")
    from transformers import LlamaConfig, LlamaForCausalLM

    width = shape.H * shape.D
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=_LAYERS,
            num_attention_heads=shape.H,
            num_key_value_heads=shape.G,
            tie_word_embeddings=True,
        )
    )


def providers(op: str) -> list[Provider]:
    """The bounds first: checking them takes the least, and a first row should come soon."""
    if op == "generate":
        return [
            Provider("transformers, cached greedy loop", _generate_transformers, computes="backbone"),
            Provider("longmem, no memory", _generate_without, computes="backbone", ours=True),
            Provider("longmem, memory", _generate_with_memory, ours=True),
        ]
    return [
        Provider("backbone forward, no gradient", _forward_only, computes="backbone"),
        Provider("longmem, no memory", _train_without, computes="backbone", ours=True),
        Provider("longmem, memory", _train_with_memory, ours=True),
    ]


# generate: a run is T tokens; the prompt is short, and read in every run


def _generate_with_memory(inputs: ModelInputs) -> Prepared:
    return _generation(inputs, inputs.model, inputs.memory())


def _generate_without(inputs: ModelInputs) -> Prepared:
    # One segment, as long as the backbone's own context.
    config = replace(inputs.model.config, segment=inputs.shape.S + inputs.shape.T)
    return _generation(inputs, LongMem(inputs.model.backbone, config).to(inputs.shape.dtype), None)


def _generation(inputs: ModelInputs, model: LongMem, memory: MemoryBank | None) -> Prepared:
    def run() -> Tensor:
        return torch.stack(list(model.generate(inputs.tokens, memory, max_new_tokens=inputs.shape.T)), 1)

    return _per_token(inputs, run)


def _per_token(inputs: ModelInputs, run: Callable[[], Tensor]) -> Prepared:
    note = f"per token; a prompt of {inputs.shape.S} tokens is read before {inputs.shape.T} are generated"
    return Prepared(run, lambda tokens: (tokens,), repeat=inputs.shape.T, note=note)


def _generate_transformers(inputs: ModelInputs) -> Prepared:
    from transformers import DynamicCache

    @torch.no_grad()
    def run() -> Tensor:
        cache, tokens, chosen = DynamicCache(), inputs.tokens, []
        for _ in range(inputs.shape.T):
            logits = inputs.network(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(tokens)
        return torch.cat(chosen, 1)

    return _per_token(inputs, run)


# train_step: forward, backward, clip, optimiser, and the write that the next step's memory needs


def _train_with_memory(inputs: ModelInputs) -> Prepared:
    return _training(inputs, inputs.memory())


def _train_without(inputs: ModelInputs) -> Prepared:
    return _training(inputs, None)


def _training(inputs: ModelInputs, memory: MemoryBank | None) -> Prepared:
    # Weights change in every step: a copy of what is trained, beside the one frozen backbone.
    model = LongMem(inputs.model.backbone, inputs.model.config)
    model.sidenet.load_state_dict(inputs.model.sidenet.state_dict())
    parameters = list(model.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    tokens, targets = inputs.tokens[:, :-1], inputs.tokens[:, 1:]

    def run() -> Tensor:
        with inputs.precision():
            loss = model(tokens, memory, targets=targets).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    return Prepared(run, lambda loss: (loss,), note=f"{sum(p.numel() for p in parameters):,} parameters are trained")


def _forward_only(inputs: ModelInputs) -> Prepared:
    tokens, targets = inputs.tokens[:, :-1], inputs.tokens[:, 1:]

    @torch.no_grad()
    def run() -> Tensor:
        with inputs.precision():
            logits = inputs.network(input_ids=tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return Prepared(run, lambda loss: (loss,))


class ModelVerifier:
    """Generated tokens must be the best, to rounding, of the full forward pass over their segments; a training loss
    must be that of the same model in float64. A memory in float64 may find another chunk where two score alike: the
    loss hardly moves."""

    def __init__(self, inputs: ModelInputs) -> None:
        self.inputs = inputs
        self._losses: dict[str, float] = {}

    def check(self, name: str, result: tuple[Tensor, ...], computes: str = "op", repeat: int = 1) -> None:
        """Raises WrongResult, naming the provider, unless `result` is right."""
        detail = self._wrong_tokens(result[0], computes) if self.inputs.op == "generate" else None
        if self.inputs.op == "train_step":
            detail = self._wrong_loss(float(result[0]), computes)
        if detail is not None:
            op = self.inputs.op
            raise WrongResult(detail, f"{op}: {name!r} failed the correctness check and is not timed: {detail}")

    @torch.no_grad()
    def _wrong_tokens(self, chosen: Tensor, computes: str) -> str | None:
        inputs, shape = self.inputs, self.inputs.shape
        if chosen.shape != (shape.B, shape.T):
            return f"wanted tokens of shape {(shape.B, shape.T)}, got {tuple(chosen.shape)}"
        text = torch.cat([inputs.tokens, chosen], 1)[:, :-1]
        if computes == "op":
            memory = inputs.memory()
            segments = text.split(inputs.model.config.segment, 1)
            logits = torch.cat([inputs.model(segment, memory).logits for segment in segments], 1)
        else:
            logits = inputs.network(input_ids=text, use_cache=False).logits
        logits = logits[:, shape.S - 1 :].float()
        short = logits.amax(-1) - logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        if not bool((short <= _LOGIT_ROUNDING[shape.dtype] * logits.abs().amax()).all()):
            return f"a token was chosen whose logit is {short.max():.3g} below the best of the full forward pass"
        return None

    def _wrong_loss(self, loss: float, computes: str) -> str | None:
        if computes not in self._losses:
            self._losses[computes] = self._exact_loss(computes)
        wanted, allowed = self._losses[computes], _LOSS_ROUNDING[self.inputs.shape.dtype]
        if not abs(loss - wanted) <= allowed * wanted:
            return f"loss must be {wanted:.6g} within {allowed:.0e}, got {loss:.6g}"
        return None

    @torch.no_grad()
    def _exact_loss(self, computes: str) -> float:
        inputs = self.inputs
        network = copy.deepcopy(inputs.network).double()
        model = LongMem(huggingface_backbone(network, inputs.shape.model), inputs.model.config)
        model.sidenet.load_state_dict(inputs.model.sidenet.state_dict())
        model.double()
        memory = inputs.memory(model) if computes == "op" else None
        loss = model(inputs.tokens[:, :-1], memory, targets=inputs.tokens[:, 1:]).loss
        return float(loss)
