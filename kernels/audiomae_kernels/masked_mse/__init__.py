"""Mean squared error of the masked patches, straight from the spectrogram."""

import torch
from torch import Tensor

from audiomae_kernels import _checks, _library, _triton
from audiomae_kernels.masked_mse.reference import masked_mse_backward_ref, masked_mse_ref


def masked_mse(
    pred: Tensor,
    spectrogram: Tensor,
    ids_masked: Tensor,
    *,
    patch: tuple[int, int],
    stride: tuple[int, int] | None = None,
    normalize: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Reconstruction loss of Audio-MAE (arXiv:2207.06405), MAE-AST and SSAST.

    The target of a masked token is its patch; with `normalize` it is ``(x - mean) / sqrt(var + 1e-6)`` with
    the patch's own mean and unbiased variance. The loss is the mean of the squared error over all masked
    tokens and values. No masked token: the loss is 0.

    Args:
        pred: (B * m, M, pt * pf) predictions in the order of `ids_masked`, any float dtype.
        spectrogram: (B, T, F), any float dtype, any strides. It takes no gradient.
        ids_masked: (B * m, M) int64 token ids; row i uses spectrogram i // m, as in `patch_gather`.
        patch, stride: as in `patch_gather`.
        normalize: normalise each target patch. A patch of one value has no variance, so V = 1 needs False.
        impl: implementation, see `audiomae_kernels`.

    Returns:
        Scalar, float32 (float64 if pred or spectrogram is). Gradient for pred.

    Raises:
        ValueError: wrong shapes or devices, a patch larger than the spectrogram, or one value to normalise.
        TypeError: `ids_masked` is not int64, or another tensor not float.
        RuntimeError: `impl` was asked for and cannot run.
    """
    patch, stride = _checks.expect_patches("masked_mse", spectrogram, ids_masked, "ids_masked", patch, stride)
    spectrogram = spectrogram.detach()
    V = patch[0] * patch[1]
    _checks.expect_shape("masked_mse: pred", pred, "(B * m, M, pt * pf)", *ids_masked.shape, V)
    _checks.expect_float("masked_mse: pred", pred)
    _checks.expect_device("masked_mse: pred", pred, "spectrogram", spectrogram.device)
    if normalize and V == 1:
        raise ValueError("masked_mse: a patch of one value has no variance; use normalize=False.")
    options = {"patch": patch, "stride": stride, "normalize": normalize}
    impl = _library.resolve("masked_mse", impl, pred, spectrogram, ids_masked, **options)
    if torch.compiler.is_exporting():
        loss = masked_mse_ref(pred, spectrogram, ids_masked, **options)
    else:
        loss = torch.ops.audiomae.masked_mse(pred, spectrogram, ids_masked, **options, impl=impl)
    if _checks.ASSERTS:
        _checks.assert_not_nan("masked_mse", loss)
    return loss


def _native_forward(pred, spectrogram, ids_masked, *, patch, stride, normalize):
    return torch.ops.audiomae_native.masked_mse.default(
        pred, spectrogram, ids_masked, *patch, *stride, normalize
    )


def _native_backward(grad, pred, spectrogram, ids_masked, *, patch, stride, normalize):
    return torch.ops.audiomae_native.masked_mse_backward.default(
        grad, pred, spectrogram, ids_masked, *patch, *stride, normalize
    )


def _native_refuses(pred, spectrogram, ids_masked, **options):
    return "It serves float32 and bfloat16 spectrograms." if spectrogram.dtype == torch.float16 else ""


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx, grad):
    return torch.ops.audiomae.masked_mse_backward(grad, *ctx.saved_tensors, **ctx.options), None, None


_library.register_gradient("masked_mse", _setup_context, _backward)
_library.register("masked_mse", "reference", masked_mse_ref, masked_mse_backward_ref)
_library.register_native("masked_mse", _native_forward, _native_backward, refuses=_native_refuses)
_triton.register("masked_mse")
