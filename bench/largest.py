"""`--largest-batch`: the largest batch of each row that a budget of memory holds, found in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from audiomae.words import plural

from . import device as devices
from . import report, results
from .memory import peak_bytes
from .models import Options
from .registry import DEFAULT_MODELS, FULL_GROUPS, Case, cases, quick_points
from .start import UsageError, open_run, reported

FREE_SHARE = 0.9  # of the free memory, where no budget is given
# The search ends when the smallest batch that does not fit is at most so much larger than the largest that does: the
# peaks of two runs of one step differ by about as much.
PRECISION = 1 / 64
MAX_BATCH = 1 << 16


@dataclass
class Search:
    """Bisection over batch sizes, led by the line through the two largest peaks that fit.

    Attributes:
        peaks: of the batches that fit, bytes.
        above: the smallest batch that does not, or one more than there may be.
    """

    budget: int
    peaks: dict[int, int] = field(default_factory=dict)
    above: int = MAX_BATCH + 1

    @property
    def largest(self) -> int:
        return max(self.peaks, default=0)

    @property
    def per_clip(self) -> float | None:
        """Bytes that a clip more takes."""
        if len(self.peaks) < 2:
            return None
        a, b = sorted(self.peaks)[-2:]
        return (self.peaks[b] - self.peaks[a]) / (b - a)

    def next(self) -> int | None:
        """The batch to try, None when the search has ended."""
        low = self.largest
        step = max(1, int(low * PRECISION))
        if self.above - low <= step:
            return None
        if low < 2:
            return low + 1
        slope = self.per_clip
        grown = slope is not None and slope > 0  # else too small to be seen beside the weights
        guess = low + int((self.budget - self.peaks[low]) / slope) if grown else 2 * low
        if guess >= self.above:  # the line was refuted
            guess = (low + self.above) // 2
        # A line through small batches can be far off: no step goes further than eight times.
        return min(max(guess, low + step), 8 * low, self.above - 1)

    def add(self, batch: int, peak: int | None) -> None:
        """`peak` is None where the process met its limit."""
        if peak is not None and peak <= self.budget:
            self.peaks[batch] = peak
        else:
            self.above = min(self.above, batch)


def search(case: Case, budget: int, measure: Callable[[Case], int], tried=lambda batch, peak: None) -> Search:
    """The largest batch of a case whose peak keeps to the budget.

    Args:
        measure: a case to its peak; raises MemoryError where it met its limit.
        tried: told of each batch and its peak.
    """
    found = Search(budget)
    while (batch := found.next()) is not None:
        try:
            peak = measure(replace(case, batch=batch))
        except MemoryError:
            peak = None
        found.add(batch, peak)
        tried(batch, peak)
    return found


def run(options: Options, started: float, budget: int | None) -> Path:
    """Search for every row; write measurements.csv and report.md into `options.out`; return the CSV's path.

    Args:
        budget: bytes; None for nine tenths of what is free. A process may not allocate more, so that a step which
            needs more fails alone.

    Raises:
        DeviceError: a GPU is present but unusable.
        UsageError: `options.out` cannot be written to, or the budget is more than there is.
        Interrupted: by Ctrl-C; the report holds what was found.
    """
    start = open_run("models", options, started)
    device, progress = start.device, start.progress
    free = devices.free_memory(device)
    if free is None and budget is None:
        raise UsageError("this system does not say how much memory is free: give --memory-budget GB.")
    if budget is not None and free is not None and budget > free:
        raise UsageError(
            f"--memory-budget is {budget / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: give less, or free some."
        )
    budget = budget or int(FREE_SHARE * free)
    models = options.models or (
        tuple(dict.fromkeys(name for group in FULL_GROUPS for name in group))
        if options.full
        else DEFAULT_MODELS
    )
    points = quick_points(1, options.modes, options.frames, options.mask_ratios, None)
    rows = [
        row for p in points for row in cases(models, options.dtypes, p, options.providers, options.overrides)
    ]
    progress(f"{plural(len(rows), 'row')}, a budget of {budget / 1e9:.2f} GB each")

    def measure(case: Case) -> int:
        return peak_bytes(case, device.type, torch.get_num_threads(), case.frames, budget)

    with (
        reported(start, report.write, ""),
        results.Writer(start.path, start.common) as write,
    ):
        write.add("others_running", start.others)
        write.add("budget", budget, "bytes")
        for number, case in enumerate(rows, start=1):
            columns = case.columns()

            def tried(batch, peak, columns=columns, case=case):
                write.add("trial", peak, "bytes", **{**columns, "batch": batch})
                outcome = "does not fit" if peak is None or peak > budget else "fits"
                size = "" if peak is None else f", {peak / 1e6:,.0f} MB"
                progress(f"{case.label}, {case.mode}: {plural(batch, 'clip')}{size}: {outcome}")

            progress(f"row {number} of {len(rows)}")
            add = partial(write.add, **columns)
            try:
                found = search(case, budget, measure, tried)
            except RuntimeError as error:
                add("error", None, note=str(error))
                progress(f"{case.label}: {error}")
                continue
            add("largest_batch", found.largest, "clips")
            if found.peaks:
                add("largest_peak", found.peaks[found.largest], "bytes")
            if found.per_clip is not None:
                add("bytes_per_clip", found.per_clip, "bytes")
    return start.path
