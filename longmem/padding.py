"""Padding: where the tokens of each row lie between it."""

from __future__ import annotations

import torch
from torch import Tensor

from longmem_kernels._checks import Sizes, check_device


def check_mask(name: str, mask: Tensor, tokens: Tensor) -> None:
    """Raises ValueError where `mask` is not bool of the shape of `tokens`, beside them."""
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape or mask.dtype != torch.bool:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: mask must be bool of the shape of tokens, {tuple(tokens.shape)}, got {got}")
    Sizes(name).bind("mask", mask, "B T")  # no sparse one
    check_device(name, tokens.device, "tokens", mask=mask)


def fill_padding(tokens: Tensor, mask: Tensor, starts: list[int]) -> Tensor:
    """`tokens` [B, n] with each row's first token, of column `starts`, in place of its padding; with another row's
    where it has none.

    Attention gives what is masked a weight of zero, but zero times NaN is NaN: so nothing stands there that a model
    could have states for which no other token has.
    """
    if mask.numel() == 0:
        return tokens
    first = tokens.gather(1, torch.tensor(starts, device=tokens.device)[:, None])
    some = mask.any(1)
    other = torch.where(some.any(), first[some.to(torch.uint8).argmax()], 0)
    return torch.where(mask, tokens, torch.where(some[:, None], first, other))


def token_spans(name: str, mask: Tensor) -> tuple[list[int], list[int]]:
    """First column and number of each row's tokens in mask [B, n] bool; (0, 0) for a row that is all padding.

    Raises:
        ValueError: padding between the tokens of a row.
    """
    count = mask.sum(1)
    # argmax of integers: the first of the largest.
    first = mask.to(torch.uint8).argmax(1) if mask.shape[1] else count
    last = mask.shape[1] - mask.flip(1).to(torch.uint8).argmax(1) if mask.shape[1] else count
    holes = (count > 0) & (last - first != count)
    if bool(holes.any()):
        rows = holes.nonzero().flatten().tolist()
        raise ValueError(
            f"{name}: padding must be on the left or on the right of a row's tokens, but mask has some between those of"
            f" row {rows[0]}"
        )
    return first.tolist(), count.tolist()


def align_left(tokens: Tensor, starts: list[int]) -> Tensor:
    """Rows of tokens [B, n] moved so that each begins with its token of column `starts`; what follows wraps around."""
    if not any(starts):
        return tokens
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    shift = torch.tensor(starts, device=tokens.device)[:, None]
    return tokens.gather(1, (columns + shift) % tokens.shape[1])
