"""Gather of spectrogram patches in plain PyTorch."""

import torch
from torch import Tensor


def patch_gather_ref(
    spectrogram: Tensor,
    ids: Tensor,
    *,
    patch: tuple[int, int],
    stride: tuple[int, int] | None = None,
    upcast: bool = True,
) -> Tensor:
    """`audiomae_kernels.patch_gather`: a copy of values, so that `upcast` changes nothing here."""
    (pt, pf), (st, sf) = patch, stride or patch
    B, rows, K = spectrogram.shape[0], *ids.shape
    patches = spectrogram.detach().unfold(1, pt, st).unfold(2, pf, sf)  # (B, T', F', pt, pf), a view
    ids = ids.reshape(B, rows // max(B, 1) * K)
    clip = torch.arange(B, device=ids.device)[:, None]
    grid_f = patches.shape[2]
    return patches[clip, ids // grid_f, ids % grid_f].reshape(rows, K, pt * pf).contiguous()
