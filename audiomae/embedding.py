"""Embeddings and labels of clips of any length from a trained encoder.

A clip that is shorter than the model's positions uses the first of them. A longer one is cut into overlapping chunks
of the length that the model was trained on, whose frame embeddings are joined; or the positions are interpolated to
reach its end.

Shapes as in `model.py`: B clips, S samples, T frames, F mel bins, T' time steps of F' patches each, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .classifier import Classifier
from .config import is_name
from .create import create_model, load
from .model import Positions, SpectrogramModel
from .pretrained import reconfigured
from .words import plural

__all__ = ["Embedder", "Tagger", "stretched"]

LONG = ("chunks", "interpolate")

Waveforms = Tensor | np.ndarray | Sequence[Tensor | np.ndarray]


def stretched(model: SpectrogramModel, frames: int) -> SpectrogramModel:
    """A model whose positions reach clips of so many frames, interpolated in time; itself if they do already.

    It shares the other weights with the model given. The decoder's positions are interpolated too.
    """
    c = model.config
    if frames <= c.frames:
        return model
    steps, _ = c.grid_of_filled(frames)
    frames = (steps - 1) * c.step[0] + c.patch[0]
    frontend = dataclasses.replace(c.frontend, frames=c.frontend.frames and frames)
    longer = reconfigured(model, frames=frames, frontend=frontend)
    for module in longer.modules():
        if isinstance(module, Positions):
            module.stretch(steps)
    return longer


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a clip that the model reads at once.

    Attributes:
        clip: which one.
        first: time step at which it begins.
        steps: time steps, the last filled up with zeros.
        start, frames: the same in frames.
    """

    clip: int
    first: int
    steps: int
    start: int
    frames: int


def _clips(waveform: Waveforms, lengths: Tensor | Sequence[int] | None) -> Tensor | list[Tensor]:
    """Waveforms as a batch (B, S) or one by one."""
    if not isinstance(waveform, (Tensor, np.ndarray)):
        if lengths is not None:
            raise ValueError(
                "lengths belong to the rows of one batch (clips, samples), not to a list of clips"
            )
        for clip in waveform:
            if not isinstance(clip, (Tensor, np.ndarray)):
                raise TypeError(
                    f"a waveform is a tensor or an array, got a {type(clip).__name__}; audiomae.data.load_audio reads "
                    "files"
                )
        return [torch.as_tensor(clip) for clip in waveform]
    waveform = torch.as_tensor(waveform)
    waveform = waveform[None] if waveform.ndim == 1 else waveform
    if lengths is None or waveform.ndim != 2:
        return waveform if waveform.ndim else waveform[None, None]
    lengths = torch.as_tensor(lengths)
    whole = lengths.shape == waveform.shape[:1] and not lengths.is_floating_point()
    if not whole or not ((lengths >= 0) & (lengths <= waveform.shape[1])).all():
        raise ValueError(
            f"lengths must hold one integer up to {waveform.shape[1]} for each of {plural(len(waveform), 'clip')}, got "
            f"{lengths.tolist()}"
        )
    return [row[:n] for row, n in zip(waveform, lengths.tolist(), strict=True)]


