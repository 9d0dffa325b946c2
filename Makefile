# The front door: every target makes .venv and installs what it needs, once.
#
#   PYTHON=python3.12       the interpreter of .venv; without it, one from 3.10 to 3.13 is looked for
#   TORCH_INDEX_URL=URL     package index of another build of PyTorch than PyPI's, ROCm's for one
#   ARGS="-k gather"        more arguments for pytest or the benchmark; `make test` then leaves test-triton out
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PY := .venv/bin/python
PIP := $(PY) -m pip install -q
STAMPS := .venv/stamps
# A file of tests stays in one process: those of whole models share what they took seconds to make.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
MAIN_TESTS := $(PY) -m pytest --ignore=tests/triton --ignore=tests/gpu $(PARALLEL)
TRITON_TESTS := TRITON_INTERPRET=1 $(PY) -m pytest tests/triton $(PARALLEL)
LIBRARY := kernels/audiomae_kernels/libaudiomae_native.so
SANITIZED_TESTS := tests/kernels/test_native.py tests/kernels/test_native_ops.py tests/kernels/test_native_fuzz.py \
	tests/kernels/test_attention.py tests/kernels/test_fbank.py \
	tests/kernels/test_native_window_attention.py -m "not slow" -k "not tier and not caches and not threads and not of_shapes and not compiled"

FITS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c '$(FITS)' 2>/dev/null && echo $$python && break; done)

# A torch that is already there is used: a fresh one is gigabytes, and may be the wrong build for the machine.
define CREATE_VENV
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit("audiomae needs Python 3.10 to 3.13, and this one is %d.%d: name another with PYTHON=." % sys.version_info[:2])
import importlib.util, pathlib, re, subprocess
name = "python%d.%d" % sys.version_info[:2]
if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
    sys.exit("Python cannot create environments here: install its venv module (Debian, Ubuntu: apt install %s-venv)." % name)
torch, inherit = importlib.util.find_spec("torch"), False
if torch and torch.origin:
    folder = pathlib.Path(torch.origin).parent
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
    inherit = bool(version) and (int(version[1]), int(version[2])) >= (2, 10)
print("Creating .venv with", name, "and the PyTorch in %s" % folder if inherit else "")
subprocess.check_call([sys.executable, "-m", "venv", ".venv"] + ["--system-site-packages"] * inherit)
if inherit and sys.prefix != sys.base_prefix:  # inside another environment: "system" is the Python beneath it
    pathlib.Path(".venv/lib", name, "site-packages/outer-environment.pth").write_text(str(folder.parent))
endef
export CREATE_VENV

define CONSTRAINTS
from importlib.metadata import version
major, minor = version("torch").split(".")[:2]
print("torch==%s\ntorchaudio<%s.%d" % (version("torch"), major, int(minor) + 1))
endef
export CONSTRAINTS

define SAY_NATIVE
from audiomae_kernels import _native
tiers = _native.cpu_tiers()
print(_native.why_not() or "The native CPU library is built; tier: " + ", ".join(name for name, chosen, _ in tiers if chosen))
endef
export SAY_NATIVE

define NEED_PYTHON
test -n "$(PYTHON)" || \
	{ echo "audiomae needs Python 3.10 to 3.13, and none was found: install one or name it with PYTHON=." >&2; exit 1; }
endef

.PHONY: help venv install native test test-all test-triton can-sanitize test-native-sanitized test-bench bench gpu lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMPS)/torch ## create .venv with PyTorch and the build tools

install: $(STAMPS)/train ## install the package into .venv, to use it: .venv/bin/audiomae

native: $(STAMPS)/native ## build the native CPU library into the checkout
	@test -f $(LIBRARY)

test: $(STAMPS)/dev $(STAMPS)/native ## run the fast tests, those of test-triton among them
	$(MAIN_TESTS) -m "not slow" $(ARGS)
	$(if $(ARGS),@echo "ARGS are for these tests: make test-triton has the others.",$(TRITON_TESTS) -m "not slow")

test-all: $(STAMPS)/dev $(STAMPS)/native ## run all tests
	$(MAIN_TESTS) $(ARGS)
	$(if $(ARGS),@echo "ARGS are for these tests: make test-triton has the others.",$(TRITON_TESTS))

test-triton: $(STAMPS)/dev ## run the Triton kernels in Triton's interpreter, and lint their binaries
	$(TRITON_TESTS) -m "not slow" $(ARGS)

