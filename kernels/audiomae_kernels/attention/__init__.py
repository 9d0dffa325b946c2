"""Multi-head self-attention over all tokens of a clip, with dropout: the encoder, and global decoder blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from audiomae_kernels import _checks, _library
from audiomae_kernels.attention.reference import (
    attention_backward_ref,
    attention_forward_ref,
    attention_ref,
    dropout_mask,
    philox,
    rounded_rate,
)

__all__ = ["attention", "attention_ref", "dropout_mask", "philox", "rounded_rate"]


def attention(
    qkv: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Scaled dot-product self-attention, ``dropout(softmax(q kᵀ / sqrt(d))) v``, of each clip and head.

    Which weights are dropped follows from a seed and a weight's clip, head, query and key alone, by a
    counter-based generator (`reference.dropout_mask`): no mask is stored, and every implementation and number of
    threads drops the same ones. The seed is drawn from PyTorch's CPU generator, which `torch.manual_seed` seeds.
    The rate is rounded to a multiple of 2^-16.

    Kept for the backward pass: qkv, the output, and two float32 statistics for each token and head.

    Args:
        qkv: (B, L, 3, H, d), any float dtype; or clips one after the other, (total, 3, H, d) with `cu_seqlens`.
        cu_seqlens: (B + 1,) int32 on the device of qkv, 0 and the end of each clip. A token attends to its clip.
        dropout: rate at which weights are dropped, in [0, 1); those that stay are divided by 1 - dropout.
        generator: draws the seed; a generator of the CPU. None: the default one.
        seed: int64, one value on the CPU, instead of one that is drawn.
        impl: implementation, see `audiomae_kernels`.

    Returns:
        (B, L, H * d) or (total, H * d) in the dtype of qkv, or in the dtype of autocast where that is on, as
        PyTorch's own attention has it. Gradient for qkv.

    Raises:
        ValueError: wrong shapes or devices, a rate outside [0, 1), a generator and a seed.
        TypeError: qkv is not float, cu_seqlens not int32, the seed not int64.
        RuntimeError: `impl` was asked for and cannot run, or cu_seqlens does not rise from 0 to the number of
            tokens.
    """
    dims = "(B, L, 3, H, d)" if cu_seqlens is None else "(total, 3, H, d) with cu_seqlens"
    _checks.expect_shape(
        "attention: qkv", qkv, dims, *(None,) * (1 if cu_seqlens is not None else 2), 3, None, None
    )
    _checks.expect_float("attention: qkv", qkv)
    if cu_seqlens is not None:
        _checks.expect_shape("attention: cu_seqlens", cu_seqlens, "(B + 1,)", None)
        _checks.expect_device("attention: cu_seqlens", cu_seqlens, "qkv", qkv.device)
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"attention: cu_seqlens must be int32, but it is {cu_seqlens.dtype}.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"attention: dropout must lie in [0, 1), got {dropout}.")
    seed = _seed(dropout, generator, seed)
    device_type = qkv.device.type
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    if autocast and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype(device_type))
    impl = _library.resolve("attention", impl, qkv, cu_seqlens, seed, dropout=dropout)
    if torch.compiler.is_exporting():
        return attention_ref(qkv, cu_seqlens, seed, dropout=dropout)
    out, _ = torch.ops.audiomae.attention(qkv, cu_seqlens, seed, dropout=dropout, impl=impl)
    return out


def _seed(dropout: float, generator: torch.Generator | None, seed: Tensor | None) -> Tensor | None:
    if seed is not None:
        if generator is not None:
            raise ValueError("attention: a generator draws the seed; give one or the other.")
        if seed.numel() != 1 or seed.device.type != "cpu":
            raise ValueError(
                f"attention: the seed must be one value on the CPU, got shape {tuple(seed.shape)} on {seed.device}."
            )
        if seed.dtype != torch.int64:
            raise TypeError(f"attention: the seed must be int64, but it is {seed.dtype}.")
    if dropout == 0.0:
        return None
    if seed is not None:
        return seed
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    qkv, cu_seqlens, seed = inputs
    out, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(qkv, out, statistics, cu_seqlens, seed)
    ctx.options = keyword_only_inputs


def _backward(ctx, grad, _):
    return torch.ops.audiomae.attention_backward(grad, *ctx.saved_tensors, **ctx.options), None, None


def _native_forward(qkv, cu_seqlens, seed, *, dropout):
    return torch.ops.audiomae_native.attention.default(qkv, cu_seqlens, seed, dropout)


def _native_backward(grad, qkv, out, statistics, cu_seqlens, seed, *, dropout):
    return torch.ops.audiomae_native.attention_backward.default(
        grad, qkv, out, statistics, cu_seqlens, seed, dropout
    )


_library.register_gradient("attention", _setup_context, _backward)
_library.register("attention", "reference", attention_forward_ref, attention_backward_ref)
_library.register_native("attention", _native_forward, _native_backward)
