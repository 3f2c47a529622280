"""Fusion: local and memory attention, forward, and forward with backward. See conftest.py for how to run it."""

from __future__ import annotations

from collections.abc import Callable

from longmem.bench import Provider, Shape

OPS = ("memory_attention", "memory_attention_backward")


def test_memory_attention(
    run_benchmark: Callable[[str, Shape, Provider], None], op: str, shape: Shape, provider: Provider
) -> None:
    run_benchmark(op, shape, provider)
