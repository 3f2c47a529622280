"""Side-by-side measurements of the operations and of what is built from them, each behind a correctness check.

rows = measure("chunk_topk", shapes_for("chunk_topk", paper=False)[0])
print(table(rows))
plot(rows, "retrieval.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .case import measure
    from .plots import plot, plot_sweeps
    from .provider import OPS, Provider, Unavailable, WrongResult
    from .report import table
    from .row import Row
    from .shapes import Shape, shapes_for

# Loaded when first asked for: `longmem-bench --help` answers without PyTorch.
_MODULES = {
    "OPS": "provider",
    "Provider": "provider",
    "Row": "row",
    "Shape": "shapes",
    "Unavailable": "provider",
    "WrongResult": "provider",
    "measure": "case",
    "plot": "plots",
    "plot_sweeps": "plots",
    "shapes_for": "shapes",
    "table": "report",
}

__all__ = [
    "OPS",
    "Provider",
    "Row",
    "Shape",
    "Unavailable",
    "WrongResult",
    "measure",
    "plot",
    "plot_sweeps",
    "shapes_for",
    "table",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
