"""Read the patches that a mask keeps, and nothing else, out of a batch of spectrograms."""

import torch
from torch import Tensor

from audiomae_kernels import _checks, _library, _triton
from audiomae_kernels.patch_gather.reference import patch_gather_ref


def patch_gather(
    spectrogram: Tensor,
    ids: Tensor,
    *,
    patch: tuple[int, int],
    stride: tuple[int, int] | None = None,
    impl: str | None = None,
) -> Tensor:
    """Patches of a spectrogram by token id.

    Args:
        spectrogram: (B, T, F) frames x mel bins, any float dtype, any strides. It takes no gradient: the
            result carries none even if the spectrogram requires one.
        ids: (B * m, K) int64. Row i holds K token ids of spectrogram i // m, in the wanted order, duplicates
            allowed. Ids count the grid of patches time-major, ``t * F' + f`` with ``T' = (T - pt) // st + 1``
            and ``F' = (F - pf) // sf + 1``.
        patch: (pt, pf) frames and mel bins of a patch.
        stride: (st, sf) steps from patch to patch; default: `patch`. Smaller steps make patches overlap.
        impl: implementation, see `audiomae_kernels`.

    Returns:
        (B * m, K, pt * pf) in the spectrogram's dtype; a patch is flattened row-major (time, mel).

    Raises:
        ValueError: wrong shapes or devices, or a patch larger than the spectrogram.
        TypeError: `ids` is not int64, or the spectrogram not float.
        RuntimeError: `impl` was asked for and cannot run.
    """
    patch, stride = _checks.expect_patches("patch_gather", spectrogram, ids, "ids", patch, stride)
    impl = _library.resolve("patch_gather", impl, spectrogram, ids, patch=patch, stride=stride)
    if torch.compiler.is_exporting():
        return patch_gather_ref(spectrogram, ids, patch=patch, stride=stride)
    return torch.ops.audiomae.patch_gather(spectrogram, ids, patch=patch, stride=stride, impl=impl)


def _native_forward(spectrogram, ids, *, patch, stride):
    return torch.ops.audiomae_native.patch_gather.default(spectrogram, ids, *patch, *stride)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.mark_non_differentiable(output)


def _backward(ctx, grad):
    return None, None


_library.register_gradient("patch_gather", _setup_context, _backward)
_library.register("patch_gather", "reference", patch_gather_ref)
_library.register_native("patch_gather", _native_forward, dtypes=_checks.FLOATS)
_triton.register("patch_gather")
