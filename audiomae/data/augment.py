"""Augmentation, all of it drawn from a generator that the caller seeds.

On waveforms, by the workers: :class:`Augment`. On normalised spectrograms, on the training device:
:func:`spec_augment`, :func:`spectrogram_noise`. On labels: :func:`smooth`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Augment", "smooth", "spec_augment", "spectrogram_noise"]


@dataclass(frozen=True)
class Augment:
    """What happens to a crop before it becomes a spectrogram; the default is nothing.

    Attributes:
        gain: decibels; the crop is scaled by a factor drawn evenly from ±`gain` dB. The Audio-MAE paper
            (section 4.2) says 6.
        roll: shift the crop cyclically by a number of samples drawn evenly from its length, as the paper says.
        upstream_roll_mag: what Audio-MAE's released code does under that name, in place of the two above: its
            roll is by ``randint(1) = 0`` samples, and its gain a factor 0.5 + Beta(10, 10).
        noise: white Gaussian noise at a signal-to-noise ratio drawn evenly from this range in dB; None adds
            none. The published noise is another one, :func:`spectrogram_noise`.
        mixup: probability of mixing in another clip of the same data set, drawn evenly: lambda times this crop
            plus (1 - lambda) times the other, labels likewise, lambda from Beta(10, 10). Published for
            fine-tuning: 0.5 (AudioSet, Speech Commands).
    """

    gain: float = 0.0
    roll: bool = False
    upstream_roll_mag: bool = False
    noise: tuple[float, float] | None = None
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gain) and self.gain >= 0):
            raise ValueError(f"gain is {self.gain}, but decibels of at least 0 were expected")
        if not 0 <= self.mixup <= 1:
            raise ValueError(f"mixup is {self.mixup}, but a probability from 0 to 1 was expected")
        if self.upstream_roll_mag and (self.gain or self.roll):
            raise ValueError("upstream_roll_mag takes the place of gain and roll; give one or the other")
        if self.noise is not None:
            low, high = self.noise
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(f"noise is {self.noise}, but a range (low, high) in dB was expected")
            object.__setattr__(self, "noise", (float(low), float(high)))

    def on_clip(self, waveform: Tensor, random: np.random.Generator) -> Tensor:
        """Gain and roll: (S,) -> (S,)."""
        if self.upstream_roll_mag:
            return waveform * (0.5 + random.beta(10, 10))
        if self.gain:
            waveform = waveform * 10 ** (random.uniform(-self.gain, self.gain) / 20)
        if self.roll:
            waveform = waveform.roll(int(random.integers(len(waveform))))
        return waveform

    def on_mixture(self, waveform: Tensor, random: np.random.Generator) -> Tensor:
        """Noise: (S,) -> (S,). A silent crop stays silent."""
        if self.noise is None:
            return waveform
        ratio = random.uniform(*self.noise)
        noise = torch.from_numpy(random.standard_normal(len(waveform), dtype=np.float32))
        return waveform + noise * (waveform.square().mean().sqrt() * 10 ** (-ratio / 20))

    def mix(self, one: Tensor, other: Tensor, random: np.random.Generator) -> tuple[Tensor, float]:
        """(S,), (S',) -> (S,) and lambda, the share of `one`; `other` is cut, or ends in silence.

        Both lose their means first, as published.
        """
        share = random.beta(10, 10)
        mixed = (one - one.mean()) * share
        other = other[: len(one)]
        mixed[: len(other)] += (other - other.mean()) * (1 - share)
        return mixed, share


def spectrogram_noise(spectrogram: Tensor, seeds: Tensor, snr: float | None = None) -> Tensor:
    """Noise that Audio-MAE and SSAST fine-tune with, for speech commands and speakers.

    With `snr`, what Audio-MAE's paper says (Huang et al. 2022, Table 3: "random noise (signal-to-noise ratio (SNR):
    20dB) to spectrograms"), and no more is stated: white Gaussian noise, its power that much below the clip's mean
    square. Without, what the released code of both does: evenly drawn values from [0, 1) times an evenly drawn level
    from [0, 0.1), one per clip, and then a roll of the clip in time by -10 to 9 frames.

    Args:
        spectrogram: (B, T, F), normalised, on any device; the noise is made there.
        seeds: (B,) int64 on the CPU, :attr:`Batch.seeds`.
        snr: decibels.

    Returns:
        (B, T, F), the dtype of `spectrogram`.
    """
    _check_shapes(spectrogram, seeds)
    generator = torch.Generator(spectrogram.device)
    noisy = []
    for clip, seed in zip(spectrogram, seeds.tolist(), strict=True):
        if snr is not None:
            noise = torch.randn(clip.shape, generator=generator.manual_seed(seed), device=clip.device)
            scale = clip.float().square().mean().sqrt() * 10 ** (-snr / 20)
            noisy.append(clip + (noise * scale).to(clip.dtype))
            continue
        random = np.random.default_rng((seed, 1))
        level, shift = random.random() / 10, int(random.integers(-10, 10))
        noise = torch.rand(clip.shape, generator=generator.manual_seed(seed), device=clip.device)
        noisy.append((clip + (noise * level).to(clip.dtype)).roll(shift, dims=0))
    return torch.stack(noisy) if noisy else spectrogram


def spec_augment(spectrogram: Tensor, seeds: Tensor, time: int, frequency: int, fill: float = 0.0) -> Tensor:
    """SpecAugment (Park et al. 2019) as AST, SSAST and Audio-MAE have it: one band of time and one of frequency a clip.

    A width is drawn evenly from 0 to `time` frames (`frequency` bins), then a place for it.

    Args:
        spectrogram: (B, T, F), on any device; each of the masks is made there.
        seeds: (B,) int64 on the CPU, :attr:`Batch.seeds`.
        time, frequency: largest widths; 0 masks nothing.
        fill: what stands in a band. The published code masks with 0 before it normalises: `-mean / (2 * std)` after.

    Returns:
        (B, T, F), the dtype of `spectrogram`.
    """
    _check_shapes(spectrogram, seeds)
    draws = np.array([np.random.default_rng((seed, 2)).random(4) for seed in seeds.tolist()]).reshape(
        -1, 2, 2
    )
    masked = torch.zeros((), dtype=torch.bool, device=spectrogram.device)
    for axis, widest in ((1, time), (2, frequency)):
        size = spectrogram.shape[axis]
        width = draws[:, axis - 1, 0] * min(widest, size)
        start = (draws[:, axis - 1, 1] * (size - width)).astype(np.int64)
        edges = torch.from_numpy(np.stack((start, start + width.astype(np.int64)))).to(spectrogram.device)
        places = torch.arange(size, device=spectrogram.device)
        band = (places >= edges[0, :, None]) & (places < edges[1, :, None])
        masked = masked | band.unsqueeze(3 - axis)
    return spectrogram.masked_fill(masked, fill)


def smooth(labels: Tensor, amount: float) -> Tensor:
    """Label smoothing: (B, C) -> (B, C), `amount` of each clip's labels spread evenly over all classes."""
    return labels if not amount else labels * (1 - amount) + amount / labels.shape[1]


def _check_shapes(spectrogram: Tensor, seeds: Tensor) -> None:
    if spectrogram.dim() != 3 or seeds.shape != spectrogram.shape[:1]:
        raise ValueError(
            f"spectrogram has shape {tuple(spectrogram.shape)} and seeds {tuple(seeds.shape)}; (batch, frames, bins) "
            "and (batch,) were expected"
        )
