"""What CI holds the CPU kernels to: `python -m benchmarks.regression` shows it, `--update` measures and stores it anew.

Update on an otherwise idle machine, and after a change that is meant to cost something; see longmem.bench.regression.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from longmem.bench.measure import Unavailable
from longmem.bench.regression import RATIOS, compiler, instructions, ratio, simd, stored, update


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regression", description="Measured beside stored.")
    parser.add_argument("--update", action="store_true", help="store what is measured")
    parser.add_argument("--only", choices=("ratios", "instructions"), help="one of the two")
    arguments = parser.parse_args()
    kinds = (arguments.only,) if arguments.only else ("ratios", "instructions")
    if arguments.update:
        update(kinds)
        print("stored")
        return
    if "ratios" in kinds:
        kept = stored("ratios", simd())
        for case in RATIOS:
            print(f"{ratio(case):8.2f}  stored {kept.get(case.name, float('nan')):.2f}  {case.name}")
    if "instructions" in kinds:
        counts = stored("instructions", compiler())
        try:
            for op, count in instructions().items():
                print(f"{count:12,}  stored {counts.get(op, float('nan')):,.0f}  instructions of {op}")
        except Unavailable as why:
            print(f"instructions: {why}")


if __name__ == "__main__":
    main()
