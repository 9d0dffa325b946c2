"""SSAST: the full-token baseline.

Gong et al., "SSAST: Self-Supervised Audio Spectrogram Transformer", AAAI 2022 (arXiv 2110.09784). Every token
goes through every encoder layer, masked ones as a learned embedding; two heads read the masked tokens. Shapes
as in `model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from audiomae_kernels import masked_mse, patch_gather, unshuffle
from torch import Tensor, nn

from .config import SSASTConfig
from .masking import Mask
from .model import Output, SpectrogramModel, check_mask, check_spectrogram, contrast, init_vit, require
from .ragged import Rows, as_ragged


class SSAST(SpectrogramModel):
    """Joint discriminative and generative masked spectrogram patch modelling.

    Build one with `audiomae.create_model`. Attribute `config` holds its `SSASTConfig`.
    """

    config_class = SSASTConfig

    def __init__(self, config: SSASTConfig):
        super().__init__(config)
        require(config.impl, "unshuffle", "masked_mse", "info_nce")
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.reconstruction_head = self._head(config)
        self.info_nce_head = self._head(config)
        init_vit(self.encoder)
        nn.init.xavier_normal_(self.mask_token)

    @staticmethod
    def _head(c: SSASTConfig) -> nn.Sequential:
        return nn.Sequential(nn.Linear(c.width, c.width), nn.ReLU(), nn.Linear(c.width, c.patch_values))

    def forward(
        self,
        spectrogram: Tensor,
        mask: Mask | tuple[Mask, Mask] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Output:
        """Training loss of a batch: 10 * reconstruction + info_nce.

        Args:
            spectrogram: (B, T, F) or (B, 1, T, F) normalised log-mel. Takes no gradient.
            mask: None draws one for each pass. With `passes=2`, a pair is for InfoNCE and for reconstruction;
                a single mask serves both.
            lengths: as in `MaskedAutoencoder.forward`.

        Returns:
            `Output` as `MaskedAutoencoder.forward` gives it; `mask` is the reconstruction's.

        Raises:
            ValueError: the input or the mask does not fit the model.
        """
        c = self.config
        spectrogram = check_spectrogram(spectrogram, lengths, self.encoder)
        clips = self.clips(lengths)
        if mask is None:
            (batch, frames, _), device = spectrogram.shape, spectrogram.device
            masks = [self.draw_mask(batch, frames, None, device, lengths) for _ in range(c.passes)]
        else:
            masks = list(mask) if isinstance(mask, tuple) else [mask] * c.passes
        if len(masks) != c.passes:
            raise ValueError(f"a model with passes={c.passes} takes {c.passes} masks, got {len(masks)}")
        for drawn in masks:
            check_mask(drawn, spectrogram, c, clips)

        spectrogram = self.normalise(spectrogram, clips)
        mask = masks[-1]
        if clips is None:
            rows = [None] * c.passes
            ids = [drawn.ids_masked for drawn in masks]
            hidden = [self._masked_hidden(spectrogram, drawn) for drawn in masks]
        else:
            rows = [Rows(clips, as_ragged(drawn)) for drawn in masks]
            ids = [packed.patches_masked for packed in rows]
            hidden = [self._packed_hidden(spectrogram, packed)[None] for packed in rows]
        pred_info_nce, pred = self.info_nce_head(hidden[0]), self.reconstruction_head(hidden[-1])
        patches = {"patch": c.patch, "stride": c.stride, "impl": c.impl}
        target = patch_gather(spectrogram, ids[0], **patches)
        # Published: softmax over the predictions for each target, the other way round than in the paper.
        contrastive = contrast(pred_info_nce, target, "prediction", c.impl, rows[0])
        reconstruction = masked_mse(pred, spectrogram, ids[-1], normalize=False, **patches)
        if clips is not None:
            pred, pred_info_nce = rows[-1].unpack_masked(pred), rows[0].unpack_masked(pred_info_nce)
        return Output(
            loss=c.reconstruction_weight * reconstruction + c.info_nce_weight * contrastive,
            losses={"reconstruction": reconstruction, "info_nce": contrastive},
            pred=pred,
            mask=mask,
            pred_info_nce=pred_info_nce,
        )

    def _masked_hidden(self, spectrogram: Tensor, mask: Mask) -> Tensor:
        """(R, M, D): the masked tokens after all layers."""
        grid = self.config.grid(spectrogram.shape[1])
        _, positions = self.encoder.positions(grid)
        tokens = self.encoder.embed(spectrogram, mask.ids_keep).to(positions.dtype)
        tokens = unshuffle(tokens, mask.ids_keep, self.mask_token.flatten(), positions, impl=self.config.impl)
        hidden = self.encoder.transform(tokens, grid)
        masked = (mask.ids_masked + self.config.prefix_tokens)[:, :, None].expand(-1, -1, hidden.shape[2])
        return hidden.gather(1, masked)

    def _packed_hidden(self, spectrogram: Tensor, rows: Rows) -> Tensor:
        """`_masked_hidden` of packed rows: (total, D)."""
        positions = self.encoder.positions.packed(rows.grids)
        tokens = self.encoder.embed(spectrogram, rows.patches_keep).to(positions.dtype)
        tokens = unshuffle(tokens, rows.ids_keep, self.mask_token.flatten(), positions, impl=self.config.impl)
        hidden = self.encoder.transform(tokens[0], rows.grids[-1], counts=rows.tokens)
        _, hidden = Rows.cut_prefix(hidden, rows.tokens, self.config.prefix_tokens)
        return hidden[rows.ids_masked[0]]
