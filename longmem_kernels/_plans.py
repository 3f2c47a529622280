"""Plans of calls: what shapes, strides, dtypes, devices and options decide is checked and decided once.

The checks of a public function take longer than its kernel does for one token. A call whose signature is that of an
earlier one takes over what was decided then, and only values are left to check: on the CPU the C++ kernels do that, as
they read them anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

MOST_PLANS = 4096  # of one function; a cache of keys that grows with every token makes new ones all the time
_PLAIN = frozenset((int, float, bool, str, type(None)))


@dataclass(frozen=True)
class Plan:
    """Decisions of a public function for all calls of one signature.

    Attributes:
        kernel: takes what its torch op takes.
        checks_values: the kernel refuses values that do not fit, before it changes anything.
    """

    kernel: Callable[..., Any]
    checks_values: bool

    def run(self, check_values: Callable[[], object], *arguments: Any) -> Any:
        """Run the kernel. `check_values` repeats the checks of the public function, and is called where the kernel has
        none, or to say in the function's words what a kernel refused."""
        if not self.checks_values or torch.compiler.is_compiling():
            check_values()
            return self.kernel(*arguments)
        try:
            return self.kernel(*arguments)
        except RuntimeError as error:
            refused = error
        check_values()
        raise refused


def without_autograd(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` for inputs of which none requires a gradient: past the autograd layer of its torch op, which is written
    in Python and takes as long as a search among 256 chunks."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return kernel

    def run(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*arguments)

    return run


P = TypeVar("P")


class Plans(Generic[P]):
    """The plans of one public function by signature; `make(*tensors, *options)` checks the arguments and decides."""

    def __init__(self, make: Callable[..., P]) -> None:
        self._make = make
        self._made: dict[tuple[object, ...], P] = {}

    def find(self, tensors: tuple[Tensor | None, ...], options: tuple[object, ...]) -> P:
        key = signature(tensors, options)
        if key is None:
            return self._make(*tensors, *options)
        plan = self._made.get(key)
        if plan is None:
            plan = self._make(*tensors, *options)
            if len(self._made) >= MOST_PLANS:
                self._made.clear()
            self._made[key] = plan
        return plan


def signature(tensors: tuple[Tensor | None, ...], options: tuple[object, ...]) -> tuple[object, ...] | None:
    """All that checks look at except values; None where that is not all, and every call is checked: tensors of classes
    of their own, or that are not strided, torch.compile, torch.func and forward-mode differentiation."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return None
    kinds = tuple(map(type, options))  # 1, 1.0 and True are equal
    if not _PLAIN.issuperset(kinds):
        return None
    key: list[object] = [kinds, options]
    try:
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                continue
            kind = type(tensor)
            if (kind is not Tensor and kind is not Parameter) or tensor.layout is not torch.strided:
                return None
            key.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad))
    except RuntimeError:  # nested tensors have no shape
        return None
    return tuple(key)
