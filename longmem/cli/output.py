"""Output of a command: results to stdout, everything else to stderr, beside progress bars."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any


def note(text: str, *, red: bool = False) -> None:
    """A line on stderr, above the progress bars that are open."""
    if red and sys.stderr.isatty():
        text = f"\x1b[31m{text}\x1b[0m"
    bars = sys.modules.get("tqdm")
    if bars is None:
        print(text, file=sys.stderr, flush=True)
    else:
        bars.tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def close_bars() -> None:
    """Close progress bars that are still open, each on a line of its own."""
    bars = sys.modules.get("tqdm")
    for bar in list(getattr(bars.tqdm, "_instances", ())) if bars is not None else []:
        bar.close()


@contextlib.contextmanager
def results(as_json: bool) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Gives a function `(text, content)` that prints the command's result: the text, or `content` as JSON.

    With `as_json` nothing else reaches stdout meanwhile: what other code prints goes to stderr.
    """
    stdout = sys.stdout

    def show(text: str, content: dict[str, Any]) -> None:
        print(json_text(content) if as_json else text, file=stdout, flush=True)

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield show


def json_text(content: Any) -> str:
    """JSON that every parser takes: numbers that are not finite become null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
