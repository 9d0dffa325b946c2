"""info_nce in Triton: the logits are computed a tile at a time, and never stored.

``X`` is the side whose rows a program owns and ``Y`` the other one, which it goes through; ``S = X Yᵀ``.

Forward, X the side whose rows have a softmax: a running maximum and sum give each row's log-sum-exp.
Backward, once for each side: S again, ``dS = softmax(S) - I`` from the stored log-sum-exp, and ``dX = dS Y``.
A program owns its rows of dX, so that nothing is added up across programs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from audiomae_kernels._library import wanted
from audiomae_kernels._partials import PROGRAMS, sum_partials
from audiomae_kernels._triton import device_of, multiprocessors, tl, triton


@triton.jit
def logits_tile(
    x_ptr, y_ptr, o_x, o_y, M, stride_x_m, stride_x_v, stride_y_m, stride_y_v,
    V: tl.constexpr, DOT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """S of the rows `o_x` of a clip with its rows `o_y`: (BLOCK, BLOCK) float32.

    Rows beyond the last give what the last one gives: an index is cheaper to bound than a load to mask.
    """
    S = tl.zeros([BLOCK, BLOCK], tl.float32)
    p_x = x_ptr + tl.minimum(o_x, M - 1).to(tl.int64)[:, None] * stride_x_m
    p_y = y_ptr + tl.minimum(o_y, M - 1).to(tl.int64)[None, :] * stride_y_m
    for i_v in range(0, V, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        o_v = o_v.to(tl.int64)
        b_x = tl.load(p_x + (o_v * stride_x_v)[None, :], mask=m_v[None, :], other=0.0)
        b_y = tl.load(p_y + (o_v * stride_y_v)[:, None], mask=m_v[:, None], other=0.0)
        S = tl.dot(b_x.to(DOT), b_y.to(DOT), S, input_precision="ieee")
    return S


@triton.jit(do_not_specialize=["B", "M"])
def info_nce_fwd_kernel(
    x_ptr,  # (B, M, V)
    y_ptr,  # (B, M, V)
    lse_ptr,  # (B, M) float32
    partials_ptr,  # (programs,) float32
    B,
    M,
    stride_x_b,
    stride_x_m,
    stride_x_v,
    stride_y_b,
    stride_y_m,
    stride_y_v,
    V: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks = tl.cdiv(M, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i_tile in range(tl.program_id(0), B * blocks, tl.num_programs(0)):
        i_b = (i_tile // blocks).to(tl.int64)
        i_x = i_tile % blocks * BLOCK
        o_x = i_x + tl.arange(0, BLOCK)
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        exp_sum = tl.zeros([BLOCK], tl.float32)
        diagonal = tl.zeros([BLOCK], tl.float32)
        for i_y in range(0, M, BLOCK):
            o_y = i_y + tl.arange(0, BLOCK)
            S = logits_tile(
                x_ptr + i_b * stride_x_b, y_ptr + i_b * stride_y_b, o_x, o_y, M,
                stride_x_m, stride_x_v, stride_y_m, stride_y_v, V, DOT, BLOCK, BLOCK_V,
            )  # fmt: skip
            if i_x == i_y:
                diagonal += tl.sum(tl.where(o_x[:, None] == o_y[None, :], S, 0.0), 1)
            S = tl.where((o_y < M)[None, :], S, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(S, 1))
            exp_sum = exp_sum * tl.exp(highest - new_highest) + tl.sum(tl.exp(S - new_highest[:, None]), 1)
            highest = new_highest
        lse = highest + tl.log(exp_sum)
        tl.store(lse_ptr + i_b * M + o_x, lse, mask=o_x < M)
        total += tl.where(o_x < M, lse - diagonal, 0.0)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["M"])
def info_nce_bwd_kernel(
    grad_ptr,  # ()
    x_ptr,  # (B, M, V)
    y_ptr,  # (B, M, V)
    lse_ptr,  # (B, M) float32
    d_x_ptr,  # (B, M, V), contiguous
    M,
    scale,
    stride_x_b,
    stride_x_m,
    stride_x_v,
    stride_y_b,
    stride_y_m,
    stride_y_v,
    stride_lse_b,
    stride_lse_m,
    V: tl.constexpr,
    SOFTMAX_OF_X: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_out = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_x, m_out = o_x < M, (o_out < V)[None, :]
    x_ptr += i_b * stride_x_b
    y_ptr += i_b * stride_y_b
    lse_ptr += i_b * stride_lse_b
    if SOFTMAX_OF_X:
        lse = tl.load(lse_ptr + o_x.to(tl.int64) * stride_lse_m, mask=m_x, other=0.0)[:, None]
    b_d_x = tl.zeros([BLOCK, BLOCK_OUT], tl.float32)
    for i_y in range(0, M, BLOCK):
        o_y = i_y + tl.arange(0, BLOCK)
        m_y = o_y < M
        S = logits_tile(
            x_ptr, y_ptr, o_x, o_y, M,
            stride_x_m, stride_x_v, stride_y_m, stride_y_v, V, DOT, BLOCK, BLOCK_V,
        )  # fmt: skip
        if not SOFTMAX_OF_X:
            lse = tl.load(lse_ptr + o_y.to(tl.int64) * stride_lse_m, mask=m_y, other=0.0)[None, :]
        d_S = tl.exp(S - lse) - tl.where(o_x[:, None] == o_y[None, :], 1.0, 0.0)
        d_S = tl.where(m_x[:, None] & m_y[None, :], d_S, 0.0)
        p_y = y_ptr + tl.minimum(o_y, M - 1).to(tl.int64)[:, None] * stride_y_m
        p_y += (o_out.to(tl.int64) * stride_y_v)[None, :]
        b_y = tl.load(p_y, mask=m_out, other=0.0).to(DOT)
        b_d_x = tl.dot(d_S.to(DOT), b_y, b_d_x, input_precision="ieee")
    # Scaled at the end: softmax - I fits float16, its share of a mean over 10^5 rows does not.
    b_d_x *= tl.load(grad_ptr).to(tl.float32) * scale
    p_d_x = d_x_ptr + (i_b * M + o_x)[:, None] * V + o_out[None, :]
    tl.store(p_d_x, b_d_x.to(d_x_ptr.dtype.element_ty), mask=m_x[:, None] & m_out)


def info_nce_triton(pred: Tensor, target: Tensor, *, over: str) -> tuple[Tensor, Tensor]:
    """The loss and the log-sum-exp (B, M) of each softmax."""
    B, M, V = pred.shape
    lse = pred.new_empty(B, M, dtype=torch.float32)
    if lse.numel() == 0:
        return pred.new_zeros((), dtype=torch.float32), lse
    x, y = (pred, target) if over == "target" else (target, pred)
    config = _config(pred, target, backward=False)
    partials = pred.new_empty(PROGRAMS * multiprocessors(pred.device), dtype=torch.float32)
    loss = pred.new_empty((), dtype=torch.float32)
    with device_of(pred):
        info_nce_fwd_kernel[(partials.numel(),)](
            x, y, lse, partials, B, M, *x.stride(), *y.stride(), V=V, **config
        )
        return sum_partials(partials, loss, 1 / lse.numel()), lse


def info_nce_backward_triton(
    grad: Tensor, pred: Tensor, target: Tensor, lse: Tensor, *, over: str, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of pred and target."""
    B, M, V = pred.shape
    sides = (pred, target), (target, pred)
    grads = tuple(wanted(x, wants) for (x, _), wants in zip(sides, output_mask, strict=True))
    config = _config(pred, target, backward=True)
    grid = (B, triton.cdiv(M, config["BLOCK"]), triton.cdiv(V, config["BLOCK_OUT"]))
    for i, ((x, y), d_x) in enumerate(zip(sides, grads, strict=True)):
        if d_x.numel() == 0:
            continue
        with device_of(pred):
            info_nce_bwd_kernel[grid](
                grad,
                x,
                y,
                lse,
                d_x,
                M,
                1 / (B * M),
                *x.stride(),
                *y.stride(),
                *lse.stride(),
                V=V,
                SOFTMAX_OF_X=(i == 0) == (over == "target"),
                **config,
            )
    return grads


def _config(pred: Tensor, target: Tensor, backward: bool) -> dict:
    """Tiles by dtype: 16-bit products run on tensor cores, float32 ones (IEEE, no TF32) do not."""
    V = max(triton.next_power_of_2(pred.shape[2]), 16)
    if pred.dtype == target.dtype and pred.dtype != torch.float32:
        dot = tl.bfloat16 if pred.dtype == torch.bfloat16 else tl.float16
        config = {"DOT": dot, "BLOCK": 64, "BLOCK_V": min(V, 64), "num_warps": 8}
        return config | {"BLOCK_OUT": min(V, 256)} if backward else config
    # Larger blocks spill, if only on some GPUs and where the pointers are not aligned.
    config = {"DOT": tl.float32, "BLOCK": 32, "BLOCK_V": 16, "num_warps": 8}
    return config | {"BLOCK_OUT": min(V, 128)} if backward else config
