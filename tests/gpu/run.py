"""Everything that needs a GPU, one step after the other, packed into one file: what `make gpu` runs.

    python tests/gpu/run.py [--rehearse]

A step that fails, hangs or cannot start is noted and the others run. Ctrl-C ends the run and packs what is
there. ``--rehearse`` goes through all of it on the CPU, small. Standard library only: nothing is installed yet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten

ROOT = Path(__file__).parents[2]
HERE = Path("tests/gpu")
FOLDER = Path("gpu-results")
PYTHON = ".venv/bin/python"
MINUTE = 60
GRACE = 60  # seconds in which a step that is ended can put down what it has


@dataclass(frozen=True)
class Step:
    """A command with its limit of time; `skip` says why it is not run."""

    name: str
    command: list[str] = field(default_factory=list)
    seconds: float = 60 * MINUTE
    environment: dict[str, str] = field(default_factory=dict)
    skip: str = ""
    output: str = ""  # a file for standard output; otherwise it goes into the log

    @property
    def log(self) -> str:
        return slug(self.name) + ".log"


@dataclass(frozen=True)
class Result:
    name: str
    outcome: str  # ok, failed, timed out, skipped, interrupted
    seconds: float
    note: str


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# --- steps ------------------------------------------------------------------------------------------------


def preparation(rehearse: bool) -> list[Step]:
    stamps = [".venv/stamps/dev", ".venv/stamps/native"]  # [dev] has all of [bench]
    environment = [PYTHON, str(HERE / "environment.py"), str(FOLDER / "environment.json")]
    return [
        Step("install", ["make", "--silent", *stamps]),
        Step("environment", environment + ["--rehearse"] * rehearse, 5 * MINUTE),
    ]


def measurements(environment: dict, rehearse: bool) -> Iterator[Step]:
    """What is run once the environment is known."""

    def pytest(name: str, file: str, *before: str, **variables: str) -> Step:
        junit = FOLDER / f"{slug(name)}.xml"
        command = [*before, PYTHON, "-m", "pytest", "-vv", "-rs", "-n", "0", "-p", "no:cacheprovider"]
        # A test that hangs shows where; seconds of compilation are properties in the XML.
        command += ["-o", "faulthandler_timeout=600", "-o", "junit_family=xunit1", f"--junitxml={junit}"]
        command += ["--durations=10"]
        command += ["--device", "cpu" if rehearse else "cuda", str(HERE / file)]
        return Step(name, command, environment=variables)

    # A process for each file: an illegal access ends all that a process has on the GPU.
    for file in sorted(path.name for path in (ROOT / HERE).glob("test_*.py")):
        yield pytest(f"device tests: {file[5:-3]}", file)

    watched = "test_sanitizers.py"
    sanitizers = {
        "overflow": pytest("sanitizer: overflow", watched, TRITON_DEBUG="1", AUDIOMAE_CHECK="1"),
        "consan": pytest("sanitizer: consan", watched, TRITON_INSTRUMENTATION_MODE="consan"),
        "gsan": pytest("sanitizer: gsan", watched, TRITON_INSTRUMENTATION_MODE="gsan"),
    }
    for tool in ("memcheck", "racecheck"):
        # Memory that PyTorch keeps for later counts as allocated: give it back.
        sanitizers[tool] = pytest(
            f"sanitizer: {tool}",
            watched,
            *("compute-sanitizer", "--tool", tool, "--error-exitcode", "1"),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
    for tool, step in sanitizers.items():
        reason = environment["sanitizers"][tool]
        yield Step(step.name, skip=reason) if reason else step

    def bench(level: str, minutes: int, *tiny: str, full: bool = True) -> Step:
        name = f"benchmark: {level}" + ", all" * (full and level == "models")
        arguments = ["--device", "cpu", "--threads", "1", "--rounds", "1", "--batch-size", "1", *tiny]
        arguments = arguments if rehearse else ["--device", "cuda", *["--full"] * full]
        command = [PYTHON, "-m", "bench", level, "--out", str(FOLDER / slug(name)), *arguments]
        return Step(name, command, minutes * MINUTE)

    tiny = ("--models", "audiomae_small", "--dtypes", "fp32", "--frames", "64")
    yield bench("models", 30, *tiny, full=False)
    # 81 cases: up to 20 seconds of timing for each, and what compiling them afresh takes.
    yield bench("kernels", 180, "--ops", "unshuffle", "--dtypes", "fp32")
    # A fresh process for each of some 1,400 rows. Out of time it stops as for Ctrl-C, and reports what it has.
    yield bench("models", 240, *tiny)

    inspect = [PYTHON, "-m", "audiomae_kernels.inspect", "--targets", environment["target"]]
    inspect += ["--quick"] if rehearse else ["--processes", str(min(8, os.cpu_count() or 1))]
    reason = environment["why_no_table"]
    yield Step("table of binaries", inspect, skip=reason, output="binaries.md")


# --- running ----------------------------------------------------------------------------------------------


def stop(process: subprocess.Popen) -> None:
    """End the process and all that it started; a second Ctrl-C ends its grace."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, ending)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(GRACE)


