"""SSAST: the full-token baseline.

Gong et al., "SSAST: Self-Supervised Audio Spectrogram Transformer", AAAI 2022 (arXiv 2110.09784). Every token
goes through every encoder layer, masked ones as a learned embedding; two heads read the masked tokens. Shapes
as in `model.py`.
"""

from __future__ import annotations

import torch
from audiomae_kernels import info_nce, masked_mse, patch_gather, unshuffle
from torch import Tensor, nn

from .config import SSASTConfig
from .masking import Mask
from .model import Output, SpectrogramModel, check_mask, check_spectrogram, init_vit, require


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
        lengths: Tensor | None = None,
    ) -> Output:
        """Training loss of a batch: 10 * reconstruction + info_nce.

        Args:
            spectrogram: (B, T, F) or (B, 1, T, F) normalised log-mel. Takes no gradient.
            mask: None draws one for each pass. With `passes=2`, a pair is for InfoNCE and for reconstruction;
                a single mask serves both.
            lengths: (B,) valid frames; zeros after a clip's end are attended, as published.

        Returns:
            `Output` as `MaskedAutoencoder.forward` gives it; `mask` is the reconstruction's.

        Raises:
            ValueError: the input or the mask does not fit the model.
        """
        c = self.config
        spectrogram = check_spectrogram(spectrogram, lengths, self.encoder)
        if mask is None:
            batch, frames = spectrogram.shape[:2]
            masks = [self.draw_mask(batch, frames, device=spectrogram.device) for _ in range(c.passes)]
        else:
            masks = list(mask) if isinstance(mask, tuple) else [mask] * c.passes
        if len(masks) != c.passes:
            raise ValueError(f"a model with passes={c.passes} takes {c.passes} masks, got {len(masks)}")
        for drawn in masks:
            check_mask(drawn, spectrogram, c)

        spectrogram = self.spectrogram_norm(spectrogram)
        hidden = [self._masked_hidden(spectrogram, drawn) for drawn in masks]
        mask = masks[-1]
        pred_info_nce, pred = self.info_nce_head(hidden[0]), self.reconstruction_head(hidden[-1])
        patches = {"patch": c.patch, "stride": c.stride, "impl": c.impl}
        target = patch_gather(spectrogram, masks[0].ids_masked, **patches)
        # Published: softmax over the predictions for each target, the other way round than in the paper.
        contrastive = info_nce(pred_info_nce, target, over="prediction", impl=c.impl)
        reconstruction = masked_mse(pred, spectrogram, mask.ids_masked, normalize=False, **patches)
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
