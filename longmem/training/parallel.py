"""How several processes share a training step: DDP or FSDP2. And what `torch.compile` is applied to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from longmem.model import LongMem
from longmem.states import StateCache

from .config import TrainConfig
from .step import Measured, Step

# A step's arguments, and whether processes exchange the gradients of this segment and of those before that did not.
RunStep = Callable[..., tuple[Tensor, Measured]]


def prepare(step: Step, config: TrainConfig) -> RunStep:
    """`step` as a function `(batch, memory, weight, last)`, compiled and distributed as `config` says.

    DDP: every process has all weights; the gradients of those that train are averaged. FSDP2: every process has a part
    of every layer, of the frozen ones too, and gathers a layer while it runs.
    """
    step.model.sidenet.checkpointing = config.checkpoint_activations
    if config.compile:
        _compile_layers(step.model)
    if not (dist.is_available() and dist.is_initialized()):
        return lambda *arguments, last: step(*arguments)
    return _fsdp(step) if config.parallel == "fsdp" else _ddp(step)


def _ddp(step: Step) -> RunStep:
    # Buffers never change; the name since PyTorch 2.13, and the one before.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(step, **options)
    if step.model.backbone.device.type == "cpu":
        wrapped.register_comm_hook(None, lambda _, bucket: _average_in_order(bucket))

    def run(*arguments: Any, last: bool) -> tuple[Tensor, Measured]:
        with nullcontext() if last else wrapped.no_sync():
            result: tuple[Tensor, Measured] = wrapped(*arguments)
            return result

    return run


def _average_in_order(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Averages gradients of all processes, added in the order of processes.

    In gloo's own sum the order depends on a gradient's place in its bucket, and DDP lays the buckets out anew after the
    first step of every start: a run that was interrupted would not end, to the bit, where another does.
    """
    parts = [torch.empty_like(bucket.buffer()) for _ in range(dist.get_world_size())]
    arrived = dist.all_gather(parts, bucket.buffer(), async_op=True).get_future()
    return arrived.then(lambda _: reduce(torch.add, parts) / len(parts))


def _fsdp(step: Step) -> RunStep:
    model, sidenet = step.model, step.model.sidenet
    if isinstance(step.states, StateCache):
        step.states.fill()  # now: later, processes could encode only all together
    mesh = init_device_mesh(model.backbone.device.type, (dist.get_world_size(),))
    layers = dict.fromkeys((*model.backbone.layers, *sidenet.stack))  # without a SideNet the stack is the backbone's
    for part in (*layers, *sidenet.reads.values(), sidenet.norm):
        if part is not None:
            fully_shard(part, mesh=mesh)
    for layer in layers:
        register_fsdp_forward_method(layer, "stored")  # which the backbone calls alone
    sharded = fully_shard(step, mesh=mesh)  # embedding, norm and head

    def run(*arguments: Any, last: bool) -> tuple[Tensor, Measured]:
        sharded.set_requires_gradient_sync(last)
        result: tuple[Tensor, Measured] = step(*arguments)
        return result

    return run


def _compile_layers(model: LongMem) -> None:
    """Layers that read no memory; those that do call into it, which is not for the compiler to see."""
    readers = {model.sidenet.stack[int(place)] for place in model.sidenet.reads}
    for layer in {*model.backbone.layers, *model.sidenet.stack} - readers:
        # Its function, not the module: names of weights stay, and FSDP's hooks stay outside.
        layer.forward = torch.compile(layer.forward)
