"""Un-shuffle of kept tokens into the full grid, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from audiomae_kernels._library import loss_dtype


def unshuffle_ref(
    tokens: Tensor, ids_keep: Tensor, mask_token: Tensor, pos: Tensor, *, upcast: bool = True
) -> Tensor:
    """`audiomae_kernels.unshuffle`, added in float32 (float64) or, without `upcast`, in the tokens' dtype."""
    B, _, D = tokens.shape
    dtype = loss_dtype(tokens) if upcast else tokens.dtype
    grid = mask_token.to(dtype).expand(B, pos.shape[0], D)
    grid = grid.scatter(1, ids_keep[..., None].expand_as(tokens), tokens.to(dtype))
    return (grid + pos.to(dtype)).to(tokens.dtype)


def unshuffle_backward_ref(
    grad: Tensor, ids_keep: Tensor, mask_token: Tensor, pos: Tensor, *, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, mask_token and pos: a gather, a sum over masked positions, a sum over clips."""
    d_tokens = d_mask_token = d_pos = None
    dtype = loss_dtype(grad)
    if output_mask[0]:
        d_tokens = grad.gather(1, ids_keep[..., None].expand(*ids_keep.shape, grad.shape[-1]))
    if output_mask[1]:
        kept = torch.zeros(grad.shape[:2], dtype=torch.bool, device=grad.device).scatter(1, ids_keep, True)
        d_mask_token = grad.masked_fill(kept[..., None], 0).sum((0, 1), dtype=dtype).to(mask_token.dtype)
    if output_mask[2]:
        d_pos = grad.sum(0, dtype=dtype).to(pos.dtype)
    unwanted = [like.new_empty(0) for like in (grad, mask_token, pos)]
    return tuple(
        empty if d is None else d for d, empty in zip((d_tokens, d_mask_token, d_pos), unwanted, strict=True)
    )
