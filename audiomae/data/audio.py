"""Audio files in, mono float32 waveforms out: decoded by soundfile, resampled by torchaudio."""

import importlib
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiomae.frontend import Frontend

__all__ = ["AudioError", "decode", "load_audio", "load_batch", "recordings"]

# What recorders and codecs produce. Outside it a header is damaged or lies.
_SAMPLE_RATES = range(1_000, 1_000_000)

# A polyphase filter has about (from / gcd) * (to / gcd) taps: 256 MiB of float32 at most.
_MAX_TAPS = 2**26


class AudioError(ValueError):
    """A recording that cannot be used; the message names the file and says why."""


def _extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"reading audio files needs {name}, which cannot be imported ({error}); "
            'pip install "audiomae[audio]"'
        ) from error


def decode(path: str | os.PathLike, start: int = 0, frames: int | None = None) -> tuple[Tensor, int]:
    """Decode a recording, or `frames` samples of it from sample `start` on, and mix its channels to mono.

    WAV, FLAC, OGG, MP3 and whatever else libsndfile reads. Only the crop is decoded.

    Args:
        path: of the file.
        start: first sample, at the file's own sample rate.
        frames: samples per channel to read; None reads to the end. Where fewer are left, fewer come back.

    Returns:
        waveform (S,), float32, the mean over the channels, in [-1, 1] for integer formats; sample rate in Hz.

    Raises:
        AudioError: the file is missing or unreadable, holds no samples from `start` on, states an implausible
            sample rate, or has NaN or infinite samples.
        ImportError: soundfile is not installed.
    """
    soundfile = _extra("soundfile")
    if start < 0 or (frames is not None and frames < 1):
        raise ValueError(f"start is {start} and frames {frames}; expected start >= 0 and frames >= 1 or None")
    if not os.path.isfile(path):
        raise AudioError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            rate, total = file.samplerate, file.frames
            if rate not in _SAMPLE_RATES:
                raise AudioError(
                    f"{path}: states a sample rate of {rate} Hz; expected {_SAMPLE_RATES[0]} to "
                    f"{_SAMPLE_RATES[-1]} Hz. The file is probably damaged"
                )
            if start >= total:
                raise AudioError(f"{path}: has {total} samples, nothing to read from sample {start} on")
            if start:
                file.seek(start)
            channels = file.read(-1 if frames is None else frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(f"{path}: cannot be decoded: {error}") from error
    if len(channels) == 0:
        raise AudioError(f"{path}: its header promises {total} samples, but none could be decoded")
    waveform = torch.from_numpy(channels).mean(dim=1)  # (S, C) -> (S,)
    if not torch.isfinite(waveform).all():
        raise AudioError(f"{path}: has NaN or infinite samples")
    return waveform, rate


@lru_cache(maxsize=16)
def _resampler(source: int, target: int) -> torch.nn.Module:
    return _extra("torchaudio").transforms.Resample(source, target)


def load_audio(path: str | os.PathLike, sample_rate: int = 16000) -> Tensor:
    """Decode a whole recording to mono at `sample_rate`.

    Returns:
        waveform (S,), float32.

    Raises:
        AudioError: as :func:`decode`, or the file's rate cannot be converted to `sample_rate` with a filter
            of reasonable size.
        ImportError: soundfile or torchaudio is not installed.
    """
    waveform, rate = decode(path)
    if rate == sample_rate:
        return waveform
    divisor = math.gcd(rate, sample_rate)
    if (rate // divisor) * (sample_rate // divisor) > _MAX_TAPS:
        raise AudioError(
            f"{path}: {rate} Hz and {sample_rate} Hz have no common divisor beyond {divisor}, so the "
            "resampling filter would be huge; convert the file with another tool first"
        )
    return _resampler(rate, sample_rate)(waveform)


def load_batch(paths: Sequence[str | os.PathLike], frontend: Frontend) -> tuple[Tensor, Tensor]:
    """Load recordings at the front end's sample rate: ``frontend(*load_batch(paths, frontend))``.

    Returns:
        waveforms (B, S), float32, zero-padded at the end to the longest; lengths (B,), int64, in samples.
    """
    waveforms = [load_audio(path, frontend.sample_rate) for path in paths]
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    return pad_sequence(waveforms, batch_first=True), lengths


def recordings() -> list[Path]:
    """The recordings that come with the package, sorted: three of speech, six sounds (see their README)."""
    folder = Path(str(resources.files("audiomae") / "recordings"))
    return sorted(path for path in folder.iterdir() if path.suffix in (".flac", ".oga"))
