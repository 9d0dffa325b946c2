"""Kernels of masked audio autoencoders: six ops and their front end, `fbank`, each with a plain PyTorch reference
and faster siblings.

Shape legend: B clips, S samples, m masks of each clip, T x F spectrogram (frames x mel bins), L tokens of a T' x F'
grid (time-major, ``t * F' + f``), K kept and M masked tokens, D width, H heads of d channels, N tokens in a
window, V values in a patch.

Every op takes ``impl``: ``None`` (the best one for device, dtype and shape), ``"reference"``, ``"native"``
(C++ on CPU tensors) or ``"triton"``. One that is named and cannot run raises ``RuntimeError`` with the
reason. ``AUDIOMAE_CHECK=1`` in the environment adds asserts, asynchronous on a GPU, for ids out of range and
for NaN losses.
"""

from audiomae_kernels._library import FRONT_END, IMPLEMENTATIONS, OPS, implementations
from audiomae_kernels.attention import attention
from audiomae_kernels.fbank import fbank
from audiomae_kernels.info_nce import info_nce
from audiomae_kernels.masked_mse import masked_mse
from audiomae_kernels.patch_gather import patch_gather
from audiomae_kernels.unshuffle import unshuffle
from audiomae_kernels.window_attention import window_attention

__all__ = [
    "FRONT_END",
    "IMPLEMENTATIONS",
    "OPS",
    "attention",
    "fbank",
    "implementations",
    "info_nce",
    "masked_mse",
    "patch_gather",
    "unshuffle",
    "window_attention",
]
