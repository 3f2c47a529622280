"""The command `longmem`, also `python -m longmem`. Modules in this folder, but for `commands`, load no PyTorch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .failures import explained
from .process import prepared_process, reuse_memory

if TYPE_CHECKING:
    from typer import Typer

# What allocates the same tensors step after step. `longmem-bench` measures code as it runs elsewhere.
_LOOPS = (["train"], ["probe-layers"], ["eval"], ["recall"], ["quickstart"])


def main() -> None:
    """Run the command line and exit: 0, 1 after an error, 2 for wrong arguments, 128 + n after signal n.

    Every error ends here, in words (`failures.explained`); LONGMEM_TRACEBACK=1 shows the traceback as well.
    """
    with prepared_process() as signals:
        if sys.argv[1:2] in _LOOPS:
            reuse_memory()
        sys.exit(explained(_run, signals.disarm))


def _run() -> None:
    from .app import app

    invoke(app, "longmem")


def invoke(app: Typer, name: str) -> None:
    """Run the command that this process's arguments name. Raises what goes wrong, for `explained`."""
    from typer.main import get_command

    # Not app(): typer would answer Ctrl-C, closed pipes and its own errors before `explained` sees them.
    command = get_command(app)
    with command.make_context(name, sys.argv[1:]) as context:
        command.invoke(context)
