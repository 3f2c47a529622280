"""What a training run logs: a line of JSON per step and, on request, TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """`metrics.jsonl` in `folder` and, with `tensorboard`, event files beside it.

    Lines after `step` go: those steps will be run again.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
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
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"training: TensorBoard was asked for and is not installed ({error}): pip install 'longmem[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1)
