"""The record that setup.py keeps of the last build (`_build.json` beside the package); why the extension is missing."""

from __future__ import annotations

import json
import platform
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parent


def build_record() -> dict[str, Any]:
    """The record of the last build; empty when nothing was ever built here.

    Keys: `result` (`cpu`, `cuda`, `none` or `failed`), `wanted` (LONGMEM_BUILD), `python`, and with version and path or
    None when there was none, `torch`, `compiler` and `nvcc`; after a failure `reason` (of a compiler's errors the first
    line) and `log` (the file with all of them, or None).
    """
    try:
        record = json.loads((PACKAGE / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def why_missing(name: str) -> str:
    """The reason why Python finds no compiled module `name` in this package, and what to do."""
    lacks = f"the compiled extension {name} was not built"
    install = f"{sys.executable} -m pip install"
    again = f"`{install} {_what_to_install()}`"
    record = build_record()
    if record.get("result") == "failed":
        log = f" (the whole log: {record['log']})" if record.get("log") else ""
        return f"{lacks}: {record.get('reason')}{log} Once that is mended: {again}"
    if record.get("result") == "none":
        return f"{lacks}: it was installed with LONGMEM_BUILD=none; without that, {again}"
    other = next((path for path in sorted(PACKAGE.glob("_C.*")) if not _loads_here(path)), None)
    if other is not None:
        return f"{lacks} for this Python, {_this_python()}: {other} is for another one; {again}"
    installed = _installed_elsewhere()
    if installed is not None:
        return (
            f"{lacks} in {PACKAGE}, which this Python finds before {installed}, where it is: start Python in another"
            f" folder, or install the sources themselves, `{install} -e {PACKAGE.parent}`"
        )
    return f"{lacks}: there is none in {PACKAGE}, and none was installed for this Python, {_this_python()}; {again}"


def why_unloadable(name: str, error: ImportError) -> str:
    """The reason why the compiled module `name` is there and does not load, and what to do."""
    record = build_record()
    made = f", built by {record.get('python')} against PyTorch {record.get('torch')}" if record.get("torch") else ""
    return (
        f"the compiled extension {name} does not load ({error}){made}; this is {_this_python()} with PyTorch"
        f" {torch.__version__} ({Path(torch.__file__).parent}): `{sys.executable} -m pip install --force-reinstall"
        f" --no-deps {_what_to_install()}`"
    )


def _this_python() -> str:
    return f"{sys.executable} ({platform.python_version()})"


def _what_to_install() -> str:
    """The sources when the package lies among them, otherwise `.`: where they are is not known."""
    return f"-e {PACKAGE.parent}" if (PACKAGE.parent / "setup.py").exists() else "."


def _loads_here(extension: Path) -> bool:
    return any(extension.name == f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)


def _installed_elsewhere() -> Path | None:
    """Another copy of this package on Python's path that has an extension."""
    for folder in map(Path, filter(None, sys.path)):
        package = folder / PACKAGE.name
        if package.is_dir() and not package.samefile(PACKAGE) and any(map(_loads_here, package.glob("_C.*"))):
            return package
    return None
