"""The versions of Triton that these tests hold for, and repairs of its interpreter where they run in it.

The budgets, the bits and the rules for binaries hold for Triton 3.7 and newer, and are looked at with 3.8. The
kernels themselves also compile with 3.6, whose interpreter does not work with NumPy 2.4. `baseline.json` holds
for the one version that it names. `test_interpreter.py` says when the repairs are no longer needed.
"""

import numpy as np
import pytest
import torch
from audiomae_kernels import _triton

OLDEST = (3, 7)

if _triton.interpreting():
    from triton.runtime import interpreter

    broken_dot = interpreter.InterpreterBuilder.create_dot
    truncating_cast = interpreter.InterpreterBuilder.cast_impl
    launch = interpreter.GridExecutor.__call__
    patched = set()

    def repaired_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        """Products of bf16, which Triton 3.8 and 3.9 take for integers, and of TF32, never cut to it there."""
        a, b = _as_multiplied(a, input_precision), _as_multiplied(b, input_precision)
        return broken_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def _as_multiplied(x, input_precision):
        bits = x.data.view(f"u{x.data.itemsize}").astype(np.uint32)
        if x.dtype.scalar == _triton.tl.bfloat16:
            bits <<= 16
        elif x.data.dtype == np.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
            bits = np.where(np.isfinite(x.data), bits & 0xFFFFE000, bits)  # GPUs cut off all but 10 bits
        else:
            return x
        return interpreter.TensorHandle(bits.astype(np.uint32).view(np.float32), _triton.tl.float32)

    def rounding_cast(self, src, dst_type):
        """float32 to bfloat16 as GPUs do it, to the nearest and, of two, to the even one.

        Triton 3.8 cuts the low bits off, which makes gradients 0.3 % too small.
        """
        if (src.dtype.scalar, dst_type.scalar) != (_triton.tl.float32, _triton.tl.bfloat16):
            return truncating_cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        bits = np.where(np.isnan(src.data), 0x7FC00000, bits + 0x7FFF + (bits >> 16 & 1))
        return interpreter.TensorHandle((bits >> 16).astype(np.uint16), _triton.tl.bfloat16)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call_device_function(self, *args, **kwargs):
        """Without patching the language again where that is done, which takes half of the time."""
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpreterBuilder.create_dot = repaired_dot
    interpreter.InterpreterBuilder.cast_impl = rounding_cast
    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter.InterpretedFunction.__call__ = call_device_function


@pytest.fixture(autouse=True, scope="module")
def supported_triton():
    """Before the other fixtures of a module, some of which compile for minutes."""
    if _triton.available():
        version = _triton.triton.__version__
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            pytest.skip(
                f"These tests hold for Triton {'.'.join(map(str, OLDEST))} and newer, not {version}: older "
                "interpreters fail at loops with NumPy 2.4, and older compilers were not reviewed."
            )


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: waking a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unrepaired_dot(monkeypatch):
    """The dot of Triton's interpreter as it comes."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", broken_dot)


@pytest.fixture
def unrepaired_cast(monkeypatch):
    """The casts of Triton's interpreter as they come."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", truncating_cast)
