"""Interleaved timing: every round runs every variant once, so that a drifting machine drifts for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


class ProviderError(RuntimeError):
    """A provider whose result is wrong, or that cannot be checked; it gets no number."""


# What a row may die of without taking the others along; a bug in the benchmark itself is not among them.
FAILURES = (RuntimeError, MemoryError, ValueError, TypeError)


@dataclass(frozen=True)
class Sample:
    """Seconds of one run of `variant` in `round`, and what the run returned; or the error that ended it."""

    variant: Hashable
    round: int
    seconds: float | None
    result: object = None
    error: str | None = None


def describe(error: BaseException) -> str:
    """One line for the table."""
    text = str(error).strip()
    if isinstance(error, ProviderError):
        return text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def interleave(
    variants: Mapping[Hashable, Callable[[], object]],
    rounds: int,
    measure: Callable[[Callable[[], object]], tuple[float, object]],
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


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values, q in [0, 1]."""
    values = sorted(values)
    if not values:
        raise ValueError("a quantile needs at least one value")
    position = q * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (position - low) * (values[high] - values[low])
