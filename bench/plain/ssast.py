"""SSAST (Gong et al., AAAI 2022): all tokens, masked or not, go through the encoder."""

import torch
from torch import nn
from torch.nn import functional as F

from .layers import Block, Losses, gather_tokens, info_nce, mask_from_keep, masked_ids


class PatchEmbed(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(1, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """The distilled ViT: two extra tokens in front, (B, L, D) -> (B, 2 + L, D)."""

    def __init__(self, patch, num_tokens, width, depth, heads):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.dist_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 2 + num_tokens, width) * 0.02)
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens):
        prefix = torch.cat([self.cls_token, self.dist_token], dim=1).expand(len(tokens), -1, -1)
        x = torch.cat([prefix, tokens], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class SSAST(nn.Module):
    """Masked spectrogram patch modelling: reconstruction and classification (InfoNCE) of masked patches.

    Args:
        patch: (frames, mels): (16, 16), or (2, 128) for upstream's frame tokens.
        passes: 1 computes both losses from one forward pass; 2 runs the encoder once for each loss, as the
            published training code does.
    """

    def __init__(self, frames=1024, mels=128, patch=(16, 16), width=768, depth=12, heads=12, passes=1):
        super().__init__()
        if passes not in (1, 2):
            raise ValueError(f"passes must be 1 or 2, got {passes}.")
        self.patch, self.passes = (patch[1], patch[0]), passes  # upstream's patches are (mel, time)
        self.grid = (frames // patch[0], mels // patch[1])
        values = patch[0] * patch[1]
        num_tokens = self.grid[0] * self.grid[1]
        self.mask_embed = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.v = VisionTransformer(self.patch, num_tokens, width, depth, heads)
        self.cpredlayer = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, values))
        self.gpredlayer = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, values))

    def encode(self, x, mask):
        """(B, 1, F, T), (B, L) -> (B, L, D) with the masked tokens replaced by `mask_embed`."""
        tokens = self.v.patch_embed(x)
        tokens = torch.where(mask.unsqueeze(-1), self.mask_embed.to(tokens.dtype), tokens)
        return self.v(tokens)[:, 2:]

    def embeddings(self, spectrogram):
        """(B, T, F) -> (B, 2 + L, D), frequency-major."""
        return self.v(self.v.patch_embed(spectrogram.transpose(1, 2).unsqueeze(1)))

    def forward(self, spectrogram, ids_keep):
        # Upstream's tokens are frequency-major, f * T' + t.
        time, frequency = self.grid
        ids_keep = ids_keep % frequency * time + ids_keep // frequency
        x = spectrogram.transpose(1, 2).unsqueeze(1)
        mask = mask_from_keep(ids_keep, time * frequency)
        ids_masked = masked_ids(ids_keep, time * frequency)
        target = gather_tokens(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2), ids_masked)

        encoded = gather_tokens(self.encode(x, mask), ids_masked)
        # Upstream's direction: each target's softmax runs over the predictions of its clip.
        nce = info_nce(target, self.cpredlayer(encoded))
        if self.passes == 2:
            encoded = gather_tokens(self.encode(x, mask), ids_masked)
        mse = F.mse_loss(self.gpredlayer(encoded).to(target.dtype), target)
        return Losses(nce + 10 * mse, mse, nce)
