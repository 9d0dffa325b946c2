"""What the tests of Triton kernels in Triton's interpreter share.

Triton decides when a kernel is defined whether it is interpreted, so that these tests need a process with
``TRITON_INTERPRET=1``; in any other they are skipped.
"""

import contextlib

import pytest
import torch
from audiomae_kernels import _triton
from kernel_cases import CASES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

needs_interpreter = pytest.mark.skipif(
    not _triton.available() or not _triton.interpreting(),
    reason=_triton.why_not() or "`make test-triton` runs it, with TRITON_INTERPRET=1",
)


def cases_and_dtypes(*extra, op):
    """Every case of `op` with every dtype: one dtype in turn for each case now, the others marked slow."""
    params = []
    for i, case in enumerate([*(case for case in CASES if case.op == op), *extra]):
        for j, dtype in enumerate(DTYPES):
            marks = () if (i + j) % 3 == 0 else (pytest.mark.slow,)
            params.append(pytest.param(case, dtype, id=f"{case.name}, {str(dtype)[6:]}", marks=marks))
    return params


@contextlib.contextmanager
def guarded_allocations(monkeypatch):
    """`Tensor.new_empty` returns the middle of a larger buffer; checks that nothing around it was written."""
    buffers, original = [], torch.Tensor.new_empty

    def new_empty(self, *size, dtype=None, device=None):
        if not (dtype or self.dtype).is_floating_point:
            return original(self, *size, dtype=dtype, device=device)
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        numel = int(torch.Size(size).numel())
        buffer = torch.full((numel + 128,), 77.0, dtype=dtype or self.dtype, device=device or self.device)
        buffers.append((buffer, numel))
        buffer[64 : 64 + numel] = float("nan")
        return buffer[64 : 64 + numel].view(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield
    assert buffers
    for buffer, numel in buffers:
        around = torch.cat((buffer[:64], buffer[64 + numel :]))
        assert (around == 77.0).all(), "a kernel wrote outside its output"


def in_the_middle(x):
    """The same values and strides with NaN, or an id far out of range, before and after them in memory."""
    fill = float("nan") if x.is_floating_point() else 10**9
    buffer = torch.full((x.numel() + 4096,), fill, dtype=x.dtype)
    view = buffer[2048 : 2048 + x.numel()].view(x.shape)
    return view.copy_(x)
