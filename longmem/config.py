"""Configuration of a LongMem: everything that defines it beside its backbone."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

# Each choice is written once, here: checks, messages and the command line's help take it from these types.
SideNetKind = Literal["none", "exact", "paper"]
Trainable = Literal["read", "all"]
Fusion = Literal["joint", "gated"]
Scope = Literal["row", "shared"]
Precision = Literal["auto", "float32", "bfloat16"]
SpecialTokens = Literal["auto", "none"]

# What `LongMemConfig` takes, by field.
CHOICES: dict[str, tuple[str, ...]] = {
    "sidenet": get_args(SideNetKind),
    "trainable": get_args(Trainable),
    "fusion": get_args(Fusion),
    "scope": get_args(Scope),
    "special_tokens": get_args(SpecialTokens),
}
PRECISIONS: tuple[str, ...] = get_args(Precision)


@dataclass(frozen=True)
class LongMemConfig:
    """Architecture and memory of a LongMem; saved with it.

    Attributes:
        memory_layers: the backbone layers whose keys and values are stored, 0-based, ascending. Which ones serve best
            is a property of the backbone (docs/decisions.md).
        sidenet: "none": memory is read inside the frozen backbone's own memory layers. "exact": a SideNet whose layers
            copy backbone layers f*i and whose residuals carry what the skipped layers added, so that before training
            the output is the backbone's. "paper": the published start, layers f*i + f - 1 and residuals
            `H[f*i+f] - H[f*i]` (LongMem, section 2.2).
        reduction: f, backbone layers per SideNet layer.
        trainable: "read": the memory layers' own query and output projections, gate and temperature. "all": the SideNet
            too.
        fusion: "joint" or "gated", see `memory_attention`.
        gate_start: initial gate logit per head, for "gated".
        chunk_size: C, tokens per chunk, 1 to 64.
        chunks_per_query: K, chunks retrieved per token and head, 1 to 64.
        memory_tokens: capacity of a row's memory, a multiple of `chunk_size`.
        segment: T, tokens encoded at once; also the local context.
        scope: "row" or "shared", see `MemoryBank`.
        special_tokens: "auto": texts begin with the special tokens that the backbone's tokenizer puts there. "none":
            without.

    Raises:
        ValueError: naming every field whose value is of another type or out of range, what was wanted and what came.
    """

    memory_layers: tuple[int, ...]
    sidenet: SideNetKind = "none"
    reduction: int = 2
    trainable: Trainable = "read"
    fusion: Fusion = "joint"
    gate_start: float = 0.0
    chunk_size: int = 4
    chunks_per_query: int = 16
    memory_tokens: int = 16_384
    segment: int = 256
    scope: Scope = "row"
    special_tokens: SpecialTokens = "auto"

    def __post_init__(self) -> None:
        wrong = [*self._wrong_layers(), *self._wrong_choices(), *self._wrong_numbers()]
        if wrong:
            raise ValueError("LongMemConfig: " + "; ".join(wrong))
        # As JSON gives it back, whatever kind of integers came.
        plain: dict[str, Any] = {"memory_layers": tuple(int(layer) for layer in self.memory_layers)}
        plain |= {"gate_start": float(self.gate_start)} | {name: int(getattr(self, name)) for name in _most()}
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def _wrong_layers(self) -> list[str]:
        layers: Any = self.memory_layers
        if not isinstance(layers, (tuple, list, range)) or not all(_is_integer(layer) for layer in layers):
            example = f", as in ({layers},)" if _is_integer(layers) else ""
            return [f"memory_layers must be a tuple of integers{example}, got {layers!r}"]
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            return [f"memory_layers must be at least one layer, from 0 up, ascending, got {tuple(layers)}"]
        return []

    def _wrong_choices(self) -> list[str]:
        return [
            f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
            for name, allowed in CHOICES.items()
            if getattr(self, name) not in allowed
        ]

    def _wrong_numbers(self) -> list[str]:
        wrong = []
        for name, most in _most().items():
            value = getattr(self, name)
            if not _is_integer(value) or value < 1 or (most is not None and value > most):
                wanted = "at least 1" if most is None else f"from 1 to {most}"
                wrong.append(f"{name} must be an integer, {wanted}, got {value!r}")
        # Kernels count chunks in 32 bits.
        if not wrong and (self.memory_tokens % self.chunk_size or self.memory_tokens // self.chunk_size >= 2**31):
            wrong.append(
                f"memory_tokens must be a multiple of chunk_size = {self.chunk_size}, of less than 2^31 chunks, got"
                f" {self.memory_tokens}"
            )
        gate: Any = self.gate_start
        if not isinstance(gate, numbers.Real) or isinstance(gate, bool) or not math.isfinite(gate):
            wrong.append(f"gate_start must be a finite number, got {gate!r}")
        return wrong

    def check(self, layers: int, max_segment: int | None = None) -> None:
        """Raises ValueError when it does not fit a backbone of `layers` layers, whose positions reach `max_segment`."""
        wrong = []
        if self.memory_layers[-1] >= layers:
            wrong.append(
                f"memory_layers must be at least one layer in [0, {layers}), ascending, got {self.memory_layers}"
            )
        if self.sidenet != "none" and self.reduction > layers:
            wrong.append(f"reduction must lie in [1, {layers}], got {self.reduction}")
        elif self.sidenet != "none":
            places = [layer // self.reduction for layer in self.memory_layers]
            if places[-1] >= layers // self.reduction:
                wrong.append(f"memory layer {self.memory_layers[-1]} lies above the last SideNet layer")
            if len(set(places)) < len(places):
                wrong.append(
                    f"memory_layers {self.memory_layers} must fall into different SideNet layers (reduction ="
                    f" {self.reduction}); default_memory_layers(backbone, {self.sidenet!r}, {self.reduction}) do"
                )
        if self.sidenet == "none" and self.trainable == "all":
            wrong.append('trainable="all" needs a SideNet: without one there is nothing but the read')
        if max_segment is not None and self.segment > max_segment:
            wrong.append(f"segment must be at most {max_segment}, the backbone's positions, got {self.segment}")
        if wrong:
            raise ValueError("LongMemConfig: " + "; ".join(wrong))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory_layers": list(self.memory_layers)}  # JSON has lists

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LongMemConfig:
        """Raises ValueError naming fields that are missing, unknown here, of another type or out of range."""
        from .files import check_fields  # here: the command line's help answers without PyTorch

        wanted = dict.fromkeys(cls.__dataclass_fields__, Any)
        checked = check_fields("LongMemConfig", values, wanted, optional=wanted.keys() - {"memory_layers"})
        return cls(**({"special_tokens": "none"} | checked))  # saved without it: trained before there were any


def sidenet_source(sidenet: str, reduction: int, place: int) -> int:
    """The backbone layer that layer `place` of a SideNet copies."""
    return reduction * place + (0 if sidenet == "exact" else reduction - 1)


def _most() -> dict[str, int | None]:
    """The integers of `LongMemConfig`, and the most that a kernel takes of each; the least is 1."""
    # Here: the command line's help answers without PyTorch.
    from longmem_kernels.chunk_topk.api import MAX_K
    from longmem_kernels.ring import MAX_CHUNK_SIZE

    limits: dict[str, int | None] = {"chunk_size": MAX_CHUNK_SIZE, "chunks_per_query": MAX_K}
    return dict.fromkeys(("reduction", "segment", "memory_tokens")) | limits


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
