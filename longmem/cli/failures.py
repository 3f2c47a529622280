"""The end of a command: every error in words, and the exit status that goes with it.

Errors that the package raises say what was wanted and what came; those of the system, of PyTorch and of other libraries
are translated here. What is left is a bug, and says so.
"""

from __future__ import annotations

import contextlib
import dis
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from signal import SIGINT, SIGPIPE

from .output import close_bars, note
from .process import Stopped

TRACEBACK = "LONGMEM_TRACEBACK"
_OURS = ("longmem", "longmem_kernels", "longmem_bench")


@dataclass(frozen=True)
class Ending:
    """How a command ends.

    Attributes:
        words: printed after "error: "; empty: nothing is printed.
        code: exit status.
        kept: whether to say what was kept: where the same command may succeed, run again.
        plain: printed as it is, for an end that is no error.
    """

    words: str
    code: int = 1
    kept: bool = False
    plain: bool = False


@contextlib.contextmanager
def doing(what: str, kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Name what is being done, for an error that does not say so itself.

    Args:
        what: "loading the backbone x".
        kept: asked after an interruption or a failure of the machine: what is kept, and how to go on.
    """
    try:
        yield
    except BaseException as error:
        if not hasattr(error, "longmem_doing"):
            error.longmem_doing = what  # type: ignore[attr-defined]
        if kept is not None and not hasattr(error, "longmem_kept"):
            error.longmem_kept = kept  # type: ignore[attr-defined]
        raise


def explained(work: Callable[[], None], ended: Callable[[], None]) -> int:
    """Run a command and return its exit status, with every error printed in words.

    Args:
        ended: called when the work has ended; from then on no signal raises anything (`Signals.disarm`).
    """
    error: BaseException | None = None
    try:
        try:
            work()
        except BaseException as raised:
            error = raised
        ended()
    except BaseException as signal:  # it came between the work and its end
        error = signal
    code = _explained(error) or _explained(_raised(_flush))
    _drop_unwritten()
    return code


def _raised(work: Callable[[], None]) -> BaseException | None:
    try:
        work()
    except BaseException as error:
        return error
    return None


def _explained(error: BaseException | None) -> int:
    if error is None:
        return 0
    ending = _ending(error)
    with contextlib.suppress(Exception):
        _say(ending, error)
    return ending.code


def _say(ending: Ending, error: BaseException) -> None:
    close_bars()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if os.environ.get(TRACEBACK, "0") not in ("", "0") and ending.words:
        traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
    if not ending.words:
        return
    process = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
    note(ending.words if ending.plain else f"error{process}: {ending.words}", red=not ending.plain)
    kept = getattr(error, "longmem_kept", None)
    if ending.kept and kept is not None:
        note(kept())


def _ending(error: BaseException) -> Ending:
    for rule in (
        _of_the_user,
        _of_typer,
        _of_memory,
        _of_swallowed_signals,
        _of_imports,
        _of_the_system,
        _of_the_network,
        _of_torch,
        _of_input,
    ):
        ending = rule(error)
        if ending is not None:
            return ending
    where = f" while {error.longmem_doing}" if hasattr(error, "longmem_doing") else ""
    return Ending(
        f"unexpected {type(error).__name__}{where}: {_line(error)}. This is a bug; {TRACEBACK}=1 in front of the"
        " command shows where it happened",
        kept=True,
    )


def _of_the_user(error: BaseException) -> Ending | None:
    """Ctrl-C, a signal, a closed pipe, an exit."""
    if isinstance(error, KeyboardInterrupt):
        said = str(error)  # by who was interrupted: what is kept
        return Ending(f"interrupted: {said}" if said else "interrupted", 128 + SIGINT, kept=not said, plain=True)
    if isinstance(error, Stopped):
        return Ending(f"stopped by {error}", 128 + error.number, kept=True, plain=True)
    if isinstance(error, BrokenPipeError):
        return Ending("", 128 + SIGPIPE)
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return Ending("", error.code or 0)
        return Ending(str(error.code))
    return None


def _of_swallowed_signals(error: BaseException) -> Ending | None:
    """A signal in the middle of an import, which libraries turn into an ImportError of their own."""
    if not isinstance(error, ImportError):
        return None
    signals = [cause for cause in _chain(error) if isinstance(cause, (KeyboardInterrupt, Stopped))]
    return _of_the_user(signals[0]) if signals else None


def _of_typer(error: BaseException) -> Ending | None:
    """Wrong arguments, and typer's own ways to end; by their attributes, since the classes have moved."""
    words = getattr(error, "format_message", None)
    if words is None:
        code = getattr(error, "exit_code", None)
        return Ending("", code) if isinstance(code, int) else None
    context = getattr(error, "ctx", None)
    text = " ".join(words().replace("Value error, ", "").split())
    if not text:  # help was asked for by giving no argument, and has been printed
        return Ending("", 2)
    command = context.command_path if context is not None else "longmem"
    stop = "" if text.endswith((".", "?")) else "."
    return Ending(f"{text}{stop} {command} --help shows what it takes", 2)


_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)


def _of_memory(error: BaseException) -> Ending | None:
    foreign = isinstance(error, RuntimeError) and _MEMORY.search(str(error))
    if not (isinstance(error, MemoryError) or foreign):
        return None
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
    amount = f" for {asked[1]}" if asked else ""
    device = "GPU" if "CUDA" in str(error) else "machine"
    return Ending(
        f"the {device} has no memory{amount}{_while(error)}; fewer --rows, a smaller --segment or --memory-tokens, or"
        " --checkpoint-activations need less",
        kept=True,
    )


