"""The benchmark's input: log-mel spectrograms of the package's recordings, and one mask per model."""

from __future__ import annotations

import torch

from audiomae import Frontend
from audiomae.data import load_audio, recordings


def spectrograms(batch: int, frames: int) -> torch.Tensor:
    """(batch, frames, 128) fp32: evenly spaced crops of all recordings in a row, every frame of them real."""
    frontend = Frontend.named("audioset", frames=frames)
    audio = torch.cat([load_audio(path, frontend.sample_rate) for path in recordings()])
    samples = 400 + 160 * (frames - 1)  # 25 ms windows every 10 ms
    starts = torch.arange(batch) * len(audio) // batch
    clips = audio[(starts[:, None] + torch.arange(samples)) % len(audio)]
    return frontend(clips)


def visible_tokens(batch: int, num_tokens: int, kept: int, seed: int = 0) -> torch.Tensor:
    """(batch, kept) int64: the first `kept` of a random permutation per clip, time-major token ids."""
    noise = torch.rand(batch, num_tokens, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(dim=1)[:, :kept].contiguous()
