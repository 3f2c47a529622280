"""A training step of the published model, ours beside the published composition.

    python -m benchmarks.official_step                   the published size, one row; some minutes on two cores
    python -m benchmarks.official_step --layers 6        fewer layers of it
    python -m benchmarks.official_step --small           a model of a few million parameters
    python -m benchmarks.official_step --json out.json   the rows, for `python -m benchmarks.report`; README shows the
                                                         newest of benchmarks/results/DEVICE/official-step/

The same weights, tokens and optimiser for every provider, a memory as full as the published arithmetic lets it be, and
the same loss at every step, or no numbers.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see conftest.py

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from longmem.bench import Row, table
from longmem.bench.kernels import kernel_times
from longmem.bench.kernels import table as kernel_table
from longmem.bench.official_step import measure_steps, published, small
from longmem.bench.results import Result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.official_step", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a model of a few million parameters")
    parser.add_argument("--layers", type=int, default=24, help="backbone layers of the published size (default 24)")
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch (default 1)")
    parser.add_argument("--steps", type=int, default=4, help="timed; even, so that half of them evict (default 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write machine, date and rows to this file")
    parser.add_argument("--kernels", action="store_true", help="the times of single kernels (on a CPU: ops) as well")
    options = parser.parse_args(arguments)
    shape = small(options.rows) if options.small else published(options.layers, options.rows)
    found: list[str] = []

    def look_into(row: Row, step: Callable[[], None]) -> None:
        times = kernel_times(step, torch.device(options.device), calls=2)
        found.append(kernel_table(f"{row.provider}, {row.dtype}: ms per step", times, most=20))

    rows = measure_steps(shape, options.steps, options.device, look_into if options.kernels else None)
    result = Result.now(rows, options.device)
    print("\n\n".join([result.headline(), table(rows), *found]))
    if options.json is not None:
        result.save(options.json)


if __name__ == "__main__":
    main()
