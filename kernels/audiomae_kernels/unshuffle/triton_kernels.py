"""unshuffle in Triton.

Forward: a program owns a block of positions of one clip. It finds which kept token, if any, belongs to each
by comparing with all of the clip's ids, which are few, and writes each row once; no index is stored.

Backward: d tokens is a gather. d mask_token and d pos are sums over the batch. A program owns a block of
positions in one of `SLICES` slices of the batch and leaves partial sums, which a second kernel adds up: no
atomics, and as many partial sums for a batch of 8 as for one of 8,000.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from audiomae_kernels._library import wanted
from audiomae_kernels._partials import sum_partials
from audiomae_kernels._triton import device_of, tl, triton

SLICES = 8


@triton.jit
def kept_at(ids_ptr, o_l, K, L, stride_k, BLOCK_L: tl.constexpr, BLOCK_KEPT: tl.constexpr):
    """For each position of `o_l` the k with ``ids[k] == l``, and -1 where there is none: (BLOCK_L,) int32."""
    kept = tl.full([BLOCK_L], -1, tl.int32)
    for i_k in range(0, K, BLOCK_KEPT):
        o_k = i_k + tl.arange(0, BLOCK_KEPT)
        b_ids = tl.load(ids_ptr + o_k.to(tl.int64) * stride_k, mask=o_k < K, other=-1)
        b_ids = tl.where((b_ids >= 0) & (b_ids < L), b_ids, -1).to(tl.int32)
        found = tl.where(o_l[:, None] == b_ids[None, :], o_k[None, :], -1)
        kept = tl.maximum(kept, tl.max(found, 1))
    return kept


@triton.jit(do_not_specialize=["K", "L"])
def unshuffle_fwd_kernel(
    tokens_ptr,  # (B, K, D)
    ids_ptr,  # (B, K)
    mask_token_ptr,  # (D,)
    pos_ptr,  # (L, D)
    out_ptr,  # (B, L, D), contiguous
    K,
    L,
    stride_b,
    stride_k,
    stride_d,
    stride_ids_b,
    stride_ids_k,
    stride_mask_d,
    stride_pos_l,
    stride_pos_d,
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = o_l < L
    b_k = kept_at(ids_ptr + i_b * stride_ids_b, o_l, K, L, stride_ids_k, BLOCK_L, BLOCK_KEPT)
    m_kept = (b_k >= 0)[:, None]
    p_tokens = tokens_ptr + i_b * stride_b + b_k.to(tl.int64)[:, None] * stride_k
    p_pos = pos_ptr + o_l.to(tl.int64)[:, None] * stride_pos_l
    p_out = out_ptr + (i_b * L + o_l)[:, None] * D
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        o_d = o_d.to(tl.int64)
        b_tokens = tl.load(p_tokens + (o_d * stride_d)[None, :], mask=m_kept & m_d[None, :], other=0.0)
        b_mask_token = tl.load(mask_token_ptr + o_d * stride_mask_d, mask=m_d, other=0.0)
        m_out = m_l[:, None] & m_d[None, :]
        b_pos = tl.load(p_pos + (o_d * stride_pos_d)[None, :], mask=m_out, other=0.0)
        b_out = tl.where(m_kept, b_tokens.to(tl.float32), b_mask_token.to(tl.float32)[None, :])
        b_out += b_pos.to(tl.float32)
        tl.store(p_out + o_d[None, :], b_out.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["K", "L"])
def unshuffle_bwd_tokens_kernel(
    grad_ptr,  # (B, L, D)
    ids_ptr,  # (B, K)
    d_tokens_ptr,  # (B, K, D), contiguous
    K,
    L,
    stride_b,
    stride_l,
    stride_d,
    stride_ids_b,
    stride_ids_k,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_ids = tl.load(ids_ptr + i_b * stride_ids_b + o_k * stride_ids_k, mask=m_k, other=-1)
    m_ids = (b_ids >= 0) & (b_ids < L)
    p_grad = grad_ptr + i_b * stride_b + (b_ids * stride_l)[:, None]
    p_out = d_tokens_ptr + (i_b * K + o_k)[:, None] * D
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = (o_d < D)[None, :]
        o_d = o_d.to(tl.int64)[None, :]
        b_grad = tl.load(p_grad + o_d * stride_d, mask=m_ids[:, None] & m_d, other=0.0)
        tl.store(p_out + o_d, b_grad, mask=m_k[:, None] & m_d)


@triton.jit(do_not_specialize=["B", "K", "L"])
def unshuffle_bwd_sums_kernel(
    grad_ptr,  # (B, L, D)
    ids_ptr,  # (B, K)
    mask_partials_ptr,  # (slices * blocks of positions, D) float32
    pos_partials_ptr,  # (slices, L, D) float32
    B,
    K,
    L,
    stride_b,
    stride_l,
    stride_d,
    stride_ids_b,
    stride_ids_k,
    D: tl.constexpr,
    WANTS_MASK_TOKEN: tl.constexpr,
    WANTS_POS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
):
    i_l, i_slice = tl.program_id(0), tl.program_id(2)
    o_l = i_l * BLOCK_L + tl.arange(0, BLOCK_L)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_tile = (o_l < L)[:, None] & m_d[None, :]
    p_grad = grad_ptr + o_l.to(tl.int64)[:, None] * stride_l + o_d.to(tl.int64)[None, :] * stride_d
    masked_total = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    stride_b, stride_ids_b = tl.cast(stride_b, tl.int64), tl.cast(stride_ids_b, tl.int64)
    for i_b in range(i_slice, B, tl.num_programs(2)):
        if WANTS_MASK_TOKEN:
            b_k = kept_at(ids_ptr + i_b * stride_ids_b, o_l, K, L, stride_ids_k, BLOCK_L, BLOCK_KEPT)
            m_masked = (b_k < 0)[:, None]
        if WANTS_POS:
            b_grad = tl.load(p_grad + i_b * stride_b, mask=m_tile, other=0.0).to(tl.float32)
            total += b_grad
            if WANTS_MASK_TOKEN:
                masked_total += tl.where(m_masked, b_grad, 0.0)
        else:  # the rows of kept tokens are not even read
            masked_total += tl.load(p_grad + i_b * stride_b, mask=m_tile & m_masked, other=0.0).to(tl.float32)
    if WANTS_MASK_TOKEN:
        i_partial = (i_slice * tl.num_programs(0) + i_l).to(tl.int64)
        tl.store(mask_partials_ptr + i_partial * D + o_d, tl.sum(masked_total, 0), mask=m_d)
    if WANTS_POS:
        o_row = i_slice.to(tl.int64) * L + o_l
        tl.store(pos_partials_ptr + o_row[:, None] * D + o_d[None, :], total, mask=m_tile)


def unshuffle_triton(tokens: Tensor, ids_keep: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    """`audiomae_kernels.unshuffle`. An id out of range places no token."""
    (B, K, D), L = tokens.shape, pos.shape[0]
    out = tokens.new_empty(B, L, D)
    if out.numel() == 0:
        return out
    block_l = 16
    with device_of(tokens):
        unshuffle_fwd_kernel[(B, triton.cdiv(L, block_l))](
            tokens,
            ids_keep,
            mask_token,
            pos,
            out,
            K,
            L,
            *tokens.stride(),
            *ids_keep.stride(),
            *mask_token.stride(),
            *pos.stride(),
            D=D,
            BLOCK_L=block_l,
            BLOCK_D=_block_d(D),
            BLOCK_KEPT=128,
            num_warps=8,
        )
    return out


def unshuffle_backward_triton(
    grad: Tensor, ids_keep: Tensor, mask_token: Tensor, pos: Tensor, *, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, mask_token and pos. That of a token whose id is out of range is 0."""
    (B, L, D), K = grad.shape, ids_keep.shape[1]
    wants_tokens, wants_mask_token, wants_pos = output_mask
    d_tokens = grad.new_empty((B, K, D) if wants_tokens else (0,))
    d_mask_token, d_pos = wanted(mask_token, wants_mask_token), wanted(pos, wants_pos)
    block_d = _block_d(D)
    strides = (*grad.stride(), *ids_keep.stride())
    with device_of(grad):
        if d_tokens.numel() > 0:
            block_k = 8
            unshuffle_bwd_tokens_kernel[(B, triton.cdiv(K, block_k))](
                grad, ids_keep, d_tokens, K, L, *strides, D=D, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=8
            )
        if (wants_mask_token or wants_pos) and D > 0:
            block_l = 8
            blocks_l = max(triton.cdiv(L, block_l), 1)
            mask_partials = grad.new_empty(
                SLICES * blocks_l if wants_mask_token else 0, D, dtype=torch.float32
            )
            pos_partials = grad.new_empty(SLICES if wants_pos else 0, L * D, dtype=torch.float32)
            unshuffle_bwd_sums_kernel[(blocks_l, triton.cdiv(D, block_d), SLICES)](
                grad,
                ids_keep,
                mask_partials,
                pos_partials,
                B,
                K,
                L,
                *strides,
                D=D,
                WANTS_MASK_TOKEN=wants_mask_token,
                WANTS_POS=wants_pos,
                BLOCK_L=block_l,
                BLOCK_D=block_d,
                BLOCK_KEPT=32,  # more of them spill beside the sums
                num_warps=8,
            )
            if wants_mask_token:
                sum_partials(mask_partials, d_mask_token)
            if wants_pos:
                sum_partials(pos_partials, d_pos)
    return d_tokens, d_mask_token, d_pos


def _block_d(D: int) -> int:
    """Columns of a tile: all if they are few, else the block that leaves the fewest of them idle."""
    if D <= 512:
        return triton.next_power_of_2(D)
    return min((512, 256, 128), key=lambda block: triton.cdiv(D, block) * block - D)
