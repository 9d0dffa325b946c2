"""Interleaved timing: every round runs every variant once, so that a drifting machine drifts for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from .device import cache_bytes


class ProviderError(RuntimeError):
    """A provider whose result is wrong, or that cannot be checked; it gets no number."""


# What a row may die of without taking the others along; a bug in the benchmark itself is not among them.
FAILURES = (RuntimeError, MemoryError, ValueError, TypeError)


# In the words of PyTorch's allocator on various systems, and of C++.
_NO_MEMORY = ("not enough memory", "can't allocate memory", "bad_alloc")


@dataclass(frozen=True)
class Sample:
    """Seconds of one run of `variant` in `round`, and what the run returned; or the error that ended it.

    What is timed in parts has the seconds of each.
    """

    variant: Hashable
    round: int
    seconds: float | Sequence[float] | None
    result: object = None
    error: str | None = None


class Progress:
    """A line per step: elapsed seconds, the estimate of the whole once there is one, what happens."""

    def __init__(self, started: float):
        self.started, self.total = started, None

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def __call__(self, text: str) -> None:
        total = f" of ~{max(self.total, self.elapsed):.0f}" if self.total else ""
        print(f"[{self.elapsed:6.1f}{total} s] {text}", flush=True)


def describe(error: BaseException) -> str:
    """One line for the table."""
    text = str(error).strip()
    if isinstance(error, ProviderError):
        return text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in text for words in _NO_MEMORY):
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def interleave(
    variants: Mapping[Hashable, Callable],
    rounds: int,
    measure: Callable[[Callable], tuple[float | Sequence[float], object]],
    another: Callable[[int], bool] = lambda done: True,
) -> Iterator[Sample]:
    """Run the variants round robin; each round starts one variant later than the one before.

    Args:
        variants: what to time, by key. One that raises is reported once and left out from then on.
        measure: (function) -> (seconds, the function's result).
        another: called with the number of finished rounds; False ends the run early. Rounds are never cut.
    """
    alive = list(variants)
    for i in range(rounds):
        if i and not another(i):
            return
        for key in alive[i % len(alive) :] + alive[: i % len(alive)] if alive else []:
            try:
                seconds, result = measure(variants[key])
            except FAILURES as error:
                alive.remove(key)
                release()
                yield Sample(key, i, None, error=describe(error))
            else:
                yield Sample(key, i, seconds, result)


def release() -> None:
    """Give cached device memory back after a failure, for the rows that follow."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_cpu(function, clock=time.perf_counter):
    """One run."""
    start = clock()
    result = function()
    return clock() - start, result


def measure_cuda(function):
    """The median of Triton's do_bench (warmed up, caches flushed, device time)."""
    from triton.testing import do_bench

    result = function()
    return do_bench(function, warmup=100, rep=500, return_mode="median") / 1e3, result


class Call(Protocol):
    """A forward pass, and a backward pass of what it returned; without one, `backward` is None."""

    def forward(self) -> torch.Tensor: ...

    backward: Callable[[torch.Tensor], object] | None


def measure_passes_cpu(call: Call, clock=time.perf_counter):
    """One run; seconds of (forward,) or (forward, backward)."""
    times = [clock()]
    output = call.forward()
    times.append(clock())
    if call.backward is not None:
        call.backward(output)
        times.append(clock())
    return tuple(b - a for a, b in pairwise(times)), None


@dataclass(frozen=True)
class Launches:
    """Whether the host kept ahead of the device, so that events timed the device alone.

    Attributes:
        host: median seconds that the host took to launch a run.
        cover: seconds for which the device was kept busy meanwhile.
        late: share of the runs for which that was too short.
    """

    host: float
    cover: float
    late: float


class PassesOnCUDA:
    """As `measure_passes_cpu` with device time: medians of `repeats` runs, each with the L2 cache flushed.

    A kernel of 10 us that Python takes 50 us to launch would be timed as 50. So the device sleeps before each
    run for twice as long as the host needs to launch it. A run whose launches took longer still is left out;
    where that befalls more than half of them, all count, and their times are upper bounds.

    Returns:
        Seconds of (forward,) or (forward, backward), and `Launches`.
    """

    def __init__(self, device: torch.device, repeats: int = 20, clock=time.perf_counter):
        self.repeats, self.clock = repeats, clock
        self.flush = torch.empty(max(2 * cache_bytes(device), 2**28), dtype=torch.int8, device=device)
        self.cycles_per_second = max(_cycles_per_second() for _ in range(3))  # of its highest clock

    def __call__(self, call: Call):
        self._run(call)
        cover = 2 * max(self._run(call)[0] for _ in range(3))
        runs = [self._run(call, cover) for _ in range(self.repeats)]
        hosts, events = zip(*runs, strict=True)
        passes = [[a.elapsed_time(b) / 1e3 for a, b in pairwise(run)] for run in events]
        covered = [times for host, times in zip(hosts, passes, strict=True) if host <= cover]
        late = 1 - len(covered) / len(passes)
        medians = (quantile(times, 0.5) for times in zip(*(passes if late > 0.5 else covered), strict=True))
        return tuple(medians), Launches(quantile(hosts, 0.5), cover, late)

    def _run(self, call: Call, cover: float = 0.0):
        """(seconds that the host took for its launches, events around the passes)."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 if call.backward is None else 3)]
        torch.cuda.synchronize()  # a full queue would make the host wait
        self.flush.zero_()
        torch.cuda._sleep(int(cover * self.cycles_per_second))
        start = self.clock()
        events[0].record()
        output = call.forward()
        events[1].record()
        if call.backward is not None:
            call.backward(output)
            events[2].record()
        host = self.clock() - start
        torch.cuda.synchronize()
        return host, events


def _cycles_per_second(cycles: int = 10_000_000) -> float:
    """The rate at which the current GPU counts the cycles of `torch.cuda._sleep`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)  # the second begins when this one ends, and not with its own launch
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / (start.elapsed_time(end) / 1e3)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The 10 % and 90 % quantiles; the lowest and the highest of fewer than five values."""
    outer = (0.1, 0.9) if len(values) >= 5 else (0, 1)
    return quantile(values, outer[0]), quantile(values, outer[1])


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values, q in [0, 1]."""
    values = sorted(values)
    if not values:
        raise ValueError("a quantile needs at least one value")
    position = q * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (position - low) * (values[high] - values[low])
