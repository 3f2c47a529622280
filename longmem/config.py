"""What defines a LongMem beside its backbone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from longmem_kernels._checks import check_integer, check_number, check_truth

from .files import check_fields, fields_of

SIDENETS = ("none", "exact", "paper")


def check_types(config: Any) -> None:
    """Raises TypeError where a number, truth value or text of a configuration is none, ValueError where not finite."""
    op = type(config).__name__
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int":
            check_integer(op, field.name, value)
        elif field.type == "float":
            check_number(op, field.name, value)
        elif field.type == "bool":
            check_truth(op, field.name, value)
        elif field.type == "str" and not isinstance(value, str):
            raise TypeError(f"{op}: {field.name} must be a text, got {value!r}")


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
    """

    memory_layers: tuple[int, ...]
    sidenet: str = "none"
    reduction: int = 2
    trainable: str = "read"
    fusion: str = "joint"
    gate_start: float = 0.0
    chunk_size: int = 4
    chunks_per_query: int = 16
    memory_tokens: int = 16_384
    segment: int = 256
    scope: str = "row"

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory_layers", tuple(self.memory_layers))  # JSON has lists
        check_types(self)

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
        wanted, optional = fields_of(cls)
        return cls(**check_fields("LongMemConfig", values, wanted, optional=optional))
