"""Tables and plots of a benchmark run: `python -m benchmarks.report result.json [--plot out.png] [--keep]`.

Reads what `pytest benchmarks/ --benchmark-json` or `longmem bench --json` wrote, or a result kept earlier in
benchmarks/results/<device>/<date>-<commit>.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longmem.bench import plot, table
from longmem.bench.results import Result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and a plot of a run.")
    parser.add_argument("result", type=Path, help="from pytest benchmarks/ --benchmark-json, or kept earlier")
    parser.add_argument("--plot", type=Path, help="write a bar plot to this PNG")
    parser.add_argument("--keep", action="store_true", help="store the rows under benchmarks/results/")
    arguments = parser.parse_args()
    try:
        result = Result.load(arguments.result)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"{result.headline()}\n\n{table(result.rows)}")
    if arguments.plot is not None:
        print(f"\n{plot([row for row in result.rows if not row.sweep], arguments.plot, date=result.date)}")
    if arguments.keep:
        print(f"\n{result.keep()}")


if __name__ == "__main__":
    main()
