"""Verification of whole models: generated tokens against the full forward pass, a loss against wider numbers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from longmem.backbones.huggingface import huggingface_backbone
from longmem.model import LongMem

from .models import ModelInputs, architecture, filled_cache
from .peak_memory import free_bytes
from .provider import WrongResult

# Logits of two right computations may differ by this share of the largest.
_LOGIT_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
_LOSS_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class ModelVerifier:
    """Generated tokens must be the best, to rounding, of the full forward pass over their segments; a training loss
    must be that of the same model in float64, or in float32 where twice that does not fit. A memory in wider numbers
    may find another chunk where two score alike: the loss hardly moves."""

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
        elif computes == "full":
            cache = filled_cache(inputs, text.shape[1])
            logits = inputs.network(input_ids=text, past_key_values=cache, use_cache=True).logits
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
        free = free_bytes(inputs.tokens.device)
        fits = free is None or 16 * architecture(inputs.shape).weights < free
        exact = torch.float64 if fits else torch.float32
        network = copy.deepcopy(inputs.network).to(exact)
        model = LongMem(huggingface_backbone(network, inputs.shape.model), inputs.model.config)
        model.sidenet.load_state_dict(inputs.model.sidenet.state_dict())
        model.to(exact)
        memory = inputs.memory(model) if computes == "op" else None
        loss = model(inputs.tokens[:, :-1], memory, targets=inputs.tokens[:, 1:]).loss
        return float(loss)
