"""A run's rows with what they depended on, kept as <device>/<date>-<commit>.json below a folder of results."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longmem.files import check_fields, fields_of, load_json, save_text

from . import environment
from .row import Row

_MACHINE = {"device": str, "threads": str, "commit": str}


@dataclass(frozen=True)
class Result:
    """One run: machine and versions, date, and the rows, those that could not be timed included."""

    machine: dict[str, str]
    date: str
    rows: list[Row]

    @classmethod
    def now(cls, rows: Sequence[Row], device: torch.device | str) -> Result:
        """Rows measured just now, in this process."""
        return cls(environment.describe(torch.device(device)), datetime.date.today().isoformat(), list(rows))

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` or `keep` wrote, or `pytest benchmarks/ --benchmark-json`.

        Raises:
            ValueError: there is no such file, or it is none of these.
        """
        path = Path(path)
        if not path.exists():
            raise ValueError(f"{path} does not exist: nothing was timed, or the benchmarks did not run")
        try:
            content = check_fields("it", load_json(path, "benchmark result"), {}, others=True)
            if "rows" not in content:
                content = _of_pytest(content)
            check_fields("it", content, {"machine": dict, "date": str, "rows": [dict]}, others=True)
            machine = check_fields("its machine", content["machine"], _MACHINE, others=True)
            return cls(machine, content["date"], [_row(row) for row in content["rows"]])
        except ValueError as error:
            raise ValueError(
                f"{path} holds no benchmark result: wanted what `longmem-bench --json` or `pytest benchmarks/"
                f" --benchmark-json` writes ({error})"
            ) from None

    @property
    def on_gpu(self) -> bool:
        return any(row.device.startswith("cuda") for row in self.rows)

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        save_text(path, self.text() + "\n")
        return path

    def text(self) -> str:
        """JSON, as `save` writes it."""
        content = {"machine": self.machine, "date": self.date, "rows": [_compact(row) for row in self.rows]}
        return json.dumps(content, indent=1)

    def keep(self, folder: Path) -> Path:
        """Save below `folder` under the device's and the commit's name."""
        device = (
            self.machine["device"] if self.on_gpu else f"{self.machine['device']} {self.machine['threads']} threads"
        )
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        return self.save(folder / name / f"{self.date}-{self.machine['commit']}.json")

    def headline(self) -> str:
        return " | ".join(f"{name} {value}" for name, value in self.machine.items()) + f" | {self.date}"


def _of_pytest(content: dict[str, Any]) -> dict[str, Any]:
    """Converts what pytest-benchmark wrote to the names that `Result.save` gives."""
    wanted = {"benchmarks": [dict], "not_timed": [dict], "machine_info": dict, "datetime": str}
    check_fields("it", content, wanted, others=True)
    rows = [benchmark.get("extra_info") for benchmark in content["benchmarks"]] + content["not_timed"]
    return {"machine": content["machine_info"].get("longmem"), "date": content["datetime"][:10], "rows": rows}


def _row(values: dict[str, Any]) -> Row:
    wanted, optional = fields_of(Row)
    return Row(**check_fields("a row", values, wanted, optional=optional))


def _compact(row: Row) -> dict[str, Any]:
    """Leaves out what is absent or false: it is the default."""
    return {name: value for name, value in row.as_dict().items() if value is not None and value is not False}


def newest(folder: Path, on_gpu: bool, kind: str = ".") -> Path | None:
    """The latest result of a CPU or a GPU kept in `folder`; by date, then by time of the file. `kind`: the folder of
    its device's that it lies in, `official-step` for one."""
    found = [path for path in folder.glob(f"*/{kind}/*.json") if Result.load(path).on_gpu == on_gpu]
    return max(found, key=lambda path: (path.name[:10], path.stat().st_mtime), default=None)
