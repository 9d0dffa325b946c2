"""Random calls of all native ops in every ISA tier that the machine runs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import audiomae_kernels as ak
import native_fuzz
import pytest
import torch
from audiomae_kernels import _native
from native_fuzz import FUZZ

ROOT = Path(__file__).parents[2]
TIERS = [name for name, _, reason in _native.cpu_tiers() if "lacks" not in reason]

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.why_not() or "loaded")


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "first, last",
    [(0, 64), pytest.param(1000, 2500, marks=pytest.mark.slow)],
    ids=["64 of each op", "1500 of each op"],
)
def test_fuzz(tier, first, last):
    path = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "tests"))
    done = subprocess.run(
        [sys.executable, "-m", "native_fuzz", str(first), str(last)],
        env={**os.environ, "AUDIOMAE_CPU_TIER": tier, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [tier, str(len(FUZZ) * (last - first))]


@pytest.mark.parametrize("factor", [1, 1 + 2**-4])
@pytest.mark.parametrize(("op", "fewest"), [("window_attention", 13), ("attention", 9)])
def test_an_attention_that_is_slightly_wrong_shows(monkeypatch, op, fewest, factor):
    """In bfloat16 too: results eight units too large at the most, where the budget is a few."""
    right = getattr(ak, op)

    def scaled(qkv, *parameters, impl, **options):
        return (factor * right(qkv, *parameters, impl=impl, **options).float()).to(qkv.dtype)

    monkeypatch.setattr(ak, op, scaled)
    monkeypatch.setattr(native_fuzz, "DTYPES", (torch.bfloat16, torch.bfloat16))
    wrong = []
    try:
        for seed in range(16):
            try:
                native_fuzz.fuzz(seed, seed + 1, [op])
            except AssertionError as error:
                wrong.append(str(error))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    assert len(wrong) == 0 if factor == 1 else len(wrong) >= fewest, wrong


@pytest.mark.parametrize("factor", [1, 1 + 2**-14])
def test_a_filter_bank_that_is_slightly_wrong_shows(monkeypatch, factor):
    right = ak.fbank

    def scaled(waveform, *, impl, **settings):
        mel = right(waveform, impl=impl, **settings)
        return mel + math.log(factor) if impl == "native" else mel

    monkeypatch.setattr(ak, "fbank", scaled)
    wrong = 0
    try:
        for seed in range(16):
            try:
                native_fuzz.fuzz(seed, seed + 1, ["fbank"])
            except AssertionError:
                wrong += 1
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    assert wrong == 0 if factor == 1 else wrong >= 8