# Why the next target cannot run here, or nothing. Clang's AddressSanitizer is another library than GCC's.
can-sanitize:
	@why="make test-native-sanitized needs Linux and GCC with its AddressSanitizer (Debian, Ubuntu: apt install g++)"; \
	$${CXX:-c++} -dM -E -x c++ /dev/null 2>/dev/null | grep -q __GNUC__ || \
		{ echo "$$why, and there is no compiler named $${CXX:-c++}: name GCC with CXX=g++." >&2; exit 1; }; \
	! $${CXX:-c++} -dM -E -x c++ /dev/null | grep -q __clang__ || \
		{ echo "$$why, and $${CXX:-c++} is Clang: name GCC with CXX=g++." >&2; exit 1; }; \
	test -f "$$($${CXX:-c++} -print-file-name=libasan.so)" || \
		{ echo "$$why, and $${CXX:-c++} finds no libasan.so: install it (Fedora: dnf install libasan libubsan)." >&2; \
		exit 1; }

# Beside the ordinary library. AddressSanitizer has to be in the process first, and libstdc++ for its exceptions.
test-native-sanitized: can-sanitize $(STAMPS)/dev ## run the native kernels under AddressSanitizer and UBSan; needs GCC
	@set -e; export PATH="$$PWD/.venv/bin:$$PATH"; find="$${CXX:-c++} -print-file-name"; \
	torch=$$($(PY) -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)'); \
	cmake -S . -B build/sanitized -DAUDIOMAE_SANITIZE=ON -DTORCH_DIR="$$torch" >/dev/null; \
	cmake --build build/sanitized --parallel $$(nproc) --target audiomae_native_emulated; \
	AUDIOMAE_NATIVE_LIBRARY=$$PWD/build/sanitized/libaudiomae_native_emulated.so ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($$find=libasan.so) $$($$find=libstdc++.so)" $(PY) -m pytest $(SANITIZED_TESTS) $(PARALLEL) $(ARGS)

test-bench: $(STAMPS)/dev $(STAMPS)/native ## time the kernels under pytest-benchmark
	$(PY) -m pytest tests/benchmarks/bench_kernels.py --benchmark-columns=min,median,iqr,rounds $(ARGS)

bench: $(STAMPS)/bench $(STAMPS)/native ## run the quick benchmark of the models into bench/results/latest
	$(PY) -m bench models --quick --out bench/results/latest $(ARGS)

# It installs as its first step, so that its record holds that too.
gpu: ## run all that needs a GPU, and pack the results into one file to send
	@$(NEED_PYTHON)
	@$(PYTHON) tests/gpu/run.py $(ARGS)

lint: $(STAMPS)/dev ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info kernels/audiomae_kernels/*.so $(STAMPS)/native .pytest_cache .ruff_cache .benchmarks
	find audiomae kernels bench tests -name __pycache__ -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(NEED_PYTHON)
	@$(PYTHON) -c "$$CREATE_VENV"
	@mkdir -p $(STAMPS) && touch $@

# The constraints keep later installs from exchanging this torch for another, and from bringing a torchaudio that is
# newer than it: torchaudio 2.11 does not load into torch 2.10.
$(STAMPS)/torch: | $(STAMPS)/venv
	@$(PIP) "setuptools>=77" wheel
	@cmake --version >/dev/null 2>&1 || $(PIP) cmake
	@ninja --version >/dev/null 2>&1 || $(PIP) ninja
	$(PY) -m pip install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL) "torch>=2.10" torchaudio torchvision,"torch>=2.10")
	@$(PY) -c "$$CONSTRAINTS" > .venv/constraints.txt
	@touch $@

# Without a compiler setup.py says so and leaves no library: the stamp is left out and the next run tries again.
$(STAMPS)/native: CMakeLists.txt setup.py $(wildcard kernels/csrc/*) | $(STAMPS)/torch
	@$(PY) setup.py -q build_ext --inplace
	@! test -f $(LIBRARY) || touch $@

$(STAMPS)/train $(STAMPS)/bench $(STAMPS)/dev: pyproject.toml setup.py | $(STAMPS)/torch $(STAMPS)/native
	@echo "Installing audiomae[$(@F)] into .venv"
	@$(PIP) -c .venv/constraints.txt --no-build-isolation -e '.[$(@F)]'
	@$(PY) -c "$$SAY_NATIVE"
	@touch $@