class AnyLength(nn.Module):
    """What `Embedder` and `Tagger` share: from waveforms to the pieces that a model reads.

    Args:
        model: a model, or its path, hub id or name (then with random weights: a baseline).
        pad: "exclude": a clip is filled up to whole patches, and what a batch is filled up with is not read.
            "attend": it is filled up to the length that the front end says, and all of that is read, as published;
            a model whose front end says none (MAE-AST) has nothing to attend, and takes "exclude". None: as its
            configuration says.
        long: what is done with a clip beyond the model's length, "chunks" or "interpolate" (positions; attention then
            costs the square of the clip's length).
        overlap: share of a chunk that the next one covers too, at least; the last chunk ends with the clip.
        batch_size: pieces that the model reads at a time.
        device: where to; None: where the model is.
        overrides: for a path or hub id: fields of its configuration, see `audiomae.load`.

    Raises:
        ValueError: a setting that is out of range.
    """

    def __init__(
        self,
        model: SpectrogramModel | str | Path,
        *,
        pad: str | None = None,
        long: str = "chunks",
        overlap: float = 0.5,
        batch_size: int = 8,
        device: torch.device | str | None = None,
        **overrides: Any,
    ):
        super().__init__()
        if long not in LONG:
            raise ValueError(f"long must be one of {', '.join(map(repr, LONG))}, got {long!r}")
        if not 0.0 <= overlap < 1.0:
            raise ValueError(f"overlap must lie in [0, 1), got {overlap!r}")
        if not (isinstance(batch_size, int) and batch_size > 0):
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        if isinstance(model, SpectrogramModel):
            if overrides:
                raise TypeError(f"{type(self).__name__} has no option {next(iter(overrides))!r}")
        elif is_name(model):
            model = create_model(model, **overrides)
        else:
            model = load(model, **overrides).float()
        # A copy, so that neither the settings nor the mode of the model given change.
        pad = "exclude" if model.config.frontend.frames is None else pad or model.config.pad
        self.model = reconfigured(model, pad=pad).eval().to(device)
        self.long, self.overlap, self.batch_size = long, overlap, batch_size

    @property
    def sample_rate(self) -> int:
        """Of the waveforms, in Hz."""
        return self.model.config.frontend.sample_rate

    @torch.no_grad()
    def spectrograms(
        self, waveform: Waveforms, lengths: Tensor | Sequence[int] | None = None
    ) -> list[Tensor]:
        """Normalised log-mel (T_i, F) of each clip, as long as the clip is.

        Args:
            waveform: (B, S) or (S,), or a sequence of (S_i,): tensors or arrays, float32 (or float64) at
                `sample_rate`, mono, in [-1, 1].
            lengths: samples of each row of (B, S), where rows were filled up.

        Raises:
            TypeError: what was given is no waveform.
            ValueError: a clip has channels, holds NaN or is shorter than one frame of 25 ms; lengths that do not fit.
        """
        frontend = dataclasses.replace(self.model.config.frontend, frames=None)
        device = next(self.model.parameters()).device
        clips = _clips(waveform, lengths)
        for number, clip in enumerate(clips):
            if clip.ndim != 1:
                raise ValueError(
                    f"clip {number} has shape {tuple(clip.shape)}, but mono (samples,) was expected: mix its channels, "
                    "waveform.mean(dim=...)"
                )
            if len(clip) < self.sample_rate // 40:
                raise ValueError(
                    f"clip {number} has {plural(len(clip), 'sample')}, fewer than one frame of 25 ms at "
                    f"{self.sample_rate} Hz"
                )
            if not torch.isfinite(clip).all():
                raise ValueError(f"clip {number} holds NaN or infinity")
        if isinstance(clips, Tensor) and len(clips):
            return list(frontend(clips.to(device)))
        return [frontend(clip.to(device)) for clip in clips]

    def _pieces(self, clip: int, frames: int) -> list[Piece]:
        """A clip's pieces, in order."""
        c = self.model.config
        (most, _), (total, _) = c.grid(), c.grid_of_filled(frames)
        if (
            frames <= c.frames
        ):  # patches that overlap do not reach the end of a clip of full length, as published
            total = min(total, most)
        steps = total if self.long == "interpolate" else min(total, most)
        hop = max(1, round(most * (1 - self.overlap)))
        pieces = []
        for first in (*range(0, total - steps, hop), total - steps):
            start = first * c.step[0]
            span = (steps - 1) * c.step[0] + c.patch[0]
            pieces.append(Piece(clip, first, steps, start, min(frames - start, span)))
        return pieces

    def _read(
        self,
        spectrograms: Sequence[Tensor],
        compute: Callable[[SpectrogramModel, Tensor, list[int]], Tensor],
    ) -> list[list[tuple[Piece, Tensor]]]:
        """`compute(model, (b, T, F), lengths)` of all pieces in batches: for each clip its pieces and their rows."""
        dtype = next(self.model.parameters()).dtype
        for number, spectrogram in enumerate(spectrograms):
            if len(spectrogram) == 0:
                raise ValueError(f"clip {number} has no frame")
        pieces = [piece for i, s in enumerate(spectrograms) for piece in self._pieces(i, len(s))]
        found: list[list[tuple[Piece, Tensor]]] = [[] for _ in spectrograms]
        # Neighbours of equal length share calls of attention.
        pieces.sort(key=lambda piece: piece.frames)
        most = self.model.config.grid()[0]
        short = [piece for piece in pieces if piece.steps <= most]
        batches = [short[i : i + self.batch_size] for i in range(0, len(short), self.batch_size)]
        for batch in batches + [[piece] for piece in pieces[len(short) :]]:
            rows = [spectrograms[p.clip][p.start : p.start + p.frames].to(dtype) for p in batch]
            model = stretched(self.model, batch[-1].frames)
            outputs = compute(model, self._filled(rows, model), [p.frames for p in batch])
            for piece, output in zip(batch, outputs, strict=True):
                found[piece.clip].append((piece, output))
        return [sorted(each, key=lambda one: one[0].first) for each in found]

    @staticmethod
    def _filled(rows: Sequence[Tensor], model: SpectrogramModel) -> Tensor:
        """One batch (b, T, F): as published to the model's length, or to the longest row."""
        c = model.config
        if c.pad == "exclude":
            return pad_sequence(list(rows), batch_first=True)
        frames = max(c.frontend.frames, *(len(row) for row in rows))
        batch = rows[0].new_full((len(rows), frames, c.mel_bins), c.frontend.padding)
        for filled, row in zip(batch, rows, strict=True):
            filled[: len(row)] = row
        return batch


