"""Attention in shifted windows of a 2-D grid, in plain PyTorch: pad, roll, partition, attend, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from audiomae_kernels._library import loss_dtype, wanted

MIN_NORM = 1e-6  # of |q||k|
MIN_TAU = 0.01
BORDER = -100.0  # added to the cosine scores of keys across a shift border


def clip_window(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[tuple, tuple]:
    """(window, shift) in force: a window not smaller than the grid is the grid, and is not shifted."""
    clipped = [(w, s) if w < g else (g, 0) for g, w, s in zip(grid, window, shift, strict=True)]
    return tuple(w for w, _ in clipped), tuple(s for _, s in clipped)


def window_index(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int] = (0, 0), device=None
) -> tuple[Tensor, Tensor]:
    """Index arithmetic of shifted windows: what padding, rolling by ``-shift`` and partitioning amount to.

    Windows and the tokens inside them are row-major (time, frequency). With ``P`` the grid size rounded up to
    whole windows, position ``p`` of the rolled axis is token ``(p + shift) % P``.

    Returns:
        index: (windows, N) int64, the token ``t * F' + f`` at each place; ``L`` stands for padding.
        region: (windows, N) int64, equal for two places of a window exactly if no shift border parts them.
    """
    window, shift = clip_window(grid, window, shift)
    axes = []
    for size, length, step in zip(grid, window, shift, strict=True):
        padded = -(-size // length) * length
        token = (torch.arange(padded, device=device) + step) % padded
        axes.append((token.view(-1, length), token < step))
    (t, t_wrapped), (f, f_wrapped) = axes
    t, f = t[:, None, :, None], f[None, :, None, :]
    t_wrapped, f_wrapped = t_wrapped.view(t.shape), f_wrapped.view(f.shape)
    index = torch.where((t < grid[0]) & (f < grid[1]), t * grid[1] + f, grid[0] * grid[1])
    region = t_wrapped * 2 + f_wrapped * 1
    N = window[0] * window[1]
    return index.view(-1, N), region.view(-1, N)


def window_attention_ref(
    qkv: Tensor,
    tau: Tensor | None,
    bias: Tensor | None,
    *,
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int] = (0, 0),
    scoring: str = "cosine",
    upcast: bool = True,
) -> Tensor:
    """`audiomae_kernels.window_attention`, in float32 (float64) or, without `upcast`, in the dtype of qkv.

    qkv is (B, L, 3, H, d) here.
    """
    window, shift = clip_window(grid, window, shift)
    q, k, v = _partition(qkv, grid, window, shift, upcast).unbind(3)
    probabilities, _ = _attend(q, k, tau, bias, grid, window, shift, scoring)
    out = probabilities @ v  # (B, nW, H, N, d)
    return _reverse(out, grid, window, shift).flatten(2).to(qkv.dtype)


def window_attention_backward_ref(
    grad: Tensor,
    qkv: Tensor,
    tau: Tensor | None,
    bias: Tensor | None,
    *,
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    scoring: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, tau and bias; the probabilities are computed again from the inputs."""
    window, shift = clip_window(grid, window, shift)
    q, k, v = _partition(qkv, grid, window, shift, upcast=True).unbind(3)
    d_out = _partition(grad.reshape(qkv[:, :, :1].shape), grid, window, shift, upcast=True).squeeze(3)
    P, cosine = _attend(q, k, tau, bias, grid, window, shift, scoring)

    d_v = P.mT @ d_out
    d_P = d_out @ v.mT
    d_scores = P * (d_P - (d_P * P).sum(-1, keepdim=True))
    d_tau, d_bias = (wanted(qkv if x is None else x, False) for x in (tau, bias))
    if output_mask[2]:
        d_bias = d_scores.sum((0, 1)).to(bias.dtype)
    if scoring == "cosine":
        divisor = tau.to(q.dtype).clamp(min=MIN_TAU)
        if output_mask[1]:
            d_tau = -(d_scores * cosine).sum((0, 1, 3, 4)) / divisor.square()
            d_tau = d_tau.masked_fill(tau < MIN_TAU, 0).to(tau.dtype)
        q_norm, k_norm = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
        norms = q_norm @ k_norm.mT
        d_dot = d_scores / divisor[:, None, None] / norms.clamp(min=MIN_NORM)
        d_norms = (d_dot * -cosine).masked_fill(norms < MIN_NORM, 0)
        # d|q| / dq = q / |q|, and 0 at q = 0
        d_q = d_dot @ k + q * (d_norms @ k_norm / q_norm).masked_fill(q_norm == 0, 0)
        d_k = d_dot.mT @ q + k * (d_norms.mT @ q_norm / k_norm).masked_fill(k_norm == 0, 0)
    else:
        d_dot = d_scores * q.shape[-1] ** -0.5
        d_q, d_k = d_dot @ k, d_dot.mT @ q
    d_qkv = wanted(qkv, output_mask[0])
    if output_mask[0]:
        for i, d in enumerate((d_q, d_k, d_v)):
            d_qkv[:, :, i] = _reverse(d, grid, window, shift)
    return d_qkv, d_tau, d_bias


