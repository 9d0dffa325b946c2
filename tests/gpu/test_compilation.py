"""When kernels compile: once for each shape and dtype, whatever the batch, and how long it takes."""

import sys
import time

import pytest
import torch
from audiomae_kernels import _triton
from budget import evaluate
from gpu.cases import ONE_EACH, inputs, named
from kernel_cases import PARAMETERS

each_op = pytest.mark.parametrize("case", **named(ONE_EACH))


def of_batch(case, clips, device):
    """The case's inputs with another number of clips."""
    tensors = inputs(case, torch.bfloat16, device)
    return {
        name: x if x is None or name in PARAMETERS else x[:1].expand(clips, *x.shape[1:]).contiguous()
        for name, x in tensors.items()
    }


def kernels():
    """Every Triton kernel of the package."""
    jitted = _triton.triton.runtime.JITFunction
    modules = [module for name, module in sys.modules.items() if name.startswith("audiomae_kernels.")]
    return {value for module in modules for value in vars(module).values() if isinstance(value, jitted)}


@each_op
def test_batch_sizes_share_their_binaries(case, device, compilations, wait):
    evaluate(case.call("triton"), of_batch(case, 2, device), case.wrt())
    compilations.clear()
    for clips in (1, 3, 16, 17, 64):
        evaluate(case.call("triton"), of_batch(case, clips, device), case.wrt())
    wait()
    assert compilations == []


@each_op
def test_seconds_of_the_first_call(case, device, compilations, wait, tmp_path, record_property):
    """With nothing compiled yet: what the first step of a training pays, and no benchmark may count."""
    evaluate(case.call("triton"), inputs(case, torch.bfloat16, device), case.wrt())
    wait()
    cache = _triton.triton.knobs.cache
    with cache.scope():
        cache.dir = str(tmp_path)
        for kernel in kernels():
            kernel.device_caches.clear()
        tensors, seconds = inputs(case, torch.bfloat16, device), []
        for expected in (True, False):
            compilations.clear()
            start = time.perf_counter()
            evaluate(case.call("triton"), tensors, case.wrt())
            wait()
            seconds.append(time.perf_counter() - start)
            assert bool(compilations) == expected
    assert any(tmp_path.iterdir()), "the kernels came from another cache"
    for name, value in zip(("first", "second"), seconds, strict=True):
        record_property(f"{case.op}: seconds of the {name} call", round(value, 4))
