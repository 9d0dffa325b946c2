"""Kernel tests in tiers other than the chosen one, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from audiomae_kernels import _native

ROOT = Path(__file__).parents[1]

# The chosen one is what all other tests run.
OTHER_TIERS = [
    name
    for name, chosen, reason in _native.cpu_tiers()
    if "lacks" not in reason and (not chosen or name == "portable")
]


def check_in_tier(module: str, tier: str) -> None:
    """Calls `check_everything()` of a module in tests/kernels with the tier forced."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "tests", "tests/kernels"))
    code = (
        f"import {module}; {module}.check_everything(); from audiomae_kernels import _native; "
        "print([name for name, chosen, _ in _native.cpu_tiers() if chosen])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "AUDIOMAE_CPU_TIER": tier, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"['{tier}']"
