"""Builds the native CPU library with CMake; everything else about the package is in pyproject.toml.

A missing or failing compiler leaves a pure-Python package and one sentence that says what to do. CXX chooses
the compiler; CMAKE_ARGS is handed to CMake.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = Path("kernels", "audiomae_kernels")
LIBRARY = "libaudiomae_native.so"
SOURCES = ["CMakeLists.txt", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "kernels/csrc").glob("*.*"))]


class NotBuilt(Exception):
    """Why there is no native library, as the part of a sentence that follows "because"."""


class BuildNative(build_ext):
    """Runs CMake; the library goes into the build folder's package or, if editable, into the checkout's."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        target = ROOT / PACKAGE if in_place else Path(self.build_lib, "audiomae_kernels")
        self.library = target / LIBRARY
        try:
            built = build_library(ROOT / "build" / "native")
        except NotBuilt as reason:
            self.library.unlink(missing_ok=True)
            self.distribution.ext_modules = []  # what is left is a pure-Python distribution
            print(
                f"audiomae: the native CPU library was not built because {reason}; the package works without "
                "it, slower, and `make native` in the checkout builds it later.",
                file=sys.stderr,
            )
            return
        target.mkdir(parents=True, exist_ok=True)
        partial = self.library.with_suffix(".partial")
        shutil.copy2(built, partial)
        os.replace(partial, self.library)  # a process that has the old library mapped keeps it

    def get_source_files(self) -> list[str]:
        return SOURCES

    def get_outputs(self) -> list[str]:
        built = self.distribution.has_ext_modules()
        return [str(Path(self.build_lib, "audiomae_kernels", LIBRARY))] if built else []

    def get_output_mapping(self) -> dict[str, str]:
        return {output: str(PACKAGE / LIBRARY) for output in self.get_outputs()} if self.editable_mode else {}


class Wheel(bdist_wheel):
    """The library uses neither Python's C API nor an unstable torch ABI: one wheel per platform."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform = "any" if self.root_is_pure else super().get_tag()[2]
        return "py3", "none", platform


def build_library(folder: Path) -> Path:
    """Builds in `folder` and returns the library's path; raises NotBuilt."""
    # This environment's scripts too: `python -m pip` does not put them on the PATH.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None:
        raise NotBuilt("CMake was not found (`pip install cmake ninja` brings it)")
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler, path=path) for compiler in compilers):
        raise NotBuilt(f"no C++ compiler named {' or '.join(compilers)} was found (install g++ or clang)")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DTORCH_DIR={find_torch()}"]
    configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))

    # CMake keeps the compiler and the options of an earlier run: objects are reused only for the same ones.
    command = shlex.join([f"CXX={os.environ.get('CXX', '')}", *configure])
    last = folder / "configured.txt"
    if folder.exists() and not (last.exists() and last.read_text() == command):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    with log.open("w") as output:
        if subprocess.run(configure, stdout=output, stderr=output).returncode:
            raise NotBuilt(f"CMake could not configure it (see {log})")
        last.write_text(command)
        jobs = ["--parallel", str(os.cpu_count() or 1)]
        if subprocess.run([cmake, "--build", str(folder), *jobs], stdout=output, stderr=output).returncode:
            raise NotBuilt(f"it did not compile (see {log})")
    return folder / LIBRARY


def find_torch() -> Path:
    """Folder of the torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotBuilt("its headers come with PyTorch, which is not installed (`pip install torch`)")
    folder = Path(spec.origin).parent
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
    if version is None or (int(version[1]), int(version[2])) < (2, 10):
        raise NotBuilt("it needs PyTorch 2.10 or later (`pip install -U torch`)")
    return folder


setup(
    # The sources are CMake's business; the name tells setuptools that the package is bound to a platform.
    ext_modules=[Extension("audiomae_kernels.libaudiomae_native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
