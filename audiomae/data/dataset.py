"""Clips in, batches of waveforms out; spectrograms, normalisation and masks are made on the training device."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from audiomae.data.audio import AudioError, load_crop
from audiomae.data.augment import Augment
from audiomae.data.sampler import ClipSampler
from audiomae.data.sources import Source
from audiomae.frontend import Frontend
from audiomae.words import plural

__all__ = ["Batch", "ClipDataset", "Failure", "FailureLog", "Sample", "collate", "make_loader"]

#: So many recordings in a row that cannot be read are no accident.
MAX_FAILURES = 100

#: Longest crop, in samples, for a front end without a length of its own: MAE-AST's `max_sample_size`.
MAX_SAMPLES = 250_000


def crop_samples(frontend: Frontend) -> int:
    """Samples that its frames read, at its rate; :data:`MAX_SAMPLES` where their number is free."""
    size, shift, _ = frontend._frame_sizes
    return MAX_SAMPLES if frontend.frames is None else size + (frontend.frames - 1) * shift


def describe(path: str, error: AudioError | OSError) -> str:
    """A sentence that names the recording: an AudioError does, the system's errors need not."""
    return (
        str(error) if isinstance(error, AudioError) else f"{path}: cannot be read: {error.strerror or error}"
    )


class Failure(str):
    """A sentence about a recording that could not be read; `path` is its name."""

    path: str

    def __new__(cls, path: str, sentence: str) -> "Failure":
        failure = super().__new__(cls, sentence)
        failure.path = path
        return failure

    def __reduce__(self):
        return Failure, (self.path, str(self))


@dataclass
class Sample:
    """One clip.

    Attributes:
        waveform: (S,) float32 at the front end's rate.
        index: the one asked for.
        seed: for what is drawn later, on the device.
        labels: (C,) float32, or None where nothing is labelled.
        failures: about the recordings that were tried first.
    """

    waveform: Tensor
    index: int
    seed: int
    labels: Tensor | None = None
    failures: list[Failure] = field(default_factory=list)


