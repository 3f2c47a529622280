"""A whole memory layer: search, attention to what was found, and the write. See conftest.py for how to run it."""

from __future__ import annotations

from collections.abc import Callable

from longmem.bench import Provider, Shape

OPS = ("memory_layer",)


def test_memory_layer(
    run_benchmark: Callable[[str, Shape, Provider], None], op: str, shape: Shape, provider: Provider
) -> None:
    run_benchmark(op, shape, provider)
