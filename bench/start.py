"""What both levels begin and end with: the device, the folder of the results, the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import torch

from . import device as devices
from .timing import Progress


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why. Raised before anything is measured."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after which the report was written."""


class Options(Protocol):
    """What the levels' options have in common; `device` None is the GPU if there is one."""

    out: Path
    full: bool
    device: str | None


@dataclass(frozen=True)
class Run:
    """A run that can begin.

    Attributes:
        path: of measurements.csv.
        common: the CSV's columns that are the same in every row.
        others: see `device.others_running`.
    """

    device: torch.device
    progress: Progress
    path: Path
    common: dict
    others: float | None


def open_run(level: str, options: Options, started: float) -> Run:
    """Seed, device and folder of a run.

    Args:
        started: `time.perf_counter()` at the program's start.

    Raises:
        DeviceError: a GPU is present but unusable.
        UsageError: the folder cannot be made or written to.
    """
    progress = Progress(started)
    torch.manual_seed(0)
    device = devices.select(options.device)
    path = options.out / "measurements.csv"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(path if path.exists() else options.out, os.W_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UsageError(
            f"--out must be a folder that can be written to, which {options.out} is not: {reason}."
        )
    others = devices.others_running()
    environment = devices.environment(device)
    progress(f"{environment['device_name']}, {environment['threads']} threads, torch {environment['torch']}")
    common = {
        **environment,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "preset": "full" if options.full else "quick",
        "level": level,
    }
    return Run(device, progress, path, common, others)


@contextmanager
def reported(run: Run, write: Callable[[Path, Path], str], plots: str) -> Iterator[None]:
    """Writes the report of what the block measured, of a block that is ended early too.

    Args:
        write: (CSV, folder) -> the report's text.
        plots: names of the files that `write` leaves beside report.md.

    Raises:
        Interrupted: the block was interrupted.
    """

    def report() -> None:
        print(write(run.path, run.path.parent))
        run.progress(f"wrote {run.path}, report.md{plots}")

    try:
        yield
    except KeyboardInterrupt:
        report()
        raise Interrupted(
            f"interrupted; what was measured is in {run.path.parent}, with its report"
        ) from None
    except devices.DeviceError:  # of the run as a whole
        raise
    except Exception:
        report()
        raise
    report()
