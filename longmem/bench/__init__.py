"""Side-by-side measurements of the operations and of what is built from them, each behind a correctness gate.

rows = measure("chunk_topk", shapes.RETRIEVAL_CPU)
print(table(rows))
plot(rows, "retrieval.png")
"""

from .gate import GateError
from .measure import Row, Unavailable, measure
from .plots import plot, plot_sweeps
from .providers import OPS, Provider, providers
from .report import table
from .shapes import Shape

__all__ = [
    "OPS",
    "GateError",
    "Provider",
    "Row",
    "Shape",
    "Unavailable",
    "measure",
    "plot",
    "plot_sweeps",
    "providers",
    "table",
]
