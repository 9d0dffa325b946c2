"""InfoNCE between the predictions and the targets of the masked tokens of a clip."""

import torch
from torch import Tensor

from audiomae_kernels import _checks, _library, _triton
from audiomae_kernels.info_nce.reference import info_nce_backward_ref, info_nce_forward_ref, info_nce_ref


def info_nce(pred: Tensor, target: Tensor, *, over: str = "target", impl: str | None = None) -> Tensor:
    """Contrastive loss of MAE-AST (arXiv:2203.16691) and SSAST (arXiv:2110.09784).

    Per clip, ``S = pred @ target.T`` without temperature or normalisation; row i of pred belongs to row i of
    target and the clip's other rows are its negatives. The loss is the mean of ``-log softmax(S)[i, i]`` over
    all B * M rows. No masked token: the loss is 0.

    Args:
        pred: (B, M, V) any float dtype.
        target: (B, M, V) any float dtype, not necessarily pred's.
        over: what the softmax runs over: ``"target"``, the targets for each prediction (MAE-AST), or
            ``"prediction"``, the predictions for each target (SSAST).
        impl: implementation, see `audiomae_kernels`.

    Returns:
        Scalar, float32 (float64 if pred or target is). Gradients for pred and target, each in its own dtype.

    Raises:
        ValueError: wrong shapes or devices, or an unknown `over`.
        TypeError: a tensor is not float.
        RuntimeError: `impl` was asked for and cannot run.
    """
    _checks.expect_shape("info_nce: pred", pred, "(B, M, V)", None, None, None)
    _checks.expect_shape("info_nce: target", target, "(B, M, V) like pred", *pred.shape)
    _checks.expect_float("info_nce: pred", pred)
    _checks.expect_float("info_nce: target", target)
    _checks.expect_device("info_nce: target", target, "pred", pred.device)
    if over not in ("target", "prediction"):
        raise ValueError(f"info_nce: over must be 'target' or 'prediction', got {over!r}.")
    impl = _library.resolve("info_nce", impl, pred, target, over=over)
    if torch.compiler.is_exporting():
        loss = info_nce_ref(pred, target, over=over)
    else:
        loss, _ = torch.ops.audiomae.info_nce(pred, target, over=over, impl=impl)
    if _checks.ASSERTS:
        _checks.assert_not_nan("info_nce", loss)
    return loss


def _native_forward(pred, target, *, over):
    return torch.ops.audiomae_native.info_nce.default(pred, target, over)


def _native_backward(grad, pred, target, lse, *, over, output_mask):
    return torch.ops.audiomae_native.info_nce_backward.default(grad, pred, target, lse, over, *output_mask)


def _native_refuses(pred, target, **options):
    return "It serves float32 and bfloat16 targets." if target.dtype == torch.float16 else ""


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs, lse)
    ctx.options = keyword_only_inputs


def _backward(ctx, grad, _):
    wants = ctx.needs_input_grad
    grads = torch.ops.audiomae.info_nce_backward(
        grad, *ctx.saved_tensors, output_mask=list(wants), **ctx.options
    )
    return tuple(g if want else None for g, want in zip(grads, wants, strict=True))


_library.register_gradient("info_nce", _setup_context, _backward)
_library.register("info_nce", "reference", info_nce_forward_ref, info_nce_backward_ref)
_library.register_native("info_nce", _native_forward, _native_backward, refuses=_native_refuses)
_triton.register("info_nce")
