"""Retrieval: exact top-K chunks for every query. See conftest.py for how to run it."""

from __future__ import annotations

from collections.abc import Callable

from longmem.bench import Provider, Shape

OPS = ("chunk_topk",)


def test_chunk_topk(
    run_benchmark: Callable[[str, Shape, Provider], None], op: str, shape: Shape, provider: Provider
) -> None:
    run_benchmark(op, shape, provider)
