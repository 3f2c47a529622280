"""Float32 matrix products by oneDNN instead of MKL on CPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_WORTHWHILE = 2**22  # multiplications; below, finding the kernel costs more than it saves


def why_no_onednn() -> str | None:
    """The reason why oneDNN cannot be asked for float32 products here; None when it can."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"PyTorch {torch.__version__} does not offer oneDNN's linear layer on ordinary tensors"
    return None


class onednn_products(TorchDispatchMode):
    """Within the block, matrix products of float32 tensors on the CPU are computed by oneDNN; the rest as always.

    >>> with onednn_products():
    ...     model.loss(tokens, targets).backward()

    PyTorch computes them by MKL; on an AMD EPYC with AVX-512 oneDNN was measured a tenth to a fifth faster. Same
    precision, another order of summation.

    Raises:
        RuntimeError: this PyTorch has no such oneDNN, and why.
    """

    def __init__(self) -> None:
        reason = why_no_onednn()
        if reason is not None:
            raise RuntimeError(f"onednn_products: cannot run: {reason}")
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not kwargs:
            if func is torch.ops.aten.mm.default and _suits(*args):
                return _product(*args)
            if func is torch.ops.aten.addmm.default and args[0].dim() == 1 and _suits(*args[1:]):
                return _product(args[1], args[2], args[0])
        return func(*args, **(kwargs or {}))


def _suits(left: Tensor, right: Tensor) -> bool:
    size = left.shape[0] * left.shape[1] * right.shape[1]
    on_cpu = left.device.type == "cpu" and left.dtype == right.dtype == torch.float32
    return on_cpu and size >= _WORTHWHILE and {type(left), type(right)} <= {Tensor, nn.Parameter}


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
