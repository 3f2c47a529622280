"""Settings of a command's process before PyTorch is loaded: threads, memory, signals, warnings."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from types import FrameType

from .output import note

# <malloc.h>, in bytes: mallopt takes an int.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_REUSED, _KEPT = 2**30, 3 * 2**28
_ALLOCATOR_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
_SIGNALS = ("SIGTERM", "SIGHUP")


class Stopped(BaseException):
    """A signal asked the process to end. No Exception: nothing but the end of a command should catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def prepared_process() -> Iterator[None]:
    """Quiet threads for the rest of the process; meanwhile, signals and warnings as a command wants them."""
    quiet_threads()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    with _stopping_signals(), _plain_warnings():
        yield


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
def _stopping_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Stopped`, so that a command ends as after Ctrl-C; ignored ones stay ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {}
    for name in _SIGNALS:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the line of code that gave them."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        with contextlib.suppress(OSError):
            note(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
