"""Contrastive loss within a clip, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from audiomae_kernels._library import loss_dtype


def info_nce_ref(pred: Tensor, target: Tensor, *, over: str = "target", upcast: bool = True) -> Tensor:
    """`audiomae_kernels.info_nce`, in float32 (float64) or, without `upcast`, the promoted dtype."""
    return info_nce_forward_ref(pred, target, over=over, upcast=upcast)[0]


def info_nce_forward_ref(
    pred: Tensor, target: Tensor, *, over: str, upcast: bool = True
) -> tuple[Tensor, Tensor]:
    """The loss and, for the backward pass, the log-sum-exp (B, M) of each softmax."""
    logits = _logits(pred, target, over, upcast)
    lse = logits.logsumexp(-1)
    diagonal = logits.diagonal(dim1=-2, dim2=-1)
    return (lse - diagonal).sum(-1).sum() / max(lse.numel(), 1), lse


def info_nce_backward_ref(
    grad: Tensor, pred: Tensor, target: Tensor, lse: Tensor, *, over: str, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of pred and target: ``dS = (softmax(S) - I) / (B * M)``, times the other side."""
    B, M, _ = pred.shape
    logits = _logits(pred, target, over, upcast=True)
    d_logits = (logits - lse[..., None]).exp()
    d_logits.diagonal(dim1=-2, dim2=-1).sub_(1)
    d_logits *= grad / max(B * M, 1)
    if over == "prediction":
        d_logits = d_logits.mT  # (B, predictions, targets)
    d_pred, d_target = pred.new_empty(0), target.new_empty(0)
    if output_mask[0]:
        d_pred = (d_logits @ target.to(d_logits.dtype)).to(pred.dtype)
    if output_mask[1]:
        d_target = (d_logits.mT @ pred.to(d_logits.dtype)).to(target.dtype)
    return d_pred, d_target


def _logits(pred, target, over, upcast):
    dtype = loss_dtype(pred, target) if upcast else torch.promote_types(pred.dtype, target.dtype)
    pred, target = pred.to(dtype), target.to(dtype)
    return pred @ target.mT if over == "target" else target @ pred.mT  # softmax over the last dimension
