"""Reconstruction loss of the masked patches, in plain PyTorch."""

import torch
from torch import Tensor

from audiomae_kernels._library import loss_dtype
from audiomae_kernels.patch_gather.reference import patch_gather_ref

EPS = 1e-6


def masked_mse_ref(
    pred: Tensor,
    spectrogram: Tensor,
    ids_masked: Tensor,
    *,
    patch: tuple[int, int],
    stride: tuple[int, int] | None = None,
    normalize: bool = True,
    upcast: bool = True,
) -> Tensor:
    """`audiomae_kernels.masked_mse`, in float32 (float64) or, without `upcast`, in the inputs' own dtypes."""
    error = _error(pred, spectrogram, ids_masked, patch, stride, normalize, upcast)
    # In stages, because the order of a full reduction depends on the number of threads.
    return error.square().sum(-1).sum(-1).sum() / max(error.numel(), 1)


def masked_mse_backward_ref(
    grad: Tensor,
    pred: Tensor,
    spectrogram: Tensor,
    ids_masked: Tensor,
    *,
    patch: tuple[int, int],
    stride: tuple[int, int],
    normalize: bool,
) -> Tensor:
    """Gradient of pred: ``2 / (R * M * V) * (pred - target) * grad``."""
    error = _error(pred, spectrogram, ids_masked, patch, stride, normalize, upcast=True)
    return (error * (grad * (2 / max(error.numel(), 1)))).to(pred.dtype).contiguous()


def _error(pred, spectrogram, ids_masked, patch, stride, normalize, upcast):
    target = patch_gather_ref(spectrogram, ids_masked, patch=patch, stride=stride)
    if upcast:
        dtype = loss_dtype(pred, spectrogram)
        pred, target = pred.to(dtype), target.to(dtype)
    if normalize and target.numel() > 0:  # var_mean warns of empty input
        var, mean = torch.var_mean(target, dim=-1, keepdim=True, correction=1)
        target = (target - mean) / (var + EPS).sqrt()
    return pred - target
