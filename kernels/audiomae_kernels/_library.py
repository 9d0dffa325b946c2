"""The ``torch.library`` ops of the package: schemas, fakes, the table of implementations, dispatch.

Each op is ``audiomae::<op>`` with a backward op ``audiomae::<op>_backward``. Tensors are positional, the rest
is keyword-only, and the last keyword ``impl`` names an implementation: the public function resolves it, the
op's kernel looks it up. An implementation is a pair of functions with the op's own arguments, so that the
reference is registered as it stands and a faster one takes one call of `register`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from audiomae_kernels import _native

SCHEMAS = {
    "attention": "(Tensor qkv, Tensor? cu_seqlens, Tensor? seed, *, float dropout, str impl) -> (Tensor, Tensor)",
    "attention_backward": "(Tensor grad, Tensor qkv, Tensor out, Tensor statistics, Tensor? cu_seqlens, Tensor? seed, "
    "*, float dropout, str impl) -> Tensor",
    "window_attention": "(Tensor qkv, Tensor? tau, Tensor? bias, *, SymInt[2] grid, int[2] window, "
    "int[2] shift, str scoring, str impl) -> Tensor",
    "window_attention_backward": "(Tensor grad, Tensor qkv, Tensor? tau, Tensor? bias, *, SymInt[2] grid, "
    "int[2] window, int[2] shift, str scoring, bool[3] output_mask, str impl) -> (Tensor, Tensor, Tensor)",
    "patch_gather": "(Tensor spectrogram, Tensor ids, *, int[2] patch, int[2] stride, str impl) -> Tensor",
    "unshuffle": "(Tensor tokens, Tensor ids_keep, Tensor mask_token, Tensor pos, *, str impl) -> Tensor",
    "unshuffle_backward": "(Tensor grad, Tensor ids_keep, Tensor mask_token, Tensor pos, *, "
    "bool[3] output_mask, str impl) -> (Tensor, Tensor, Tensor)",
    "masked_mse": "(Tensor pred, Tensor spectrogram, Tensor ids_masked, *, int[2] patch, int[2] stride, "
    "bool normalize, str impl) -> Tensor",
    "masked_mse_backward": "(Tensor grad, Tensor pred, Tensor spectrogram, Tensor ids_masked, *, "
    "int[2] patch, int[2] stride, bool normalize, str impl) -> Tensor",
    "info_nce": "(Tensor pred, Tensor target, *, str over, str impl) -> (Tensor, Tensor)",
    "info_nce_backward": "(Tensor grad, Tensor pred, Tensor target, Tensor lse, *, str over, "
    "bool[2] output_mask, str impl) -> (Tensor, Tensor)",
}

OPS = tuple(name for name in SCHEMAS if not name.endswith("_backward"))
# What runs before the graph begins: functions of several implementations that are no `torch.library` op.
FRONT_END = ("fbank",)
IMPLEMENTATIONS = ("native", "triton", "reference")

# What `impl=None` tries before the reference.
_PREFERRED = {"cpu": "native", "cuda": "triton"}


def loss_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: the dtype of losses and of the reference's arithmetic."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


# --- implementations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: two functions that take the arguments of the op's schemas, less ``impl``."""

    forward: Callable
    backward: Callable | None = None
    device_types: Callable[[], tuple[str, ...]] | tuple[str, ...] | None = None  # None: any
    dtypes: tuple[torch.dtype, ...] | None = None  # of the op's first tensor; None: any
    unavailable: str = ""  # why it cannot run at all on this machine
    demanded: bool = False  # by the environment: where it is unavailable, impl=None raises
    refuses: Callable[..., str] | None = None  # (tensors and options of the call) -> why not, or ""

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it does not serve tensors of `dtype` on `device`; empty if it does."""
        if self.unavailable:
            return self.unavailable
        device_types = self.device_types() if callable(self.device_types) else self.device_types
        if device_types is not None and device.type not in device_types:
            return f"It serves tensors on {' or '.join(device_types)}, not on {device.type}."
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"It serves {', '.join(_short(d) for d in self.dtypes)}, not {_short(dtype)}."
        return ""


class Served(NamedTuple):
    """One line of `implementations`."""

    name: str
    available: bool
    reason: str  # why it is not available; empty if it is
    chosen: bool  # whether impl=None takes it


_table: dict[str, dict[str, Implementation]] = {op: {} for op in (*FRONT_END, *OPS)}


def register(op: str, name: str, forward: Callable, backward: Callable | None = None, **limits) -> None:
    """Add implementation `name` of `op`; `limits` are the remaining fields of `Implementation`."""
    _table[op][name] = Implementation(forward, backward, **limits)


def register_native(
    op: str,
    forward: Callable,
    backward: Callable | None = None,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    refuses: Callable[..., str] | None = None,
) -> None:
    """Add the C++ library's implementation of `op`, or the reason why this machine has none."""
    unavailable = _native.why_not()
    if not unavailable and op not in _native.ops():
        unavailable = f"The native library was built without {op}."
    register(
        op,
        "native",
        forward,
        backward,
        device_types=("cpu",),
        dtypes=dtypes,
        unavailable=unavailable,
        demanded=_native.demanded(),
        refuses=refuses,
    )


