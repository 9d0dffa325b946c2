"""window_attention in Triton: a program attends in W neighbouring windows of HG neighbouring heads.

Its tile of q, k or v is loaded as (W * NP tokens, HG * DC channels), whole 128-byte lines where heads are
contiguous, and worked on as (U, NP, DC): U = W * HG small matrices, which the warps share out. NP is the N
tokens of a window, padded to a power of two of at least 16. The D channels of a head come in C chunks of DC,
one after the other: nearly always one. See ``kernels/README.md``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from audiomae_kernels import _library
from audiomae_kernels._partials import sum_partials
from audiomae_kernels._triton import device_of, is_hip, multiprocessors, targets_hip, tl, triton

PROGRAMS = 6  # of the backward a multiprocessor: two rounds if it holds three at a time, three if two

MIN_NORM = tl.constexpr(1e-6)  # of |q||k|
MIN_TAU = tl.constexpr(0.01)
BORDER = tl.constexpr(-100.0)
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
MIN_SQUARE = tl.constexpr(1e-37)  # of a norm: its inverse, and the product of two, are float32 numbers


@triton.jit
def token_places(
    i_window,
    o_place,
    T,
    F: tl.constexpr,
    WT: tl.constexpr,
    WF: tl.constexpr,
    ST: tl.constexpr,
    SF: tl.constexpr,
):
    """Token at places `o_place` of windows `i_window`, if it exists, and which shift borders it is past."""
    PT = (T + WT - 1) // WT * WT
    PF: tl.constexpr = (F + WF - 1) // WF * WF
    t = i_window // (PF // WF) * WT + o_place // WF + ST
    f = i_window % (PF // WF) * WF + o_place % WF + SF
    past_t, past_f = t >= PT, f >= PF
    t, f = tl.where(past_t, t - PT, t), tl.where(past_f, f - PF, f)
    exists = (i_window < PT // WT * (PF // WF)) & (o_place < WT * WF) & (t < T) & (f < F)
    return t * F + f, exists, past_t * 2 + past_f * 1


@triton.jit
def channels(i_chunk, i_head, H: tl.constexpr, D: tl.constexpr, HG: tl.constexpr, DC: tl.constexpr):
    """Head and channel of each column of a tile, int64, and whether they exist: (1, HG * DC)"""
    o_col = tl.arange(0, HG * DC)[None, :]
    o_head, o_channel = (i_head + o_col // DC).to(tl.int64), (i_chunk * DC + o_col % DC).to(tl.int64)
    return o_head, o_channel, (o_head < H) & (o_channel < D)


@triton.jit
def load_units(p_x, mask, W: tl.constexpr, HG: tl.constexpr):
    """(W * NP, HG * DC) -> (U, NP, DC)"""
    b_x = tl.load(p_x, mask=mask, other=0.0)
    NP: tl.constexpr = b_x.shape[0] // W
    DC: tl.constexpr = b_x.shape[1] // HG
    return b_x.reshape(W, NP, HG, DC).permute(0, 2, 1, 3).reshape(W * HG, NP, DC)


@triton.jit
def store_units(p_x, b_x, mask, W: tl.constexpr, HG: tl.constexpr):
    """(U, NP, DC) -> (W * NP, HG * DC)"""
    NP: tl.constexpr = b_x.shape[1]
    DC: tl.constexpr = b_x.shape[2]
    b_x = b_x.to(p_x.dtype.element_ty).reshape(W, HG, NP, DC).permute(0, 2, 1, 3)
    tl.store(p_x, b_x.reshape(W * NP, HG * DC), mask=mask)


@triton.jit
def dot(b_a, b_b, PRECISION: tl.constexpr):
    """Products of U pairs of matrices, in float32."""
    if b_a.shape[0] > 1:  # the warps share out the matrices
        b_c = tl.dot(b_a, b_b, input_precision=PRECISION)
    else:  # ... and a single one's rows and columns
        b_a, b_b = b_a.reshape(b_a.shape[1], b_a.shape[2]), b_b.reshape(b_b.shape[1], b_b.shape[2])
        b_c = tl.dot(b_a, b_b, input_precision=PRECISION)[None, :, :]
    return b_c


@triton.jit
def dot_wide(b_a, b_b):
    """`dot` for a left side in float32 that float16 cannot hold: TF32 has float32's range.

    Its fraction has 10 bits, as float16's, but what does not fit is cut off where float16 rounds to nearest.
    AMD's float32 products are exact; most of its GPUs have no TF32.
    """
    PRECISION: tl.constexpr = "ieee" if is_hip() else "tf32"
    WIDE: tl.constexpr = b_b.dtype == tl.float16
    return dot(b_a, b_b.to(tl.float32), PRECISION) if WIDE else dot(b_a.to(b_b.dtype), b_b, "ieee")


@triton.jit
def load_bias(
    bias_ptr,
    i_head,
    H: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    W: tl.constexpr,
    HG: tl.constexpr,
):
    """(U, NP, NP) float32, times log2(e)."""
    o_head = i_head + tl.arange(0, HG)[:, None, None]
    o_q, o_k = tl.arange(0, NP)[None, :, None], tl.arange(0, NP)[None, None, :]
    p_bias = bias_ptr + (o_head * N + o_q) * N + o_k
    b_bias = tl.load(p_bias, mask=(o_head < H) & (o_q < N) & (o_k < N), other=0.0).to(tl.float32) * LOG2_E
    return tl.broadcast_to(b_bias[None, :, :, :], W, HG, NP, NP).reshape(W * HG, NP, NP)


@triton.jit
def load_tau(tau_ptr, i_head, H: tl.constexpr, W: tl.constexpr, HG: tl.constexpr):
    """(U, 1, 1) float32, not clamped."""
    o_head = i_head + tl.arange(0, W * HG)[:, None, None] % HG
    return tl.load(tau_ptr + o_head, mask=o_head < H, other=1.0).to(tl.float32)


@triton.jit
def clamp_tau(b_tau):
    """At least 0.01; NaN stays NaN."""
    return tl.maximum(b_tau, MIN_TAU, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def on_diagonal(b_x, NP: tl.constexpr):
    """(U, NP, NP), a row or a column of it, or a number: 0 off the diagonal."""
    o_place = tl.arange(0, NP)
    return tl.where(o_place[None, :, None] == o_place[None, None, :], b_x, 0.0)


@triton.jit
def squared_norms(b_x, AXIS: tl.constexpr):
    """|x|^2: (U, NP, DC) -> (U, NP, 1), or (U, 1, NP) with AXIS = 1."""
    if b_x.dtype == tl.float32 or b_x.shape[1] > 16:
        b_x = b_x.to(tl.float32)
        b_square = tl.expand_dims(tl.sum(b_x * b_x, 2), AXIS)
    else:  # the diagonal of x x^T: tensor cores have the time, and the result has the layout of the scores
        b_xx = dot(b_x, b_x.permute(0, 2, 1), "ieee")
        b_square = tl.sum(on_diagonal(b_xx, b_x.shape[1]), AXIS, keep_dims=True)
    return b_square


@triton.jit
def inverse_root(b_square):
    """1 / |x| from |x|^2, large for no length."""
    return tl.rsqrt(tl.maximum(b_square, MIN_SQUARE))


@triton.jit
def scale_rows(b_scale, b_x, AXIS: tl.constexpr):
    """x (U, NP, DC), its rows times (U, NP, 1), or (U, 1, NP) with AXIS = 1."""
    if b_x.dtype == tl.float32 or b_x.shape[1] > 16:
        b_x = b_x.to(tl.float32) * b_scale.reshape(b_x.shape[0], b_x.shape[1])[:, :, None]
    else:  # again without a change of layout
        b_x = dot_wide(on_diagonal(b_scale, b_x.shape[1]), b_x)
    return b_x


@triton.jit
def mask_scores(
    b_s,
    i_window,
    T,
    F: tl.constexpr,
    WT: tl.constexpr,
    WF: tl.constexpr,
    ST: tl.constexpr,
    SF: tl.constexpr,
    COSINE: tl.constexpr,
    PADDED: tl.constexpr,
    W: tl.constexpr,
):
    """Scores (U, NP, NP), times log2(e), with shift borders and padding."""
    o_window = i_window + (tl.arange(0, b_s.shape[0]) // (b_s.shape[0] // W))[:, None, None]
    o_place = tl.arange(0, b_s.shape[1])
    _, _, past_q = token_places(o_window, o_place[None, :, None], T, F, WT, WF, ST, SF)
    _, exists, past_k = token_places(o_window, o_place[None, None, :], T, F, WT, WF, ST, SF)
    if ST > 0 or SF > 0:
        if COSINE:
            b_s = tl.where(past_q == past_k, b_s, b_s + BORDER * LOG2_E)
        else:
            b_s = tl.where(past_q == past_k, b_s, LOWEST)
    if PADDED or b_s.shape[1] > WT * WF:
        b_s = tl.where(exists, b_s, LOWEST)
    return b_s


@triton.jit
def window_attention_fwd_kernel(
    qkv_ptr,  # (B, L, 3, H, D)
    tau_ptr,  # (H,) or None: dot scoring
    bias_ptr,  # (H, N, N) or None
    out_ptr,  # (B, L, H * D)
    stride_b,
    stride_l,
    stride_s,
    stride_h,
    stride_d,
    T,
    strips,  # groups of W windows in a clip
    F: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WT: tl.constexpr,
    WF: tl.constexpr,
    ST: tl.constexpr,
    SF: tl.constexpr,
    PADDED: tl.constexpr,  # whether the windows do not tile the grid
    NP: tl.constexpr,
    DC: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    HG: tl.constexpr,
):
    COSINE: tl.constexpr = tau_ptr is not None
    GROUPS: tl.constexpr = (H + HG - 1) // HG
    U: tl.constexpr = W * HG
    i_tile = tl.program_id(0) // GROUPS
    i_head = tl.program_id(0) % GROUPS * HG
    i_clip = (i_tile // strips).to(tl.int64)
    i_window = i_tile % strips * W

    o_row = tl.arange(0, W * NP)
    o_token, m_row, _ = token_places(i_window + o_row // NP, o_row % NP, T, F, WT, WF, ST, SF)
    o_token, m_row = o_token.to(tl.int64)[:, None], m_row[:, None]
    p_in = qkv_ptr + i_clip * stride_b + o_token * stride_l
    p_out = out_ptr + (i_clip * T * F + o_token) * (H * D)

    b_v = tl.zeros([U, NP, DC], qkv_ptr.dtype.element_ty)
    b_s = tl.zeros([U, NP, NP], tl.float32)
    b_qq, b_kk = tl.zeros([U, NP, 1], tl.float32), tl.zeros([U, 1, NP], tl.float32)
    for i_chunk in tl.range(0, C, num_stages=1):
        o_head, o_channel, m_col = channels(i_chunk, i_head, H, D, HG, DC)
        p_q = p_in + (o_head * stride_h + o_channel * stride_d)
        b_q = load_units(p_q, m_row & m_col, W, HG)
        b_k = load_units(p_q + stride_s, m_row & m_col, W, HG)
        if C == 1:  # asked for together with the others
            b_v = load_units(p_q + stride_s + stride_s, m_row & m_col, W, HG)
        b_s += dot(b_q, b_k.permute(0, 2, 1), "ieee")
        if COSINE:
            b_qq += squared_norms(b_q, 2)
            b_kk += squared_norms(b_k, 1)
    if COSINE:
        b_tau = clamp_tau(load_tau(tau_ptr, i_head, H, W, HG))
        b_s *= tl.minimum(inverse_root(b_qq) * inverse_root(b_kk), 1 / MIN_NORM) * (1 / b_tau * LOG2_E)
    else:
        b_s *= D**-0.5 * LOG2_E
    if bias_ptr is not None:
        b_s += load_bias(bias_ptr, i_head, H, WT * WF, NP, W, HG)
    b_s = mask_scores(b_s, i_window, T, F, WT, WF, ST, SF, COSINE, PADDED, W)
    b_p = tl.exp2(b_s - tl.max(b_s, 2, keep_dims=True))
    b_over = 1 / tl.sum(b_p, 2, keep_dims=True)

    for i_chunk in tl.range(0, C, num_stages=1):
        o_head, o_channel, m_col = channels(i_chunk, i_head, H, D, HG, DC)
        if C > 1:
            p_v = p_in + (o_head * stride_h + o_channel * stride_d) + stride_s + stride_s
            b_v = load_units(p_v, m_row & m_col, W, HG)
        b_out = dot(b_p.to(b_v.dtype), b_v, "ieee") * b_over
        store_units(p_out + (o_head * D + o_channel), b_out, m_row & m_col, W, HG)


@triton.jit(do_not_specialize=["tiles"])
def window_attention_bwd_kernel(
    grad_ptr,  # (B, L, H, D)
    qkv_ptr,  # (B, L, 3, H, D)
    tau_ptr,  # (H,) or None: dot scoring
    bias_ptr,  # (H, N, N) or None
    dqkv_ptr,  # (B, L, 3, H, D), contiguous, or None
    dtau_ptr,  # (programs of a head group, H) float32 partial sums, or None
    dbias_ptr,  # (programs of a head group, H, N, N) float32 partial sums, or None
    grad_stride_b,
    grad_stride_l,
    grad_stride_h,
    grad_stride_d,
    stride_b,
    stride_l,
    stride_s,
    stride_h,
    stride_d,
    T,
    strips,  # groups of W windows in a clip
    tiles,  # of all clips
    F: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WT: tl.constexpr,
    WF: tl.constexpr,
    ST: tl.constexpr,
    SF: tl.constexpr,
    PADDED: tl.constexpr,
    NP: tl.constexpr,
    DC: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    HG: tl.constexpr,
):
    COSINE: tl.constexpr = tau_ptr is not None
    GROUPS: tl.constexpr = (H + HG - 1) // HG
    N: tl.constexpr = WT * WF
    U: tl.constexpr = W * HG
    i_program = tl.program_id(0) // GROUPS
    i_head = tl.program_id(0) % GROUPS * HG
    o_row = tl.arange(0, W * NP)

    KEEPS_BIAS: tl.constexpr = NP == 16  # in registers, from tile to tile
    if bias_ptr is not None and KEEPS_BIAS:
        b_bias = load_bias(bias_ptr, i_head, H, N, NP, W, HG)
    if COSINE:
        b_tau = load_tau(tau_ptr, i_head, H, W, HG)
        b_scale = 1 / clamp_tau(b_tau)
    else:
        b_scale = D**-0.5
    b_dtau = tl.zeros([U, NP, 1], tl.float32)
    b_dbias = tl.zeros([U, NP, NP], tl.float32)

    for i_tile in range(i_program, tiles, tl.num_programs(0) // GROUPS):
        i_clip = (i_tile // strips).to(tl.int64)
        i_window = i_tile % strips * W
        o_token, m_row, _ = token_places(i_window + o_row // NP, o_row % NP, T, F, WT, WF, ST, SF)
        o_token, m_row = o_token.to(tl.int64)[:, None], m_row[:, None]
        p_in = qkv_ptr + i_clip * stride_b + o_token * stride_l
        p_grad = grad_ptr + i_clip * grad_stride_b + o_token * grad_stride_l

        b_q = tl.zeros([U, NP, DC], qkv_ptr.dtype.element_ty)
        b_k = tl.zeros([U, NP, DC], qkv_ptr.dtype.element_ty)
        b_do = tl.zeros([U, NP, DC], grad_ptr.dtype.element_ty)
        b_c = tl.zeros([U, NP, NP], tl.float32)
        b_ds = tl.zeros([U, NP, NP], tl.float32)
        b_qq, b_kk = tl.zeros([U, NP, 1], tl.float32), tl.zeros([U, 1, NP], tl.float32)
        for i_chunk in tl.range(0, C, num_stages=1):
            o_head, o_channel, m_col = channels(i_chunk, i_head, H, D, HG, DC)
            p_q = p_in + (o_head * stride_h + o_channel * stride_d)
            b_q = load_units(p_q, m_row & m_col, W, HG)
            b_k = load_units(p_q + stride_s, m_row & m_col, W, HG)
            b_v = load_units(p_q + stride_s + stride_s, m_row & m_col, W, HG)
            p_do = p_grad + (o_head * grad_stride_h + o_channel * grad_stride_d)
            b_do = load_units(p_do, m_row & m_col, W, HG)
            b_c += dot(b_q, b_k.permute(0, 2, 1), "ieee")
            b_ds += dot(b_do, b_v.permute(0, 2, 1), "ieee")
            if COSINE:
                b_qq += squared_norms(b_q, 2)
                b_kk += squared_norms(b_k, 1)

        # the probabilities again; s = c * scale + bias, and c = q.k * r for the cosine
        if COSINE:
            b_rq, b_rk = inverse_root(b_qq), inverse_root(b_kk)
            b_r = b_rq * b_rk
            m_free = b_r <= 1 / MIN_NORM  # where the clamp of |q||k| does not hold
            b_r = tl.minimum(b_r, 1 / MIN_NORM)
            b_c *= b_r
        b_s = b_c * (b_scale * LOG2_E)
        if bias_ptr is not None:
            if not KEEPS_BIAS:
                b_bias = load_bias(bias_ptr, i_head, H, N, NP, W, HG)
            b_s += b_bias
        b_s = mask_scores(b_s, i_window, T, F, WT, WF, ST, SF, COSINE, PADDED, W)
        b_p = tl.exp2(b_s - tl.max(b_s, 2, keep_dims=True))
        b_p *= 1 / tl.sum(b_p, 2, keep_dims=True)

        b_ds = b_p * (b_ds - tl.sum(b_ds * b_p, 2, keep_dims=True))
        if dbias_ptr is not None:
            b_dbias += b_ds
        if dtau_ptr is not None:
            b_dtau += tl.sum(b_ds * b_c, 2, keep_dims=True)

        if dqkv_ptr is not None:
            b_ds *= b_scale
            if COSINE:
                # what the norms take back: dq -= q / |q|^2 * sum_k(ds * c), dk likewise
                b_back = tl.where(m_free, b_ds * b_c, 0.0)
                b_back_q = b_rq * b_rq * tl.sum(b_back, 2, keep_dims=True)
                b_back_k = b_rk * b_rk * tl.sum(b_back, 1, keep_dims=True)
                b_ds *= b_r
            p_out = dqkv_ptr + (i_clip * T * F + o_token) * (3 * H * D)
            for i_chunk in tl.range(0, C, num_stages=1):
                o_head, o_channel, m_col = channels(i_chunk, i_head, H, D, HG, DC)
                if C > 1:  # again, a tile that it has just read
                    p_q = p_in + (o_head * stride_h + o_channel * stride_d)
                    b_q = load_units(p_q, m_row & m_col, W, HG)
                    b_k = load_units(p_q + stride_s, m_row & m_col, W, HG)
                    p_do = p_grad + (o_head * grad_stride_h + o_channel * grad_stride_d)
                    b_do = load_units(p_do, m_row & m_col, W, HG)
                p_dq = p_out + (o_head * D + o_channel)
                b_dv = dot(b_p.to(b_do.dtype).permute(0, 2, 1), b_do, "ieee")
                store_units(p_dq + 2 * H * D, b_dv, m_row & m_col, W, HG)
                b_dq, b_dk = dot_wide(b_ds, b_k), dot_wide(b_ds.permute(0, 2, 1), b_q)
                if COSINE:
                    b_dq -= scale_rows(b_back_q, b_q, 2)
                    b_dk -= scale_rows(b_back_k, b_k, 1)
                store_units(p_dq, b_dq, m_row & m_col, W, HG)
                store_units(p_dq + H * D, b_dk, m_row & m_col, W, HG)

    # over the windows
    o_head = i_head + tl.arange(0, HG)
    o_sum = i_program.to(tl.int64) * H + o_head
    if dtau_ptr is not None:
        b_dtau = tl.where(b_tau < MIN_TAU, 0.0, -tl.sum(b_dtau, 1, keep_dims=True) * (b_scale * b_scale))
        tl.store(dtau_ptr + o_sum, tl.sum(b_dtau.reshape(W, HG), 0), mask=o_head < H)
    if dbias_ptr is not None:
        b_dbias = tl.sum(b_dbias.reshape(W, HG, NP, NP), 0)
        o_q, o_k = tl.arange(0, NP)[None, :, None], tl.arange(0, NP)[None, None, :]
        mask = (o_head < H)[:, None, None] & (o_q < N) & (o_k < N)
        tl.store(dbias_ptr + (o_sum[:, None, None] * N + o_q) * N + o_k, b_dbias, mask=mask)


class Config(NamedTuple):
    """Tile of a program, and its warps."""

    NP: int  # places for the tokens of a window
    DC: int  # channels of a chunk of a head
    C: int  # chunks
    W: int  # windows
    HG: int  # heads
    num_warps: int


def config(windows: int, N: int, H: int, D: int, dtype: torch.dtype, backward: bool) -> Config:
    """The tile for a clip of `windows` windows."""
    NP, DC = (
        max(16, triton.next_power_of_2(size)) for size in (N, D)
    )  # a matrix product has no smaller side
    # What the registers hold of a head; float32 goes without tensor cores and needs more of them.
    if dtype == torch.float32:
        DC = 16
    elif NP > 16 or DC > 64 or backward:
        DC = min(DC, 32)
    if not targets_hip():
        idle = D > DC and D % DC and NP == 16
        if idle or (backward and dtype == torch.float16):  # float16 is widened for some products
            DC = 16
    C = triton.cdiv(D, DC)
    if NP > 16:  # one window and head; a wave of AMD's is two warps
        num_warps = NP // 16 if targets_hip() or (NP == 32 and dtype != torch.float32) else NP // 8
        return Config(NP, DC, C, W=1, HG=1, num_warps=num_warps)
    units = 4 if backward or dtype == torch.float32 else min(8, 4096 // (NP * DC))  # for four warps
    lines = 128 // math.gcd(128, D * dtype.itemsize)  # heads that fill whole lines
    HG = max(1, min(lines, triton.next_power_of_2(H), units))
    W = max(1, min(triton.next_power_of_2(windows), units // HG))
    if backward and C > 4 and dtype == torch.float32:
        W = 1
    return Config(NP, DC, C, W, HG, num_warps=max(1, W * HG * 4 // units))


def register_limit(tile: Config, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Option for NVIDIA's assembler, which without it spills a few values to fit one more program."""
    if targets_hip():
        return {}
    if dtype == torch.float32 and tile.NP == 16 and not backward:
        return {"maxnreg": 128}
    if dtype == torch.float32 and tile.C <= 2 and backward and tile.NP == 16:
        return {"maxnreg": 168}
    if dtype == torch.float16 and (tile.NP > 16 or tile.C > 4) and backward:
        return {"maxnreg": 255}
    return {}