class Embedder(AnyLength):
    """Embeddings of clips of any length: one per clip, or one per time step.

    Args:
        model: a model, or its path, hub id or name (then with random weights: a baseline).
        level: what calling it returns: "clip" or "frame".
        layer: "last" (after the final norm), a block's number from 1 (its output, before the final norm), or "mean"
            over the outputs of all blocks.
        pad: "exclude" (a clip's own tokens only) or "attend" (see `AnyLength`; the mean then goes over what the clip
            was filled up with too, as published).
        long, overlap, batch_size, device, overrides: see `AnyLength`.

    No gradients are recorded. A clip gives what it gives alone, whatever it shares a batch with.
    """

    def __init__(
        self,
        model: SpectrogramModel | str | Path,
        *,
        level: str = "clip",
        layer: int | str = "last",
        pad: str = "exclude",
        **options: Any,
    ):
        super().__init__(model, pad=pad, **options)
        depth = self.model.config.depth
        if level not in ("clip", "frame"):
            raise ValueError(f"level must be 'clip' or 'frame', got {level!r}")
        if layer not in ("last", "mean") and not (type(layer) is int and 1 <= layer <= depth):
            raise ValueError(
                f"layer must be 'last', 'mean' or a block's number from 1 to {depth}, got {layer!r}"
            )
        self.level, self.layer = level, layer

    @property
    def width(self) -> int:
        """D, values of an embedding."""
        return self.model.config.width

    @property
    def step_ms(self) -> float:
        """From one time step to the next, in milliseconds."""
        return 10.0 * self.model.config.step[0]

    def times(self, steps: int) -> Tensor:
        """(steps,) float64: the middle of what each time step sees, in milliseconds from the clip's start."""
        span = 10.0 * (self.model.config.patch[0] - 1) + 25.0
        return torch.arange(steps, dtype=torch.float64) * self.step_ms + span / 2

    def forward(
        self, waveform: Waveforms, lengths: Tensor | Sequence[int] | None = None
    ) -> Tensor | list[Tensor]:
        """(B, D), or at level "frame" a (T'_i, D) for each clip.

        Arguments and errors as of `spectrograms`.
        """
        return self.embed(self.spectrograms(waveform, lengths))

    @torch.no_grad()
    def embed(self, spectrograms: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """As `forward`, from normalised log-mel (T_i, F), each as long as its clip."""
        parts = self._read(spectrograms, self._steps)
        if self.level == "frame":
            return [self._joined(each) for each in parts]
        return torch.stack([self._pooled(each) for each in parts]) if parts else torch.empty(0, self.width)

    def _pooled(self, parts: list[tuple[Piece, Tensor]]) -> Tensor:
        """(D,): the mean over a clip's steps, and over those it was filled up with where these are attended."""
        if self.model.config.pad == "attend" and len(parts) == 1:
            return parts[0][1].mean(dim=0)
        return self._joined(parts).mean(dim=0)

    def _steps(self, model: SpectrogramModel, batch: Tensor, lengths: list[int]) -> Tensor:
        """(b, T, F) -> (b, T', D): the mean over the frequency bands of each time step."""
        if self.layer == "last":
            tokens = model.encode(batch, lengths=lengths)
        else:
            blocks = range(1, model.config.depth + 1) if self.layer == "mean" else [self.layer]
            hidden = model.encode(batch, lengths=lengths, layers=blocks)
            tokens = sum(hidden[1:], start=hidden[0]) / len(hidden)
        bands = model.config.grid()[1]
        return tokens[:, model.num_prefix_tokens :].unflatten(1, (-1, bands)).mean(dim=2)

    @staticmethod
    def _joined(parts: Sequence[tuple[Piece, Tensor]]) -> Tensor:
        """(T', D) of a clip from its pieces; where they overlap, a step weighs more the farther it is from an edge."""
        parts = [(piece, x[: piece.steps]) for piece, x in parts]  # what follows was filled up
        if len(parts) == 1:
            return parts[0][1]
        steps = parts[-1][0].first + parts[-1][0].steps
        total = parts[0][1].new_zeros(steps, parts[0][1].shape[1])
        weights = total.new_zeros(steps, 1)
        for piece, x in parts:
            rising = torch.arange(1, piece.steps + 1, dtype=x.dtype, device=x.device)[:, None]
            weight = torch.minimum(rising, rising.flip(0))
            total[piece.first : piece.first + piece.steps] += weight * x
            weights[piece.first : piece.first + piece.steps] += weight
        return total / weights


class Tagger(AnyLength):
    """Class probabilities of clips of any length from a classifier.

    Args:
        model: a classifier, or its path or hub id.
        scores: "sigmoid" (any number of classes in a clip) or "softmax" (one class a clip). None: softmax where the
            model's record says that it was fine-tuned with cross-entropy, else sigmoid.
        pad, long, overlap, batch_size, device, overrides: see `AnyLength`. The probabilities of a clip's chunks are
            averaged.

    Attributes:
        labels: names of the classes, "0", "1", ... where the weights come with none.

    Raises:
        ValueError: the model is no classifier.
    """

    def __init__(
        self,
        model: Classifier | str | Path,
        *,
        scores: str | None = None,
        **options: Any,
    ):
        super().__init__(model, **options)
        c = self.model.config
        if not isinstance(self.model, Classifier):
            raise ValueError(
                f"labels come from a classifier, and this is a {type(self.model).__name__}, which has no classes"
            )
        if scores is None:
            record = self.model.record
            scores = "softmax" if record is not None and record.settings.get("loss") == "ce" else "sigmoid"
        if scores not in ("sigmoid", "softmax"):
            raise ValueError(f"scores must be 'sigmoid' or 'softmax', got {scores!r}")
        self.scores = scores
        self.labels = c.frontend.labels or tuple(str(i) for i in range(c.num_classes))

    def forward(self, waveform: Waveforms, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """(B, classes) probabilities; arguments and errors as of `Embedder`."""
        return self.tag(self.spectrograms(waveform, lengths))

    @torch.no_grad()
    def tag(self, spectrograms: Sequence[Tensor]) -> Tensor:
        """As `forward`, from normalised log-mel (T_i, F), each as long as its clip."""
        parts = self._read(spectrograms, self._probabilities)
        return torch.stack([torch.stack([x for _, x in each]).mean(dim=0) for each in parts])

    def _probabilities(self, model: Classifier, batch: Tensor, lengths: list[int]) -> Tensor:
        logits = model(batch, lengths=lengths).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.sigmoid() if self.scores == "sigmoid" else logits.softmax(dim=1)
