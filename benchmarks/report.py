"""Tables and a plot of a pytest-benchmark file: `python -m benchmarks.report result.json [--plot out.png]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from longmem.bench import Row, plot, table


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What the run depended on, and its rows: those timed, then those that could not be, sorted into their groups."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist: nothing was timed, or the benchmarks did not run")
    result = json.loads(path.read_text())
    if "not_timed" not in result or "longmem" not in result.get("machine_info", {}):
        raise SystemExit(f"{path} was not written by `pytest benchmarks/ --benchmark-json {path}`")
    timed = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    return result["machine_info"]["longmem"], [Row(**row) for row in (*timed, *result["not_timed"])]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", type=Path, help="written by pytest benchmarks/ --benchmark-json")
    parser.add_argument("--plot", type=Path, help="write a bar plot to this PNG")
    arguments = parser.parse_args()
    machine, rows = load(arguments.result)
    print(" | ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
    print(table(rows))
    if arguments.plot is not None:
        print(f"\n{plot(rows, arguments.plot)}")


if __name__ == "__main__":
    main()