def _of_imports(error: BaseException) -> Ending | None:
    if not isinstance(error, ImportError):
        return None
    module = (error.name or "").split(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module in ("", *_OURS):
        return Ending(f"{_line(error)}{_while(error)}")
    package, extra = _extra_of(module)
    if extra is None:
        return Ending(f"{module} is not installed: pip install {package}")
    return Ending(f"{module} is not installed; it comes with the extra {extra!r}: pip install 'longmem[{extra}]'")


def _extra_of(module: str) -> tuple[str, str | None]:
    """The package that brings `module`, and the extra of this one that asks for it, by the installed metadata."""
    from importlib.metadata import PackageNotFoundError, requires

    package = {"faiss": "faiss-cpu"}.get(module, module)
    try:
        wanted = requires("longmem") or []
    except PackageNotFoundError:
        wanted = []
    for requirement in wanted:
        found = re.match(r"([\w.-]+).*\bextra\s*==\s*[\"'](\w+)", requirement)
        if found and found[1].lower().replace("_", "-") == package and found[2] not in _OF_DEVELOPERS:
            return package, found[2]
    return package, None


_OF_DEVELOPERS = ("test", "lint")
_AGAIN = "; free some room, and run the same command again"
_SYSTEM = {
    errno.ENOSPC: "no room left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the system allows (ulimit -f)",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EISDIR: "it is a folder, and a file was wanted",
    errno.ENOTDIR: "a file stands where a folder was wanted",
    errno.EEXIST: "it is there already, and is no folder",
    errno.ENOENT: "there is no such file or folder",
    errno.EMFILE: "too many open files (ulimit -n)",
    errno.ENOMEM: "the machine has no memory for it",
    errno.EIO: "the device failed to read or write",
}
# Within the messages of libraries that are not written in Python.
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_WRITE_FAILED = re.compile(r"No space left on device|PytorchStreamWriter failed|unexpected pos \d+ vs \d+")


def _of_the_system(error: BaseException) -> Ending | None:
    """Files and disks: by the number of the error, wherever in the chain it is."""
    number, path = None, None
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _SYSTEM:
            number, path = cause.errno, cause.filename
            break
        found = _OS_ERROR.search(str(cause))
        if found and int(found[1] or found[2]) in _SYSTEM:
            number = int(found[1] or found[2])
            break
        if _WRITE_FAILED.search(str(cause)):
            number = errno.ENOSPC
            break
    if number is None:
        return None
    place = f"{os.fsdecode(path)}: " if isinstance(path, (str, bytes)) else ""
    full = number in (errno.ENOSPC, errno.EDQUOT)
    machine = full or number in (errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE)
    said = f"{place}{_SYSTEM[number]}{_while(error)}"
    if _is_ours(error):  # it says what happened, and where
        whole = isinstance(error, OSError) and error.strerror
        said = f"{place}{whole}" if whole else str(error)
    return Ending(f"{said}{_AGAIN if full else ''}", kept=machine)


_NETWORK = re.compile(
    r"couldn't connect to|[Nn]ame or service not known|[Tt]emporary failure in name resolution"
    r"|[Nn]etwork is unreachable|Max retries exceeded|offline mode is enabled"
    r"|cannot find the requested files in the local cache"
)


def _of_the_network(error: BaseException) -> Ending | None:
    if _is_ours(error) or not any(_NETWORK.search(str(cause)) for cause in _chain(error)):
        return None
    return Ending(
        f"the network could not be reached{_while(error)}, and what was wanted is not in the local cache; name a folder"
        " with the model's files, or run again with a network"
    )


_TORCH = (
    (r"CUDA driver|no kernel image|CUDA error|cuDNN error|CUBLAS_STATUS", "the GPU, or its driver, failed"),
    (
        r"NCCL|[Gg]loo|Connection (?:closed|reset) by peer|c10d|rendezvous",
        "another process of this run ended or was lost",
    ),
    (r"InvalidCxxCompiler|CppCompileError|C\+\+ compiler|[Bb]ackend compiler failed|inductor", "--compile failed"),
    (r"Overflow when unpacking long", "a number is too large"),
)


def _of_torch(error: BaseException) -> Ending | None:
    """PyTorch's errors that are about the machine."""
    kind = f"{type(error).__module__}.{type(error).__name__}"
    if not isinstance(error, RuntimeError) or _is_ours(error):
        return None
    for pattern, words in _TORCH:
        if re.search(pattern, f"{kind} {error}"):
            return Ending(f"{words}{_while(error)}: {_line(error)}", kept=True)
    return None


def _of_input(error: BaseException) -> Ending | None:
    """Errors that a user can act on: the package's own, and those of libraries about files and values."""
    if _is_ours(error) and not isinstance(error, (AssertionError, NotImplementedError)):
        return Ending(str(error))
    if isinstance(error, (ValueError, OSError)) or type(error).__name__ == "SafetensorError":
        place = getattr(error, "longmem_doing", None)
        return Ending(f"{place}: {_line(error)}" if place else _line(error))
    return None


def _is_ours(error: BaseException) -> bool:
    """True when a `raise` of these packages made it, not a function in C++ or of a library that was called there."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0]
    raised = trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and module in _OURS


def _while(error: BaseException) -> str:
    what = getattr(error, "longmem_doing", None)
    return f" while {what}" if what else ""


def _line(error: BaseException) -> str:
    """The message without line breaks, cut where it is long: libraries append stacks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _flush() -> None:
    """Write what is buffered while an error can still be told: at the interpreter's end it could not."""
    with doing("writing to stdout"):
        sys.stdout.flush()
    sys.stderr.flush()


def _drop_unwritten() -> None:
    """Let the interpreter's own flush succeed where stdout or stderr is closed or full."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(Exception), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
