"""The number format that matrix products run in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .config import PRECISIONS


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" is bfloat16 where the hardware multiplies it natively (CUDA, CPUs with AVX512-BF16 or AMX), else float32.

    Raises:
        ValueError: not one of auto, float32, bfloat16.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision
    if device.type == "cpu":
        # Private, but the only question that every supported PyTorch answers.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def memory_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What keys and values are stored in: on a GPU the format they are multiplied in, half the traffic of float32. CPU
    kernels compute in float32 and would have to convert."""
    half = device.type == "cuda" and resolve_precision(precision, device) == "bfloat16"
    return torch.bfloat16 if half else torch.float32


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in `precision`; parameters, norms, losses and the residual stream stay as they are."""
    if resolve_precision(precision, device) == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
