"""Parts that the baselines share. Shapes: B batch, L tokens, M masked tokens, D width, V patch values."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Losses(NamedTuple):
    """The training loss and its unweighted parts, all scalars; `info_nce` is None where there is none."""

    loss: torch.Tensor
    reconstruction: torch.Tensor
    info_nce: torch.Tensor | None = None


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection, (B, L, D) -> (B, L, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block (ViT)."""

    def __init__(self, width, heads, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def gather_tokens(x, ids):
    """(B, L, D), (B, K) -> (B, K, D)."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def mask_from_keep(ids_keep, num_tokens):
    """(B, K) -> (B, L) bool, True where a token is masked."""
    mask = torch.ones(ids_keep.shape[0], num_tokens, dtype=torch.bool, device=ids_keep.device)
    return mask.scatter(1, ids_keep, False)


def masked_ids(ids_keep, num_tokens):
    """(B, K) -> (B, L - K) ids of the masked tokens, ascending."""
    order = mask_from_keep(ids_keep, num_tokens).argsort(dim=1, descending=True, stable=True)
    return order[:, : num_tokens - ids_keep.shape[1]]


def info_nce(rows, columns):
    """(B, M, V), (B, M, V) -> scalar: cross-entropy of each row's dot products with its clip's columns."""
    with torch.autocast(rows.device.type, enabled=False):
        logits = rows.to(torch.promote_types(rows.dtype, torch.float32)) @ columns.to(
            torch.promote_types(columns.dtype, torch.float32)
        ).transpose(1, 2)
        return -logits.log_softmax(dim=-1).diagonal(dim1=1, dim2=2).mean()
