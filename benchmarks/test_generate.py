"""Generation with a memory, per token, beside the backbone's own. See conftest.py for how to run it."""

from __future__ import annotations

from collections.abc import Callable

from longmem.bench import Provider, Shape

OPS = ("generate",)


def test_generate(
    run_benchmark: Callable[[str, Shape, Provider], None], op: str, shape: Shape, provider: Provider
) -> None:
    run_benchmark(op, shape, provider)
