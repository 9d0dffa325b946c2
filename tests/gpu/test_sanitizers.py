"""Small calls of every op: what sanitizers watch.

Run for `TRITON_DEBUG=1` (integer overflow), `TRITON_INSTRUMENTATION_MODE=consan` (races in shared memory) or
`gsan` (races in global memory), and under NVIDIA's compute-sanitizer. A sanitizer that finds something ends
the kernel with an error, which surfaces when the host waits.
"""

import contextlib

import pytest
import torch
from audiomae_kernels import _triton
from budget import evaluate
from gpu.cases import SHARED, inputs, laid_out, named

NAMES = {
    "window_attention": ("shifted in time", "padded and shifted", "dot"),
    "patch_gather": ("square", "overlapping", "three masks a clip"),
    "unshuffle": ("usual", "odd"),
    "masked_mse": ("square", "overlapping", "three masks a clip"),
    "info_nce": ("over target", "over prediction, odd"),
}
WATCHED = [case for case in SHARED if case.name in NAMES[case.op]]


@pytest.fixture(scope="module", autouse=True)
def shadowed_memory(on_gpu):
    """GSan sees only what its own allocator gave out, and allocators belong to a thread."""
    with contextlib.ExitStack() as stack:
        if on_gpu and "gsan" in _triton.triton.knobs.compilation.instrumentation_mode:
            from triton.experimental.gsan import create_mem_pool

            stack.enter_context(torch.cuda.use_mem_pool(create_mem_pool()))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield


@pytest.mark.parametrize("layout", ["contiguous", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", **named(WATCHED))
def test_nothing_to_find(case, dtype, layout, device, impl, wait):
    tensors = inputs(case, dtype, device)
    if layout == "unaligned":
        tensors = {name: laid_out(x, layout) for name, x in tensors.items()}
    try:
        results = evaluate(case.call(impl), tensors, case.wrt())
    except RuntimeError as error:
        if "PassManager::run failed" not in str(error):
            raise
        pytest.skip("Triton cannot instrument this kernel in this mode: its compiler passes fail.")
    wait()
    expected = evaluate(case.reference(), tensors, case.wrt())
    for name, value in results.items():  # far from an error budget: that something was computed
        torch.testing.assert_close(
            value, expected[name], rtol=0.05, atol=0.05 * expected[name].abs().max().item()
        )
