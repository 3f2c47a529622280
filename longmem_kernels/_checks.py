"""Argument checks shared by the public functions: errors name the op, the argument, what was wanted and what came."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPUTE_DTYPES = (*STORAGE_DTYPES, torch.float64)
FEW = 64
QUANTISED_DTYPE = torch.float8_e4m3fn  # of memory whose chunks carry a scale

_debug = False


def debug_checks(enabled: bool) -> None:
    """Turn the checks that read values from CUDA tensors (a host sync each) on or off. On CPU they always run."""
    global _debug
    _debug = enabled


def values_readable(tensor: Tensor) -> bool:
    """True when checking the values of `tensor` now causes no graph break and no host sync that nobody asked for."""
    device = tensor.device.type
    return not torch.compiler.is_compiling() and (device == "cpu" or (_debug and device == "cuda"))


class Sizes:
    """Binds size symbols (design notation: B, H, T, D, ...) while arguments are checked; first use fixes a symbol."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.size: dict[str, int] = {}
        self.origin: dict[str, str] = {}

    def __getitem__(self, symbol: str) -> int:
        return self.size[symbol]

    def bind(self, name: str, tensor: Tensor, symbols: str) -> None:
        """Check that `tensor` has the axes named in `symbols` (space separated) and the sizes bound so far.

        A number among the symbols is a size of its own.

        Raises:
            TypeError: not a tensor, or one that is not strided (sparse, nested).
            ValueError: wrong rank, or a size that contradicts an earlier argument.
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.op}: {name} must be a tensor [{symbols}], got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else str(tensor.layout)
            raise TypeError(f"{self.op}: {name} must be a strided tensor [{symbols}], got a {kind} one")
        axes = symbols.split()
        shape = tuple(tensor.shape)
        if len(shape) != len(axes):
            raise ValueError(f"{self.op}: {name} must have {len(axes)} axes [{', '.join(axes)}], got shape {shape}")
        for symbol, size in zip(axes, shape, strict=True):
            if symbol.isdigit():
                if size != int(symbol):
                    raise ValueError(f"{self.op}: {name} must be [{', '.join(axes)}], got shape {shape}")
            elif symbol not in self.size:
                self.size[symbol], self.origin[symbol] = size, name
            elif self.size[symbol] != size:
                raise ValueError(
                    f"{self.op}: {name} [{', '.join(axes)}] must have {symbol} = {self.size[symbol]}"
                    f" (from {self.origin[symbol]}), got shape {shape}"
                )

    def positive(self, *symbols: str) -> None:
        for symbol in symbols:
            size = self.size[symbol]
            if size < 1:
                raise ValueError(f"{self.op}: {symbol} must be at least 1, got {size} in {self.origin[symbol]}")

    def grouped(self) -> None:
        """H query heads share G key/value heads evenly."""
        heads, kv_heads = self.size["H"], self.size["G"]
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"{self.op}: query heads H must be a multiple of key/value heads G, got H={heads}, G={kv_heads}"
                f" in {self.origin['H']} and {self.origin['G']}"
            )


def check_integer(op: str, name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int from `low` to `high`: of Python or NumPy, not a truth value."""
    limits = [f"at {word} {limit}" for word, limit in (("least", low), ("most", high)) if limit is not None]
    wanted = "an integer" + (f" of {' and '.join(limits)}" if limits else "")
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be {wanted}, got {_shown(value)}")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{op}: {name} must be {wanted}, got {number}")
    return number