def implementations(
    op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> list[Served]:
    """Which implementations serve `op` for tensors of `dtype` on `device`, and why the others do not."""
    if op not in _table:
        raise ValueError(f"There is no op {op!r}; the ops are {', '.join(_table)}.")
    device = torch.device(device)
    chosen = _choose(op, device, dtype)
    lines = []
    for name in IMPLEMENTATIONS:
        reason = _table[op][name].refusal(device, dtype) if name in _table[op] else _does_not_exist(op, name)
        lines.append(Served(name, not reason, reason, name == chosen))
    return lines


def resolve(op: str, impl: str | None, *tensors: Tensor | None, **options) -> str:
    """The name of the implementation that serves this call.

    Raises:
        ValueError: `impl` is not the name of an implementation.
        RuntimeError: `impl` was asked for and cannot serve these arguments; or `impl` is None and the environment
            names a native library or CPU tier that cannot be had.
    """
    device = tensors[0].device
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            dtype = torch.float64
    table = _table[op]
    if impl is None:
        preferred = table.get(_PREFERRED.get(device.type))
        if preferred is not None and preferred.demanded and preferred.unavailable and dtype != torch.float64:
            raise RuntimeError(f"{op}: {preferred.unavailable}")
        name = _choose(op, device, dtype)
        refuses = table[name].refuses
        return "reference" if refuses is not None and refuses(*tensors, **options) else name
    if impl not in IMPLEMENTATIONS:
        *others, last = map(repr, IMPLEMENTATIONS)
        raise ValueError(f"{op}: impl must be None, {', '.join(others)} or {last}, got {impl!r}.")
    if impl not in table:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run. {_does_not_exist(op, impl)}")
    reason = table[impl].refusal(device, dtype)
    if not reason and table[impl].refuses is not None:
        reason = table[impl].refuses(*tensors, **options)
    if reason:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run. {reason}")
    return impl


def forward(op: str, impl: str) -> Callable:
    """The function of an implementation that `resolve` named."""
    return _table[op][impl].forward


def _choose(op: str, device: torch.device, dtype: torch.dtype) -> str:
    name = _PREFERRED.get(device.type)
    if name not in _table[op] or dtype == torch.float64 or _table[op][name].refusal(device, dtype):
        return "reference"
    return name


def _does_not_exist(op: str, name: str) -> str:
    exist = " and ".join(other for other in IMPLEMENTATIONS if other in _table[op])
    return f"There is no {name} implementation of {op}, only: {exist}."


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- ops ------------------------------------------------------------------------------------------

_library = torch.library.Library("audiomae", "DEF")


def _define(op: str, direction: str, name: str) -> None:
    def kernel(*tensors, impl, **options):
        function = getattr(_table[op][impl], direction)
        device_type = tensors[0].device.type
        if torch.is_autocast_enabled(device_type):
            # Autocast reaches into the kernels of custom ops and would turn fp32 products into bf16 ones.
            with torch.autocast(device_type, enabled=False):
                return function(*tensors, **options)
        return function(*tensors, **options)

    _library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")


for _op in OPS:
    _define(_op, "forward", _op)
    if _op + "_backward" in SCHEMAS:
        _define(_op, "backward", _op + "_backward")


def register_gradient(op: str, setup_context: Callable, backward: Callable) -> None:
    """Autograd of ``audiomae::<op>``. Its backward op has no gradient of its own and says so."""
    torch.library.register_autograd(f"audiomae::{op}", backward, setup_context=setup_context, lib=_library)
    if op + "_backward" not in SCHEMAS:
        return

    def refuse(ctx, *grads):
        raise NotImplementedError(f"audiomae_kernels.{op} has no second derivatives.")

    torch.library.register_autograd(f"audiomae::{op}_backward", refuse, lib=_library)


def wanted(like: Tensor, wants: bool) -> Tensor:
    """A gradient buffer, contiguous, for `like`; an empty one stands for a gradient that nobody wants."""
    return like.new_empty(like.shape if wants else (0,))


# --- fakes: shapes and dtypes of the results ------------------------------------------------------


def _fake(name: str) -> Callable:
    return torch.library.register_fake(f"audiomae::{name}", lib=_library)


@_fake("attention")
def _(qkv, cu_seqlens, seed, *, dropout, impl):
    *tokens, _, H, d = qkv.shape
    return qkv.new_empty(*tokens, H * d), qkv.new_empty(*tokens, H, 2, dtype=loss_dtype(qkv))


@_fake("attention_backward")
def _(grad, qkv, out, statistics, cu_seqlens, seed, *, dropout, impl):
    return wanted(qkv, True)


@_fake("window_attention")
def _(qkv, tau, bias, *, grid, window, shift, scoring, impl):
    B, L, _, H, d = qkv.shape
    return qkv.new_empty(B, L, H * d)


@_fake("window_attention_backward")
def _(grad, qkv, tau, bias, *, grid, window, shift, scoring, output_mask, impl):
    inputs = (qkv, tau, bias)
    return tuple(wanted(qkv if x is None else x, wants) for x, wants in zip(inputs, output_mask, strict=True))


@_fake("patch_gather")
def _(spectrogram, ids, *, patch, stride, impl):
    return spectrogram.new_empty(*ids.shape, patch[0] * patch[1])


@_fake("unshuffle")
def _(tokens, ids_keep, mask_token, pos, *, impl):
    return tokens.new_empty(tokens.shape[0], *pos.shape)


@_fake("unshuffle_backward")
def _(grad, ids_keep, mask_token, pos, *, output_mask, impl):
    tokens = grad.new_empty(*ids_keep.shape, grad.shape[-1])
    inputs = (tokens, mask_token, pos)
    return tuple(wanted(x, wants) for x, wants in zip(inputs, output_mask, strict=True))


@_fake("masked_mse")
def _(pred, spectrogram, ids_masked, *, patch, stride, normalize, impl):
    return pred.new_empty((), dtype=loss_dtype(pred, spectrogram))


@_fake("masked_mse_backward")
def _(grad, pred, spectrogram, ids_masked, *, patch, stride, normalize, impl):
    return wanted(pred, True)


@_fake("info_nce")
def _(pred, target, *, over, impl):
    dtype = loss_dtype(pred, target)
    return pred.new_empty((), dtype=dtype), pred.new_empty(pred.shape[:2], dtype=dtype)


@_fake("info_nce_backward")
def _(grad, pred, target, lse, *, over, output_mask, impl):
    return wanted(pred, output_mask[0]), wanted(target, output_mask[1])
