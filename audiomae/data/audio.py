"""Audio files in, mono float32 waveforms out: decoded by soundfile or torchcodec, resampled by torchaudio."""

import importlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from audiomae.frontend import Frontend
from audiomae.words import plural

__all__ = ["AudioError", "decode", "load_audio", "load_batch", "load_crop", "open_audio", "recordings"]

#: Names that a folder is searched for. libsndfile reads the first row; containers need torchcodec.
SOUNDFILE_SUFFIXES = (
    *(
        ".wav",
        ".flac",
        ".ogg",
        ".oga",
        ".opus",
        ".mp3",
        ".aiff",
        ".aif",
        ".aifc",
        ".au",
        ".caf",
        ".w64",
        ".rf64",
    ),
)
TORCHCODEC_SUFFIXES = (".m4a", ".mp4", ".aac", ".mkv", ".mka", ".webm", ".wma", ".ac3", ".3gp")
AUDIO_SUFFIXES = SOUNDFILE_SUFFIXES + TORCHCODEC_SUFFIXES

# What recorders and codecs produce. Outside it a header is damaged or lies.
_SAMPLE_RATES = range(1_000, 1_000_000)

# A polyphase filter has about (from / gcd) * (to / gcd) taps: 256 MiB of float32 at most.
_MAX_TAPS = 2**26

# torchaudio's defaults, by name because the margins of a crop follow from them.
_FILTER_WIDTH, _ROLLOFF = 6, 0.99

# libsndfile's own log tells of a WAV or AIFF file whose data ends before its header says. Programs that write
# into a pipe leave a size of about 2 or 4 GiB there, which means nothing.
_CUT_SHORT = re.compile(r"\b(?:data|SSND)\s*: (\d+) \(should be (\d+)\)")
_UNKNOWN_SIZE = 0x7FFF_0000

# MPEG audio comes in frames of up to 1152 samples, and its headers may count one too many at either end.
_MPEG_SLACK = 2 * 1152


# Integers of 32 bits that were written as floats, unscaled. Beyond it are damaged floats, whose power overflows.
_LARGEST = 2.0**31


class AudioError(ValueError):
    """A recording that cannot be used; the message names the file and says why."""


def _extra(name: str, extra: str = "audio", purpose: str = "reading audio files") -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs {name}, which cannot be imported ({error}); pip install "audiomae[{extra}]"'
        ) from error


class Reader(Protocol):
    """An open recording.

    Attributes:
        sample_rate: in Hz.
        samples: per channel, as the file states it.
        slack: how many of them may be missing without the file being damaged.
        suffix: what names of such files end with; "" where that is not known.
    """

    sample_rate: int
    samples: int
    slack: int
    suffix: str

    def read(self, start: int, count: int) -> Tensor:
        """(up to `count`, C) float32 from sample `start` on."""


class _Soundfile:
    def __init__(self, file: Any):
        self.file = file
        self.sample_rate, self.samples = file.samplerate, file.frames
        self.slack = _MPEG_SLACK if "MPEG" in file.subtype or file.format in ("MP3", "MPEG") else 0
        self.suffix = ".wav" if file.format == "WAVEX" else f".{file.format.lower()}"

    def read(self, start: int, count: int) -> Tensor:
        if start:
            self.file.seek(start)
        return torch.from_numpy(self.file.read(count, dtype="float32", always_2d=True))


