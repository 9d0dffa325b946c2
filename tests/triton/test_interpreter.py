"""Triton's interpreter, as it comes and as `conftest.py` repairs it."""

import pytest
import torch
from audiomae_kernels._triton import interpreting, tl, triton
from interpreter import needs_interpreter

pytestmark = needs_interpreter

if interpreting():

    @triton.jit
    def dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr):
        o = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        b_c = tl.dot(tl.load(a_ptr + o), tl.load(b_ptr + o), input_precision=PRECISION)
        tl.store(out_ptr + o, b_c)

    @triton.jit
    def cast_kernel(x_ptr, out_ptr):
        o = tl.arange(0, 1024)
        tl.store(out_ptr + o, tl.load(x_ptr + o).to(out_ptr.dtype.element_ty))


def cast(x):
    out = torch.empty(1024, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out)
    return out


def dot(a, b, precision="ieee"):
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, precision)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot(dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    torch.testing.assert_close(dot(a, b), a.float() @ b.float())


def test_dot_truncates_to_tf32_when_asked():
    """Tensor cores leave out the low 13 bits of the fraction, of either sign: no rounding to nearest."""
    a, b = torch.full((16, 16), 1 + 2**-10 + 2**-11 + 2**-20), torch.eye(16)
    assert (dot(a, b, "tf32") == 1 + 2**-10).all()
    assert (dot(b, -a, "tf32") == -1 - 2**-10).all()
    assert torch.equal(dot(a, b), a)
    assert torch.equal(dot(torch.full((16, 16), float("inf")), torch.ones(16, 16), "tf32"), a * float("inf"))


def test_bf16_dot_still_needs_its_repair(unrepaired_dot):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    assert not torch.allclose(dot(a, b), a.float() @ b.float(), rtol=0.1), (
        "Triton's interpreter multiplies bf16 now (triton-lang/triton#11584): "
        "remove the repair of its dot from tests/triton/conftest.py, and this test."
    )


def test_cast():
    x = torch.randn(1024) * torch.logspace(-38, 38, 1024)
    x[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float("inf"), -float("inf"), float("nan")])
    torch.testing.assert_close(cast(x), x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_bf16_cast_still_needs_its_repair(unrepaired_cast):
    x = torch.rand(1024) + 1
    assert (cast(x) <= x).all(), (
        "Triton's interpreter rounds to bfloat16 now: "
        "remove the repair of its cast from tests/triton/conftest.py, and this test."
    )
