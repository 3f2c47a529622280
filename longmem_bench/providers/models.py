"""Generation and a training step of a whole LongMem model, beside what its backbone does alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from longmem.memory import MemoryBank
from longmem.model import LongMem

from ..models import ModelInputs, filled_cache, rewind, why_too_large
from ..provider import Prepared, Provider
from ..shapes import Shape

WITH_MEMORY, WITHOUT_MEMORY = "longmem, memory", "longmem, no memory"
FORWARD, LOCAL_BACKBONE = "backbone forward, no gradient", "transformers, cached greedy loop"
FULL_ATTENTION = "transformers, full attention, static cache"


def providers(op: str) -> list[Provider]:
    """The bounds first: checking them takes the least, and a first row should come soon."""
    if op == "generate":
        return [
            Provider(LOCAL_BACKBONE, _generate_transformers, why_too_large, computes="backbone"),
            Provider(FULL_ATTENTION, _generate_over_everything, _why_no_full, computes="full"),
            Provider(WITHOUT_MEMORY, _generate_without, why_too_large, computes="backbone", ours=True),
            Provider(WITH_MEMORY, _generate_with_memory, why_too_large, ours=True),
        ]
    return [
        Provider(FORWARD, _forward_only, why_too_large, computes="backbone"),
        Provider(WITHOUT_MEMORY, _train_without, why_too_large, computes="backbone", ours=True),
        Provider(WITH_MEMORY, _train_with_memory, why_too_large, ours=True),
    ]


def _why_no_full(shape: Shape, device: torch.device) -> str | None:
    if shape.model in ("tiny", "smollm2"):
        return "asked of the models of today's sizes: --model llama-8b, llama-1b or llama-tiny"
    return why_too_large(shape, device)


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


def _generate_over_everything(inputs: ModelInputs) -> Prepared:
    """Attention of every layer to as many tokens as the memory holds: SDPA over a static cache."""
    shape = inputs.shape
    held, room = shape.M * shape.C, shape.S + shape.T
    cache = filled_cache(inputs, room)

    @torch.no_grad()
    def run() -> Tensor:
        rewind(cache, held)
        tokens, chosen = inputs.tokens, []
        for _ in range(shape.T):
            logits = inputs.network(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(tokens)
        return torch.cat(chosen, 1)

    return replace(_per_token(inputs, run), note=f"per token; every layer attends to {held:,} tokens before the prompt")


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