def refuses(qkv: Tensor, tau: Tensor | None, bias: Tensor | None, *, window, **_) -> str:
    N, D = window[0] * window[1], qkv.shape[-1]
    if N > 64 or D > 128:  # more than the registers hold
        return f"It serves windows of up to 64 tokens and heads of up to 128 channels, not {N} and {D}."
    return ""


def window_attention_triton(
    qkv: Tensor,
    tau: Tensor | None,
    bias: Tensor | None,
    *,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    scoring: str,
) -> Tensor:
    """`audiomae_kernels.window_attention` for (B, L, 3, H, d) of any strides, window and shift clipped."""
    B, L, _, H, D = qkv.shape
    out = qkv.new_empty(B, L, H * D)
    if out.numel() == 0:
        return out
    arguments, tile, strips = _tiling(qkv, grid, window, shift, backward=False)
    groups = triton.cdiv(H, tile.HG)
    with device_of(qkv):
        window_attention_fwd_kernel[(B * strips * groups,)](
            qkv, _flat(tau), _flat(bias), out, *qkv.stride(), grid[0], strips, **arguments
        )
    return out


def window_attention_backward_triton(
    grad: Tensor,
    qkv: Tensor,
    tau: Tensor | None,
    bias: Tensor | None,
    *,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    scoring: str,
    output_mask: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, tau and bias; an empty tensor stands for one that nobody wants."""
    B, _, _, H, D = qkv.shape
    grads = tuple(
        _library.wanted(qkv if x is None else x, wants)
        for x, wants in zip((qkv, tau, bias), output_mask, strict=True)
    )
    if qkv.numel() == 0:
        return tuple(x.zero_() for x in grads)
    arguments, tile, strips = _tiling(qkv, grid, window, shift, backward=True)
    groups = triton.cdiv(H, tile.HG)
    rows = max(1, PROGRAMS * multiprocessors(qkv.device) // groups)
    N = window[0] * window[1]
    d_qkv, d_tau, d_bias = (x if wants else None for x, wants in zip(grads, output_mask, strict=True))
    tau_partials = None if d_tau is None else qkv.new_empty(rows, H, dtype=torch.float32)
    bias_partials = None if d_bias is None else qkv.new_empty(rows, H, N, N, dtype=torch.float32)
    grad = grad.unflatten(-1, (H, D))
    with device_of(qkv):
        window_attention_bwd_kernel[(rows * groups,)](
            grad,
            qkv,
            _flat(tau),
            _flat(bias),
            d_qkv,
            tau_partials,
            bias_partials,
            *grad.stride(),
            *qkv.stride(),
            grid[0],
            strips,
            B * strips,
            **arguments,
            num_stages=1,
        )
    if d_tau is not None:
        sum_partials(tau_partials, d_tau)
    if d_bias is not None:
        sum_partials(bias_partials.flatten(1), d_bias)
    return grads


def _tiling(qkv: Tensor, grid, window, shift, backward: bool) -> tuple[dict, Config, int]:
    """The kernels' constants, their tile, and the strips of a clip."""
    H, D = qkv.shape[3:]
    windows = triton.cdiv(grid[0], window[0]) * triton.cdiv(grid[1], window[1])
    tile = config(windows, window[0] * window[1], H, D, qkv.dtype, backward)
    padded = grid[0] % window[0] != 0 or grid[1] % window[1] != 0
    constants = {
        "F": grid[1],
        "H": H,
        "D": D,
        "WT": window[0],
        "WF": window[1],
        "ST": shift[0],
        "SF": shift[1],
    }
    limit = register_limit(tile, qkv.dtype, backward)
    return {**constants, "PADDED": padded, **tile._asdict(), **limit}, tile, triton.cdiv(windows, tile.W)


def _flat(x: Tensor | None) -> Tensor | None:
    """tau and bias are small: contiguous."""
    return None if x is None else x.contiguous()
