"""How options are defined: their help panels, and checks of the numbers given."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer


def finite(
    *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf, most: float = math.inf
) -> Callable[[Any], Any]:
    """A callback that refuses numbers outside (above, below) and [least, most], not-a-number and infinity."""
    limits = [(above, "above"), (least, "of at least"), (below, "below"), (most, "of at most")]
    wanted = " and ".join(f"{word} {value:g}" for value, word in limits if math.isfinite(value))

    def check(value: Any) -> Any:
        inside = value is None or (math.isfinite(value) and above < value < below and least <= value <= most)
        if not inside:
            raise typer.BadParameter(f"wanted a number {wanted}".rstrip() + f", got {value}")
        return value

    return check


def _path(text: str | Path) -> Path:
    """An empty path, out of a variable that is not set, would be the working directory."""
    if not str(text):
        raise typer.BadParameter("wanted a path, got an empty one")
    return Path(text)


def path_option(*names: str, **more: Any) -> Any:
    return option(*names, parser=_path, metavar="PATH", **more)


def option(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)
