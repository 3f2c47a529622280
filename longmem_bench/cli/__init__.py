"""The command `longmem-bench`, also `python -m longmem_bench`. Of this folder `commands` alone loads PyTorch."""

from __future__ import annotations

import sys

from longmem.cli import invoke
from longmem.cli.failures import explained
from longmem.cli.process import prepared_process


def main() -> None:
    """Run the command line and exit, as `longmem` does: every error ends here, in words."""
    with prepared_process() as signals:
        sys.exit(explained(_run, signals.disarm))


def _run() -> None:
    from .app import app

    invoke(app, "longmem-bench")