def _attend(q, k, tau, bias, grid, window, shift, scoring):
    """Probabilities, and the cosines if that is the scoring: (B, nW, H, N, N) each."""
    cosine = None
    if scoring == "cosine":
        norms = q.norm(dim=-1, keepdim=True) @ k.norm(dim=-1, keepdim=True).mT
        cosine = q @ k.mT / norms.clamp(min=MIN_NORM)
        scores = cosine / tau.to(q.dtype).clamp(min=MIN_TAU)[:, None, None]
    else:
        scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    padded = grid[0] % window[0] != 0 or grid[1] % window[1] != 0
    if padded or any(shift):
        index, region = window_index(grid, window, shift, q.device)
        across = region[:, :, None] != region[:, None, :]  # (nW, N, N)
        excluded = (index == grid[0] * grid[1])[:, None, :].expand_as(across)
        if scoring == "cosine":
            scores = scores + across[:, None].to(scores.dtype) * BORDER
        else:
            excluded = excluded | across
        # The lowest finite number and not -inf: the rows of padded queries may have no key left.
        scores = scores.masked_fill(excluded[:, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1), cosine


def _partition(x, grid, window, shift, upcast):
    """(B, L, S, H, d) -> (B, windows, H, S, N, d) of the padded and rolled grid."""
    B, _, S, H, d = x.shape
    (T, F), (wt, wf) = grid, window
    if upcast:
        x = x.to(loss_dtype(x))
    x = x.reshape(B, T, F, S * H * d)
    if T % wt != 0 or F % wf != 0:
        x = functional.pad(x, (0, 0, 0, -F % wf, 0, -T % wt))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    nt, nf = -(-T // wt), -(-F // wf)
    x = x.view(B, nt, wt, nf, wf, S, H, d).permute(0, 1, 3, 6, 5, 2, 4, 7)  # (B, nt, nf, H, S, wt, wf, d)
    return x.reshape(B, nt * nf, H, S, wt * wf, d)


def _reverse(x, grid, window, shift):
    """(B, windows, H, N, d) -> (B, L, H, d), contiguous: undoes `_partition` and drops the padding."""
    B, _, H, _, d = x.shape
    (T, F), (wt, wf) = grid, window
    nt, nf = -(-T // wt), -(-F // wf)
    x = x.reshape(B, nt, nf, H, wt, wf, d).permute(0, 1, 4, 2, 5, 3, 6)  # (B, nt, wt, nf, wf, H, d)
    x = x.reshape(B, nt * wt, nf * wf, H * d)
    if any(shift):
        x = x.roll(tuple(shift), (1, 2))
    return x[:, :T, :F].reshape(B, T * F, H, d).contiguous()
