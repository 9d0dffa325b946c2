"""Interleaving, on a clock of its own."""

import math
from types import SimpleNamespace

import pytest
import torch

from bench import timing
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


class FakeGPU:
    """A device with a queue: what is launched begins when the host has launched it and the device is free."""

    CYCLES_PER_SECOND = 2e9

    def __init__(self, monkeypatch):
        self.host = self.free = 0.0
        self.flush = SimpleNamespace(zero_=lambda: self.launch(10e-6))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / self.CYCLES_PER_SECOND))
        monkeypatch.setattr(timing, "cache_bytes", lambda device: 0)

    def launch(self, seconds, host=5e-6):
        self.host += host
        self.free = max(self.free, self.host) + seconds

    def synchronize(self):
        self.host = max(self.host, self.free)

    def passes(self, **options):
        measure = timing.PassesOnCUDA(torch.device("cpu"), clock=lambda: self.host, **options)
        measure.flush = self.flush
        return measure


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.free, self.gpu.host)

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def two_kernels(gpu, host):
    """A forward and a backward pass of two kernels each, of 10 and of 20 us; `host()` launches one."""

    def kernels(seconds):
        for _ in range(2):
            gpu.launch(seconds, host())

    return SimpleNamespace(forward=lambda: kernels(10e-6), backward=lambda _: kernels(20e-6))


def test_device_time_is_not_that_of_the_launches(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    measure = gpu.passes()
    assert measure.cycles_per_second == pytest.approx(gpu.CYCLES_PER_SECOND)
    (forward, backward), launches = measure(two_kernels(gpu, lambda: 60e-6))
    assert (forward, backward) == (pytest.approx(20e-6), pytest.approx(40e-6))
    assert (launches.host, launches.cover) == (pytest.approx(240e-6), pytest.approx(480e-6))
    assert launches.late == 0
    _, events = measure._run(two_kernels(gpu, lambda: 60e-6))  # without the cover the host would be timed
    assert events[0].elapsed_time(events[1]) > 100e-3
    forward_only = SimpleNamespace(forward=lambda: gpu.launch(10e-6, 60e-6), backward=None)
    assert measure(forward_only)[0] == (pytest.approx(10e-6),)


@pytest.mark.parametrize("every, late", [(5, 0.2), (1, 1.0)])
def test_launches_that_come_too_late(every, late, monkeypatch):
    """After the cover is chosen, every fifth run's launches, or all of them, take ten times as long."""
    gpu, calls = FakeGPU(monkeypatch), []

    def host():
        calls.append(1)
        run = (len(calls) - 1) // 4 - 4  # one to warm up and three to choose the cover come first
        return 600e-6 if run >= 0 and run % every == 0 else 60e-6

    (forward, _), launches = gpu.passes(repeats=20)(two_kernels(gpu, host))
    assert launches.late == pytest.approx(late)
    assert forward == pytest.approx(20e-6) if late < 0.5 else forward > 20e-6


def test_a_call_that_waits_for_the_device_is_late(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    waiting = SimpleNamespace(forward=lambda: (gpu.launch(10e-6), gpu.synchronize()), backward=None)
    _, launches = gpu.passes()(waiting)
    assert launches.late == 1


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
