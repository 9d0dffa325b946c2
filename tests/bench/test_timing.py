"""Interleaving, on a clock of its own."""

import math

import pytest
import torch

from bench.models import compare
from bench.timing import ProviderError, interleave, measure_cpu, quantile


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def task(self, seconds, result=None):
        def run():
            self.now += seconds
            return result

        return run


def timed(clock):
    return lambda function: measure_cpu(function, clock)


def test_every_round_runs_every_variant_once():
    clock = Clock()
    variants = {"a": clock.task(1.0, "A"), "b": clock.task(2.0), "c": clock.task(4.0)}
    samples = list(interleave(variants, 4, timed(clock)))
    assert [s.variant for s in samples] == list("abcbcacababc")
    assert [s.round for s in samples] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert {s.variant: s.seconds for s in samples} == {"a": 1.0, "b": 2.0, "c": 4.0}
    assert samples[0].result == "A"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("..."), MemoryError(), RuntimeError("bad shape")])
def test_a_failing_variant_leaves_the_others_alone(error):
    clock, calls = Clock(), []

    def fail():
        calls.append(1)
        if len(calls) == 2:
            raise error

    samples = list(interleave({"a": clock.task(1.0), "bad": fail, "c": clock.task(1.0)}, 4, timed(clock)))
    bad = [s for s in samples if s.variant == "bad"]
    assert [s.error is None for s in bad] == [True, False] and bad[1].seconds is None
    assert ("bad shape" if "bad shape" in str(error) else "out of memory") in bad[1].error
    for other in "ac":
        assert [s.round for s in samples if s.variant == other] == [0, 1, 2, 3]


def test_all_variants_fail():
    def fail():
        raise RuntimeError("no")

    assert [s.error for s in interleave({"a": fail}, 3, timed(Clock()))] == ["RuntimeError: no"]


def test_time_limit_ends_between_rounds():
    clock = Clock()
    variants = {"a": clock.task(1.0), "b": clock.task(2.0)}
    samples = list(
        interleave(variants, 100, timed(clock), another=lambda done: clock() + clock() / done <= 10)
    )
    assert len(samples) == 6 and clock() == 9.0


def test_quantiles():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([4.0, 1.0], 0.5) == 2.5
    assert quantile([10.0, 20.0, 30.0], 0.1) == pytest.approx(12.0)
    assert quantile([5.0], 0.9) == 5.0
    with pytest.raises(ValueError, match="at least one"):
        quantile([], 0.5)


@pytest.mark.parametrize("value", [1.002, math.nan, math.inf])
def test_compare_refuses(value):
    with pytest.raises(ProviderError, match="wrong loss"):
        compare("loss", value, 1.0, 1e-3)
    compare("loss", 1.0005, 1.0, 1e-3)