def check_number(op: str, name: str, value: object) -> float:
    """`value` as a finite float: of Python or NumPy, not a truth value."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {_shown(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


def check_truth(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {_shown(value)}")


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def check_frozen(op: str, why: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{op}: {name} must not require grad: {why}; got one that does, pass a detached one")


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{op}: {name} must be one of {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_device(op: str, device: torch.device, like: str = "the first argument", /, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like {like}, got {tensor.device}")


def check_last_axis_contiguous(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{op}: the last axis of {name} must be contiguous, got strides {tuple(tensor.stride())}")


def check_range(op: str, name: str, tensor: Tensor | None, low: int, high: int) -> None:
    """Values of an integer tensor must lie in [low, high). Read only where `values_readable`."""
    if tensor is None or not values_readable(tensor) or tensor.numel() == 0:
        return
    if tensor.numel() <= FEW:  # reading them is quicker than launching an operation
        values = tensor.flatten().tolist()
        smallest, largest = min(values), max(values)
    else:
        smallest, largest = (int(bound) for bound in torch.aminmax(tensor))
    if smallest < low or largest >= high:
        raise ValueError(f"{op}: {name} must lie in [{low}, {high}), got values from {smallest} to {largest}")


def check_ring_index(op: str, ring_index: Tensor | None, sizes: Sizes) -> None:
    """`ring_index [B]` int32; without it rows and rings must pair up one to one, or there must be a single ring."""
    rows, rings = sizes["B"], sizes["R"]
    if ring_index is None:
        if rings not in (1, rows):
            raise ValueError(
                f"{op}: ring_index is needed when R is neither 1 nor B, got R={rings} rings for B={rows} rows"
            )
        return
    sizes.bind("ring_index", ring_index, "B")
    check_dtype(op, "ring_index", ring_index, (torch.int32,))


class KernelArguments:
    """Checks in a torch op what its kernel dereferences, at a few hundred nanoseconds a tensor.

    The public functions check more and say it better; this holds for calls of `torch.ops.longmem`, as `Arguments` does
    in the C++ bindings.
    """

    def __init__(self, op: str, first: Tensor) -> None:
        self.op, self.device, self.index = op, first.device, first.get_device()

    def expect(
        self,
        name: str,
        tensor: Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        whole: bool = False,
        any_strides: bool = False,
    ) -> None:
        """Raises ValueError unless it has this shape and dtype, is on the device, and has a contiguous last axis, is
        contiguous (`whole`) or has `any_strides`. None passes."""
        if tensor is None:
            return
        if tensor.shape != shape or tensor.dtype != dtype or tensor.get_device() != self.index:
            raise ValueError(
                f"{self.op}: {name} must be {dtype} {tuple(shape)} on {self.device}, got {tensor.dtype}"
                f" {tuple(tensor.shape)} on {tensor.device}"
            )
        if any_strides:
            return
        fits = tensor.is_contiguous() if whole else tensor.stride(-1) == 1 or shape[-1] <= 1
        if not fits:
            wanted = "contiguous" if whole else "contiguous in its last axis"
            raise ValueError(f"{self.op}: {name} must be {wanted}, got strides {tensor.stride()}")

    def require(self, holds: bool, wanted: str, *got: object) -> None:
        if not holds:
            raise ValueError(f"{self.op}: {wanted}, got {', '.join(map(str, got))}")

    def heads(self, H: int, G: int, D: int, head_dims: tuple[int, ...]) -> None:
        self.require(G > 0 and H > 0 and H % G == 0, "query heads must be a multiple of key/value heads", H, G)
        self.require(D in head_dims, "head dim must be one that this kernel was made for", D)

    def ring_index(self, ring_index: Tensor | None, B: int, R: int) -> None:
        self.expect("ring_index", ring_index, (B,), torch.int32, whole=True)
        self.require(ring_index is not None or R in (1, B), "ring_index is needed when R is neither 1 nor B", R, B)


def constant(tensor: Tensor) -> Tensor:
    """`tensor` without its part in differentiation, backward or forward."""
    if _forward_mode():
        tensor = forward_ad.unpack_dual(tensor.detach()).primal
    return tensor.detach() if tensor.requires_grad else tensor


def check_differentiation(op: str, impl: str, *tensors: Tensor | None) -> None:
    """Refuse the kinds of differentiation that PyTorch would leave out of a kernel without a word, or with one about
    itself: forward mode and transforms of `torch.func`. The reference has both."""
    given = [tensor for tensor in tensors if tensor is not None]
    if _forward_mode() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        kind = "forward-mode differentiation (torch.func.jvp, dual tensors)"
    elif not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        if not any(tensor.requires_grad for tensor in given):
            return
        kind = "torch.func's grad, vjp, jacrev and hessian"
    else:
        return
    raise NotImplementedError(
        f'{op}: {kind} is not implemented by impl={impl!r}; ask for impl="reference", or use torch.autograd'
    )


def _forward_mode() -> bool:
    return forward_ad._current_level >= 0


def packed(tensor: Tensor | None) -> Tensor | None:
    """A small vector argument with the unit stride that kernels count on; `tensor[::2]` and `expand` have another."""
    return None if tensor is None else tensor.contiguous()


def packed_last_axis(tensor: Tensor) -> Tensor:
    """A tensor of ids whose last axis kernels may read as an array; other axes keep their strides."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
