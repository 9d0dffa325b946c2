"""Kaldi's log-mel filter banks in plain PyTorch: batched, on any device, differentiable."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Kaldi's floor under the logarithm is float32's epsilon in every dtype.
_LOG_FLOOR = torch.finfo(torch.float32).eps

# The mel matrix is nearly all zeros: low filters see few FFT bins, high filters none of the low ones. Each of
# these groups of neighbouring filters multiplies only the bins that it sees.
_MEL_GROUPS = 8

# Elements of frames in flight. On a CPU they should stay in the cache (2 MiB of float32, 6 with all buffers): a batch
# in one piece is several times slower. Elsewhere this only bounds the memory.
_BLOCK_CPU, _BLOCK_DEVICE = 2**19, 2**26


def frame_sizes(sample_rate: float, frame_length: float, frame_shift: float) -> tuple[int, int, int]:
    """Samples in a frame, from frame to frame, and in its FFT."""
    # Truncated in this order of operations, as torchaudio does: it shows at 22.05 and 44.1 kHz.
    size, shift = int(sample_rate * frame_length * 0.001), int(sample_rate * frame_shift * 0.001)
    return size, shift, 1 << max(0, size - 1).bit_length()


def frames_per_block(waveform: Tensor, fft_size: int) -> int:
    """How many frames of `waveform` are worked on at a time."""
    if torch.compiler.is_compiling():
        return waveform.numel()  # one block: a loop would be unrolled
    return max(1, (_BLOCK_CPU if waveform.device.type == "cpu" else _BLOCK_DEVICE) // fft_size)


def _mel(hertz: float) -> float:
    return 1127.0 * math.log(1.0 + hertz / 700.0)


def _hertz(mel: float) -> float:
    return 700.0 * (math.exp(mel / 1127.0) - 1.0)


def taper(window: str, size: int, dtype: torch.dtype) -> Tensor:
    """The window, (size,)."""
    hann = torch.hann_window(size, periodic=False, dtype=dtype, device="cpu")
    return hann.pow(0.85) if window == "povey" else hann


def mel_weights(
    sample_rate: float, fft_size: int, mel_bins: int, low_freq: float, high_freq: float
) -> Tensor:
    """(F, fft_size / 2) float32: the filters' weights of the bins below half the sample rate."""
    # The weights are float32 in every dtype, as in torchaudio. A filter's only FFT bin can lie close to its
    # edge: the rounding of this very order of operations is then visible in the log domain.
    low, delta = _mel_steps(mel_bins, low_freq, high_freq)
    hertz = sample_rate / fft_size * torch.arange(fft_size // 2, dtype=torch.float32, device="cpu")
    mel = 1127.0 * (1.0 + hertz / 700.0).log()
    index = torch.arange(mel_bins, dtype=torch.float32, device="cpu").unsqueeze(1)
    left, center, right = (low + (index + i) * delta for i in (0.0, 1.0, 2.0))
    return torch.minimum((mel - left) / (center - left), (right - mel) / (right - center)).clamp_(min=0.0)


def _mel_steps(mel_bins: int, low_freq: float, high_freq: float) -> tuple[float, float]:
    """The lowest edge, and from filter to filter."""
    low, high = _mel(low_freq), _mel(high_freq)
    return low, (high - low) / (mel_bins + 1)


def _build_constants(
    sample_rate: float,
    window: str,
    mel_bins: int,
    low_freq: float,
    high_freq: float,
    size: int,
    fft_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Window (size,); (first row, weights) of each group of mel filters.

    Rows count the FFT's squares as they lie in memory: Re², Im² of bin 0, Re², Im² of bin 1, ...
    """
    weights = mel_weights(sample_rate, fft_size, mel_bins, low_freq, high_freq)
    low, delta = _mel_steps(mel_bins, low_freq, high_freq)
    bin_width = sample_rate / fft_size
    groups, first = [], 0
    for rows in weights.chunk(_MEL_GROUPS):
        last = first + len(rows)
        start = math.floor(_hertz(low + first * delta) / bin_width)
        stop = math.ceil(_hertz(low + (last + 1) * delta) / bin_width) + 1
        # Each weight twice: the power is never formed, Re² and Im² meet in the matrix product.
        columns = rows[:, start:stop].T.repeat_interleave(2, dim=0)
        groups.append((2 * start, columns.to(device, dtype)))
        first = last
    return taper(window, size, dtype).to(device), groups


@lru_cache(maxsize=64)
def _cached_constants(*settings: Any) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    # A tensor made in inference mode could not be used by autograd later.
    with torch.inference_mode(False), torch.no_grad():
        return _build_constants(*settings)


@torch.compiler.assume_constant_result
def _constants(*settings: Any) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    return _cached_constants(*settings)


def is_ordinary(waveform: Tensor) -> bool:
    """Fake tensors and other subclasses live in a world of their own, which must not enter a cache."""
    return type(waveform) in (Tensor, torch.nn.Parameter)


def _blocks(waveform: Tensor, size: int, shift: int, fft_size: int) -> Iterator[Tensor]:
    """What is computed at a time: views (clips, frames, size) of the samples."""
    frames = waveform.unfold(1, size, shift)
    count, block = frames.shape[1], frames_per_block(waveform, fft_size)
    clips = max(1, block // count)
    for clip in range(0, len(waveform), clips):
        for frame in range(0, count, block):
            yield frames[clip : clip + clips, frame : frame + block]


def fbank_ref(
    waveform: Tensor,
    *,
    sample_rate: float,
    window: str,
    mel_bins: int,
    frame_length: float,
    frame_shift: float,
    low_freq: float,
    high_freq: float,
    preemphasis: float,
    remove_dc_offset: bool,
) -> Tensor:
    """`audiomae_kernels.fbank` of (B, S).

    Up to the FFT the operations and their order are Kaldi's, rounding for rounding: quiet frames amplify
    differences there. After it all terms are positive and any order will do.
    """
    size, shift, fft_size = frame_sizes(sample_rate, frame_length, frame_shift)
    if len(waveform) == 0:  # which torch's FFT refuses
        return waveform.new_zeros(0, (waveform.shape[1] - size) // shift + 1, mel_bins)
    settings = (
        sample_rate,
        window,
        mel_bins,
        low_freq,
        high_freq,
        size,
        fft_size,
        waveform.device,
        waveform.dtype,
    )
    build = _constants if is_ordinary(waveform) or torch.compiler.is_compiling() else _build_constants
    tapered, groups = build(*settings)
    blocks = []
    for part in _blocks(waveform.contiguous(), size, shift, fft_size):
        x = part - part.mean(-1, keepdim=True) if remove_dc_offset else part
        # Every window begins with 0: no frame needs a sample before its first.
        x = (x[..., 1:] - preemphasis * x[..., :-1]) * tapered[1:]
        spectrum = torch.fft.rfft(functional.pad(x, (1, fft_size - size))).flatten(0, 1)
        squares = torch.view_as_real(spectrum).flatten(1).square_()  # (clips * frames, fft_size + 2)
        mel = torch.cat([squares[:, start : start + len(w)].mm(w) for start, w in groups], dim=1)
        blocks.append(mel.clamp_(min=_LOG_FLOOR).log_())
    mel = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return mel.unflatten(0, (len(waveform), -1))
