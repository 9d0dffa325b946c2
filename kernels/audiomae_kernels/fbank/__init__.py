"""Kaldi's log-mel filter bank energies of a batch of waveforms: the front end of all these models."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from audiomae_kernels import _library
from audiomae_kernels.fbank.reference import (
    fbank_ref,
    frame_sizes,
    is_ordinary,
    mel_weights,
    taper,
)

__all__ = ["fbank", "fbank_ref", "num_frames"]

WINDOWS = ("hanning", "povey")

_LARGEST_FFT = 8192  # of the native library


def num_frames(
    samples: int | Tensor, sample_rate: int = 16000, *, frame_length: float = 25.0, frame_shift: float = 10.0
) -> int | Tensor:
    """Number of whole frames in `samples` samples (Kaldi's ``snip_edges``): 998 for 10 s at 16 kHz.

    `samples` is an int, or an integer tensor of any shape; then a tensor of that shape comes back.
    `frame_length` and `frame_shift` are in milliseconds. Less than one frame gives 0.
    """
    size, shift, _ = frame_sizes(sample_rate, frame_length, frame_shift)
    if isinstance(samples, Tensor):
        return ((samples - size).div(shift, rounding_mode="floor") + 1).clamp_(min=0)
    return max(0, (samples - size) // shift + 1)


def check_waveform(waveform: Tensor) -> None:
    """Raises unless it is (samples,) or (batch, samples) in float32 or float64."""
    if waveform.dim() not in (1, 2):
        raise ValueError(
            f"waveform has shape {tuple(waveform.shape)}, but (samples,) or (batch, samples) was expected; "
            "mix the channels of a recording first, e.g. waveform.mean(channel_dim)"
        )
    if waveform.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"waveform is {waveform.dtype}, but float32 or float64 was expected; scale integer samples to "
            "[-1, 1] and convert half precision with .float()"
        )


def fbank(
    waveform: Tensor,
    sample_rate: int = 16000,
    *,
    window: str = "hanning",
    mel_bins: int = 128,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    low_freq: float = 20.0,
    high_freq: float | None = None,
    preemphasis: float = 0.97,
    remove_dc_offset: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Kaldi's log-mel filter bank energies of a batch of waveforms.

    Equals ``torchaudio.compliance.kaldi.fbank(htk_compat=True, use_energy=False, dither=0.0)`` clip by clip, to
    the rounding of float32. The reference is differentiable with respect to the waveform and traceable by
    ``torch.compile(fullgraph=True)``; it serves wherever a gradient, a transform or a graph is asked for.
    Autocast has no effect. The reference's mel filters are a float32 matrix product, whose precision
    ``torch.set_float32_matmul_precision`` may lower.

    Args:
        waveform: (B, S) or (S,), float32 or float64, on any device; in [-1, 1] for published weights.
        sample_rate: of the waveform, in Hz. Nothing is resampled.
        window: "hanning" (Audio-MAE, SSAST) or "povey" (Kaldi's default, MAE-AST).
        mel_bins: number F of triangular filters.
        frame_length, frame_shift: in milliseconds; a frame is zero-padded to a power of two for the FFT.
        low_freq, high_freq: edges of the lowest and the highest filter in Hz; None is half the sample rate.
        preemphasis: coefficient of the high-pass filter ``x[i] - preemphasis * x[i - 1]`` within each frame.
        remove_dc_offset: subtract each frame's mean.
        impl: implementation, see `audiomae_kernels`.

    Returns:
        (B, T, F) or (T, F), the waveform's dtype, with ``T = num_frames(S, sample_rate)``: frames that reach
        past the end are left out. A NaN sample makes the frames around it NaN.

    Raises:
        TypeError: the waveform is not float32 or float64.
        ValueError: wrong rank, a setting out of range, or a waveform shorter than one frame.
        RuntimeError: `impl` was asked for and cannot run.
    """
    check_waveform(waveform)
    size, shift, _ = frame_sizes(sample_rate, frame_length, frame_shift)
    nyquist = sample_rate / 2
    high_freq = nyquist if high_freq is None else high_freq
    if window not in WINDOWS:
        raise ValueError(f"unknown window {window!r}; choose one of {', '.join(map(repr, WINDOWS))}")
    if size < 2 or shift < 1:
        raise ValueError(
            f"a frame of {frame_length} ms every {frame_shift} ms at {sample_rate} Hz is {size} samples "
            f"every {shift}; at least 2 every 1 were expected"
        )
    if mel_bins < 1 or not 0.0 <= low_freq < high_freq <= nyquist:
        raise ValueError(
            f"cannot place {mel_bins} mel filters from {low_freq} to {high_freq} Hz; expected at least one, "
            f"and 0 <= low_freq < high_freq <= {nyquist} Hz, half the sample rate"
        )
    samples = waveform.shape[-1]
    if samples < size:
        raise ValueError(
            f"the waveform has {samples} sample{'' if samples == 1 else 's'}, fewer than one frame of {size} "
            f"({frame_length} ms at {sample_rate} Hz); pad it with zeros or leave the clip out"
        )
    settings = {
        "sample_rate": float(sample_rate),
        "window": window,
        "mel_bins": mel_bins,
        "frame_length": float(frame_length),
        "frame_shift": float(frame_shift),
        "low_freq": float(low_freq),
        "high_freq": float(high_freq),
        "preemphasis": float(preemphasis),
        "remove_dc_offset": remove_dc_offset,
    }
    impl = _library.resolve("fbank", impl, waveform, **settings)
    batch = waveform if waveform.dim() == 2 else waveform.unsqueeze(0)
    with torch.autocast(waveform.device.type, enabled=False):
        mel = _library.forward("fbank", impl)(batch, **settings)
    return mel if waveform.dim() == 2 else mel.squeeze(0)


def _why_not_native(waveform: Tensor, *, sample_rate, frame_length, frame_shift, **settings) -> str:
    _, _, fft_size = frame_sizes(sample_rate, frame_length, frame_shift)
    if fft_size > _LARGEST_FFT:
        return f"Its FFT has at most {_LARGEST_FFT} samples, where a frame of this length takes {fft_size}."
    differentiated = torch.is_grad_enabled() and waveform.requires_grad
    if torch.compiler.is_compiling() or differentiated or not is_ordinary(waveform):
        return "It has no gradient and is no part of a graph; the reference serves these."
    if (
        forward_ad.unpack_dual(waveform).tangent is not None
        or torch.func.debug_unwrap(waveform) is not waveform
    ):
        return "It takes no tensors of torch.func or of forward-mode differentiation; the reference does."
    return ""


@lru_cache(maxsize=64)
def _native_constants(
    sample_rate: float,
    window: str,
    mel_bins: int,
    low_freq: float,
    high_freq: float,
    size: int,
    fft_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Window (size,); the filters' weights without their zeros: where each begins, its first bin, and all in a row."""
    filters = mel_weights(sample_rate, fft_size, mel_bins, low_freq, high_freq)
    seen = filters > 0
    seen[:, 0] |= ~seen.any(1)  # a filter between two bins has the weight 0, and NaN where all bins are
    counts, first_bins = seen.sum(1), seen.int().argmax(1)
    return (
        taper(window, size, torch.float32),
        torch.cat((counts.new_zeros(1), counts.cumsum(0))),
        first_bins,
        filters[seen],
    )


def _native_forward(waveform, *, frame_length, frame_shift, preemphasis, remove_dc_offset, **filters):
    size, shift, fft_size = frame_sizes(filters["sample_rate"], frame_length, frame_shift)
    constants = _native_constants(**filters, size=size, fft_size=fft_size)
    return torch.ops.audiomae_native.fbank.default(
        waveform, *constants, fft_size, shift, preemphasis, remove_dc_offset
    )


_library.register("fbank", "reference", fbank_ref)
_library.register_native("fbank", _native_forward, dtypes=(torch.float32,), refuses=_why_not_native)
