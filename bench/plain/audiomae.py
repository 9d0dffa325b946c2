"""Audio-MAE (Huang et al., NeurIPS 2022): a ViT on the visible patches, a shifted-window decoder on all."""

import torch
from torch import nn
from torch.nn import functional as F

from .layers import Block, Losses, Mlp, gather_tokens, mask_from_keep


def sincos_2d(rows, columns, width):
    """(rows * columns, width) fp32: the column's [sin | cos] codes, then the row's."""

    def codes(positions):
        omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        angles = positions.double()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    index = torch.arange(rows * columns)
    return torch.cat([codes(index % columns), codes(index // columns)], dim=1).float()


class PatchEmbed(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(1, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class MetaMlp(nn.Module):
    """Relative coordinates to one bias per head, (N * N, 2) -> (N * N, H)."""

    def __init__(self, heads, hidden=384, dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, heads)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.fc2(self.dropout(F.relu(self.fc1(x)))))


def window_partition(x, window):
    """(B, R, C, D) -> (B * windows, N, D)."""
    B, R, C, D = x.shape
    x = x.view(B, R // window, window, C // window, window, D)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, D)


def window_reverse(x, window, grid):
    """(B * windows, N, D) -> (B, R, C, D)."""
    R, C = grid
    x = x.view(-1, R // window, C // window, window, window, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, R, C, x.shape[-1])


class WindowAttention(nn.Module):
    """Cosine attention with a learned temperature and a learned bias, (B * windows, N, D) -> the same."""

    def __init__(self, width, heads, window, dropout):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.tau = nn.Parameter(torch.ones(heads))
        self.meta_mlp = MetaMlp(heads, dropout=dropout)
        cells = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offsets = (cells[:, None] - cells[None]).float().flatten(0, 1)
        offsets = offsets.sign() * offsets.abs().log1p()
        self.register_buffer("offsets", offsets, persistent=False)  # (N * N, 2)

    def forward(self, x, mask):
        """mask: (windows, N, N) additive, or None."""
        B, N, D = x.shape
        H = self.heads
        q, k, v = self.qkv(x).view(B, N, 3, H, D // H).permute(2, 0, 3, 1, 4)
        norms = (q.norm(dim=-1, keepdim=True) @ k.norm(dim=-1, keepdim=True).transpose(-2, -1)).clamp(
            min=1e-6
        )
        scores = q @ k.transpose(-2, -1) / norms / self.tau.clamp(min=0.01)[:, None, None]
        scores = scores + self.meta_mlp(self.offsets).T.view(H, N, N)
        if mask is not None:
            scores = (scores.view(-1, len(mask), H, N, N) + mask[:, None]).view(B, H, N, N)
        x = scores.softmax(dim=-1).to(v.dtype) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class WindowBlock(nn.Module):
    """Residual post-norm block on windows of a (R, C) grid, cyclically shifted along time.

    Rows that fill no window are padded at the end, and the padding is nobody's key.
    """

    def __init__(self, width, heads, grid, window, shift, dropout):
        super().__init__()
        self.grid, self.window, self.shift = grid, window, shift
        self.attn = WindowAttention(width, heads, window, dropout)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.padding = -grid[0] % window
        mask = None
        if shift or self.padding:
            length = grid[0] + self.padding
            rows = torch.arange(length)[:, None].expand(length, grid[1])
            regions = (rows >= length - window).long() + (rows >= length - shift)
            regions, places = (
                window_partition(x[None, :, :, None], window).squeeze(-1)  # (windows, N)
                for x in (regions, (rows + shift) % length)
            )
            mask = torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)
            mask = mask.masked_fill(places[:, None] >= grid[0], -torch.inf)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        y = x.view(len(x), *self.grid, -1)
        if self.padding:
            y = F.pad(y, (0, 0, 0, 0, 0, self.padding))
        if self.shift:
            y = torch.roll(y, -self.shift, dims=1)
        y = self.attn(window_partition(y, self.window), self.mask)
        y = window_reverse(y, self.window, (self.grid[0] + self.padding, self.grid[1]))
        if self.shift:
            y = torch.roll(y, self.shift, dims=1)
        if self.padding:
            y = y[:, : self.grid[0]]
        x = x + self.norm1(y.reshape(x.shape))
        return x + self.norm2(self.mlp(x))


class AudioMAE(nn.Module):
    """Reconstruction of masked patches; the loss is the masked patches' mean squared error.

    Args:
        decoder: "window" (16 blocks of 4x4 windows, every second one shifted by 2 in time, without the cls
            token), "global" (8 pre-norm blocks, with it) or "hybrid" (window blocks, then 4 global ones).
        normalize_target: compare with patches of zero mean and unit (unbiased) variance.
        dropout: of the bias MLP's layers; 0.1 in upstream's training.
    """

    def __init__(
        self,
        frames=1024,
        mels=128,
        patch=16,
        width=768,
        depth=12,
        heads=12,
        decoder="window",
        decoder_width=512,
        decoder_depth=16,
        decoder_heads=16,
        global_blocks=4,
        normalize_target=True,
        dropout=0.0,
    ):
        super().__init__()
        grid = (frames // patch, mels // patch)
        num_tokens = grid[0] * grid[1]
        self.patch, self.decoder, self.normalize_target = patch, decoder, normalize_target
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_width) * 0.02)
        if decoder not in ("window", "hybrid", "global"):
            raise ValueError(f'decoder must be "window", "hybrid" or "global", got {decoder!r}.')
        local = {"window": decoder_depth, "hybrid": decoder_depth - global_blocks, "global": 0}[decoder]
        shift = 2 if grid[0] > 4 else 0  # a single window has nothing to shift
        self.decoder_blocks = nn.ModuleList(
            WindowBlock(decoder_width, decoder_heads, grid, 4, shift * (i % 2), dropout)
            if i < local
            else Block(decoder_width, decoder_heads)
            for i in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_width, patch**2)
        # Upstream builds the table on the transposed grid while its tokens are time-major.
        for name, size in (("pos_embed", width), ("decoder_pos_embed", decoder_width)):
            table = sincos_2d(grid[1], grid[0], size)
            self.register_buffer(name, torch.cat([torch.zeros(1, size), table])[None])  # (1, 1 + L, D)
        self.num_tokens = num_tokens

    def encode(self, x, ids_keep=None):
        """(B, 1, T, F) -> (B, 1 + K, D); all tokens without `ids_keep`."""
        x = self.patch_embed(x) + self.pos_embed[:, 1:]
        if ids_keep is not None:
            x = gather_tokens(x, ids_keep)
        cls = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent, ids_keep):
        x = self.decoder_embed(latent)
        kept = x[:, 1:]
        full = self.mask_token.to(x.dtype).expand(len(x), self.num_tokens, -1)
        full = full.scatter(1, ids_keep.unsqueeze(-1).expand_as(kept), kept)
        x = torch.cat([x[:, :1], full], dim=1) + self.decoder_pos_embed
        if self.decoder != "global":
            x = x[:, 1:]
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_pred(self.decoder_norm(x))
        return x[:, 1:] if self.decoder == "global" else x

    def embeddings(self, spectrogram):
        """(B, T, F) -> (B, 1 + L, D)."""
        return self.encode(spectrogram.unsqueeze(1))

    def forward(self, spectrogram, ids_keep):
        x = spectrogram.unsqueeze(1)
        pred = self.decode(self.encode(x, ids_keep), ids_keep)
        target = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        if self.normalize_target:
            var, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        mask = mask_from_keep(ids_keep, self.num_tokens).to(target.dtype)
        loss = (pred - target).square().mean(dim=-1)
        loss = (loss * mask).sum() / mask.sum()
        return Losses(loss, loss)