def execute(step: Step, folder: Path) -> tuple[str, str]:
    """Run it; (outcome, note). What it says goes to a file in `folder`."""
    if step.skip:
        return "skipped", step.skip
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"PYTHONUNBUFFERED": "1"} | step.environment
    log = folder / step.log
    with contextlib.ExitStack() as files:
        errors = files.enter_context(log.open("w"))
        output = files.enter_context((folder / step.output).open("w")) if step.output else errors
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            return "failed", f"it did not start: {error}"
        try:
            code = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            return "timed out", f"ended after {step.seconds:g} s"
        except KeyboardInterrupt:
            stop(process)
            return "interrupted", ""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = said[-1].strip("= ") if said else ""
    return ("failed", f"exit code {code}; {last}") if code else ("ok", last)


def run(steps: Iterable[Step], folder: Path) -> list[Result]:
    """One after the other, whatever becomes of each; Ctrl-C ends the list."""
    results = []
    for step in steps:
        start = time.monotonic()
        print(f"{step.name} ({folder.name}/{step.log})", end=" ... ", flush=True)
        try:
            outcome, note = execute(step, folder)
        except KeyboardInterrupt:
            outcome, note = "interrupted", ""
        results.append(Result(step.name, outcome, time.monotonic() - start, note))
        print(f"{outcome} after {results[-1].seconds:.0f} s", flush=True)
        if outcome == "interrupted":
            break
    return results


def table(results: list[Result]) -> str:
    rows = [("step", "outcome", "seconds", "")]
    rows += [(r.name, r.outcome, f"{r.seconds:.0f}", shorten(r.note, 100)) for r in results]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    )


def why_nothing(results: list[Result], folder: Path) -> str:
    """A sentence for a run that ended before its environment was known."""
    first = next((result for result in results if result.outcome != "ok"), results[-1])
    if first.name == "environment" and first.outcome == "failed":
        return first.note.removeprefix("exit code 1; ")
    log = f"{folder.name}/{slug(first.name)}.log"
    return f"Nothing was measured, because of the step {first.name!r}: {first.outcome} (see {log})."


def pack(folder: Path, results: list[Result], environment: dict, target: Path) -> Path:
    """`folder` with a summary of the results as gpu-results-<device>-<commit>.tar.gz in `target`."""
    (folder / "summary.txt").write_text(table(results) + "\n")
    (folder / "summary.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    commit = environment["commit"] + "-dirty" * environment["dirty"]
    name = f"gpu-results-{slug(environment['device'])}-{commit or 'unknown'}"
    archive = target / f"{name}.tar.gz"
    unfinished = archive.with_suffix(".part")
    with tarfile.open(unfinished, "w:gz") as tar:
        tar.add(folder, name)
    return unfinished.replace(archive)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="all steps on the CPU, small")
    args = parser.parse_args(argv)
    # A connection that breaks is a Ctrl-C, except under nohup; shells start background jobs without SIGINT.
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if ending != signal.SIGHUP or signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, signal.default_int_handler)
    folder = ROOT / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    results = run(preparation(args.rehearse), folder)
    written = folder / "environment.json"
    if not written.exists():
        print(f"\n{why_nothing(results, folder)}")
        return 1
    environment = json.loads(written.read_text())
    if results[-1].outcome != "interrupted":
        results += run(measurements(environment, args.rehearse), folder)
    archive = pack(folder, results, environment, ROOT)
    print(f"\n{table(results)}\n")
    print("Please attach this file to an issue of the repository that you cloned:")
    print(archive.relative_to(ROOT))
    return 0 if all(result.outcome in ("ok", "skipped") for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
