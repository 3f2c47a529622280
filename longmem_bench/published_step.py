"""A whole training step of the published model: our kernels against the published composition, on the same weights.

Both keep what the published code keeps: keys and values of memory in float16, search vectors in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from longmem.official import OfficialConfig, OfficialLongMem
from longmem.official.loading import official_parameters
from longmem.precision import autocast

from . import environment
from .onednn import onednn_products, why_no_onednn
from .peak_memory import peak_extra_bytes
from .provider import WrongResult
from .providers.faiss_search import FaissIndex
from .providers.published import Index, TorchIndex
from .providers.published_model import PublishedModel
from .row import Row
from .timing import CoreClock, summarise

PUBLISHED = OfficialConfig()
STORAGE = torch.float16  # of the memory's keys and values, on both sides
# Of a loss, in nats, from our loss in float32, at any step. Products in bfloat16 round a random model's loss by 1e-4.
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 1e-3}


@dataclass(frozen=True)
class StepShape:
    """B rows; `config` says the rest. The memory is as full as the published arithmetic lets it be."""

    rows: int
    config: OfficialConfig

    def describe(self) -> str:
        c = self.config
        return (
            f"B={self.rows} T={c.tokens_per_sample} layers={c.layers}+{c.sidenet_layers} E={c.embed} H={c.heads}"
            f" V={c.vocab} memory={c.memory_size} k={c.k} C={c.chunk}"
        )


def published(layers: int = 24, rows: int = 1) -> StepShape:
    """The published size, or fewer layers of it, memory read and written at the same relative depth."""
    index = min(layers - 1, round(17 * layers / 24))
    return StepShape(rows, replace(PUBLISHED, layers=layers, retrieval_layer_index=index, sidenet_layers=layers // 2))


def small(rows: int = 2) -> StepShape:
    """A model of a few million parameters, in which attention and memory weigh more than matrix products."""
    sizes = {"vocab": 2048, "layers": 4, "embed": 256, "ffn": 1024, "heads": 4, "retrieval_layer_index": 3}
    config = OfficialConfig(**sizes, tokens_per_sample=256, memory_size=8192)
    return StepShape(rows, config)


@dataclass(frozen=True)
class StepProvider:
    """One row: who takes the step, and in which format matrix products run ("float32" or "bfloat16")."""

    name: str
    precision: str
    index: type[Index] | None = None  # of the published composition; None is ours
    onednn: bool = False  # float32 products by oneDNN, see `onednn`


def step_providers(device: torch.device) -> list[StepProvider]:
    """Ours and the published composition, like for like; ours in float32 first, for it sets the losses."""
    if device.type == "cpu" and find_spec("faiss") is not None:
        theirs = StepProvider("published composition, faiss-cpu", "float32", FaissIndex)
    else:
        theirs = StepProvider("published composition, torch search", "float32", TorchIndex)
    ours = StepProvider("longmem", "float32")
    in_float32 = [ours, theirs]
    if device.type == "cpu" and why_no_onednn() is None:
        in_float32.insert(1, replace(ours, name="longmem, products by oneDNN", onednn=True))
    return [*in_float32, replace(ours, precision="bfloat16"), replace(theirs, precision="bfloat16")]


class Steps:
    """One model whose training steps are taken by different providers, each from the same start."""

    def __init__(self, shape: StepShape, device: torch.device | str = "cpu", *, seed: int = 0) -> None:
        self.shape, self.device = shape, torch.device(device)
        torch.manual_seed(seed)
        self.model = OfficialLongMem(shape.config, storage=STORAGE)
        self.model.initialise_from_backbone()
        self.model.to(self.device)
        self.start = {name: p.detach().cpu().clone() for name, p in self._trained().items()}

    def prepare(self, provider: StepProvider) -> tuple[Callable[[], None], list[float]]:
        """A training step (forward, backward, optimiser) from the common start, and where it puts its losses."""
        self._restore()
        self.model.memory.reset()
        loss_of: Callable[[Tensor, Tensor], Tensor]
        write: Callable[[Tensor, Tensor], None]
        if provider.index is None:
            loss_of = self.model.loss
            write = lambda key, value: self.model.memory.add_index({"k": key, "v": value})  # noqa: E731
        else:
            composition = PublishedModel(
                official_parameters(self.model), self.shape.config, storage=STORAGE, index=provider.index
            )
            loss_of, write = composition.loss, composition.write
        for key, value in self._past():
            write(key, value)
        optimiser = torch.optim.AdamW(self._trained().values(), 2e-4, (0.9, 0.98), 1e-6, 0.01, fused=True)
        generator, losses = torch.Generator().manual_seed(1), []

        def step() -> None:
            c = self.shape.config
            text = torch.randint(4, c.vocab, (self.shape.rows, c.tokens_per_sample + 1), generator=generator)
            text = text.to(self.device)
            optimiser.zero_grad()
            with onednn_products() if provider.onednn else nullcontext():
                with autocast(provider.precision, self.device):
                    loss = loss_of(text[:, :-1], text[:, 1:])
                loss.backward()
            optimiser.step()
            losses.append(loss.item())

        return step, losses

    def measure(
        self, provider: StepProvider, steps: int, watch: Callable[[Row, Callable[[], None]], None] | None = None
    ) -> tuple[Row, list[float]]:
        """Time `steps` steps, after one that warms up and one that shows the memory they take; and all losses. `watch`
        gets the row and the step, to take more of them."""
        step, losses = self.prepare(provider)
        step()
        peak = peak_extra_bytes(step, self.device)
        seconds = []
        with CoreClock() as clock:
            for _ in range(steps):
                begin = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - begin)
        row, taken = self.row(provider, peak_bytes=peak, cores=clock.cores, **summarise(seconds)), list(losses)
        if watch is not None:
            watch(row, step)
        return row, taken

    def row(self, provider: StepProvider, **numbers: Any) -> Row:
        """A row with everything but the numbers filled in."""
        return Row(
            op="official_step",
            provider=provider.name,
            shape=self.shape.describe(),
            dtype="float32" if provider.precision == "float32" else f"float32, products in {provider.precision}",
            device=str(self.device),
            device_name=environment.device_name(str(self.device)),
            threads=torch.get_num_threads(),
            commit=environment.commit(),
            ours=provider.index is None,
            **numbers,
        )

    def _past(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of as many segments as fit before an eviction, spread as a random model's are."""
        c, generator = self.shape.config, torch.Generator().manual_seed(2)
        tokens = self.shape.rows * c.tokens_per_sample
        size, scale = (self.shape.rows, c.tokens_per_sample, c.embed), 0.02 * c.embed**0.5
        for _ in range((c.memory_size // c.chunk - 1) // (tokens // c.chunk)):
            key, value = ((torch.randn(size, generator=generator) * scale).to(self.device) for _ in range(2))
            yield key, value

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in official_parameters(self.model).items() if p.requires_grad}

    def _restore(self) -> None:
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(self.start[name])
                parameter.grad = None


def measure_steps(
    shape: StepShape,
    steps: int = 4,
    device: torch.device | str = "cpu",
    watch: Callable[[Row, Callable[[], None]], None] | None = None,
) -> list[Row]:
    """Rows of all providers, which have all had the same losses at every step. `watch`: see `Steps.measure`.

    Raises:
        WrongResult: a provider's losses are others.
    """
    case = Steps(shape, device)
    rows: list[Row] = []
    wanted: list[float] = []
    for provider in step_providers(case.device):
        row, losses = case.measure(provider, steps, watch)
        wanted = wanted or losses
        check_losses(provider, losses, wanted)
        rows.append(row)
    return rows


def check_losses(provider: StepProvider, losses: list[float], wanted: list[float]) -> None:
    """Raises WrongResult unless all losses lie within `LARGEST_DIFFERENCE`."""
    worst = max(abs(mine - theirs) for mine, theirs in zip(losses, wanted, strict=True))
    if not worst <= LARGEST_DIFFERENCE[provider.precision]:
        raise WrongResult(
            f"official_step: {provider.name!r} in {provider.precision} differs by {worst:.2g} nats in its loss and is"
            " not reported"
        )
