"""Runs groups of commands within a time, keeps what came out of them, and sums them up in one table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDEST = 320  # characters of a line of the table's last column
GRACE = 10.0  # seconds from an interrupt to the end of a step's time, at most


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        command: "{minutes}" in it becomes the time it has, less a tenth.
        most: seconds it may take; less where its group has less.
        least: seconds below which it is not begun.
        report: from what it printed to what the table says of it, by default the last line.
        needs: why it cannot run here, or None.
    """

    name: str
    command: Sequence[str]
    most: float = 600.0
    least: float = 5.0
    environment: Mapping[str, str] = field(default_factory=dict)
    report: Callable[[str], list[str]] = lambda text: text.strip().splitlines()[-1:]
    needs: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Group:
    """Stages one after another; the steps of a stage at once. Seconds: see `allotted`."""

    name: str
    about: str
    least: float
    most: float
    stages: Sequence[Sequence[Step]]


@dataclass(frozen=True)
class Outcome:
    """`status`: passed, failed, cut (its time was over) or skipped."""

    group: str
    step: str
    status: str
    seconds: float
    lines: list[str]


class Check:
    """Runs groups, keeps what came out of them, and rewrites it after every step."""

    def __init__(self, out: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.out, self.clock, self.outcomes = out, clock, list[Outcome]()
        self._running: list[subprocess.Popen[str]] = []
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu_check.log").write_text("")

    def run(self, groups: Sequence[Group], seconds: float) -> None:
        """All groups in order, within `seconds`."""
        end, waiting = self.clock() + seconds, list(groups)
        try:
            while waiting:
                group = waiting.pop(0)
                left = end - self.clock()
                allowed = allotted(group, waiting, left)
                if allowed is None:
                    why = f"{max(left, 0):.0f} s were left, it needs {group.least:.0f}"
                    self._add(Outcome(group.name, "-", "skipped", 0.0, [why]))
                    continue
                self._group(group, self.clock() + allowed)
        except KeyboardInterrupt:
            for process in self._running:
                _end(process, signal.SIGKILL)
            for group in waiting:
                self._add(Outcome(group.name, "-", "skipped", 0.0, ["interrupted before it"]))

    def _group(self, group: Group, end: float) -> None:
        print(f"== {group.name} ({end - self.clock():.0f} s): {group.about}", flush=True)
        for stage in group.stages:
            begun = [(step, *self._begin(group, step, end)) for step in stage]
            for step, begin, running in begun:
                if running is not None:
                    process, log = running
                    self._finish(group, step, process, log, begin, min(begin + step.most, end))

    def _begin(self, group: Group, step: Step, end: float) -> tuple[float, tuple[subprocess.Popen[str], Path] | None]:
        begin = self.clock()
        why = step.needs()
        if why is None and end - begin < step.least:
            why = f"{max(end - begin, 0):.0f} s were left, it needs {step.least:.0f}"
        if why is not None:
            self._add(Outcome(group.name, step.name, "skipped", 0.0, [why]))
            return begin, None
        handle, name = tempfile.mkstemp(prefix=f"gpu_check_{step.name}_")
        # This checkout also where nothing could be installed.
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        ours = {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", "PYTHONPATH": path}
        environment = {**os.environ, **ours, **step.environment}
        minutes = f"{0.9 * min(step.most, end - begin) / 60:.2f}"
        command = [word.replace("{minutes}", minutes) for word in step.command]
        with os.fdopen(handle, "w") as log:
            try:
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
                    cwd=ROOT, env=environment, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self._add(Outcome(group.name, step.name, "failed", 0.0, [str(error)]))
                return begin, None
        self._running.append(process)
        return begin, (process, Path(name))

    def _finish(
        self, group: Group, step: Step, process: subprocess.Popen[str], log: Path, begin: float, end: float
    ) -> None:
        status = "passed"
        try:
            grace = min(GRACE, 0.25 * (end - begin))
            code = process.wait(max(0.0, end - grace - self.clock()))
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "cut"
            process.send_signal(signal.SIGINT)  # to it alone: workers of pytest-xdist are its to end
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        _end(process, signal.SIGKILL)  # what it may have left running
        self._running.remove(process)
        text = log.read_text(errors="replace")
        log.unlink()
        seconds = self.clock() - begin
        with (self.out / "gpu_check.log").open("a") as whole:
            whole.write(
                f"\n===== {group.name} {step.name}: {status}, {seconds:.0f} s: {' '.join(step.command)}\n{text}"
            )
        lines = step.report(text) if text.strip() else ["it printed nothing"]
        if status == "failed" and not lines:
            lines = text.strip().splitlines()[-1:]
        self._add(Outcome(group.name, step.name, status, seconds, [line.strip()[:WIDEST] for line in lines]))

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if outcome.step != "-" or outcome.status != "skipped":
            first = outcome.lines[0] if outcome.lines else ""
            print(f"   {outcome.step}: {outcome.status}, {outcome.seconds:.0f} s. {first}", flush=True)
        content = {"failed": self.failed, "steps": [asdict(one) for one in self.outcomes]}
        (self.out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.out / "table.txt").write_text(table(self.outcomes) + "\n")

    @property
    def failed(self) -> bool:
        return any(one.status == "failed" for one in self.outcomes)


def allotted(group: Group, later: Sequence[Group], left: float) -> float | None:
    """Seconds for `group` of the `left` ones: all but the least of the `later` ones, as many of them as fit in their
    order; None when its own least does not fit."""
    if left < group.least:
        return None
    spare = left - group.least
    for other in later:
        if other.least > spare:
            break
        spare -= other.least
    return min(group.most, group.least + spare)


def _end(process: subprocess.Popen[str], how: signal.Signals) -> None:
    """The process and all it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    process.wait()


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per outcome, further lines of its report below it."""
    lines = [("group", "step", "status", "s", "result")]
    for one in outcomes:
        first, *others = one.lines or [""]
        lines.append((one.group, one.step, one.status, f"{one.seconds:.0f}", first))
        lines += [("", "", "", "", line) for line in others]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in lines
    )


# What a step printed, in a line or a few


def of_pytest(text: str, most: int = 8) -> list[str]:
    """The last summary line, then names of tests that failed."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    ends = re.findall(r"^=* ?(\d+ (?:passed|failed|skipped|error)[^=\n]*?)(?: =*)?$", plain, re.M)
    failed = list(dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) (\S+)", plain, re.M)))
    lines = [ends[-1].strip()] if ends else plain.strip().splitlines()[-1:]
    if len(failed) > most:
        failed = [*failed[:most], f"and {len(failed) - most} more"]
    return [*lines, *failed]


def of_sanitizer(text: str) -> list[str]:
    """The tool's own summary and its first complaint, else the last kernel that ran; and kernels that did not."""
    errors = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", text)
    first = re.search(r"^========= (?!COMPUTE|ERROR SUMMARY|RACECHECK SUMMARY)(\S.*)$", text, re.M)
    found = [errors[-1]] if errors else text.strip().splitlines()[-1:]
    complaint = [first[1]] if first and errors and " 0 " not in errors[-1] else []
    return [*found, *complaint, *re.findall(r"^\w+ (?:cuda|triton): not run, .*$", text, re.M)]


def of_rows(text: str) -> list[str]:
    """Of a benchmark: the operations with their tokens, and the rows of each as they were said."""
    shapes: dict[str, list[str]] = {}
    for op, shape, provider, said in re.findall(r"^(\w+) \[([^\]]*)\] (.+?): (.+)$", text, re.M):
        words = said.replace(" in a graph, ", " (graph; host ").replace(" by the host's clock", ")")
        tokens = next((size for size in shape.split() if size.startswith("T=")), "")
        shapes.setdefault(f"{op} {tokens}", []).append(f"{provider} {words}")
    lines = [f"{shape}: {'; '.join(rows)}" for shape, rows in shapes.items()]
    return [*_wrong(text), *lines] or text.strip().splitlines()[-1:]


def of_sweeps(text: str) -> list[str]:
    """Of each sweep the sizes, and how many times faster than the best baseline ours is."""
    lines, heading, sizes = [], "", list[str]()
    for line in text.splitlines():
        if found := re.match(r"(\w+, [^\[]+) \[", line):
            heading = found[1]
        elif line.startswith("ms "):
            sizes = line.split()[1:]
        elif line.startswith("ours x best") and heading:
            pairs = zip(sizes, line.split()[3:], strict=False)
            lines.append(f"{heading}: {', '.join(f'{size} {times}x' for size, times in pairs)}")
    return [*_wrong(text), *lines] or of_rows(text)


def _wrong(text: str) -> list[str]:
    return re.findall(r"^(?:WRONG|error): .*$", text, re.M)


def of_tuning(text: str) -> list[str]:
    """Of each ranking what the table has and the winner."""
    lines = []
    for block in re.split(r"\n(?=\w+ \(sm_\d+; )", "\n" + text):
        heading = re.match(r"\n?(\w+) \(sm_\d+; ([^)]*)\) in (\w+)", block)
        if heading is None:
            continue
        rows = dict(re.findall(r"^(table|winner) +(.*)$", block, re.M))
        row = rows.get("winner") or rows.get("table", "nothing ran")
        better = "winner" if "winner" in rows else "table stays"
        lines.append(f"{heading[1]} ({heading[2]}): {better}: {' '.join(row.split())}")
    return lines or text.strip().splitlines()[-1:]


def of_last(count: int) -> Callable[[str], list[str]]:
    return lambda text: text.strip().splitlines()[-count:]
