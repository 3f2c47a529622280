"""The number format that matrix products run in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .config import PRECISIONS

HALF = (torch.bfloat16, torch.float16)


def resolve_precision(precision: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The name of the format that a backbone with weights of `dtype` multiplies in.

    For float32 weights "auto" is bfloat16 where the hardware multiplies it natively (CUDA, CPUs with AVX512-BF16 or
    AMX), else float32. Other weights multiply in their own format, unless bfloat16 is asked for by name.

    Raises:
        ValueError: not one of auto, float32, bfloat16.
    """
    if precision == dtype_name(dtype):
        return precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if dtype != torch.float32 and precision != "bfloat16":
        return dtype_name(dtype)
    if precision != "auto":
        return precision
    if device.type == "cpu":
        # Private, but the only question that every supported PyTorch answers.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def memory_dtype(precision: str, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.dtype:
    """The format that keys and values of a backbone with weights of `dtype` are stored in: on a GPU the one they are
    multiplied in, half the traffic of float32. CPU kernels compute in float32 and would have to convert."""
    multiplied = getattr(torch, resolve_precision(precision, device, dtype))
    return multiplied if device.type == "cuda" and multiplied in HALF else torch.float32


def autocast(
    precision: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> AbstractContextManager[object]:
    """Matrix products in `precision`, around a backbone with weights of `dtype`; parameters, norms, losses and the
    residual stream stay as they are."""
    resolved = resolve_precision(precision, device, dtype)
    if resolved in ("float32", dtype_name(dtype)):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def multiply_as(x: Tensor) -> AbstractContextManager[object]:
    """Matrix products of trained float32 weights in the half precision of the activations `x`, as autocast does them.

    Weights that train stay in float32, where small updates are not lost, also beside a backbone in half precision.
    Nothing where autocast is on already, or `x` is not in half precision.
    """
    if x.dtype not in HALF or torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, x.dtype)


def trained_dtype(dtype: torch.dtype) -> torch.dtype:
    """The format of weights that train beside a backbone with weights of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)
