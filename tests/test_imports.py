"""Importing the package and running a model: without Triton, without the native library, and off the GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from audiomae_kernels import FRONT_END, OPS, _native, _triton

ROOT = Path(__file__).parents[1]

BLOCK_TRITON = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
"""
# Counting the GPUs starts the driver, after which a process cannot fork any more.
BLOCK_GPU = """
import torch

def touched(*_, **__):
    raise AssertionError("a GPU was touched")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = touched
"""
RUN = """
import json, audiomae, audiomae_kernels as ak

model = audiomae.create_model(
    "audiomae_base", width=16, heads=2, depth=1, frames=128, decoder_width=16, decoder_heads=2, decoder_depth=2
)
loss = model(torch.randn(2, 128, 128)).loss
loss.backward()
assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
said = {}
for impl in ("native", "triton"):
    try:
        ak.info_nce(torch.randn(1, 2, 4), torch.randn(1, 2, 4), impl=impl)
    except RuntimeError as error:
        said[impl] = str(error)
served = {
    device: {op: [list(line) for line in ak.implementations(op, device)] for op in (*ak.FRONT_END, *ak.OPS)}
    for device in ("cpu", "cuda")
}
print(json.dumps([ak.__file__, torch.cuda.is_initialized(), said, served]))
"""


@pytest.fixture
def without_library(tmp_path):
    """A copy of the kernels' package that holds no native library."""
    shutil.copytree(
        ROOT / "kernels/audiomae_kernels",
        tmp_path / "audiomae_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    return tmp_path


def run(code, *paths):
    """What RUN prints in a process of its own: said by impl, {device: {op: {name: (reason, chosen)}}}."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*paths, ROOT, ROOT / "kernels")))
    done = subprocess.run([sys.executable, "-c", code + RUN], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, initialized, said, served = json.loads(done.stdout)
    assert not initialized
    assert not paths or Path(file).is_relative_to(paths[0])
    for ops in served.values():
        assert ops.keys() == {*FRONT_END, *OPS}
        for op, lines in ops.items():
            assert all(available == (not reason) for _, available, reason, _ in lines)
            ops[op] = {name: (reason, chosen) for name, _, reason, chosen in lines}
    return said, served


def test_import_and_a_step_touch_no_gpu():
    said, _ = run(BLOCK_GPU)
    assert ("native" in said) == (not _native.available())
    if _triton.available():
        assert said["triton"] == "info_nce: impl='triton' cannot run. It serves tensors on cuda, not on cpu."


def test_without_triton():
    said, served = run(BLOCK_TRITON + "import torch\n")
    for device in served:
        for op, lines in served[device].items():
            reason, chosen = lines["triton"]
            missing = "Triton does not import (No module named 'triton'): "
            assert (
                reason.startswith("There is no triton" if op in ("attention", "fbank") else missing)
                and not chosen
            )
            assert lines["reference"][0] == ""
    assert all(lines["reference"][1] for lines in served["cuda"].values())
    assert said["triton"] == f"info_nce: impl='triton' cannot run. {served['cpu']['info_nce']['triton'][0]}"
    assert ("native" in said) == (not _native.available())


def test_without_triton_and_the_native_library(without_library):
    said, served = run(BLOCK_TRITON + "import torch\n", without_library)
    for lines in served["cpu"].values():
        reason, chosen = lines["native"]
        assert reason.startswith("The native CPU library is not built: ") and not chosen
        assert "`make native`" in reason and reason.endswith(".")
        assert lines["reference"] == ("", True)
    assert said["native"] == f"info_nce: impl='native' cannot run. {served['cpu']['info_nce']['native'][0]}"
    assert said.keys() == {"native", "triton"}
