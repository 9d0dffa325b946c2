"""masked_mse in Triton: patches are read from the spectrogram and normalised on chip, and none is stored.

Forward: `PROGRAMS` programs a multiprocessor go through the tiles of masked tokens; each leaves one partial sum,
0 if there is no tile for it, and a second kernel adds these up. Backward: the same error again, times
``2 / (R * M * V)`` and the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from audiomae_kernels._partials import PROGRAMS, sum_partials
from audiomae_kernels._triton import device_of, multiprocessors, tl, triton
from audiomae_kernels.masked_mse.reference import EPS
from audiomae_kernels.patch_gather.triton_kernels import patch_offsets

TILE = 2048  # values of pred and as many of the spectrogram that a program of four warps holds
MAX_VALUES = 8192  # of a patch: it is normalised in registers


@triton.jit
def error_tile(
    pred_ptr,
    spectrogram_ptr,
    ids_ptr,
    i_row,
    o_m,
    M,
    masks,
    tokens,
    eps,
    stride_pred_row,
    stride_pred_m,
    stride_pred_v,
    stride_b,
    stride_t,
    stride_f,
    stride_ids_row,
    stride_ids_m,
    GRID_F: tl.constexpr,
    PT: tl.constexpr,
    PF: tl.constexpr,
    ST: tl.constexpr,
    SF: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``pred - target`` of the tokens `o_m` of one row: (BLOCK_M, BLOCK_V) float32.

    Tokens beyond the last give what the last one gives: an index is cheaper to bound than a load to mask.
    """
    V: tl.constexpr = PT * PF
    o_v = tl.arange(0, BLOCK_V)
    m_v = (o_v < V)[None, :]
    o_m = tl.minimum(o_m, M - 1)
    b_ids = tl.load(ids_ptr + i_row * stride_ids_row + o_m * stride_ids_m)
    o_patch, m_ids = patch_offsets(b_ids, tokens, stride_t, stride_f, GRID_F, ST, SF)
    o_value = (o_v // PF).to(tl.int64) * stride_t + (o_v % PF).to(tl.int64) * stride_f
    p_patch = spectrogram_ptr + i_row // masks * stride_b + o_patch[:, None] + o_value[None, :]
    p_pred = pred_ptr + i_row * stride_pred_row + o_m[:, None] * stride_pred_m
    p_pred += (o_v.to(tl.int64) * stride_pred_v)[None, :]
    b_target = tl.load(p_patch, mask=m_v, other=0.0).to(tl.float32)
    b_pred = tl.load(p_pred, mask=m_v, other=0.0).to(tl.float32)
    b_target = tl.where(m_ids[:, None], b_target, 0.0)
    if NORMALIZE:
        mean = tl.sum(b_target, 1) / V
        b_target = tl.where(m_v, b_target - mean[:, None], 0.0)
        var = tl.sum(b_target * b_target, 1) / (V - 1)
        b_target *= tl.rsqrt(var + eps)[:, None]
    return b_pred - b_target


@triton.jit(do_not_specialize=["rows", "M", "masks", "tokens"])
def masked_mse_fwd_kernel(
    pred_ptr,  # (B * m, M, V)
    spectrogram_ptr,  # (B, T, F)
    ids_ptr,  # (B * m, M)
    partials_ptr,  # (programs,) float32
    rows,
    M,
    masks,
    tokens,
    eps,
    stride_pred_row,
    stride_pred_m,
    stride_pred_v,
    stride_b,
    stride_t,
    stride_f,
    stride_ids_row,
    stride_ids_m,
    GRID_F: tl.constexpr,
    PT: tl.constexpr,
    PF: tl.constexpr,
    ST: tl.constexpr,
    SF: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks = tl.cdiv(M, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i_tile in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
        i_row = (i_tile // blocks).to(tl.int64)
        o_m = (i_tile % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        b_error = error_tile(
            pred_ptr, spectrogram_ptr, ids_ptr, i_row, o_m, M, masks, tokens, eps,
            stride_pred_row, stride_pred_m, stride_pred_v, stride_b, stride_t, stride_f,
            stride_ids_row, stride_ids_m, GRID_F, PT, PF, ST, SF, NORMALIZE, BLOCK_V,
        )  # fmt: skip
        total += tl.where(o_m < M, tl.sum(b_error * b_error, 1), 0.0)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["M", "masks", "tokens"])
def masked_mse_bwd_kernel(
    grad_ptr,  # ()
    pred_ptr,  # (B * m, M, V)
    spectrogram_ptr,  # (B, T, F)
    ids_ptr,  # (B * m, M)
    d_pred_ptr,  # (B * m, M, V), contiguous
    M,
    masks,
    tokens,
    eps,
    scale,
    stride_pred_row,
    stride_pred_m,
    stride_pred_v,
    stride_b,
    stride_t,
    stride_f,
    stride_ids_row,
    stride_ids_m,
    GRID_F: tl.constexpr,
    PT: tl.constexpr,
    PF: tl.constexpr,
    ST: tl.constexpr,
    SF: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_v = tl.arange(0, BLOCK_V)
    b_error = error_tile(
        pred_ptr, spectrogram_ptr, ids_ptr, i_row, o_m, M, masks, tokens, eps,
        stride_pred_row, stride_pred_m, stride_pred_v, stride_b, stride_t, stride_f,
        stride_ids_row, stride_ids_m, GRID_F, PT, PF, ST, SF, NORMALIZE, BLOCK_V,
    )  # fmt: skip
    b_d_pred = b_error * (tl.load(grad_ptr).to(tl.float32) * scale)
    p_d_pred = d_pred_ptr + (i_row * M + o_m)[:, None] * (PT * PF) + o_v[None, :]
    m_out = (o_m < M)[:, None] & (o_v < PT * PF)[None, :]
    tl.store(p_d_pred, b_d_pred.to(d_pred_ptr.dtype.element_ty), mask=m_out)


def masked_mse_triton(
    pred: Tensor,
    spectrogram: Tensor,
    ids_masked: Tensor,
    *,
    patch: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
) -> Tensor:
    """`audiomae_kernels.masked_mse`. The patch of an id out of range is zeros."""
    if pred.numel() == 0:
        return pred.new_zeros((), dtype=torch.float32)
    arguments = _arguments(pred, spectrogram, ids_masked, patch, stride, normalize)
    partials = pred.new_empty(PROGRAMS * multiprocessors(pred.device), dtype=torch.float32)
    loss = pred.new_empty((), dtype=torch.float32)
    with device_of(pred):
        masked_mse_fwd_kernel[(partials.numel(),)](
            pred, spectrogram, ids_masked, partials, pred.shape[0], **arguments
        )
        return sum_partials(partials, loss, 1 / pred.numel())


def masked_mse_backward_triton(
    grad: Tensor,
    pred: Tensor,
    spectrogram: Tensor,
    ids_masked: Tensor,
    *,
    patch: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
) -> Tensor:
    """Gradient of pred."""
    d_pred = pred.new_empty(pred.shape)
    if pred.numel() == 0:
        return d_pred
    arguments = _arguments(pred, spectrogram, ids_masked, patch, stride, normalize)
    rows, M, _ = pred.shape
    with device_of(pred):
        masked_mse_bwd_kernel[(rows, triton.cdiv(M, arguments["BLOCK_M"]))](
            grad, pred, spectrogram, ids_masked, d_pred, scale=2 / pred.numel(), **arguments
        )
    return d_pred


def refuses(pred: Tensor, *_, **__) -> str:
    """Why these arguments are not served; empty if they are."""
    if pred.shape[2] > MAX_VALUES:
        return f"It serves patches of up to {MAX_VALUES} values, not of {pred.shape[2]}."
    return ""


def _arguments(pred, spectrogram, ids_masked, patch, stride, normalize):
    """What both kernels take by name."""
    (pt, pf), (st, sf) = patch, stride
    B, T, F = spectrogram.shape
    grid_t, grid_f = (T - pt) // st + 1, (F - pf) // sf + 1
    block_v = triton.next_power_of_2(pt * pf)
    named = {"M": pred.shape[1], "masks": pred.shape[0] // B, "tokens": grid_t * grid_f, "eps": EPS}
    named |= zip(("stride_pred_row", "stride_pred_m", "stride_pred_v"), pred.stride(), strict=True)
    named |= zip(("stride_b", "stride_t", "stride_f"), spectrogram.stride(), strict=True)
    named |= zip(("stride_ids_row", "stride_ids_m"), ids_masked.stride(), strict=True)
    return named | {
        "GRID_F": grid_f,
        "PT": pt,
        "PF": pf,
        "ST": st,
        "SF": sf,
        "NORMALIZE": normalize,
        "BLOCK_M": max(TILE // block_v, 1),
        "BLOCK_V": block_v,
        "num_warps": 4 if block_v <= TILE else 8,
    }
