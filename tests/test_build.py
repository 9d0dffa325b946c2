"""The build: with a compiler and without one, a stale or broken library, wheels, the Makefile."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from audiomae_kernels import _native

ROOT = Path(__file__).parents[1]
TARGETS = [
    "help",
    "venv",
    "install",
    "native",
    "test",
    "test-all",
    "test-triton",
    "test-native-sanitized",
    "test-bench",
    "bench",
]
TARGETS += ["gpu", "lint", "clean"]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="There is no make.")
needs_library = pytest.mark.skipif(not _native.available(), reason=_native.why_not() or "loaded")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build reads; its package holds a left-over library."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("kernels", "audiomae"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    (copy / "README.md").touch()
    (copy / "kernels/audiomae_kernels/libaudiomae_native.so").write_text("left over")
    return copy


def run(command, cwd, **environment):
    of_make = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # set if `make test` runs this
    inherited = {name: value for name, value in os.environ.items() if name not in of_make}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    done.text = done.stdout + done.stderr
    return done


def setup(checkout, *arguments, **environment):
    done = run([sys.executable, "-W", "ignore", "setup.py", "-q", *arguments], checkout, **environment)
    assert done.returncode == 0, done.text
    return done.text


def wheel_of(checkout, **environment):
    text = setup(checkout, "bdist_wheel", **environment)
    (wheel,) = (checkout / "dist").glob("*.whl")
    return wheel, zipfile.ZipFile(wheel), text


def test_no_compiler(checkout):
    said = setup(checkout, "build_ext", "--inplace", CXX="/nonexistent")
    assert said.strip() == (
        "audiomae: the native CPU library was not built because no C++ compiler named /nonexistent was found "
        "(install g++ or clang); the package works without it, slower, and `make native` in the checkout "
        "builds it later."
    )
    code = "from audiomae_kernels import _native as n; print(n.ops(), n.cpu_tiers(), n.why_not())"
    done = run([sys.executable, "-c", code], checkout, PYTHONPATH=str(checkout / "kernels"))
    assert re.match(r"frozenset\(\) \[\] The native CPU library is not built: .*`make native`", done.stdout)


def test_compile_error(checkout):
    for source in (checkout / "kernels/csrc").glob(
        "*.cpp"
    ):  # all of them: the build waits for what it has begun
        source.write_text("#error on purpose\n")
    said = setup(checkout, "build_ext", "--inplace")
    if "no C++ compiler" in said or "CMake was not found" in said:
        pytest.skip(said)
    assert "not built because it did not compile (see " in said
    assert "on purpose" in Path(re.search(r"\(see (.*?)\)", said)[1]).read_text()
    assert not (checkout / "kernels/audiomae_kernels/libaudiomae_native.so").exists()


def test_wheel_without_compiler(checkout):
    """Pure Python, and the left-over library of an earlier build stays out."""
    wheel, content, text = wheel_of(checkout, CXX="/nonexistent")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "was not built because" in text
    assert not [name for name in content.namelist() if name.endswith(".so")]
    assert "audiomae_kernels/_native.py" in content.namelist()


@needs_library
def test_stale_library(tmp_path):
    sources = tmp_path / "csrc"
    shutil.copytree(_native.SOURCES, sources)
    assert _native._stamp(_native.LIBRARY) == _native._digest(sources)
    with (sources / "tier.cpp").open("a") as file:
        file.write("\n")
    why = _native._load(_native.LIBRARY, sources)
    assert re.fullmatch(
        r"The native CPU library was built from other sources than .* `make native` .*\.", why
    )


def test_library_that_does_not_load(tmp_path):
    library = tmp_path / "libaudiomae_native.so"
    library.write_text(f"audiomae_native_stamp={'0' * 64};")
    why = _native._load(library, tmp_path / "no sources")
    assert re.fullmatch(
        r"The native CPU library does not load into torch .* \(.*\): run `make native` .*\.", why
    )


@needs_make
def test_makefile_targets():
    listed = run(["make"], ROOT).stdout
    assert [line.split()[0] for line in listed.splitlines()] == TARGETS
    for target in TARGETS:
        done = run(["make", "-n", target], ROOT)
        assert done.returncode == 0, done.text


@needs_make
@pytest.mark.parametrize("version", [(3, 9, 1), (3, 14, 0)])
def test_makefile_refuses_python(checkout, version):
    python = checkout / "python"
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[2])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    python.chmod(0o755)
    done = run(["make", "venv", f"PYTHON={python}"], checkout)
    assert done.returncode != 0
    assert (
        f"needs Python 3.10 to 3.13, and this one is {version[0]}.{version[1]}: name another" in done.stderr
    )
    assert not (checkout / ".venv").exists()


def test_ci_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert {"make test </dev/null", "make test-native-sanitized </dev/null"} <= {
        line.strip() for line in script.read_text().splitlines()
    }


@needs_make
@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("exit 1", "there is no compiler named .*: name GCC with CXX=g\\+\\+"),
        ("echo '#define __GNUC__ 4'; echo '#define __clang__ 1'", "is Clang: name GCC with CXX=g\\+\\+"),
        ("[ $1 = -dM ] && echo '#define __GNUC__ 4' || echo libasan.so", r"finds no libasan\.so: install it"),
    ],
    ids=["no compiler", "Clang", "no libasan"],
)
def test_makefile_says_why_it_cannot_sanitize(checkout, compiler, reason):
    program = checkout / "compiler"
    program.write_text(f"#!/bin/sh\n{compiler}\n")
    program.chmod(0o755)
    done = run(["make", "test-native-sanitized", f"CXX={program}"], checkout)
    assert done.returncode != 0 and not (checkout / ".venv").exists()
    assert re.match(f"make test-native-sanitized needs Linux and GCC .*, and .*{reason}", done.stderr), (
        done.text
    )


@pytest.mark.slow
@needs_make
def test_makefile_uses_the_torch_that_is_there(checkout):
    """Also from inside an environment, where --system-site-packages means the Python beneath it."""
    outer = checkout / "outer"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", outer], check=True)
    (site_packages,) = outer.glob("lib/python3*/site-packages")
    (site_packages / "torch").mkdir()
    (site_packages / "torch" / "__init__.py").touch()
    (site_packages / "torch" / "version.py").write_text("__version__ = '2.10.3+rocm7.0'\n")
    done = run(["make", ".venv/stamps/venv", f"PYTHON={outer / 'bin' / 'python'}"], checkout)
    assert done.returncode == 0, done.text
    found = run([checkout / ".venv/bin/python", "-c", "import torch; print(torch.__file__)"], checkout)
    assert found.stdout.strip() == str(site_packages / "torch" / "__init__.py")


@pytest.mark.slow
@needs_library
def test_wheel(checkout, tmp_path):
    wheel, content, text = wheel_of(checkout)
    assert "not built" not in text
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name)
    assert [name for name in content.namelist() if name.endswith(".so")] == [
        "audiomae_kernels/libaudiomae_native.so"
    ]
    (metadata,) = (name for name in content.namelist() if name.endswith(".dist-info/WHEEL"))
    assert "Root-Is-Purelib: false" in content.read(metadata).decode()
    library = content.read("audiomae_kernels/libaudiomae_native.so")
    assert str(checkout).encode() not in library and str(ROOT).encode() not in library

    content.extractall(tmp_path / "installed")
    code = "from audiomae_kernels import _native as n; print(n.why_not(), sorted(n.ops()), n.LIBRARY)"
    done = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert done.stdout.startswith(f" {sorted(_native.ops())} {tmp_path}"), done.text


@pytest.mark.slow
def test_sdist(checkout):
    setup(checkout, "sdist")
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"CMakeLists.txt", "setup.py"} <= names
    assert {f"kernels/csrc/{path.name}" for path in _native.SOURCES.iterdir()} <= names
    assert not [name for name in names if name.endswith(".so")]


def other_pythons():
    folders = [*map(Path, os.environ["PATH"].split(os.pathsep)), *Path.home().glob(".pyenv/versions/3.*/bin")]
    for version in ("3.10", "3.11", "3.12", "3.13"):
        for folder in folders:
            python = folder / f"python{version}"
            if python.exists() and run([python, "-c", ""], ROOT).returncode == 0:
                yield version, python
                break


@pytest.mark.slow
def test_compiles_on_every_supported_python(checkout):
    pythons = dict(other_pythons())
    if not pythons.keys() - {f"{sys.version_info[0]}.{sys.version_info[1]}"}:
        pytest.skip("There is no other Python.")
    for python in pythons.values():
        done = run([python, "-m", "compileall", "-q", "-f", "kernels", "audiomae", "setup.py"], checkout)
        assert done.returncode == 0, done.text
