"""A reconstruction to look at: original, what the encoder saw, and what the decoder made of it."""

from __future__ import annotations

import os

import torch
from audiomae_kernels import patch_gather
from torch import Tensor

from .masking import Mask
from .model import SpectrogramModel


@torch.no_grad()
def reconstruct(
    model: SpectrogramModel, spectrogram: Tensor, mask: Mask | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a masked autoencoder makes of masked spectrograms.

    Args:
        model: with a reconstruction loss.
        spectrogram: (B, T, F) normalised log-mel, as long as it is shown.
        mask: one row for each clip; None draws one.

    Returns:
        Three (B, T, F) float32 tensors: the spectrogram as the model's target has it (MAE-AST normalises it once
        more); the same, NaN where masked; the same, predictions where masked. Where the target is normalised patch
        by patch, a prediction gets back the mean and the variance of the patch it stands for, since the model is not
        asked for them. Masked tokens that the model does not decode (`decode_ratio`) stay NaN.

    Raises:
        ValueError: the model does not reconstruct.
    """
    c = model.config
    if mask is None:
        mask = model.draw_mask(len(spectrogram), spectrogram.shape[1], device=spectrogram.device)
        step = len(mask.ids_keep) // len(spectrogram)  # of several masks of a clip, the first
        mask = Mask(mask.ids_keep[::step], mask.ids_masked[::step], mask.num_tokens)
    out = model(spectrogram, mask)
    if out.pred is None:
        raise ValueError(
            "this model has no reconstruction loss (reconstruction_weight=0), so there is nothing to see"
        )
    original = model.spectrogram_norm(spectrogram).float()
    ids, values = out.get("ids_decoded", mask.ids_masked), out.pred.float()
    if getattr(c, "normalize_target", False):
        patches = patch_gather(original, ids.clamp(min=0), patch=c.patch, stride=c.stride)
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
        values = values * (variance + 1e-6).sqrt() + mean
    total, count = _scatter(original, ids, values, c)
    # With overlapping patches a value may be seen in one and masked in another: it was seen.
    _, masked = _scatter(original, mask.ids_masked, None, c)
    _, seen = _scatter(original, mask.ids_keep, None, c)
    hidden = (masked > 0) & (seen == 0)
    return original, original.masked_fill(hidden, torch.nan), torch.where(hidden, total / count, original)


def _scatter(like: Tensor, ids: Tensor, values: Tensor | None, c) -> tuple[Tensor, Tensor]:
    """Sums (B, T, F) of the patches' values at their places, and how many patches reach each place; -1 is none."""
    bands, valid = c.grid(like.shape[1])[1], (ids >= 0)[:, :, None].to(like.dtype)
    steps = [torch.arange(size, device=ids.device) for size in c.patch]
    ids = ids.clamp(min=0)[:, :, None]
    frames, bins = (
        ids.div(bands, rounding_mode="floor") * c.step[0] + steps[0],
        ids % bands * c.step[1] + steps[1],
    )
    places = (frames[:, :, :, None] * like.shape[2] + bins[:, :, None, :]).flatten(2)  # (B, M, V)
    zeros = torch.zeros_like(like).flatten(1)
    count = zeros.scatter_add(1, places.flatten(1), valid.expand_as(places).flatten(1))
    total = zeros if values is None else zeros.scatter_add(1, places.flatten(1), (values * valid).flatten(1))
    return total.view_as(like), count.view_as(like)


def draw_reconstruction(
    path: str | os.PathLike, original: Tensor, masked: Tensor, reconstruction: Tensor, title: str = ""
) -> None:
    """A PNG of what :func:`reconstruct` returns, a column for each clip. Needs matplotlib."""
    from matplotlib.figure import Figure

    clips = len(original)
    figure = Figure(figsize=(5.5 * clips, 7), layout="constrained")
    axes = figure.subplots(3, clips, sharex=True, sharey=True, squeeze=False)
    names = ("original", "masked", "reconstructed")
    for row, name, spectrograms in zip(axes, names, (original, masked, reconstruction), strict=True):
        for axis, spectrogram, scale in zip(row, spectrograms, original, strict=True):
            axis.imshow(
                spectrogram.T.cpu().numpy(),
                origin="lower",
                aspect="auto",
                interpolation="nearest",
                vmin=scale.min().item(),
                vmax=scale.max().item(),
            )
            axis.set_title(name)
        row[0].set_ylabel("mel bin")
    for axis in axes[-1]:
        axis.set_xlabel("frame of 10 ms")
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=100)
