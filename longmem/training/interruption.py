"""Signals that ask a run to end: noted while a step is under way, obeyed when it is over."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# SIGHUP comes when the terminal is closed; Windows has none.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interruption:
    """While a `with` block runs, the first signal that asks the process to end is noted instead of obeyed.

    A second Ctrl-C is obeyed at once. Signals that are ignored stay ignored, and outside of the main thread, which
    alone may handle signals, nothing is changed.

    Attributes:
        number: of the signal that came; 0: none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # None: a handler that is not Python's
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def is_fatal(self, number: int) -> bool:
        """True when the signal, obeyed, ends the process without an exception."""
        return bool(self._before.get(number, signal.getsignal(number)) is signal.SIG_DFL)

    def obey(self, number: int) -> None:
        """Do what the signal would have done, had it not been noted. Returns where that does not end anything."""
        self.number = 0
        if number not in self._before:  # it came to another process of the run
            signal.raise_signal(number)
            return
        signal.signal(number, self._before[number])
        try:
            signal.raise_signal(number)
        finally:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.number:
            self.obey(number)
        else:
            self.number = self.number or number
