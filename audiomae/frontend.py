"""From waveform to normalised log-mel spectrogram: Kaldi's fbank, batched, on any device.

Audio-MAE (https://arxiv.org/abs/2207.06405), SSAST (https://arxiv.org/abs/2110.09784) and MAE-AST
(https://arxiv.org/abs/2203.16691) all read Kaldi log-mel filter banks: 25 ms frames every 10 ms, 128 bins.

Shapes: B clips, S samples, T frames, N samples per frame, F mel bins.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import zip_longest
from typing import Any

import torch
from audiomae_kernels.fbank import WINDOWS, check_waveform, fbank, num_frames
from audiomae_kernels.fbank.reference import frame_sizes, frames_per_block
from torch import Tensor
from torch.nn import functional

from .words import plural

__all__ = ["FRONTENDS", "Frontend", "fbank", "num_frames"]


def _clip_sums(waveform: Tensor, block: int = 1024) -> Tensor:
    """(B, S) -> (B, 1), float64, the same bits whatever the number of zeros at the end.

    Float32 sums of blocks that start at fixed places, then a float64 sum of those.
    """
    whole = waveform.shape[1] // block * block
    tail = functional.pad(waveform[:, whole:], (0, block - (waveform.shape[1] - whole)))
    sums = torch.cat((waveform[:, :whole].unflatten(1, (-1, block)).sum(2), tail.sum(1, keepdim=True)), dim=1)
    return sums.sum(1, keepdim=True, dtype=torch.float64)


@dataclass(frozen=True)
class Frontend:
    """How waveforms become a model's input; stored with its weights, since they are worth little without it.

    Calling it gives ``(fbank - mean) / (2 * std)``, as the published code normalises. The published settings
    are in :data:`FRONTENDS`; :meth:`named` takes one and changes what differs.

    Attributes:
        sample_rate: of the waveforms, in Hz.
        window: "hanning" or "povey", see :func:`fbank`.
        mel_bins: number F of mel filters.
        mean, std: of the log-mel values over the training set; both None leaves them as they are (MAE-AST
            normalises by batch statistics inside the model).
        frames: pad or cut at the end to this many frames; None leaves the length alone. The padding is 0.0
            *before* normalising, as published: ``-mean / (2 * std)`` after it, which is not silence.
        remove_mean: subtract each clip's mean from its waveform (Audio-MAE and SSAST do, MAE-AST does not).
        labels: a classifier's class names, in the order of its logits.
    """

    sample_rate: int = 16000
    window: str = "hanning"
    mel_bins: int = 128
    mean: float | None = None
    std: float | None = None
    frames: int | None = None
    remove_mean: bool = True
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise ValueError(f"unknown window {self.window!r}; choose one of {', '.join(map(repr, WINDOWS))}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean is {self.mean} and std {self.std}; give both, or neither")
        if self.std is not None and not self.std > 0:
            raise ValueError(f"std is {self.std}, but a positive number was expected")
        for name in ("sample_rate", "mel_bins", "frames"):
            value = getattr(self, name)
            if (value is not None or name != "frames") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, but a positive integer was expected")
        if self.labels is not None:
            if isinstance(self.labels, str) or not all(isinstance(label, str) for label in self.labels):
                raise ValueError(f"labels is {self.labels!r:.80}, but a sequence of strings was expected")
            for label in self.labels:  # they are printed, and may be a stranger's
                if any(unicodedata.category(character) == "Cc" for character in label):
                    raise ValueError(
                        f"the label {label!r:.80} holds control characters; take them out of its name"
                    )
            object.__setattr__(self, "labels", tuple(self.labels))

    @classmethod
    def named(cls, name: str, **changes: Any) -> "Frontend":
        """Published settings by name (see :data:`FRONTENDS`), with some fields changed."""
        if name not in FRONTENDS:
            raise ValueError(f"unknown front end {name!r}; choose one of {', '.join(FRONTENDS)}")
        return replace(FRONTENDS[name], **changes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-able values; :meth:`from_dict` reads them back."""
        return asdict(self) | {"labels": None if self.labels is None else list(self.labels)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Frontend":
        """The front end whose :meth:`to_dict` is `settings`; fields left out keep their defaults."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(
                f"unknown front-end settings {', '.join(unknown)}; known are {', '.join(known)}. "
                "Were they written by a newer version?"
            )
        return cls(**settings)

    @property
    def padding(self) -> float:
        """The normalised value that a clip is filled up with to `frames`."""
        return 0.0 if self.mean is None else -self.mean / (2 * self.std)

    def num_frames(self, samples: int | Tensor) -> int | Tensor:
        """Number of frames that hold audio, of a clip of `samples` samples: never more than `frames`.

        This is what a model takes as ``lengths``. An int, or an integer tensor of any shape.
        """
        count = num_frames(samples, self.sample_rate)
        if self.frames is None:
            return count
        return count.clamp_(max=self.frames) if isinstance(count, Tensor) else min(count, self.frames)

    def __call__(self, waveform: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Normalised log-mel spectrograms of a batch of waveforms.

        Args:
            waveform: (B, S) or (S,), float32 or float64, at `sample_rate`.
            lengths: (B,) integers, each clip's number of samples when shorter ones were filled up to S. A
                clip then has its own mean, and its frames that reach past its end are padding: it gives what
                it gives alone, whatever it was filled up with. Lengths on the CPU are checked; those on
                another device are not, so that nothing waits for it.

        Returns:
            (B, T, F) or (T, F), the waveform's dtype; T is `frames`, or ``num_frames(S)`` where that is None.

        Raises:
            TypeError: the waveform is not float32 or float64, or lengths are not integers.
            ValueError: wrong shapes, or a clip shorter than one frame or longer than S.
        """
        check_waveform(waveform)
        if lengths is not None:
            lengths = self._checked_lengths(waveform, lengths)
        batch = waveform if waveform.dim() == 2 else waveform.unsqueeze(0)
        count = max(1, self.num_frames(batch.shape[1]))
        clips = max(1, frames_per_block(batch, self._frame_sizes[2]) // count)
        parts = [None] if lengths is None else lengths.split(clips)
        blocks = [self._spectrogram(*part) for part in zip_longest(batch.split(clips), parts)]
        mel = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return mel if waveform.dim() == 2 else mel.squeeze(0)

    @property
    def _frame_sizes(self) -> tuple[int, int, int]:
        return frame_sizes(self.sample_rate, 25.0, 10.0)

    def _spectrogram(self, waveform: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, S), (B,) -> (B, T, F)."""
        if lengths is not None:
            lengths = lengths.unsqueeze(1)
            samples = torch.arange(waveform.shape[1], device=waveform.device)
            waveform = waveform.where(samples < lengths, 0.0)
        if self.remove_mean:
            mean = _clip_sums(waveform) / (waveform.shape[1] if lengths is None else lengths)
            waveform = waveform - mean.to(waveform.dtype)
        if self.frames is not None:  # what no frame reads need not be computed
            size, shift, _ = self._frame_sizes
            waveform = waveform[:, : (self.frames - 1) * shift + size]

        mel = fbank(waveform, self.sample_rate, window=self.window, mel_bins=self.mel_bins)
        if lengths is not None:
            padding = torch.arange(mel.shape[1], device=mel.device) >= self.num_frames(lengths)  # (B, T)
            mel.masked_fill_(padding.unsqueeze(2), 0.0)
        if self.frames is not None and self.frames > mel.shape[1]:
            zeros = mel.new_zeros(len(mel), self.frames - mel.shape[1], self.mel_bins)
            mel = torch.cat((mel, zeros), dim=1)
        return mel if self.mean is None else mel.sub_(self.mean).div_(2 * self.std)

    def _checked_lengths(self, waveform: Tensor, lengths: Tensor | Sequence[int]) -> Tensor:
        lengths = torch.as_tensor(lengths)
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths are {lengths.dtype}, but integers (numbers of samples) were expected")
        if waveform.dim() != 2 or lengths.shape != waveform.shape[:1]:
            raise ValueError(
                f"lengths have shape {tuple(lengths.shape)} and the waveform {tuple(waveform.shape)}; "
                "(batch,) and (batch, samples) were expected"
            )
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            frame, _, _ = self._frame_sizes
            for clip, length in enumerate(lengths.tolist()):
                if not frame <= length <= waveform.shape[1]:
                    raise ValueError(
                        f"clip {clip} has {plural(length, 'sample')}; expected at least {frame} (one frame of 25 ms) "
                        f"and at most {waveform.shape[1]}, the waveform's; pad it or leave it out"
                    )
        return lengths.to(waveform.device, non_blocking=True)


#: Published settings. Means and standard deviations are those of the training sets: AudioSet, ESC-50 and
#: Speech Commands V2 as in the released code, Speech Commands V1 and VoxCeleb1 as in Table 3 of the Audio-MAE
#: paper.
FRONTENDS: dict[str, Frontend] = {
    "audioset": Frontend(mean=-4.2677393, std=4.5689974, frames=1024),
    "esc50": Frontend(mean=-6.6268077, std=5.358466, frames=512),
    "speech_commands": Frontend(mean=-6.845978, std=5.5654526, frames=128),
    "speech_commands_v1": Frontend(mean=-6.702, std=5.448, frames=128),
    "voxceleb": Frontend(mean=-6.370, std=3.074, frames=1024),
    "mae_ast": Frontend(window="povey", remove_mean=False),
}