@dataclass
class Batch:
    """B clips.

    Attributes:
        waveform: (B, S) float32 at the front end's rate, filled up with zeros.
        lengths: (B,) int64, valid samples.
        labels: (B, C) float32, 1 where a label holds (less under mixup), or None where nothing is labelled.
        indices: (B,) int64, the clips asked for.
        seeds: (B,) int64, always on the CPU, for :func:`spectrogram_noise`.
        failures: sentences about clips that could not be read and were replaced by others.
    """

    waveform: Tensor
    lengths: Tensor
    labels: Tensor | None
    indices: Tensor
    seeds: Tensor
    failures: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.waveform)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """A batch with its tensors on `device`; seeds stay."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """A batch in page-locked memory; DataLoader calls it."""
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> "Batch":
        labels = None if self.labels is None else function(self.labels)
        return replace(
            self,
            waveform=function(self.waveform),
            lengths=function(self.lengths),
            labels=labels,
            indices=function(self.indices),
        )


class ClipDataset(Dataset):
    """Random crops of the clips of several sources, one after another.

    What is drawn (crop, augmentation, mixup's partner, a replacement) depends on `seed` and the key alone, not on
    workers, ranks, batches or what came before.

    A recording that cannot be read is replaced by another of the same source, drawn evenly, and the sample says
    so. The crop is as long as `frontend.frames` frames, or 250,000 samples (MAE-AST's limit) where that is None;
    a shorter recording is taken whole. Ten hours are no trouble: only the crop is decoded.

    Args:
        sources: label names must be the same in all that have any.
        frontend: whose sample rate and length the crops get.
        augment: see :class:`Augment`.
        random_crop: False takes the start of each recording.
        seconds: longest crop, where the front end's frames would take more.
        seed: of everything drawn.

    Raises:
        ValueError: no sources, or two whose label names differ.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        frontend: Frontend,
        *,
        augment: Augment | None = None,
        random_crop: bool = True,
        seconds: float | None = None,
        seed: int = 0,
    ):
        if not sources:
            raise ValueError("sources is empty, but at least one was expected")
        if seed < 0:
            raise ValueError(f"seed is {seed}, but a number of at least 0 was expected")
        labelled = [source for source in sources if source.label_names]
        for source in labelled[1:]:
            if source.label_names != labelled[0].label_names:
                raise ValueError(
                    f"{labelled[0].name} and {source.name} have different label names; give both the same label CSV"
                )
        self.sources, self.frontend = list(sources), frontend
        self.augment, self.random_crop, self.seed = augment or Augment(), random_crop, seed
        self.label_names = labelled[0].label_names if labelled else ()
        self._ends = np.cumsum([len(source) for source in sources])
        self.shortest, _, _ = frontend._frame_sizes
        self.crop = crop_samples(frontend)
        if seconds is not None:
            self.crop = min(self.crop, round(seconds * frontend.sample_rate))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The clip `index` as `epoch` crops and augments it; key is (epoch, index).

        Raises:
            IndexError: there is no such clip.
            AudioError: 100 recordings in a row could not be read.
        """
        epoch, index = key
        if not 0 <= index < len(self):
            raise IndexError(f"there is no clip {index} of {len(self)}")
        random = np.random.default_rng((self.seed, epoch, index))
        sample = Sample(torch.empty(0), index, int(random.integers(2**62)))
        sample.waveform, sample.labels = self._read(index, random, sample.failures)
        if self.augment.mixup and random.random() < self.augment.mixup:
            other, labels = self._read(int(random.integers(len(self))), random, sample.failures)
            sample.waveform, share = self.augment.mix(sample.waveform, other, random)
            if labels is not None:
                sample.labels = share * sample.labels + (1 - share) * labels
        sample.waveform = self.augment.on_mixture(sample.waveform, random)
        return sample

    def _read(
        self, index: int, random: np.random.Generator, failures: list[Failure]
    ) -> tuple[Tensor, Tensor | None]:
        """Waveform and labels of a clip, or of the first readable one of those drawn in its place."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        place = index - int(self._ends[number]) + len(source)
        for _ in range(MAX_FAILURES):
            clip = source[place]
            try:
                waveform = self._crop(source, place, clip.path, random)
            except (AudioError, OSError) as error:
                failures.append(Failure(clip.path, describe(clip.path, error)))
            else:
                return self.augment.on_clip(waveform, random), self._multi_hot(clip.labels)
            place = int(random.integers(len(source)))
        last = failures[-MAX_FAILURES:]
        if len({failure.path for failure in last}) == len(source):
            said = f"none of {plural(len(source), 'recording')} of {source.name} can be read"
        else:
            said = f"{MAX_FAILURES} recordings of {source.name} in a row could not be read"
        raise AudioError(f"{said}; the first: {last[0]}; the last: {last[-1]}")

    def _crop(self, source: Source, place: int, name: str, random: np.random.Generator) -> Tensor:
        file = source.file(place)
        start = random if self.random_crop else 0
        if isinstance(file, str):
            waveform = load_crop(file, self.frontend.sample_rate, self.crop, start)
        else:
            with closing(file):
                waveform = load_crop(file, self.frontend.sample_rate, self.crop, start, name=name)
        if len(waveform) < self.shortest:
            raise AudioError(
                f"{name}: has {plural(len(waveform), 'sample')} at {self.frontend.sample_rate} Hz, fewer than one "
                f"frame of {self.shortest}"
            )
        return waveform

    def _multi_hot(self, labels: tuple[int, ...]) -> Tensor | None:
        if not self.label_names:
            return None
        row = torch.zeros(len(self.label_names))
        row[list(labels)] = 1.0
        return row


def collate(samples: Iterable[Sample]) -> Batch:
    """A batch of the samples in their order, filled up with zeros to the longest."""
    samples = list(samples)
    if not samples:
        raise ValueError("there are no samples, but at least one was expected")
    labels = [sample.labels for sample in samples]
    return Batch(
        waveform=pad_sequence([sample.waveform for sample in samples], batch_first=True),
        lengths=torch.tensor([len(sample.waveform) for sample in samples]),
        labels=None if labels[0] is None else torch.stack(labels),
        indices=torch.tensor([sample.index for sample in samples]),
        seeds=torch.tensor([sample.seed for sample in samples]),
        failures=[failure for sample in samples for failure in sample.failures],
    )


class _Loader(DataLoader):
    """A worker that dies while a batch is on its way breaks pipes: torch passes EOFError or ConnectionError on."""

    def close(self) -> None:
        """End the workers, in place of waiting until nobody holds on to them."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()
            self._iterator = None

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from super().__iter__()
        except AudioError as error:  # of a worker: torch puts its traceback into the message
            raise AudioError(str(error).rsplit("AudioError: ", 1)[-1].strip()) from None
        except (EOFError, ConnectionError, RuntimeError) as error:
            killed = str(error) if "DataLoader worker" in str(error) else ""
            if not killed and isinstance(error, RuntimeError):
                raise
            try:
                time.sleep(
                    0.5 if not killed else 0
                )  # until torch hears of the death, which it says only once
            except RuntimeError as said:
                killed = str(said)
            raise RuntimeError(
                f"a process that loads data was killed, most often for want of memory: {killed.strip() or repr(error)}"
            ) from error


def make_loader(
    dataset: ClipDataset, sampler: ClipSampler, workers: int, pin_memory: bool = False
) -> DataLoader:
    """Batches in the sampler's order, made by `workers` processes (0: by this one).

    The workers stay alive between epochs. If one is killed, a RuntimeError says so: here, or from torch's handler of
    signals in whatever the training loop is doing.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}, but a number of at least 0 was expected")
    if len(dataset) != sum(sampler.sizes):
        raise ValueError(
            f"the sampler counts {plural(sum(sampler.sizes), 'clip')} and the data set {len(dataset)}; give both "
            "the same sources"
        )
    return _Loader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        # The workers draw nothing from torch, and without its own generator the loader would draw from the
        # training's.
        generator=torch.Generator(),
    )


class FailureLog:
    """Logs each unreadable recording once, as a warning of ``audiomae.data``, and counts.

    That 100 recordings in a row could not be read is an :class:`AudioError` of the data set, which the loader
    passes on.

    Attributes:
        total: clips that were replaced, each time counted.
        files: names of the recordings.
    """

    def __init__(self) -> None:
        self.total = 0
        self.files: set[str] = set()

    def add(self, failures: Iterable[str]) -> None:
        """Take note of a batch's failures."""
        for failure in failures:
            self.total += 1
            name = getattr(failure, "path", failure)
            if name not in self.files:
                self.files.add(name)
                self._say(failure)

    def _say(self, failure: str) -> None:
        _log.warning("%s; another clip takes its place", failure)


_log = logging.getLogger("audiomae.data")
