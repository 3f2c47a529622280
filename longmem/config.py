"""What defines a LongMem beside its backbone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

# Each choice is written once, here: checks, messages and the command line's help take it from these types.
SideNetKind = Literal["none", "exact", "paper"]
Trainable = Literal["read", "all"]
Fusion = Literal["joint", "gated"]
Scope = Literal["row", "shared"]
Precision = Literal["auto", "float32", "bfloat16"]
SpecialTokens = Literal["auto", "none"]

SIDENETS: tuple[str, ...] = get_args(SideNetKind)
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
        chunk_size: C, tokens per chunk.
        chunks_per_query: K, chunks retrieved per token and head.
        memory_tokens: capacity of a row's memory.
        segment: T, tokens encoded at once; also the local context.
        scope: "row" or "shared", see `MemoryBank`.
        special_tokens: "auto": texts begin with the special tokens that the backbone's tokenizer puts there. "none":
            without.
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
        object.__setattr__(self, "memory_layers", tuple(self.memory_layers))  # JSON has lists

    def check(self, layers: int, max_segment: int | None = None) -> None:
        """Raises ValueError when a value is out of range for a backbone of `layers` layers, whose positions reach
        `max_segment`."""
        wrong = []
        ascending = list(self.memory_layers) == sorted(set(self.memory_layers))
        if not self.memory_layers or not ascending or self.memory_layers[0] < 0 or self.memory_layers[-1] >= layers:
            wrong.append(
                f"memory_layers must be at least one layer in [0, {layers}), ascending, got {self.memory_layers}"
            )
        if self.sidenet not in SIDENETS:
            wrong.append(f"sidenet must be one of {', '.join(SIDENETS)}, got {self.sidenet!r}")
        if self.sidenet != "none" and not 1 <= self.reduction <= layers:
            wrong.append(f"reduction must lie in [1, {layers}], got {self.reduction}")
        elif self.sidenet != "none" and self.memory_layers:
            places = [layer // self.reduction for layer in self.memory_layers]
            if places[-1] >= layers // self.reduction:
                wrong.append(f"memory layer {self.memory_layers[-1]} lies above the last SideNet layer")
            if len(set(places)) < len(places):
                wrong.append(
                    f"memory_layers {self.memory_layers} must fall into different SideNet layers (f = {self.reduction})"
                )
        if self.trainable not in ("read", "all"):
            wrong.append(f"trainable must be read or all, got {self.trainable!r}")
        if self.sidenet == "none" and self.trainable == "all":
            wrong.append('trainable="all" needs a SideNet: without one there is nothing but the read')
        if self.fusion not in ("joint", "gated"):
            wrong.append(f"fusion must be joint or gated, got {self.fusion!r}")
        if self.special_tokens not in ("auto", "none"):
            wrong.append(f"special_tokens must be auto or none, got {self.special_tokens!r}")
        for name in ("chunk_size", "chunks_per_query", "segment"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if max_segment is not None and self.segment > max_segment:
            wrong.append(f"segment must be at most {max_segment}, the backbone's positions, got {self.segment}")
        if self.chunk_size >= 1 and (self.memory_tokens < 1 or self.memory_tokens % self.chunk_size):
            wrong.append(f"memory_tokens must be a positive multiple of chunk_size, got {self.memory_tokens}")
        if wrong:
            raise ValueError("LongMemConfig: " + "; ".join(wrong))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory_layers": list(self.memory_layers)}  # as JSON gives it back

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LongMemConfig:
        """Raises ValueError naming fields that are missing, unknown or of another type."""
        from .files import check_fields, fields_of  # here: the command line's help answers without PyTorch

        wanted, optional = fields_of(cls)
        checked = check_fields("LongMemConfig", values, wanted, optional=optional)
        return cls(**({"special_tokens": "none"} | checked))  # saved without it: trained before there were any
