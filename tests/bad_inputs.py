"""Wrong arguments of a function, made from its signature and one good call: each argument in each way to be wrong.

What is wrong follows from the good value of an argument: a tensor has a rank, sizes, a dtype, a device, a layout and
values; a number has a type and a range. An argument of the signature without a good value is an error, so that a new
one is tried without anybody thinking of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

Wrong = tuple[str, str, dict[str, Any]]  # what is wrong, the argument's name in messages, and what changes


@dataclass
class Subject:
    """A function, a good call of it, and what is not wrong about an argument though it looks so.

    Attributes:
        name: what its messages begin with. Others of `also` do where it calls them.
        good: arguments by name.
        free: axes whose size an argument may choose, by argument.
        packed: tensors whose last axis may have any stride.
        any_value: integer tensors and numbers that are never out of range.
        frozen: tensors that must not require grad.
        untried: arguments, and parts of them, that are not tried.
        called: what messages call an argument, where not by its name.
        passes_to: the function that takes its other keyword arguments.
    """

    name: str
    function: Callable[..., Any]
    good: dict[str, Any]
    also: tuple[str, ...] = ()
    free: dict[str, tuple[int, ...]] = field(default_factory=dict)
    packed: tuple[str, ...] = ()
    any_value: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    untried: tuple[str, ...] = ()
    called: dict[str, tuple[str, ...]] = field(default_factory=dict)
    passes_to: Callable[..., Any] | None = None

    def parameters(self) -> dict[str, inspect.Parameter]:
        found = inspect.signature(self.function).parameters
        return {name: p for name, p in found.items() if p.kind is not p.VAR_KEYWORD and name != "self"}

    def optional(self, name: str) -> bool:
        passed = {} if self.passes_to is None else inspect.signature(self.passes_to).parameters
        parameter = {**passed, **self.parameters()}.get(name)
        return parameter is not None and parameter.default is None

    def missing(self) -> list[str]:
        return [name for name in self.parameters() if name not in self.good and name not in self.untried]

    def wrong(self) -> Iterator[Wrong]:
        for name, value in self.good.items():
            if name in self.untried:
                continue
            if is_dataclass(value):
                yield f"{name} is a list", name, {name: [1]}
                for part in fields(value):
                    path = f"{name}.{part.name}"
                    if path in self.untried or getattr(value, part.name) is None:
                        continue
                    for what, bad in self.wrong_values(path, getattr(value, part.name), optional=False):
                        yield f"{path} {what}", path, {name: replace(value, **{part.name: bad})}
                continue
            for what, bad in self.wrong_values(name, value, self.optional(name)):
                yield f"{name} {what}", name, {name: bad}

    def wrong_values(self, name: str, value: Any, optional: bool) -> Iterator[tuple[str, Any]]:
        if not optional:
            yield "is None", None
        if isinstance(value, Tensor):
            yield from self.wrong_tensors(name, value)
        elif isinstance(value, bool):
            yield from {"is 1": 1, "is text": "yes", "is a tensor": torch.tensor(True)}.items()
        elif isinstance(value, str):
            yield from {"is another text": "nonsense", "is a number": 3.5, "is a list": [value]}.items()
        elif isinstance(value, torch.dtype):
            yield from {"is int8": torch.int8, "is text": "float32", "is a number": 3}.items()
        else:
            yield from {"is text": "a", "is True": True, "is a list": [value], "is complex": 1j}.items()
            if name not in self.any_value:
                yield from {"is NaN": math.nan, "is infinite": math.inf, "is minus infinite": -math.inf}.items()
            if isinstance(value, int):
                yield from {"is 2.5": 2.5, "is a tensor": torch.tensor(2.5)}.items()
            if isinstance(value, int) and name not in self.any_value:
                yield from {"is 0": 0, "is negative": -1, "is -2^63": -(2**63)}.items()

    def wrong_tensors(self, name: str, value: Tensor) -> Iterator[tuple[str, Any]]:
        yield from {"is a list": [1.0], "is text": "a", "is True": True}.items()
        yield "has an axis more", value[None]
        if value.dim() > 1:
            yield "has an axis less", value[0]
        for axis in range(value.dim()):
            if axis not in self.free.get(name, ()):
                yield f"is longer in axis {axis}", torch.cat([value, value.narrow(axis, 0, 1)], axis).contiguous()
                yield f"is empty in axis {axis}", value.narrow(axis, 0, 0)
        for dtype in (torch.complex64, torch.int16, torch.bool, torch.float8_e5m2):
            if dtype != value.dtype:
                yield f"is {dtype}", value.real.to(dtype) if value.is_complex() else value.to(dtype)
        yield "is on meta", value.to("meta")
        if value.dtype in (torch.float32, torch.bool, torch.int32, torch.int64):
            yield "is sparse", value.to_sparse()
        if name not in self.packed and value.shape[-1] > 1:
            yield "has a strided last axis", torch.stack([value, value], -1)[..., 0]
            yield "is expanded in its last axis", value[..., :1].expand(value.shape)
        if name in self.frozen:
            yield "requires grad", value.clone().requires_grad_()
        if value.dtype in (torch.int32, torch.int64) and name not in self.any_value:
            top = torch.iinfo(value.dtype).max
            yield from {"has huge values": value * 0 + top, "has very negative values": value * 0 - top}.items()

    def refuses(self, argument: str, changes: dict[str, Any]) -> str:
        """Why the call with these changes was not refused as it should be; empty when it was."""
        call = {name: self.good[name] for name in self.good} | changes
        before = {name: _copies(value) for name, value in self.good.items()}
        try:
            self.function(**call)
        except (TypeError, ValueError, RuntimeError) as error:
            text = str(error)
        except Exception as error:  # a check that is not there
            return f"{type(error).__name__}: {error}"
        else:
            return "nothing was refused"
        names = self.called.get(argument, (argument,))
        if argument == next(iter(self.good)):
            names = (*names, "the first argument")
        if not any(text.startswith(f"{op}: ") for op in (self.name, *self.also)) or "got" not in text:
            return f"the message is not of {self.name}: {text}"
        if not any(name in text for name in names):
            return f"the message does not name {argument}: {text}"
        changed = [name for name, value in self.good.items() if not _same(_copies(value), before[name])]
        return f"{', '.join(changed)} was changed" if changed else ""


def _copies(value: Any) -> list[Tensor]:
    if is_dataclass(value):
        return [copy for part in fields(value) for copy in _copies(getattr(value, part.name))]
    return [value.detach().clone()] if isinstance(value, Tensor) and not value.is_meta else []


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    pairs = ((x.contiguous(), y.contiguous()) for x, y in zip(a, b, strict=True))
    return all(x.view(torch.uint8).equal(y.view(torch.uint8)) if x.dim() else x.equal(y) for x, y in pairs)
