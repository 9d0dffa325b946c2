"""Finds and loads the native CPU library, and says plainly why it could not.

The library is a plain shared object on PyTorch's stable C++ ABI (``kernels/csrc``). Loading it registers the
ops ``torch.ops.audiomae_native.*``. It happens once, at the first question asked here; nothing here raises
because the library is missing, stale or broken.
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(
    os.environ.get("AUDIOMAE_NATIVE_LIBRARY") or Path(__file__).with_name("libaudiomae_native.so")
)  # the variable: one built for tests, with sanitizers or with AMX emulated
SOURCES = Path(__file__).parents[1] / "csrc"  # in a checkout; an installed package has none
_REBUILD = "run `make native` in the checkout, or reinstall the package"


def available() -> bool:
    """Whether the native library is loaded and its ops can be called."""
    return not why_not()


@cache
def why_not() -> str:
    """One sentence that says why the native library cannot be used and what to do; empty if it can."""
    return _load(LIBRARY, SOURCES) or _tier_refused()


def demanded() -> bool:
    """Whether the environment names a library or a tier, so that doing without it would be against its word."""
    return bool(os.environ.get("AUDIOMAE_NATIVE_LIBRARY") or os.environ.get("AUDIOMAE_CPU_TIER"))


@cache
def ops() -> frozenset[str]:
    """Names of the ops that the library implements; empty without the library."""
    return frozenset(torch.ops.audiomae_native.ops().split()) if available() else frozenset()


def cpu_tiers() -> list[tuple[str, bool, str]]:
    """The library's ISA tiers, lowest first: (name, chosen, why or why not); empty without the library."""
    return _tiers() if available() else []


def _tiers() -> list[tuple[str, bool, str]]:
    lines = torch.ops.audiomae_native.cpu_tiers().splitlines()
    return [(name, chosen == "1", reason) for name, chosen, reason in (line.split("\t") for line in lines)]


def _tier_refused() -> str:
    # Where AUDIOMAE_CPU_TIER names what is unknown or cannot run here, no tier is chosen; the portable one, which
    # runs anywhere, has the reason.
    tiers = _tiers()
    return "" if any(chosen for _, chosen, _ in tiers) else tiers[0][2]


def _load(library: Path, sources: Path) -> str:
    named = bool(os.environ.get("AUDIOMAE_NATIVE_LIBRARY"))
    subject = f"AUDIOMAE_NATIVE_LIBRARY={library}" if named else "The native CPU library"
    remedy = "name a native library, or unset the variable" if named else _REBUILD
    try:
        if not library.is_file():
            if named:
                return f"{subject} is not a file: {remedy}."
            return (
                f"The native CPU library is not built: with CMake and a C++17 compiler at hand, {_REBUILD}."
            )
        stamp = _stamp(library)
        current = _digest(sources) if (sources / "registration.cpp").is_file() else stamp
    except OSError as error:
        return f"{subject} cannot be checked ({error.strerror}: {error.filename}): make it readable, or {remedy}."
    if not stamp:
        return f"{subject} is not a library that this package built: {remedy}."
    if stamp != current:
        return f"{subject} was built from other sources than {sources} holds now: {_REBUILD}."
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        reason = str(error.__cause__ or error).rstrip(".")
        return f"{subject} does not load into torch {torch.__version__} ({reason}): {remedy}."
    if missing := [op for op in ("ops", "cpu_tiers") if not hasattr(torch.ops.audiomae_native, op)]:
        return f"{subject} lacks audiomae_native::{' and audiomae_native::'.join(missing)}: {remedy}."
    return ""


def _stamp(library: Path) -> str:
    # Out of the file's bytes: once loaded, a stale library has registered its ops.
    found = re.search(rb"audiomae_native_stamp=([0-9a-f]{64});", library.read_bytes())
    return found[1].decode() if found else ""


def _digest(sources: Path) -> str:
    files = sorted(path for path in sources.iterdir() if path.suffix in (".cpp", ".h"))
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    return hashlib.sha256(digests.encode()).hexdigest()