class _Torchcodec:
    """Places in Matroska files are those of its timestamps: up to a millisecond off."""

    suffix = ""

    @classmethod
    def open(cls, file: str | os.PathLike | BinaryIO) -> "_Torchcodec":
        """ImportError says why torchcodec cannot be had; what it raises of its own tells of the file."""
        try:
            decoders = importlib.import_module("torchcodec.decoders")
        except (ImportError, RuntimeError, OSError) as error:
            raise ImportError(f'cannot be imported ({error}); pip install "audiomae[codecs]"') from error
        try:
            return cls(decoders.AudioDecoder(file))
        except RuntimeError as error:
            if "Could not load libtorchcodec" in str(error):
                raise ImportError("finds none of FFmpeg's libraries; install FFmpeg") from error
            raise

    def __init__(self, decoder: Any):
        self.decoder = decoder
        self.sample_rate = decoder.metadata.sample_rate
        seconds = decoder.metadata.duration_seconds
        self.samples = self._find_end() if seconds is None else round(seconds * self.sample_rate)
        self.slack = self.sample_rate // 10  # containers state durations of packets, encoder delay included

    def read(self, start: int, count: int) -> Tensor:
        chunk = self.decoder.get_samples_played_in_range(
            start_seconds=start / self.sample_rate, stop_seconds=(start + count) / self.sample_rate
        )
        return chunk.data.T[:count]

    def _find_end(self) -> int:
        """Samples of a stream that was never finished and states no duration: up to a second without any.

        Doubling and bisection decode a few of its seconds where decoding tells, not all.
        """
        rate = self.sample_rate

        def heard(second: int) -> int:
            try:
                return len(self.read(second * rate, rate))
            except RuntimeError:  # so torchcodec says that nothing is there
                return 0

        low, high = 0, 1
        while heard(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if heard(middle) else (low, middle)
        return low * rate + heard(low)


def check_file(path: str | os.PathLike, name: str) -> None:
    if not os.path.isfile(path):
        raise AudioError(f"{name}: {'is a folder, no file' if os.path.isdir(path) else 'no such file'}")


def _open(file: str | os.PathLike | BinaryIO, name: str) -> tuple[Reader, Any]:
    """The reader, and what has to be closed."""
    soundfile = _extra("soundfile")
    is_path = isinstance(file, (str, os.PathLike))
    if is_path:
        check_file(file, name)
    try:
        # As bytes, since soundfile encodes strictly and file names need not be Unicode.
        opened = soundfile.SoundFile(os.fsencode(file) if is_path and os.name == "posix" else file)
        return _Soundfile(opened), opened
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: .raw, which has no header
        reason = re.sub(r"^Error opening .*?: ", "", str(error)).rstrip(".") or "damaged"
        if "SF_INFO struct incomplete" in reason:  # libsndfile's word for a zero in it
            reason = "its header states no sample rate, or no channels"
    try:  # libsndfile's words for what the system refuses are vague
        with open(file, "rb") if is_path else nullcontext(file) as content:
            content.seek(0)
            if not content.read(1):
                raise AudioError(f"{name}: cannot be decoded: the file is empty")
            content.seek(0)
            return _Torchcodec.open(file if is_path else content), None
    except AudioError:
        raise
    except OSError as error:
        raise AudioError(f"{name}: cannot be decoded: {error.strerror or error}") from error
    except ImportError as error:
        if name.lower().endswith(TORCHCODEC_SUFFIXES):
            reason += f"; torchcodec reads such files, but {error}"
        raise AudioError(f"{name}: cannot be decoded: {reason}") from error
    except (RuntimeError, ValueError, TypeError) as error:
        said = re.sub(r".*\.cpp:\d+, ", "", str(error).strip()).splitlines() or ["damaged"]
        raise AudioError(f"{name}: cannot be decoded: {reason}; nor by torchcodec: {said[0]}") from error


@contextmanager
def open_audio(file: str | os.PathLike | BinaryIO, name: str | None = None) -> Iterator[Reader]:
    """Open a recording for reading parts of it: by soundfile, and where that cannot, by torchcodec.

    Args:
        file: a path, or a seekable binary file such as a member of a shard.
        name: what errors call it; default: the path.

    Raises:
        AudioError: it is missing, unreadable, empty, cut short, no audio, or states an implausible rate.
        ImportError: soundfile is not installed.
    """
    name = str(file) if name is None else name
    reader, opened = _open(file, name)
    try:
        rate = reader.sample_rate
        if rate not in _SAMPLE_RATES:
            raise AudioError(
                f"{name}: states a sample rate of {rate} Hz; expected {_SAMPLE_RATES[0]} to "
                f"{_SAMPLE_RATES[-1]} Hz. The file is probably damaged"
            )
        if opened is not None:
            for stated, found in _CUT_SHORT.findall(opened.extra_info):
                if _UNKNOWN_SIZE > int(stated) > int(found) + 1:  # + 1: chunks are padded to even sizes
                    raise AudioError(f"{name}: is cut short: {found} of {stated} bytes of audio are there")
        yield reader
    finally:
        if opened is not None:
            opened.close()


def _read(reader: Reader, start: int, count: int, name: str) -> Tensor:
    """(S,) float32: the mean over the channels of what there is of `count` samples from `start` on."""
    if start >= reader.samples:
        raise AudioError(
            f"{name}: has {plural(reader.samples, 'sample')}, nothing to read from sample {start} on"
        )
    expected = min(count, reader.samples - start)
    try:
        channels = reader.read(start, expected)
    except (RuntimeError, ValueError, OSError) as error:  # LibsndfileError is a RuntimeError
        raise AudioError(
            f"{name}: cannot be decoded: {error or 'its data is damaged or cut short'}"
        ) from error
    if len(channels) == 0:
        raise AudioError(
            f"{name}: its header promises {plural(reader.samples, 'sample')}, but none could be decoded from {start} on"
        )
    if len(channels) < expected - reader.slack:
        raise AudioError(
            f"{name}: is cut short: its header promises {plural(reader.samples, 'sample')}, but it ends after "
            f"{start + len(channels)}"
        )
    waveform = channels.mean(dim=1)
    peak = waveform.abs().max().item()
    if not math.isfinite(peak):
        raise AudioError(f"{name}: has NaN or infinite samples")
    if peak > _LARGEST:
        raise AudioError(f"{name}: has samples up to {peak:.3g}, where 1 is full scale: damaged, or no audio")
    return waveform


def decode(path: str | os.PathLike, start: int = 0, frames: int | None = None) -> tuple[Tensor, int]:
    """Decode a recording, or `frames` samples of it from sample `start` on, and mix its channels to mono.

    WAV, FLAC, OGG, MP3 and whatever else libsndfile reads; with torchcodec installed, what FFmpeg reads too.
    Only the crop is decoded.

    Args:
        path: of the file.
        start: first sample, at the file's own sample rate.
        frames: samples per channel to read; None reads to the end. Where fewer are left, fewer come back.

    Returns:
        waveform (S,), float32, the mean over the channels, in [-1, 1] for integer formats; sample rate in Hz.

    Raises:
        AudioError: the file is missing, unreadable or cut short, holds no samples from `start` on, states an
            implausible sample rate, or has NaN, infinite or impossibly large samples.
        ImportError: soundfile is not installed.
    """
    if start < 0 or (frames is not None and frames < 1):
        raise ValueError(f"start is {start} and frames {frames}; expected start >= 0 and frames >= 1 or None")
    with open_audio(path) as reader:
        count = reader.samples if frames is None else frames
        return _read(reader, start, count, str(path)), reader.sample_rate


@lru_cache(maxsize=16)
def _resampler(source: int, target: int) -> torch.nn.Module:
    return _extra("torchaudio").transforms.Resample(
        source, target, lowpass_filter_width=_FILTER_WIDTH, rolloff=_ROLLOFF
    )


def _reduced(source: int, target: int, name: str) -> tuple[int, int]:
    """Every `source` samples in become `target` samples out, in lowest terms."""
    divisor = math.gcd(source, target)
    if (source // divisor) * (target // divisor) > _MAX_TAPS:
        raise AudioError(
            f"{name}: {source} Hz and {target} Hz have no common divisor beyond {divisor}, so the "
            "resampling filter would be huge; convert the file with another tool first"
        )
    return source // divisor, target // divisor


def resampled_length(samples: int, source: int, target: int) -> int:
    """Number of samples at `target` Hz of `samples` at `source` Hz."""
    return -(-samples * target // source)


def read_crop(reader: Reader, start: int, count: int, sample_rate: int, name: str) -> Tensor:
    """Up to `count` samples from `start` on, both at `sample_rate`, of an open recording: (S,) float32.

    What the whole recording resampled would have there, decoded with just enough margin for the resampling
    filter. The polyphase filter maps blocks of `orig` samples to blocks of `new`, so reading whole blocks
    keeps its phase; only the order of float32 additions may differ, by a few units in the last place.
    """
    rate = reader.sample_rate
    if rate == sample_rate:
        return _read(reader, start, count, name)
    orig, new = _reduced(rate, sample_rate, name)
    width = math.ceil(_FILTER_WIDTH * orig / (_ROLLOFF * min(orig, new)))  # of one side of the filter
    margin = -(-width // orig)
    first = max(0, start // new - margin)
    last = -(-(start + count) // new) + margin
    chunk = _read(reader, first * orig, (last - first) * orig, name)
    skip = start - first * new
    return _resampler(rate, sample_rate)(chunk)[skip : skip + count]


def load_crop(
    file: str | os.PathLike | BinaryIO,
    sample_rate: int = 16000,
    samples: int | None = None,
    start: int | np.random.Generator = 0,
    *,
    name: str | None = None,
) -> Tensor:
    """Decode a part of a recording to mono at `sample_rate`, reading no more of it than that takes.

    Equals ``load_audio(file, sample_rate)[start : start + samples]`` up to float32 rounding (1e-6 of full
    scale).

    Args:
        file: a path, or a seekable binary file.
        samples: how many, at `sample_rate`; None for all. Where fewer are left, fewer come back.
        start: the first, at `sample_rate`; or a generator that draws it from all places where the crop fits.
        name: what errors call the recording; default: the path.

    Returns:
        waveform (S,), float32.

    Raises:
        AudioError: as :func:`load_audio`, or there is nothing from `start` on.
    """
    name = str(file) if name is None else name
    with open_audio(file, name) as reader:
        total = resampled_length(reader.samples, reader.sample_rate, sample_rate)
        samples = total if samples is None else samples
        if isinstance(start, np.random.Generator):
            start = int(start.integers(max(0, total - samples) + 1))
        return read_crop(reader, start, min(samples, max(1, total - start)), sample_rate, name)


def load_audio(path: str | os.PathLike, sample_rate: int = 16000) -> Tensor:
    """Decode a whole recording to mono at `sample_rate`.

    Returns:
        waveform (S,), float32.

    Raises:
        AudioError: as :func:`decode`, or the file's rate cannot be converted to `sample_rate` with a filter
            of reasonable size.
        ImportError: soundfile or torchaudio is not installed.
    """
    return load_crop(path, sample_rate)


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
