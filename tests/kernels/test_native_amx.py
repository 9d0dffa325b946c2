"""The AMX tier: its instructions emulated where there are none, and what happens if they are refused."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from audiomae_kernels import _native

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "kernels" / "csrc"
BUILD = ROOT / "build" / "native"  # of setup.py
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=sysconfig.get_path("scripts"))
TIERS = {name: reason for name, _, reason in _native.cpu_tiers()}

pytestmark = pytest.mark.skipif("amx" not in TIERS, reason=_native.why_not() or "This build has no AMX tier.")

CHECK = """
import torch
from test_native_window_attention import DTYPES, SHAPES, assert_case
from test_native_window_attention import _native, test_a_nan_stays_in_its_window, test_threads
from native_fuzz import fuzz
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
for case in SHAPES:
    assert_case(case, torch.bfloat16)
for scoring in ("cosine", "dot"):
    test_a_nan_stays_in_its_window(torch.bfloat16, 32, scoring)
test_threads(torch.bfloat16)
fuzz(0, 64, ["window_attention"])
print(*(name for name, chosen, _ in _native.cpu_tiers() if chosen))
"""


def run_in_the_amx_tier(code, **environment):
    path = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "tests", "tests/kernels"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "AUDIOMAE_CPU_TIER": "amx", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif("lacks" in TIERS.get("avx512_bf16", "lacks"), reason="Needs AVX512_BF16.")
def test_emulated():
    """The kernels of the tier with TDPBF16PS in C++."""
    if not (BUILD / "CMakeCache.txt").exists() or CMAKE is None:
        pytest.skip("The library was not built here.")
    target = "audiomae_native_emulated"
    command = [CMAKE, "--build", BUILD, "--target", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_in_the_amx_tier(CHECK, AUDIOMAE_NATIVE_LIBRARY=str(BUILD / f"lib{target}.so")) == "amx"


@pytest.mark.skipif("lacks" in TIERS.get("amx", "lacks"), reason="Needs AMX.")
def test_on_this_machine():
    assert run_in_the_amx_tier(CHECK) == "amx"


@pytest.mark.parametrize("granted", [True, False])
def test_permission(tmp_path, granted):
    """Linux grants the tiles to processes that ask, or says why not."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or pytest.skip("There is no C++ compiler.")
    (tmp_path / "main.cpp").write_text(
        "#include <cerrno>\n#include <unistd.h>\nlong answer(long number, int request, int feature);\n"
        f'#define syscall answer\n#include "{CSRC}/tier.cpp"\n#include <cstdio>\n'
        "long answer(long number, int request, int feature) {\n"
        "  if (number != SYS_arch_prctl || request != 0x1023 || feature != 18) return 0;\n"
        f"  errno = ENOSPC;\n  return {0 if granted else -1};\n}}\n"
        "int main() { std::puts(audiomae::tiles_refused().c_str()); }\n"
    )
    program = tmp_path / "permission"
    flags = ["-std=c++17", "-DAUDIOMAE_ENTRY", "-DAUDIOMAE_X86_TIERS", "-DAUDIOMAE_AMX_TIER", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, tmp_path / "main.cpp", "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.strip()
    refused = "the permission of the operating system to use AMX (No space left on device)"
    assert said == ("" if granted else refused)
