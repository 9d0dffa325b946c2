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
    return _load(LIBRARY, SOURCES)


@cache
def ops() -> frozenset[str]:
    """Names of the ops that the library implements; empty without the library."""
    return frozenset(torch.ops.audiomae_native.ops().split()) if available() else frozenset()


def cpu_tiers() -> list[tuple[str, bool, str]]:
    """The library's ISA tiers, lowest first: (name, chosen, why or why not); empty without the library.

    No tier is chosen if ``AUDIOMAE_CPU_TIER`` names one that is unknown or that this machine cannot run. The
    reason says so, and every op raises it.
    """
    if not available():
        return []
    lines = torch.ops.audiomae_native.cpu_tiers().splitlines()
    return [(name, chosen == "1", reason) for name, chosen, reason in (line.split("\t") for line in lines)]


def _load(library: Path, sources: Path) -> str:
    if not library.is_file():
        if os.environ.get("AUDIOMAE_NATIVE_LIBRARY"):
            return f"AUDIOMAE_NATIVE_LIBRARY={library} is not a file: name a native library, or unset it."
        return f"The native CPU library is not built: with CMake and a C++17 compiler at hand, {_REBUILD}."
    if (sources / "registration.cpp").is_file() and _stamp(library) != _digest(sources):
        return f"The native CPU library was built from other sources than {sources} holds now: {_REBUILD}."
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        reason = str(error.__cause__ or error).rstrip(".")
        return f"The native CPU library does not load into torch {torch.__version__} ({reason}): {_REBUILD}."
    return ""


def _stamp(library: Path) -> str:
    # Out of the file's bytes: once loaded, a stale library has registered its ops.
    found = re.search(rb"audiomae_native_stamp=([0-9a-f]{64});", library.read_bytes())
    return found[1].decode() if found else ""


def _digest(sources: Path) -> str:
    files = sorted(path for path in sources.iterdir() if path.suffix in (".cpp", ".h"))
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    return hashlib.sha256(digests.encode()).hexdigest()
