"""Put the kept tokens back on the full grid, mask tokens everywhere else, and add position embeddings."""

import torch
from torch import Tensor

from audiomae_kernels import _checks, _library, _triton
from audiomae_kernels.unshuffle.reference import unshuffle_backward_ref, unshuffle_ref


def unshuffle(
    tokens: Tensor, ids_keep: Tensor, mask_token: Tensor, pos: Tensor, *, impl: str | None = None
) -> Tensor:
    """Input of a masked autoencoder's decoder.

    ``out[b, ids_keep[b, k]] = tokens[b, k]``, everywhere else ``mask_token``; then ``out[b, l] += pos[l]``.

    Args:
        tokens: (B, K, D) kept tokens, any float dtype.
        ids_keep: (B, K) int64 positions of the kept tokens, without duplicates (`audiomae.Mask` sees to it).
        mask_token: (D,) any float dtype.
        pos: (L, D) position embeddings, any float dtype.
        impl: implementation, see `audiomae_kernels`.

    Returns:
        (B, L, D) in the tokens' dtype. Gradients for tokens, mask_token and pos, each in its own dtype.

    Raises:
        ValueError: wrong shapes or devices, or more kept tokens than positions.
        TypeError: `ids_keep` is not int64, or another tensor not float.
        RuntimeError: `impl` was asked for and cannot run.
    """
    _checks.expect_shape("unshuffle: tokens", tokens, "(B, K, D)", None, None, None)
    B, K, D = tokens.shape
    _checks.expect_shape("unshuffle: ids_keep", ids_keep, "(B, K)", B, K)
    _checks.expect_shape("unshuffle: mask_token", mask_token, "(D,)", D)
    _checks.expect_shape("unshuffle: pos", pos, "(L, D)", None, D)
    _checks.expect_float("unshuffle: tokens", tokens)
    _checks.expect_ids("unshuffle: ids_keep", ids_keep)
    _checks.expect_float("unshuffle: mask_token", mask_token)
    _checks.expect_float("unshuffle: pos", pos)
    _checks.expect_device("unshuffle: ids_keep", ids_keep, "tokens", tokens.device)
    _checks.expect_device("unshuffle: mask_token", mask_token, "tokens", tokens.device)
    _checks.expect_device("unshuffle: pos", pos, "tokens", tokens.device)
    if pos.shape[0] < K:
        raise ValueError(f"unshuffle: {K} kept tokens do not fit into the {pos.shape[0]} positions of pos.")
    if _checks.ASSERTS:
        _checks.assert_ids("unshuffle: ids_keep", ids_keep, pos.shape[0])
    impl = _library.resolve("unshuffle", impl, tokens, ids_keep, mask_token, pos)
    if torch.compiler.is_exporting():
        return unshuffle_ref(tokens, ids_keep, mask_token, pos)
    return torch.ops.audiomae.unshuffle(tokens, ids_keep, mask_token, pos, impl=impl)


def _native_forward(tokens, ids_keep, mask_token, pos):
    return torch.ops.audiomae_native.unshuffle.default(tokens, ids_keep, mask_token, pos)


def _native_backward(grad, ids_keep, mask_token, pos, *, output_mask):
    return torch.ops.audiomae_native.unshuffle_backward.default(grad, ids_keep, mask_token, pos, *output_mask)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    _, ids_keep, mask_token, pos = inputs
    ctx.save_for_backward(ids_keep, mask_token, pos)
    ctx.impl = keyword_only_inputs["impl"]


def _backward(ctx, grad):
    wants = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    grads = torch.ops.audiomae.unshuffle_backward(grad, *ctx.saved_tensors, output_mask=wants, impl=ctx.impl)
    d_tokens, d_mask_token, d_pos = (g if want else None for g, want in zip(grads, wants, strict=True))
    return d_tokens, None, d_mask_token, d_pos


_library.register_gradient("unshuffle", _setup_context, _backward)
_library.register("unshuffle", "reference", unshuffle_ref, unshuffle_backward_ref)
_library.register_native("unshuffle", _native_forward, _native_backward)
_triton.register("unshuffle")
