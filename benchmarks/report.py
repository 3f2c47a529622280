"""Tables and a plot of a benchmark run: `python -m benchmarks.report result.json [--plot out.png] [--keep]`.

Reads what `pytest benchmarks/ --benchmark-json` wrote, or a result kept earlier: the same rows without the raw timings,
in benchmarks/results/<device>/<date>-<commit>.json.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from longmem.bench import Row, plot, table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """One run: what it depended on, and its rows, those timed before those that could not be."""

    machine: dict[str, str]
    date: str
    rows: list[Row]

    @classmethod
    def load(cls, path: Path) -> Result:
        if not path.exists():
            raise SystemExit(f"{path} does not exist: nothing was timed, or the benchmarks did not run")
        content = json.loads(path.read_text())
        if "rows" in content:
            return cls(content["machine"], content["date"], [Row(**row) for row in content["rows"]])
        if "not_timed" not in content or "longmem" not in content.get("machine_info", {}):
            raise SystemExit(f"{path} was not written by `pytest benchmarks/ --benchmark-json {path}`, nor by --keep")
        timed = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        rows = [Row(**row) for row in (*timed, *content["not_timed"])]
        return cls(content["machine_info"]["longmem"], content["datetime"][:10], rows)

    def keep(self) -> Path:
        device = f"{self.machine['device']} {self.machine['threads']} threads"
        if self.machine["cuda"] != "none" and any(row.device.startswith("cuda") for row in self.rows):
            device = self.machine["device"]
        folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.date}-{self.machine['commit']}.json"
        content = {"machine": self.machine, "date": self.date, "rows": [row.as_dict() for row in self.rows]}
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and a plot of a run.")
    parser.add_argument("result", type=Path, help="from pytest benchmarks/ --benchmark-json, or kept earlier")
    parser.add_argument("--plot", type=Path, help="write a bar plot to this PNG")
    parser.add_argument("--keep", action="store_true", help="store the rows under benchmarks/results/")
    arguments = parser.parse_args()
    result = Result.load(arguments.result)
    print(" | ".join(f"{name} {value}" for name, value in result.machine.items()) + "\n")
    print(table(result.rows))
    if arguments.plot is not None:
        print(f"\n{plot(result.rows, arguments.plot)}")
    if arguments.keep:
        print(f"\n{result.keep()}")


if __name__ == "__main__":
    main()
