"""From waveform to normalised log-mel spectrogram: Kaldi's fbank, batched, on any device.

Audio-MAE (https://arxiv.org/abs/2207.06405), SSAST (https://arxiv.org/abs/2110.09784) and MAE-AST
(https://arxiv.org/abs/2203.16691) all read Kaldi log-mel filter banks: 25 ms frames every 10 ms, 128 bins.

Shapes: B clips, S samples, T frames, N samples per frame, F mel bins.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from .words import plural

__all__ = ["FRONTENDS", "Frontend", "fbank", "num_frames"]

WINDOWS = ("hanning", "povey")

# Kaldi's floor under the logarithm is float32's epsilon in every dtype.
_LOG_FLOOR = torch.finfo(torch.float32).eps

# The mel matrix is nearly all zeros: low filters see few FFT bins, high filters none of the low ones. Each of
# these groups of neighbouring filters multiplies only the bins that it sees.
_MEL_GROUPS = 8

# Elements of frames in flight. On a CPU they should stay in the cache (2 MiB of float32, 6 with all buffers): a batch
# in one piece is several times slower. Elsewhere this only bounds the memory.
_BLOCK_CPU, _BLOCK_DEVICE = 2**19, 2**26


def _frame_sizes(sample_rate: float, frame_length: float, frame_shift: float) -> tuple[int, int, int]:
    """Samples in a frame, from frame to frame, and in its FFT."""
    # Truncated in this order of operations, as torchaudio does: it shows at 22.05 and 44.1 kHz.
    size, shift = int(sample_rate * frame_length * 0.001), int(sample_rate * frame_shift * 0.001)
    return size, shift, 1 << max(0, size - 1).bit_length()


def _frames_per_block(waveform: Tensor, fft_size: int) -> int:
    if torch.compiler.is_compiling():
        return waveform.numel()  # one block: a loop would be unrolled
    return max(1, (_BLOCK_CPU if waveform.device.type == "cpu" else _BLOCK_DEVICE) // fft_size)


def num_frames(
    samples: int | Tensor, sample_rate: int = 16000, *, frame_length: float = 25.0, frame_shift: float = 10.0
) -> int | Tensor:
    """Number of whole frames in `samples` samples (Kaldi's ``snip_edges``): 998 for 10 s at 16 kHz.

    `samples` is an int, or an integer tensor of any shape; then a tensor of that shape comes back.
    `frame_length` and `frame_shift` are in milliseconds. Less than one frame gives 0.
    """
    size, shift, _ = _frame_sizes(sample_rate, frame_length, frame_shift)
    if isinstance(samples, Tensor):
        return ((samples - size).div(shift, rounding_mode="floor") + 1).clamp_(min=0)
    return max(0, (samples - size) // shift + 1)


def _mel(hertz: float) -> float:
    return 1127.0 * math.log(1.0 + hertz / 700.0)


def _hertz(mel: float) -> float:
    return 700.0 * (math.exp(mel / 1127.0) - 1.0)


def _build_constants(
    size: int,
    window: str,
    fft_size: int,
    sample_rate: float,
    mel_bins: int,
    low_freq: float,
    high_freq: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Window (size,); (first row, weights) of each group of mel filters.

    Rows count the FFT's squares as they lie in memory: Re², Im² of bin 0, Re², Im² of bin 1, ...
    """
    taper = torch.hann_window(size, periodic=False, dtype=dtype, device="cpu")
    if window == "povey":
        taper = taper.pow(0.85)

    # The weights are float32 in every dtype, as in torchaudio. A filter's only FFT bin can lie close to its
    # edge: the rounding of this very order of operations is then visible in the log domain.
    low, high = _mel(low_freq), _mel(high_freq)
    delta = (high - low) / (mel_bins + 1)
    bin_width = sample_rate / fft_size
    hertz = bin_width * torch.arange(fft_size // 2, dtype=torch.float32, device="cpu")
    mel = 1127.0 * (1.0 + hertz / 700.0).log()
    index = torch.arange(mel_bins, dtype=torch.float32, device="cpu").unsqueeze(1)
    left, center, right = (low + (index + i) * delta for i in (0.0, 1.0, 2.0))
    weights = torch.minimum((mel - left) / (center - left), (right - mel) / (right - center)).clamp_(min=0.0)

    groups, first = [], 0
    for rows in weights.chunk(_MEL_GROUPS):
        last = first + len(rows)
        start = math.floor(_hertz(low + first * delta) / bin_width)
        stop = math.ceil(_hertz(low + (last + 1) * delta) / bin_width) + 1
        # Each weight twice: the power is never formed, Re² and Im² meet in the matrix product.
        columns = rows[:, start:stop].T.repeat_interleave(2, dim=0)
        groups.append((2 * start, columns.to(device, dtype)))
        first = last
    return taper.to(device), groups


@lru_cache(maxsize=64)
def _cached_constants(*settings: Any) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    # A tensor made in inference mode could not be used by autograd later.
    with torch.inference_mode(False), torch.no_grad():
        return _build_constants(*settings)


@torch.compiler.assume_constant_result
def _constants(*settings: Any) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    return _cached_constants(*settings)


def _blocks(waveform: Tensor, size: int, shift: int, fft_size: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """What is computed at a time: which clips, which of their frames, a view (clips, frames, size) of the samples."""
    frames = waveform.unfold(1, size, shift)
    count, block = frames.shape[1], _frames_per_block(waveform, fft_size)
    clips = max(1, block // count)
    for clip in range(0, len(waveform), clips):
        for frame in range(0, count, block):
            where = slice(clip, clip + clips), slice(frame, frame + block)
            yield *where, frames[where]


def _log_mel(
    waveform: Tensor,
    size: int,
    shift: int,
    fft_size: int,
    window: Tensor,
    groups: list[tuple[int, Tensor]],
    preemphasis: float,
    remove_dc_offset: bool,
) -> Tensor:
    """(B, S) -> (B, T, F).

    Up to the FFT the operations and their order are Kaldi's, rounding for rounding: quiet frames amplify
    differences there. After it all terms are positive and any order will do.
    """
    blocks = []
    for _, _, part in _blocks(waveform, size, shift, fft_size):
        x = part - part.mean(-1, keepdim=True) if remove_dc_offset else part
        # Every window begins with 0: no frame needs a sample before its first.
        x = (x[..., 1:] - preemphasis * x[..., :-1]) * window[1:]
        spectrum = torch.fft.rfft(functional.pad(x, (1, fft_size - size))).flatten(0, 1)
        squares = torch.view_as_real(spectrum).flatten(1).square_()  # (clips * frames, fft_size + 2)
        mel = torch.cat([squares[:, start : start + len(w)].mm(w) for start, w in groups], dim=1)
        blocks.append(mel.clamp_(min=_LOG_FLOOR).log_())
    mel = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return mel.unflatten(0, (len(waveform), -1))


def _log_mel_in_place(
    waveform: Tensor,
    size: int,
    shift: int,
    fft_size: int,
    window: Tensor,
    groups: list[tuple[int, Tensor]],
    preemphasis: float,
    remove_dc_offset: bool,
) -> Tensor:
    """The bits of :func:`_log_mel`, for a CPU: two buffers that stay in its cache, and fewer passes over them."""
    widths = [w.shape[1] for _, w in groups]
    mel = waveform.new_empty(len(waveform), (waveform.shape[1] - size) // shift + 1, sum(widths))
    rows = min(_frames_per_block(waveform, fft_size), mel.shape[0] * mel.shape[1])
    centred, windowed = waveform.new_empty(rows, size), waveform.new_empty(rows, fft_size)
    windowed[:, 0], windowed[:, size:] = 0.0, 0.0
    # The product with 1 keeps the two roundings of the pre-emphasis apart; `sub` with its alpha is a fused operation.
    one = waveform.new_ones(())
    for clips, frames, x in _blocks(waveform, size, shift, fft_size):
        shape, rows = x.shape[:2], x.shape[0] * x.shape[1]
        if remove_dc_offset:
            x = torch.sub(x, x.mean(-1, keepdim=True), out=centred[:rows].unflatten(0, shape))
        y = windowed[:rows, 1:size].unflatten(0, shape)
        torch.addcmul(x[..., 1:], x[..., :-1], one, value=-preemphasis, out=y)
        y *= window[1:]
        squares = torch.view_as_real(torch.fft.rfft(windowed[:rows])).flatten(1).square_()
        block = mel[clips, frames].flatten(0, 1)
        for (start, w), columns in zip(groups, block.split(widths, dim=1), strict=True):
            torch.mm(squares[:, start : start + len(w)], w, out=columns)
        block.clamp_(min=_LOG_FLOOR).log_()
        del squares  # the next block's FFT then finds this memory, still in the cache
    return mel


def _is_plain(waveform: Tensor) -> bool:
    """Whether operations on it may write into buffers: no derivatives, no transforms, nothing that traces them."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and waveform.requires_grad):
        return False
    dual = forward_ad.unpack_dual(waveform).tangent is not None
    return not dual and torch.func.debug_unwrap(waveform) is waveform


def _check_waveform(waveform: Tensor) -> None:
    if waveform.dim() not in (1, 2):
        raise ValueError(
            f"waveform has shape {tuple(waveform.shape)}, but (samples,) or (batch, samples) was expected; "
            "mix the channels of a recording first, e.g. waveform.mean(channel_dim)"
        )
    if waveform.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"waveform is {waveform.dtype}, but float32 or float64 was expected; scale integer samples to "
            "[-1, 1] and convert half precision with .float()"
        )


def fbank(
    waveform: Tensor,
    sample_rate: int = 16000,
    *,
    window: str = "hanning",
    mel_bins: int = 128,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    low_freq: float = 20.0,
    high_freq: float | None = None,
    preemphasis: float = 0.97,
    remove_dc_offset: bool = True,
) -> Tensor:
    """Kaldi's log-mel filter bank energies of a batch of waveforms.

    Equals ``torchaudio.compliance.kaldi.fbank(htk_compat=True, use_energy=False, dither=0.0)`` clip by clip.
    Differentiable with respect to the waveform, and traceable by ``torch.compile(fullgraph=True)``. Autocast
    has no effect. The mel filters are a float32 matrix product, whose precision
    ``torch.set_float32_matmul_precision`` may lower.

    Args:
        waveform: (B, S) or (S,), float32 or float64, on any device; in [-1, 1] for published weights.
        sample_rate: of the waveform, in Hz. Nothing is resampled.
        window: "hanning" (Audio-MAE, SSAST) or "povey" (Kaldi's default, MAE-AST).
        mel_bins: number F of triangular filters.
        frame_length, frame_shift: in milliseconds; a frame is zero-padded to a power of two for the FFT.
        low_freq, high_freq: edges of the lowest and the highest filter in Hz; None is half the sample rate.
        preemphasis: coefficient of the high-pass filter ``x[i] - preemphasis * x[i - 1]`` within each frame.
        remove_dc_offset: subtract each frame's mean.

    Returns:
        (B, T, F) or (T, F), the waveform's dtype, with ``T = num_frames(S, sample_rate)``: frames that reach
        past the end are left out. A NaN sample makes the frames around it NaN.

    Raises:
        TypeError: the waveform is not float32 or float64.
        ValueError: wrong rank, a setting out of range, or a waveform shorter than one frame.
    """
    _check_waveform(waveform)
    size, shift, fft_size = _frame_sizes(sample_rate, frame_length, frame_shift)
    nyquist = sample_rate / 2
    high_freq = nyquist if high_freq is None else high_freq
    if window not in WINDOWS:
        raise ValueError(f"unknown window {window!r}; choose one of {', '.join(map(repr, WINDOWS))}")
    if size < 2 or shift < 1:
        raise ValueError(
            f"a frame of {frame_length} ms every {frame_shift} ms at {sample_rate} Hz is {size} samples "
            f"every {shift}; at least 2 every 1 were expected"
        )
    if mel_bins < 1 or not 0.0 <= low_freq < high_freq <= nyquist:
        raise ValueError(
            f"cannot place {mel_bins} mel filters from {low_freq} to {high_freq} Hz; expected at least one, "
            f"and 0 <= low_freq < high_freq <= {nyquist} Hz, half the sample rate"
        )
    if waveform.shape[-1] < size:
        raise ValueError(
            f"the waveform has {plural(waveform.shape[-1], 'sample')}, fewer than one frame of {size} "
            f"({frame_length} ms at {sample_rate} Hz); pad it with zeros or leave the clip out"
        )

    device, dtype = waveform.device, waveform.dtype
    settings = (size, window, fft_size, sample_rate, mel_bins, low_freq, high_freq, device, dtype)
    # Fake tensors and other subclasses live in a world of their own, which must not enter the cache.
    ordinary = type(waveform) in (Tensor, torch.nn.Parameter)
    build = _constants if ordinary or torch.compiler.is_compiling() else _build_constants
    taper, groups = build(*settings)

    batch = waveform if waveform.dim() == 2 else waveform.unsqueeze(0)
    if len(batch) == 0:  # which torch's FFT refuses
        return waveform.new_zeros(0, (batch.shape[1] - size) // shift + 1, mel_bins)
    in_place = ordinary and device.type == "cpu" and _is_plain(waveform)
    log_mel = _log_mel_in_place if in_place else _log_mel
    with torch.autocast(device.type, enabled=False):
        mel = log_mel(batch.contiguous(), size, shift, fft_size, taper, groups, preemphasis, remove_dc_offset)
    return mel if waveform.dim() == 2 else mel.squeeze(0)


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
        _check_waveform(waveform)
        if lengths is not None:
            lengths = self._checked_lengths(waveform, lengths)
        batch = waveform if waveform.dim() == 2 else waveform.unsqueeze(0)
        count = max(1, self.num_frames(batch.shape[1]))
        clips = max(1, _frames_per_block(batch, self._frame_sizes[2]) // count)
        parts = [None] if lengths is None else lengths.split(clips)
        blocks = [self._spectrogram(*part) for part in zip_longest(batch.split(clips), parts)]
        mel = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return mel if waveform.dim() == 2 else mel.squeeze(0)

    @property
    def _frame_sizes(self) -> tuple[int, int, int]:
        return _frame_sizes(self.sample_rate, 25.0, 10.0)

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
