"""Fine-tuning: a pre-trained encoder, mean pooling and a linear head.

Huang et al. 2022, section 3.4: the decoder is dropped, and in training whole time steps and frequency bands
are masked instead of single patches. Shapes as in `model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from audiomae_kernels import _checks
from torch import Tensor, nn

from .attention import on_device
from .config import ClassifierConfig
from .masking import Grid, Mask
from .model import Output, SpectrogramModel, check_spectrogram, init_vit
from .ragged import as_ragged


class Classifier(SpectrogramModel):
    """Encoder, mean over the patch tokens, LayerNorm, Linear.

    Build one with `audiomae.create_classifier`. Attribute `config` holds its `ClassifierConfig`.
    """

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig):
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.num_classes)
        init_vit(self.encoder)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def _draw_mask(self, rows: int, grid: Grid, generator, device) -> Mask:
        """Structured masking with `mask_time` and `mask_frequency`; one of them must be set."""
        c = self.config
        if not (c.mask_time or c.mask_frequency):
            raise ValueError(
                "this classifier masks nothing: set mask_time or mask_frequency in its configuration"
            )
        if not c.mask_frequency:
            return Mask.time(rows, grid, c.mask_time, generator, device)
        if not c.mask_time:
            return Mask.frequency(rows, grid, c.mask_frequency, generator, device)
        return Mask.time_frequency(rows, grid, c.mask_time, c.mask_frequency, generator, device)

    def forward(
        self,
        spectrogram: Tensor,
        mask: Mask | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """Logits, and the loss when labels are given.

        Args:
            spectrogram: (B, T, F) or (B, 1, T, F) normalised log-mel.
            mask: tokens to leave out; None masks nothing in evaluation, and in training draws a mask where
                `mask_time` or `mask_frequency` is set.
            lengths: as in `encode`; with `pad="exclude"` the mean is that of a clip's own tokens.
            labels: (R,) int64 class numbers (cross-entropy) or (R, num_classes) float targets in [0, 1] (binary
                cross-entropy per class), on the spectrogram's device. Values are looked at on a CPU, and on
                other devices asserted without waiting under AUDIOMAE_CHECK=1.

        Returns:
            `Output` with `loss` (if labels), `logits` (R, num_classes), `mask` (if any).

        Raises:
            ValueError: the input, the mask or the labels do not fit the model.
        """
        c = self.config
        spectrogram = check_spectrogram(spectrogram, lengths, self.encoder)
        if mask is None and self.training and (c.mask_time or c.mask_frequency):
            batch, frames = spectrogram.shape[:2]
            mask = self.draw_mask(batch, frames, device=spectrogram.device, lengths=lengths)
        if labels is not None:
            rows = (spectrogram if mask is None else mask.ids_keep).shape[0]
            check_labels(labels, rows, c.num_classes, spectrogram.device)
        tokens = self.encode(spectrogram, mask, lengths)[:, c.prefix_tokens :]
        logits = self.head(self.fc_norm(self._mean(tokens, mask, lengths)))
        out = (
            Output(logits=logits) if labels is None else Output(loss=self.loss(logits, labels), logits=logits)
        )
        if mask is not None:
            out["mask"] = mask
        return out

    def _mean(self, tokens: Tensor, mask: Mask | None, lengths: Tensor | Sequence[int] | None) -> Tensor:
        """(R, K, D) -> (R, D): over a row's own tokens, which zeros follow."""
        clips = self.clips(lengths)
        if clips is None:
            return tokens.mean(dim=1)
        counts = clips.tokens if mask is None else as_ragged(mask).kept
        return tokens.sum(dim=1) / on_device(counts, tokens.dtype, tokens.device)[:, None]

    @staticmethod
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy for (R,) int64 labels, binary cross-entropy for (R, C) float ones; fp32 or fp64."""
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if labels.dtype == torch.int64:
            loss = F.cross_entropy(precise, labels)
        else:
            loss = F.binary_cross_entropy_with_logits(precise, labels.to(precise.dtype))
        if _checks.ASSERTS:
            _checks.assert_not_nan("classifier", loss)
        return loss


def check_labels(labels: Tensor, rows: int, num_classes: int, device: torch.device) -> None:
    """Refuses labels that do not fit (R, C) logits on this device; see `Classifier.forward`."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    numbers = labels.dtype == torch.int64 and labels.shape == (rows,)
    if not numbers and not (labels.is_floating_point() and labels.shape == (rows, num_classes)):
        raise ValueError(
            f"labels must be int64 of shape {(rows,)} (one class a clip) or float of shape "
            f"{(rows, num_classes)} (any number of classes), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if labels.device != device:
        raise ValueError(
            f"labels are on {labels.device}, the spectrogram on {device}: move them with labels.to(device)"
        )
    highest = num_classes - 1 if numbers else 1
    wanted = f"class labels from 0 to {highest}" if numbers else "targets from 0 to 1"
    looks = device.type == "cpu" and not torch.compiler.is_compiling()
    if not looks and not _checks.ASSERTS:
        return  # a look would wait for the device
    fits = (labels >= 0) & (labels <= highest)
    if not looks:
        torch._assert_async(fits.all(), f"the classifier takes {wanted}")
    elif not fits.all():
        raise ValueError(f"the classifier takes {wanted}, got {labels[~fits][:5].tolist()}")
