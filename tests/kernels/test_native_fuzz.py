"""Random calls of all native ops in every ISA tier that the machine runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from audiomae_kernels import _native
from native_fuzz import FUZZ

ROOT = Path(__file__).parents[2]
TIERS = [name for name, _, reason in _native.cpu_tiers() if "lacks" not in reason]

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.why_not() or "loaded")


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "first, last",
    [(0, 64), pytest.param(1000, 2500, marks=pytest.mark.slow)],
    ids=["384 cases", "9000 cases"],
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
