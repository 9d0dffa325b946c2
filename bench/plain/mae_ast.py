"""MAE-AST (Baade et al., Interspeech 2022): a deep encoder on visible tokens, a shallow decoder on all."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .layers import Losses, gather_tokens, info_nce, masked_ids


def sinusoids(length, width):
    """(length, width) fp32: sin and cos interleaved over the token index."""
    angles = torch.arange(length)[:, None] * torch.exp(
        torch.arange(0, width, 2) * (-math.log(10000.0) / width)
    )
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with separate projections, (B, L, D) -> (B, L, D)."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = (
            proj(x).view(B, L, self.heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))


class Layer(nn.Module):
    """Post-norm transformer layer."""

    def __init__(self, width, heads, hidden, dropout):
        super().__init__()
        self.self_attn = SelfAttention(width, heads, dropout)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn(x)))
        return self.final_layer_norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class Transformer(nn.Module):
    """A norm before the first layer, then post-norm layers."""

    def __init__(self, width, depth, heads, hidden, dropout):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, hidden, dropout) for _ in range(depth))
        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.dropout(self.layer_norm(x))
        for layer in self.layers:
            x = layer(x)
        return x


class MAEAST(nn.Module):
    """Reconstruction (weight 10) and InfoNCE (weight 1) of masked patches, from one forward pass.

    The input is normalised by its batch statistics in training, as upstream's is.

    Args:
        patch: (frames, mels): (16, 16), or (2, 128) for upstream's frame tokens.
    """

    def __init__(
        self,
        frames=1024,
        mels=128,
        patch=(16, 16),
        width=768,
        depth=12,
        heads=12,
        decoder_depth=2,
        dropout=0.0,
    ):
        super().__init__()
        self.patch = patch
        self.num_tokens = (frames // patch[0]) * (mels // patch[1])
        values = patch[0] * patch[1]
        self.batch_norm = nn.BatchNorm2d(1, affine=False)
        self.post_extract_proj = nn.Linear(values, width)
        self.decoder_mask_emb = nn.Parameter(torch.empty(width).uniform_())
        self.register_buffer("positions", sinusoids(self.num_tokens, width), persistent=False)
        self.encoder = Transformer(width, depth, heads, 4 * width, dropout)
        self.decoder = Transformer(width, decoder_depth, heads, 4 * width, dropout)
        self.final_proj_reconstruction = nn.Linear(width, values)
        self.final_proj_classification = nn.Linear(width, values)

    def patches(self, spectrogram):
        x = self.batch_norm(spectrogram.unsqueeze(1)) * 0.5
        return F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)

    def embeddings(self, spectrogram):
        """(B, T, F) -> (B, L, D)."""
        return self.encoder(self.post_extract_proj(self.patches(spectrogram)) + self.positions)

    def forward(self, spectrogram, ids_keep):
        patches = self.patches(spectrogram)

        x = self.post_extract_proj(gather_tokens(patches, ids_keep)) + self.positions[ids_keep]
        x = self.encoder(x)

        full = self.decoder_mask_emb.to(x.dtype).expand(len(x), self.num_tokens, -1)
        full = full.scatter(1, ids_keep.unsqueeze(-1).expand_as(x), x)
        x = self.decoder(full + self.positions)

        ids_masked = masked_ids(ids_keep, self.num_tokens)
        x, target = gather_tokens(x, ids_masked), gather_tokens(patches, ids_masked)
        mse = F.mse_loss(self.final_proj_reconstruction(x).to(target.dtype), target)
        nce = info_nce(self.final_proj_classification(x), target)
        return Losses(nce + 10 * mse, mse, nce)
