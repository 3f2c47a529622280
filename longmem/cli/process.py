"""Settings of a command's process before PyTorch is loaded: threads, memory, signals, warnings."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from types import FrameType

from .output import note

# <malloc.h>, in bytes: mallopt takes an int.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_REUSED, _KEPT = 2**30, 3 * 2**28
_ALLOCATOR_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_ECHO = 1.0  # seconds: a launcher passes on what the terminal sent already, and people press twice


class Stopped(BaseException):
    """A signal asked the process to end. No Exception: nothing but the end of a command should catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """SIGTERM and SIGHUP raise `Stopped` and SIGINT `KeyboardInterrupt`, once: so that a command ends in words.

    An exception while it ends would leave it with a traceback. So a second signal ends the process at once, as does a
    first one after `disarm`; one that comes within a second of the first is taken for the same.

    Ignored signals, and those that somebody else handles, stay as they are. Outside of the `with` block signals end the
    process without a word: Python's own handler of SIGINT would print a traceback, and the process is about to end.
    """

    def __init__(self) -> None:
        self._armed = True
        self._came = -math.inf

    def __enter__(self) -> Signals:
        self._numbers = []
        for name in _SIGNALS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._numbers.append(number)
                signal.signal(number, self._obey)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)

    def disarm(self) -> None:
        """The command has ended, and is about to say how."""
        self._armed = False

    def _obey(self, number: int, _: FrameType | None) -> None:
        before, self._came = self._came, time.monotonic()
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)
        if self._came - before > _ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextlib.contextmanager
def prepared_process() -> Iterator[Signals]:
    """Quiet threads for the rest of the process; meanwhile, signals and warnings as a command wants them."""
    quiet_threads()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    with Signals() as signals, _plain_warnings():
        yield signals


def quiet_threads() -> None:
    """Let OpenMP threads sleep while they wait, unless OMP_WAIT_POLICY says otherwise.

    Waiting threads spin by default, and take the processor from whoever else works: another process, or the thread pool
    of FAISS. The OpenMP runtime reads the variable when PyTorch loads it: afterwards this has no effect.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def reuse_memory() -> bool:
    """Let glibc keep freed tensors of up to 1 GiB for the next ones, unless the environment sets its allocator.

    A training step allocates the same tensors again and again. By default glibc returns the large ones to the system,
    which zeroes their pages anew each time: a sixth of the processor time of a step of SmolLM2. Reuse costs memory in
    turn, since a place that was freed is not always the size of what comes next.

    Returns whether it was done: not with another allocator or C library.
    """
    chosen = any(name in os.environ for name in _ALLOCATOR_SETTINGS) or "malloc" in os.environ.get("LD_PRELOAD", "")
    if chosen or not _is_glibc():
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _REUSED) and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT))


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the line of code that gave them."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        with contextlib.suppress(OSError):
            note(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
