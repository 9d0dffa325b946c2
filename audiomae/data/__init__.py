"""Recordings: sources of clips, crops and augmentation, batches, shards."""

from audiomae.data.audio import AudioError, decode, load_audio, load_batch, load_crop, recordings
from audiomae.data.augment import Augment, smooth, spec_augment, spectrogram_noise
from audiomae.data.dataset import Batch, ClipDataset, FailureLog, Sample, collate, make_loader
from audiomae.data.pack import prepare
from audiomae.data.sampler import BalancedSampler, ClipSampler, RepeatingSampler
from audiomae.data.sources import Clip, Source, labelled_folder, open_source

__all__ = [
    "AudioError",
    "Augment",
    "BalancedSampler",
    "Batch",
    "Clip",
    "ClipDataset",
    "ClipSampler",
    "FailureLog",
    "RepeatingSampler",
    "Sample",
    "Source",
    "collate",
    "decode",
    "labelled_folder",
    "load_audio",
    "load_batch",
    "load_crop",
    "make_loader",
    "open_source",
    "prepare",
    "recordings",
    "smooth",
    "spec_augment",
    "spectrogram_noise",
]
