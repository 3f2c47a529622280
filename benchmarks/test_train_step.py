"""A whole training step of a LongMem model, beside one without memory. See conftest.py for how to run it."""

from __future__ import annotations

from collections.abc import Callable

from longmem.bench import Provider, Shape

OPS = ("train_step",)


def test_train_step(
    run_benchmark: Callable[[str, Shape, Provider], None], op: str, shape: Shape, provider: Provider
) -> None:
    run_benchmark(op, shape, provider)
