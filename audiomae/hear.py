"""The common API of HEAR, the holistic evaluation of audio representations (Turian et al. 2022, arXiv 2203.03022).

`audiomae.hear` is the module that the public evaluation kit takes. It imports TensorFlow, and the process crashes if
PyTorch's Triton comes after that, so import this package first:

    python -c "import audiomae, heareval.embeddings.runner as kit; kit.runner()" audiomae.hear --model FOLDER

Its specification: https://hearbenchmark.com/hear-api.html
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .embedding import Embedder

__all__ = ["get_scene_embeddings", "get_timestamp_embeddings", "load_model"]

HOP_MS = 50.0  # the longest that the specification suggests


class HearModel(Embedder):
    """An `Embedder` with the attributes that HEAR asks for.

    Attributes:
        sample_rate: in Hz, of the audio.
        scene_embedding_size, timestamp_embedding_size: the model's width.
    """

    @property
    def scene_embedding_size(self) -> int:
        return self.width

    @property
    def timestamp_embedding_size(self) -> int:
        return self.width

    @property
    def hop_ms(self) -> float:
        """Between timestamps: the model's own step, at most 50 ms."""
        return min(HOP_MS, self.step_ms)


def load_model(model_file_path: str = "", **options: Any) -> HearModel:
    """The model in a folder, a published checkpoint or a hub id, on the CPU.

    Args:
        model_file_path: a name of `audiomae.list_models()` too: with random weights, as a baseline.
        options: of `Embedder` (`layer`, `long`, ...), or what a published checkpoint cannot say (`tokens="patch"`).

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no name, no model in it, or an option that is out of range.
    """
    if not model_file_path:
        raise ValueError(
            "no weights come with this package: name a folder, a published checkpoint or a hub id (--model)"
        )
    return HearModel(model_file_path, level="frame", **options)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """(n, samples) float32 in [-1, 1] at `model.sample_rate` -> (n, width) float32: the mean over time.

    Raises:
        ValueError: the audio has another shape, or is shorter than 25 ms.
    """
    return torch.stack([frames.mean(dim=0) for frames in _frames(audio, model)])


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Embeddings at regular intervals, and the moments in their middle.

    Args:
        audio: (n, samples) float32 in [-1, 1] at `model.sample_rate`.

    Returns:
        (n, t, width) float32 and (n, t) float32 timestamps in milliseconds, from 0 to the clip's end, `model.hop_ms`
        apart. Between the middles of two time steps of the model (160 ms apart for patches of 16 frames) embeddings
        are interpolated linearly.

    Raises:
        ValueError: as `get_scene_embeddings`.
    """
    frames = torch.stack(_frames(audio, model))  # (n, T', D)
    milliseconds = 1000.0 * audio.shape[1] / model.sample_rate
    # Multiples, not sums: nothing drifts in a long clip.
    times = torch.arange(math.floor(milliseconds / model.hop_ms) + 1, dtype=torch.float64) * model.hop_ms
    place = ((times - model.times(1)) / model.step_ms).clamp(0, frames.shape[1] - 1)
    before = place.long()
    after = (before + 1).clamp(max=frames.shape[1] - 1)
    share = (place - before)[:, None].to(frames)
    before, after = before.to(frames.device), after.to(frames.device)
    embeddings = frames[:, before].lerp(frames[:, after], share)
    return embeddings, times.float().to(frames.device).expand(len(audio), -1)


def _frames(audio: Tensor, model: HearModel) -> list[Tensor]:
    if audio.ndim != 2 or len(audio) == 0:
        raise ValueError(f"audio must be (sounds, samples), mono, got {tuple(audio.shape)}")
    return model(audio)
