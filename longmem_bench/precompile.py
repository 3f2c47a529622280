"""Compile the Triton kernels of operations beforehand, in parallel, into Triton's cache.

Launches go through Triton's own path up to the point where a GPU would be needed, so that what is compiled here is what
a later process finds in the cache. The GPU need not be there: any architecture can be compiled for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch

from longmem_kernels import _dispatch, _tiles

from .case import first_line
from .inputs import LayerInputs, blank
from .provider import Provider
from .providers import providers
from .shapes import Shape

TRITON_OPS = ("chunk_topk", "memory_attention", "memory_attention_backward", "memory_layer")


@dataclass(frozen=True)
class Variant:
    """An operation on one shape, with some kernels' tiles other than the table's."""

    op: str
    shape: Shape
    uses: dict[str, _tiles.Use] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        uses = "".join(f", {kernel} {use}" for kernel, use in self.uses.items())
        return f"{self.op} [{self.shape.describe(self.op)} {self.shape.dtype_name}]{uses}"


@dataclass(frozen=True)
class Compiled:
    """Kernels of a variant with the shared memory each needs, or why it cannot run."""

    variant: Variant
    shared_bytes: dict[str, int]
    reason: str | None = None


class _Driver:
    """Answers to what Triton asks a driver before it launches. The device's number is its architecture: Triton keeps
    compiled kernels by device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def compiling(architecture: int) -> Iterator[dict[str, int]]:
    """Triton launches of the block, on CPU tensors, are compiled for sm_`architecture` in place of being run; a dict of
    the shared memory that each kernel needs.

    Raises:
        ValueError: kernels are interpreted.
    """
    if _dispatch._interpreted:
        raise ValueError("compile: TRITON_INTERPRET=1 is set, and interpreted kernels cannot be compiled")
    from triton.runtime.driver import DriverConfig
    from triton.runtime.jit import JITFunction

    found: dict[str, int] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        found[kernel.fn.__name__] = compiled.metadata.shared
        return compiled

    capability, target = divmod(architecture, 10), _Driver(architecture)
    with (
        mock.patch.object(DriverConfig, "active", property(lambda _: target)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(_tiles, "capability", lambda device: capability),
        mock.patch.object(_dispatch, "why_unavailable", lambda op, impl, device: None),
    ):
        yield found


def triton_provider(op: str) -> Provider:
    """Our Triton implementation of `op`, also where it is an interpreter."""
    name = "longmem triton" if op != "memory_layer" else "longmem"
    found = next(provider for provider in providers(op) if provider.name == name)
    return Provider(found.name, found.prepare, ours=True, graphable=found.graphable)


def _launch(variant: Variant) -> None:
    """Launch what the variant launches, its inputs blank."""
    op, inputs = variant.op, blank(variant.op.removesuffix("_backward"), variant.shape)
    with _tiles.forced(variant.uses):
        # A layer is a search and a read; its write is no Triton kernel.
        if isinstance(inputs, LayerInputs):
            triton_provider("chunk_topk").prepare(inputs.retrieval).run()
            op, inputs = "memory_attention", inputs.fusion
        triton_provider(op).prepare(inputs).run()


def lookups_of(variant: Variant, architecture: int) -> list[_tiles.Lookup]:
    """Rows that its launches ask the tables for, one of each kernel, found without compiling anything."""
    from triton.runtime.jit import JITFunction

    nothing = mock.patch.object(JITFunction, "run", lambda *args, **options: None)
    with compiling(architecture), nothing, _tiles.noted() as found:
        _launch(variant)
    return list({lookup.kernel: lookup for lookup in reversed(found)}.values())


def candidates_of(variants: Sequence[Variant], architecture: int, kernels: Sequence[str] = ()) -> list[Variant]:
    """`variants`, then each of them with every candidate of every kernel it launches (those whose names hold one of
    `kernels`), the same launch once."""
    found, seen = list(variants), set()
    for variant in variants:
        for lookup in lookups_of(variant, architecture):
            if lookup in seen or (kernels and not any(word in lookup.kernel for word in kernels)):
                continue
            seen.add(lookup)
            tried = _tiles.candidates(lookup.kernel, architecture, dict(lookup.facts))
            found += [Variant(variant.op, variant.shape, {lookup.kernel: use}) for use in tried[1:]]
    return found


def compile_variant(variant: Variant, architecture: int) -> Compiled:
    """Compile what the variant launches on sm_`architecture`."""
    shared: dict[str, int] = {}
    try:
        with compiling(architecture) as shared:
            _launch(variant)
    except Exception as error:  # of the compiler: the reason why this variant does not exist
        return Compiled(variant, shared, first_line(error))
    most = _tiles.SHARED_BYTES[architecture]
    over = [
        f"{kernel} needs {size:,} bytes of shared memory, a block has {most:,}"
        for kernel, size in shared.items()
        if size > most
    ]
    return Compiled(variant, shared, "; ".join(over) or None)


def compile_all(
    variants: Sequence[Variant],
    architecture: int,
    *,
    workers: int,
    seconds: float | None = None,
    done: Callable[[Compiled], object] = lambda compiled: None,
) -> list[Compiled]:
    """`compile_variant` in `workers` processes; those not begun after `seconds` are left out."""
    begin, found = time.monotonic(), []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        waiting = [pool.submit(compile_variant, variant, architecture) for variant in variants]
        for future in as_completed(waiting):
            if future.cancelled():
                continue
            found.append(future.result())
            done(found[-1])
            if seconds is not None and time.monotonic() - begin > seconds:
                for other in waiting:
                    other.cancel()
    return found


def _one_thread() -> None:
    torch.set_num_threads(1)
