"""Attention in shifted windows of the token grid: the decoder of Audio-MAE."""

from __future__ import annotations

import torch
from torch import Tensor

from audiomae_kernels import _checks, _library, _triton
from audiomae_kernels.window_attention.reference import (
    clip_window,
    window_attention_backward_ref,
    window_attention_ref,
    window_index,
)

__all__ = ["clip_window", "window_attention", "window_attention_ref", "window_index"]


def window_attention(
    qkv: Tensor,
    tau: Tensor | None,
    bias: Tensor | None,
    *,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    scoring: str = "cosine",
    impl: str | None = None,
) -> Tensor:
    """Multi-head attention inside (shifted) windows.

    ``scoring="cosine"`` (Audio-MAE, arXiv:2207.06405, after Swin v2, arXiv:2111.09883)::

        softmax(q·k / clamp(|q||k|, min=1e-6) / clamp(tau, min=0.01) + bias + border) v

    with ``border`` = -100 for keys on the other side of a shift border and 0 for the rest. ``scoring="dot"``:
    ``softmax(q·k / sqrt(d) + bias) v`` where keys across a shift border are excluded.

    The grid is shifted cyclically by rolling it by ``-shift``. On an axis where the window is not smaller
    than the grid, the window is the grid and the shift 0. A grid that the window does not tile is padded at
    its end; padding is no key of any query, and a shift wraps at the padded end. `window_index` gives this as
    indices.

    Args:
        qkv: (B, L, 3, H, d) or (B, L, 3 * H * d), L = T' * F' tokens in time-major order, any float dtype.
        tau: (H,) divisor of the cosines, any float dtype; None with ``scoring="dot"``.
        bias: (H, N, N) added to the scores of queries x keys, N the tokens of a (clipped) window in row-major
            (time, frequency) order, any float dtype; or None.
        grid: (T', F') tokens in time and frequency.
        window: (wt, wf) tokens of a window.
        shift: (time, frequency), each less than the window.
        scoring: "cosine" or "dot".
        impl: implementation, see `audiomae_kernels`.

    Returns:
        (B, L, H * d) in the dtype of qkv. Gradients for qkv, tau and bias, each in its own dtype.

    Raises:
        ValueError: wrong shapes, devices or options, or a number of heads that nothing gives.
        TypeError: a tensor is not float.
        RuntimeError: `impl` was asked for and cannot run.
    """
    if scoring not in ("cosine", "dot"):
        raise ValueError(f"window_attention: scoring must be 'cosine' or 'dot', got {scoring!r}.")
    if (tau is None) == (scoring == "cosine"):
        raise ValueError(
            "window_attention: scoring='cosine' needs tau (H,)."
            if tau is None
            else "window_attention: tau divides cosines only; pass tau=None with scoring='dot'."
        )
    grid = _checks.expect_pair("window_attention: grid", grid, 1)
    window = _checks.expect_pair("window_attention: window", window, 1)
    shift = _checks.expect_pair("window_attention: shift", shift, 0)
    if shift[0] >= window[0] or shift[1] >= window[1]:
        raise ValueError(f"window_attention: shift {shift} must be smaller than the window {window}.")
    window, shift = clip_window(grid, window, shift)
    qkv = _heads(qkv, tau, bias)
    B, _, _, H, d = qkv.shape
    N = window[0] * window[1]
    _checks.expect_shape("window_attention: qkv", qkv, "(B, T' * F', 3, H, d)", B, grid[0] * grid[1], 3, H, d)
    _checks.expect_float("window_attention: qkv", qkv)
    if tau is not None:
        _checks.expect_shape("window_attention: tau", tau, "(H,)", H)
        _checks.expect_float("window_attention: tau", tau)
        _checks.expect_device("window_attention: tau", tau, "qkv", qkv.device)
    if bias is not None:
        _checks.expect_shape("window_attention: bias", bias, "(H, N, N)", H, N, N)
        _checks.expect_float("window_attention: bias", bias)
        _checks.expect_device("window_attention: bias", bias, "qkv", qkv.device)
    options = {"grid": grid, "window": window, "shift": shift, "scoring": scoring}
    impl = _library.resolve("window_attention", impl, qkv, tau, bias, **options)
    if torch.compiler.is_exporting():
        return window_attention_ref(qkv, tau, bias, **options)
    return torch.ops.audiomae.window_attention(qkv, tau, bias, **options, impl=impl)


def _heads(qkv: Tensor, tau: Tensor | None, bias: Tensor | None) -> Tensor:
    """View of qkv with its heads apart: (B, L, 3, H, d)."""
    if qkv.dim() == 5:
        return qkv
    _checks.expect_shape(
        "window_attention: qkv", qkv, "(B, L, 3 * H * d) or (B, L, 3, H, d)", None, None, None
    )
    if tau is None and bias is None:
        raise ValueError(
            "window_attention: with neither tau nor bias the number of heads is unknown; "
            "pass qkv as (B, L, 3, H, d)."
        )
    H = (bias if tau is None else tau).shape[0]
    if H == 0 or qkv.shape[-1] % (3 * H) != 0:
        raise ValueError(
            f"window_attention: the last dimension of qkv must be 3 * H * d with H = {H} heads "
            f"(from {'bias' if tau is None else 'tau'}), but it is {qkv.shape[-1]}."
        )
    return qkv.unflatten(-1, (3, H, qkv.shape[-1] // (3 * H)))


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx, grad):
    wants = ctx.needs_input_grad
    grads = torch.ops.audiomae.window_attention_backward(
        grad, *ctx.saved_tensors, output_mask=list(wants), **ctx.options
    )
    return tuple(g if want else None for g, want in zip(grads, wants, strict=True))


def _native_forward(qkv, tau, bias, *, grid, window, shift, scoring):
    window, shift = clip_window(grid, window, shift)
    return torch.ops.audiomae_native.window_attention.default(qkv, tau, bias, *grid, *window, *shift)


def _native_backward(grad, qkv, tau, bias, *, grid, window, shift, scoring, output_mask):
    window, shift = clip_window(grid, window, shift)
    return torch.ops.audiomae_native.window_attention_backward.default(
        grad, qkv, tau, bias, *grid, *window, *shift, *output_mask
    )


_library.register_gradient("window_attention", _setup_context, _backward)
_library.register("window_attention", "reference", window_attention_ref, window_attention_backward_ref)
_library.register_native("window_attention", _native_forward, _native_backward)
_triton.register("window_attention")
