"""Side-by-side measurements of the operations and of what is built from them: every provider passes a correctness gate before it is timed.

rows = measure("chunk_topk", shapes.RETRIEVAL_CPU)
print(table(rows))
plot(rows, "retrieval.png")
"""

from .gate import GateError
from .measure import Row, Unavailable, measure
from .providers import OPS, Provider, providers
from .report import plot, table
from .shapes import Shape

__all__ = ["OPS", "GateError", "Provider", "Row", "Shape", "Unavailable", "measure", "plot", "providers", "table"]
