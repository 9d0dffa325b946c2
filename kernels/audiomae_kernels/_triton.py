"""The only import of Triton in the project: real, interpreted (``TRITON_INTERPRET=1``) or absent.

The kernels, ``<op>/triton_kernels.py``, take `triton` and `tl` from here and are imported only if there is a
Triton. Nothing here or there touches a GPU before the first launch.
"""

from __future__ import annotations

import contextlib
import functools
from importlib import import_module

import torch

from audiomae_kernels import _library

try:
    import triton
    import triton.language as tl
    from triton.language.target_info import is_hip
except ImportError as error:
    triton = tl = is_hip = None
    _why_not = f"Triton does not import ({error}): on Linux it comes with PyTorch's own builds."
else:
    _why_not = ""

# Triton reads the variable when a kernel is defined: later changes of it have no effect.
_interpreting = triton is not None and triton.knobs.runtime.interpret
_device_types = ("cuda", "cpu") if _interpreting else ("cuda",)  # ROCm's devices are called cuda as well

# Around launches: Triton takes the current device, which need not be the tensor's. Nothing for CPU tensors.
device_of = torch.cuda.device_of


def available() -> bool:
    """Whether there is a Triton; a GPU is another question."""
    return not _why_not


def why_not() -> str:
    """One sentence that says why there is no Triton; empty if there is."""
    return _why_not


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return _interpreting


def device_types() -> tuple[str, ...]:
    """Types of the devices whose tensors kernels can be launched on."""
    return _device_types


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 for the CPU, whose programs run one after another or not at all."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def targets_hip() -> bool:
    """`is_hip` for code that launches kernels: asks each driver once, since an answer takes microseconds."""
    return _targets_hip(triton.runtime.driver._active)


@functools.cache
def _targets_hip(driver) -> bool:
    return bool(is_hip())


@contextlib.contextmanager
def allow_cpu():
    """Take CPU tensors as well, for a driver that compiles and records launches instead of running them."""
    global _device_types
    before, _device_types = _device_types, ("cuda", "cpu")
    try:
        yield
    finally:
        _device_types = before


def register(op: str) -> None:
    """Register ``<op>/triton_kernels.py`` as the implementation "triton" of `op`.

    The module defines ``<op>_triton``, ``<op>_backward_triton`` if the op has a backward, and, if there are
    calls that it does not serve, ``refuses`` (see `_library.Implementation`).
    """
    if triton is None:
        _library.register(op, "triton", _absent, unavailable=_why_not)
        return
    module = import_module(f"audiomae_kernels.{op}.triton_kernels")
    refuses = getattr(module, "refuses", None)

    def refuses_call(*tensors, **options) -> str:
        reason = _refuses_device(tensors[0].device)
        return refuses(*tensors, **options) if refuses is not None and not reason else reason

    _library.register(
        op,
        "triton",
        getattr(module, f"{op}_triton"),
        getattr(module, f"{op}_backward_triton", None),
        device_types=device_types,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        refuses=refuses_call,
    )


def _absent(*_, **__):
    raise RuntimeError(_why_not)


@torch.compiler.assume_constant_result
def _refuses_device(device: torch.device) -> str:
    # A fake CUDA tensor has no device to ask.
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"It needs compute capability 8.0 (bf16 tensor cores), not {major}.{minor}."
