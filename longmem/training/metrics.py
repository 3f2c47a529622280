"""Log of a training run: a line of JSON per step and, on request, TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longmem.files import Whole, check_fields, parse_json, save_text, short


class MetricsLog:
    """`metrics.jsonl` in `folder` and, with `tensorboard`, event files beside it.

    Lines after `step` go: those steps will be run again.

    Raises:
        ValueError: TensorBoard is asked for and not installed, or there is a `metrics.jsonl` that is damaged.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._writer: Any = _summary_writer(folder / "tensorboard", step) if tensorboard else None
        self._path = folder / "metrics.jsonl"
        if self._path.exists():
            _truncate(self._path, step)

    def write(self, metrics: dict[str, float]) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:  # of a write, it does not name the file
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        if self._writer is not None:
            for name, value in metrics.items():
                if name != "step":
                    self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _truncate(path: Path, step: int) -> None:
    try:
        *lines, _ = path.read_bytes().decode().split("\n")  # what follows the last line's end was cut off by a kill
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"metrics: {path} cannot be read ({short(error)})") from None
    kept = []
    for number, line in enumerate(lines, start=1):
        what = f"metrics: line {number} of {path}"
        if check_fields(what, parse_json(line, what), {"step": Whole()}, others=True)["step"] <= step:
            kept.append(line)
    save_text(path, "".join(line + "\n" for line in kept))


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"training: TensorBoard was asked for and is not installed ({error}): pip install 'longmem[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1)
