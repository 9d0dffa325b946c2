"""Checks of arguments. None waits for the device; values are looked at under ``AUDIOMAE_CHECK=1`` only."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Read once: the answer must be the same for every call of a process and constant under torch.compile.
ASSERTS = os.environ.get("AUDIOMAE_CHECK", "0") not in ("", "0")


def expect_shape(what: str, tensor: Tensor, dims: str, *sizes: int | None) -> None:
    """Refuse a tensor that is not of `sizes` (None: any size); `dims` names them in the message."""
    matches = tensor.dim() == len(sizes)
    if matches:
        for given, expected in zip(tensor.shape, sizes, strict=True):
            if expected is not None and given != expected:
                matches = False
    if not matches:
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(
            f"{what} must have shape {dims}, here ({expected}), but it has shape {tuple(tensor.shape)}."
        )


def expect_float(what: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{what} must be float32, bfloat16, float16 or float64, but it is {tensor.dtype}.")


def expect_ids(what: str, ids: Tensor) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"{what} must be int64 token ids, but it is {ids.dtype}.")


def expect_device(what: str, tensor: Tensor, other: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{what} must be on the device of {other}, {device}, but it is on {tensor.device}.")


def expect_pair(what: str, pair, minimum: int) -> tuple[int, int]:
    """A (time, frequency) pair of integers."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{what} must be a pair (time, frequency), got {pair!r}.")
    if not all(isinstance(value, (int, torch.SymInt)) and value >= minimum for value in pair):
        raise ValueError(f"{what} must be a pair of integers of at least {minimum}, got {tuple(pair)}.")
    return tuple(pair)


def expect_patches(op: str, spectrogram: Tensor, ids: Tensor, ids_name: str, patch, stride) -> tuple:
    """Check what `patch_gather` and `masked_mse` share; returns (patch, stride), the default filled in."""
    patch = expect_pair(f"{op}: patch", patch, 1)
    stride = patch if stride is None else expect_pair(f"{op}: stride", stride, 1)
    expect_shape(f"{op}: spectrogram", spectrogram, "(B, T, F)", None, None, None)
    expect_float(f"{op}: spectrogram", spectrogram)
    expect_shape(f"{op}: {ids_name}", ids, "(B * m, tokens)", None, None)
    expect_ids(f"{op}: {ids_name}", ids)
    expect_device(f"{op}: {ids_name}", ids, "spectrogram", spectrogram.device)
    B, T, F = spectrogram.shape
    if patch[0] > T or patch[1] > F:
        raise ValueError(
            f"{op}: a patch of {patch[0]} x {patch[1]} (frames x mel bins) does not fit "
            f"into a spectrogram of {T} x {F}; pad the clip or choose a smaller patch."
        )
    rows = ids.shape[0]
    if rows % B != 0 if B > 0 else rows != 0:
        raise ValueError(
            f"{op}: {ids_name} must have a whole number of rows for each spectrogram "
            f"(row i uses spectrogram i // m), but it has {rows} rows for {B} spectrograms."
        )
    if ASSERTS:
        tokens = ((T - patch[0]) // stride[0] + 1) * ((F - patch[1]) // stride[1] + 1)
        assert_ids(f"{op}: {ids_name}", ids, tokens)
    return patch, stride


def assert_ids(what: str, ids: Tensor, tokens: int) -> None:
    """Device assert that ids lie in [0, tokens)."""
    torch._assert_async(((ids >= 0) & (ids < tokens)).all(), f"{what} holds ids outside the grid's tokens.")


def assert_not_nan(what: str, loss: Tensor) -> None:
    """Device assert that a loss is a number."""
    torch._assert_async(~loss.isnan(), f"{what}: the loss is NaN.")
