"""Builds longmem against several PyTorch releases and tests every build, for the table of releases in docs/install.md.

    python tools/torch_matrix.py                            2.11 to 2.14 with this Python
    python tools/torch_matrix.py 2.11.0 2.14.1:python3.12   chosen releases, each with the interpreter behind the colon

Each release has an environment of its own, in which the package is built without CUDA and, where nvcc is found, with it
(no GPU is needed), and tested. Then the oldest's and the newest's builds are tested with all other releases, as they
are. Prints a table last; logs, wheels and environments are in --out. Exits 1 when something failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASES = ["2.11.0", "2.12.1", "2.13.0", "2.14.1"]
NEEDED = ["setuptools>=77", "numpy", "safetensors", "pytest", "expecttest", "hypothesis"]
# The ops against independent oracles, with every implementation that runs here.
TESTS = ["ring_write", "ring_write_float8", "chunk_topk", "memory_attention", "memory_attention_cpp"]
TESTS += ["memory_fused_attention"]
# For the CPU kernels of a build with CUDA, which are the same sources, and for a build that meets another release after
# it has passed with its own: every kernel, few shapes.
FEW_TESTS = ["ring_write_float8", "memory_fused_attention"]
SAME_BUILD = """
from longmem_kernels import _extension
assert _extension.load_error is None, _extension.load_error
assert bool(_extension.build_info()["cuda"]) == {cuda}, _extension.build_info()
"""


@dataclass
class Matrix:
    """Runs the steps and remembers what came of each.

    `before` is put before each build and test, e.g. `["nice"]`. `cells` maps a release and a column to what is shown.
    """

    out: Path
    before: list[str]
    cells: dict[tuple[str, str], str] = field(default_factory=dict)

    def step(self, release: str, column: str, *commands: list[str | Path], cwd: Path = ROOT, build: str = "") -> bool:
        """Run `commands` until one fails, into one log. True when all passed. `build` is their LONGMEM_BUILD."""
        log = self.out / f"{name_of(release)}, {column}.log".replace(" ", "-").replace(",", "")
        passed = True
        with log.open("w") as file:
            for command in commands:
                file.write(f"$ {shlex.join(map(str, command))}\n")
                file.flush()
                environment = {**os.environ, **({"LONGMEM_BUILD": build} if build else {})}
                before = [] if column == "install" else self.before
                run = subprocess.run([*before, *command], cwd=cwd, env=environment, stdout=file, stderr=file)
                passed = run.returncode == 0
                if not passed:
                    break
        told = re.findall(r"\d+ passed", log.read_text())
        self.cells[release, column] = (told[-1] if told else "yes") if passed else "FAILED"
        print(f"{release}, {column}: {self.cells[release, column]} ({log})", flush=True)
        return passed

    def prepare(self, release: str, torch_args: list[str]) -> bool:
        version, _, interpreter = release.partition(":")
        python, pip = self.python(release), [self.python(release), "-m", "pip", "install"]
        create = [] if python.exists() else [[interpreter or sys.executable, "-m", "venv", python.parent.parent]]
        return self.step(
            release, "install", *create, [*pip, "--upgrade", "pip"], [*pip, f"torch=={version}", *torch_args],
            [*pip, *NEEDED],
        )  # fmt: skip

    def build(self, release: str, build: str) -> bool:
        wheels, sources = self.wheels(release, build), self.out / "sources"
        for folder in (wheels, sources):
            shutil.rmtree(folder, ignore_errors=True)
        # A copy, so that nothing is left in the sources, and nothing that was left there is used.
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "out", "*.so", "*.egg-info", "_build.json")
        shutil.copytree(ROOT, sources, ignore=ignored)
        pip = [self.python(release), "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, sources]
        return self.step(release, f"build {build}", pip, build=build)

    def test(self, release: str, column: str, wheel: Path, tests: list[str], cuda: bool) -> bool:
        python = self.python(release)
        return self.step(
            release,
            column,
            [python, "-m", "pip", "install", "--force-reinstall", "--no-deps", wheel],
            [python, "-m", "longmem_kernels.info"],
            [python, "-c", SAME_BUILD.format(cuda=cuda)],
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"test_{name}.py" for name in tests)],
            cwd=self.out / "tests",  # beside no sources: what was installed is what is imported
        )

    def python(self, release: str) -> Path:
        return self.out / f"torch-{name_of(release)}" / "bin" / "python"

    def wheels(self, release: str, build: str) -> Path:
        return self.out / f"wheel-{name_of(release)}-{build}"

    def wheel(self, release: str, build: str) -> Path:
        return next(self.wheels(release, build).glob("*.whl"))

    def table(self, releases: list[str]) -> str:
        columns = list(dict.fromkeys(column for _, column in self.cells if column != "install"))
        rows = [["PyTorch", *columns], ["---"] * (len(columns) + 1)]
        rows += [[release, *(self.cells.get((release, column), "-") for column in columns)] for release in releases]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def name_of(release: str) -> str:
    return re.sub(r"\W+", "-", release.replace(".", "_")).replace("_", ".")


def run(matrix: Matrix, releases: list[str], builds: list[str], torch_args: list[str]) -> None:
    shutil.rmtree(matrix.out / "tests", ignore_errors=True)
    shutil.copytree(ROOT / "tests", matrix.out / "tests")
    shutil.copy(ROOT / "pyproject.toml", matrix.out)
    ready = [release for release in releases if matrix.prepare(release, torch_args)]
    built = []
    for release in ready:
        for build in builds:
            if matrix.build(release, build):
                built.append((release, build))
                tests = TESTS if build == "cpu" else FEW_TESTS
                matrix.test(release, f"tests {build}", matrix.wheel(release, build), tests, build == "cuda")
    for maker, build in built:
        for release in ready:
            if maker in (ready[0], ready[-1]) and release != maker:
                wheel = matrix.wheel(maker, build)
                matrix.test(release, f"tests {build} of {maker}", wheel, FEW_TESTS, build == "cuda")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=RELEASES, help="e.g. 2.13.0, or 2.13.0:python3.12")
    parser.add_argument("--builds", nargs="+", choices=["cpu", "cuda"], help="default: cpu, and cuda where nvcc is")
    parser.add_argument(
        "--torch-args", type=shlex.split, default=[], metavar="ARGS",
        help="more arguments for pip install torch, e.g. '--index-url https://download.pytorch.org/whl/cpu', which"
        " takes 1 GB a release where PyTorch built for CUDA takes 5",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "out/torch_matrix")
    parser.add_argument("--before", type=shlex.split, default=[], metavar="COMMAND", help="e.g. nice")
    parser.add_argument("--keep", action="store_true", help="keep the environments for another run")
    args = parser.parse_args()
    wrong = [release for release in args.releases if not re.fullmatch(r"\d+\.\d+\.\d+(:.+)?", release)]
    if wrong:
        parser.error(f"a release looks like 2.13.0 or 2.13.0:python3.12, got {wrong[0]!r}")
    if not args.builds and not shutil.which("nvcc"):
        print("no nvcc on PATH: building without CUDA alone")
    builds = args.builds or (["cpu", "cuda"] if shutil.which("nvcc") else ["cpu"])
    args.out.mkdir(parents=True, exist_ok=True)
    matrix = Matrix(args.out.resolve(), args.before)
    try:
        run(matrix, args.releases, builds, args.torch_args)
    finally:
        print(f"\n{matrix.table(args.releases)}")
        if not args.keep:
            for release in args.releases:
                shutil.rmtree(matrix.python(release).parent.parent, ignore_errors=True)
    return int("FAILED" in matrix.cells.values())


if __name__ == "__main__":
    sys.exit(main())
