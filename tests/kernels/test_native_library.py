"""Which file the loader takes for the native library, and what it says of those that it refuses."""

import shutil
import subprocess
from pathlib import Path

import audiomae_kernels as ak
import pytest
import torch
from audiomae_kernels import _native

STAMP = f"audiomae_native_stamp={'0' * 64};"


@pytest.fixture
def named(monkeypatch):
    """Makes the user the one who names the file."""

    def named(path):
        monkeypatch.setenv("AUDIOMAE_NATIVE_LIBRARY", str(path))
        return path

    return named


def foreign_library(folder, stamp=""):
    """A shared object that has nothing of ours, or no more than the stamp."""
    compiler = shutil.which("cc") or shutil.which("c++") or pytest.skip("There is no C compiler.")
    source, library = folder / "other.c", folder / "other.so"
    source.write_text(f'const char text[] = "{stamp}";\n')
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@pytest.mark.parametrize("sources", [_native.SOURCES, Path("no sources")])
def test_a_file_of_others_is_refused_before_it_is_loaded(tmp_path, named, monkeypatch, sources):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("it was loaded"))
    text = tmp_path / "notes.txt"
    text.write_text("not a library\n")
    for file in (text, foreign_library(tmp_path)):
        assert _native._load(named(file), sources) == (
            f"AUDIOMAE_NATIVE_LIBRARY={file} is not a library that this package built: "
            "name a native library, or unset the variable."
        )


def test_a_library_without_our_ops_is_refused(tmp_path, named, monkeypatch):
    """One of another time, which has the stamp."""
    monkeypatch.setattr(torch.ops, "audiomae_native", object())
    file = named(foreign_library(tmp_path, STAMP))
    assert _native._load(file, tmp_path / "no sources") == (
        f"AUDIOMAE_NATIVE_LIBRARY={file} lacks audiomae_native::ops and audiomae_native::cpu_tiers: "
        "name a native library, or unset the variable."
    )


def test_what_is_named_and_does_not_exist(tmp_path, named):
    for path in (tmp_path / "no.so", tmp_path):
        assert " is not a file: name a native library, or unset" in _native._load(named(path), tmp_path)


@pytest.mark.parametrize("unreadable", ["libaudiomae_native.so", "registration.cpp"])
def test_what_cannot_be_read_is_said(tmp_path, monkeypatch, unreadable):
    read_bytes = Path.read_bytes

    def refuse(path):
        if path.name == unreadable:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    library = tmp_path / "libaudiomae_native.so"
    library.write_text(STAMP)
    (tmp_path / "registration.cpp").touch()
    assert _native._load(library, tmp_path).startswith(
        f"The native CPU library cannot be checked (Permission denied: {tmp_path / unreadable}): make it readable, or "
    )


@pytest.fixture
def refused(monkeypatch):
    """The library with a tier refused."""
    lines = [
        ("portable", False, "AUDIOMAE_CPU_TIER=sse9 is not a tier."),
        ("amx", False, "this machine lacks it"),
    ]
    monkeypatch.setattr(_native, "_load", lambda *_: "")
    monkeypatch.setattr(_native, "_tiers", lambda: lines)
    for function in (_native.why_not, _native.ops):
        function.cache_clear()
    yield
    for function in (_native.why_not, _native.ops):
        function.cache_clear()


def test_a_refused_tier_makes_the_library_unavailable(refused):
    assert _native.why_not() == "AUDIOMAE_CPU_TIER=sse9 is not a tier."
    assert not _native.available() and not _native.cpu_tiers() and not _native.ops()


@pytest.mark.parametrize("variable", ["AUDIOMAE_CPU_TIER", "AUDIOMAE_NATIVE_LIBRARY"])
def test_what_the_environment_demands_is_not_passed_over(monkeypatch, variable):
    """Without a word from the environment the reference serves; fp64 is the reference's in any case."""
    from audiomae_kernels import _library

    monkeypatch.setattr(_native, "why_not", lambda: "There is none.")
    monkeypatch.setitem(_library._table, "unshuffle", dict(_library._table["unshuffle"]))
    arguments = torch.ones(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.ones(2), torch.zeros(3, 2)
    for name in ("AUDIOMAE_CPU_TIER", "AUDIOMAE_NATIVE_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    _library.register_native("unshuffle", lambda *_: None)
    assert ak.unshuffle(*arguments).sum() == 6

    monkeypatch.setenv(variable, "something")
    _library.register_native("unshuffle", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"^unshuffle: There is none\.$"):
        ak.unshuffle(*arguments)
    assert ak.unshuffle(*arguments, impl="reference").sum() == 6
    doubles = (x.double() if x.is_floating_point() else x for x in arguments)
    assert ak.unshuffle(*doubles).sum() == 6
    assert [served.chosen for served in ak.implementations("unshuffle")] == [False, False, True]
