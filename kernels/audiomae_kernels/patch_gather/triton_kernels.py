"""patch_gather in Triton: a program copies a block of tokens of one row of ids.

A patch is pt runs of pf contiguous values, so that a program reads whole runs and writes one contiguous
piece.
"""

from __future__ import annotations

from torch import Tensor

from audiomae_kernels._triton import device_of, tl, triton

TILE_BYTES = 8192  # of values that a program of four warps holds: four 128-bit accesses a thread


@triton.jit
def patch_offsets(
    b_ids, tokens, stride_t, stride_f, GRID_F: tl.constexpr, ST: tl.constexpr, SF: tl.constexpr
):
    """Offsets of the patches' first values in a clip, int64, and whether the ids are in range."""
    m_ids = (b_ids >= 0) & (b_ids < tokens)
    b_ids = tl.where(m_ids, b_ids, 0).to(tl.int32)  # fewer than 2^31 tokens: 32-bit division
    o_t, o_f = (b_ids // GRID_F * ST).to(tl.int64), (b_ids % GRID_F * SF).to(tl.int64)
    return o_t * stride_t + o_f * stride_f, m_ids


@triton.jit(do_not_specialize=["K", "masks", "tokens"])
def patch_gather_fwd_kernel(
    spectrogram_ptr,  # (B, T, F)
    ids_ptr,  # (B * m, K)
    out_ptr,  # (B * m, K, PT * PF), contiguous
    K,
    masks,
    tokens,
    stride_b,
    stride_t,
    stride_f,
    stride_row,
    stride_k,
    GRID_F: tl.constexpr,
    PT: tl.constexpr,
    PF: tl.constexpr,
    ST: tl.constexpr,
    SF: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k = o_k < K
    b_ids = tl.load(ids_ptr + i_row * stride_row + o_k * stride_k, mask=m_k, other=-1)
    o_patch, m_ids = patch_offsets(b_ids, tokens, stride_t, stride_f, GRID_F, ST, SF)
    o_value = (o_v // PF).to(tl.int64) * stride_t + (o_v % PF).to(tl.int64) * stride_f
    m_v = (o_v < PT * PF)[None, :]
    p_spectrogram = spectrogram_ptr + i_row // masks * stride_b + o_patch[:, None] + o_value[None, :]
    b_patch = tl.load(p_spectrogram, mask=m_ids[:, None] & m_v, other=0.0)  # (BLOCK_K, BLOCK_V)
    p_out = out_ptr + (i_row * K + o_k)[:, None] * (PT * PF) + o_v[None, :]
    tl.store(p_out, b_patch, mask=m_k[:, None] & m_v)


def patch_gather_triton(
    spectrogram: Tensor, ids: Tensor, *, patch: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """`audiomae_kernels.patch_gather`. The patch of an id out of range is zeros."""
    (pt, pf), (st, sf) = patch, stride
    (B, T, F), (rows, K) = spectrogram.shape, ids.shape
    grid_t, grid_f = (T - pt) // st + 1, (F - pf) // sf + 1
    V = pt * pf
    out = spectrogram.new_empty(rows, K, V)
    if out.numel() == 0:
        return out
    block_v = min(triton.next_power_of_2(V), 1024)
    block_k = max(TILE_BYTES // spectrogram.element_size() // block_v, 1)
    with device_of(spectrogram):
        patch_gather_fwd_kernel[(rows, triton.cdiv(K, block_k), triton.cdiv(V, block_v))](
            spectrogram,
            ids,
            out,
            K,
            rows // B,
            grid_t * grid_f,
            *spectrogram.stride(),
            *ids.stride(),
            GRID_F=grid_f,
            PT=pt,
            PF=pf,
            ST=st,
            SF=sf,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            num_warps=4,
        )
    return out
