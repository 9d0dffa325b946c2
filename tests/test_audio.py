"""Decoding, resampling, and errors that name the file."""

import importlib
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import audiomae.data
from audiomae.data.audio import AudioError, decode, load_audio, load_batch, recordings
from audiomae.frontend import Frontend

soundfile = pytest.importorskip("soundfile")
torchaudio = pytest.importorskip("torchaudio")


def tone(samples: int, rate: int, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)).astype(np.float32)


# Lossless formats are held to half a step of 16 bits, lossy ones to what a coder leaves of a pure tone.
@pytest.mark.parametrize(
    ("suffix", "tolerance"), [("wav", 2**-15), ("flac", 2**-15), ("ogg", 0.02), ("mp3", 0.02)]
)
def test_formats(tmp_path, suffix, tolerance):
    path, wave = tmp_path / f"tone.{suffix}", tone(32000, 16000)
    soundfile.write(path, wave, 16000)
    waveform, rate = decode(path)
    assert rate == 16000 and waveform.dtype == torch.float32 and waveform.shape == (32000,)
    assert torch.equal(load_audio(path), waveform)
    inner = slice(1000, 31000)  # a lossy coder smears the ends
    torch.testing.assert_close(waveform[inner], torch.from_numpy(wave)[inner], rtol=0, atol=tolerance)


def test_channels_are_averaged(tmp_path):
    path = tmp_path / "stereo.wav"
    left, right = tone(1000, 8000), tone(1000, 8000, 1000.0)
    soundfile.write(path, np.stack((left, right), axis=1), 8000, subtype="FLOAT")
    waveform, rate = decode(path)
    assert rate == 8000
    torch.testing.assert_close(waveform, torch.from_numpy((left + right) / 2))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_crops(tmp_path, suffix):
    path = tmp_path / f"noise.{suffix}"
    soundfile.write(path, np.random.RandomState(0).uniform(-0.5, 0.5, 20000), 16000)
    whole = decode(path)[0]
    assert torch.equal(decode(path, 5000, 3000)[0], whole[5000:8000])
    assert torch.equal(decode(path, 19000, 3000)[0], whole[19000:])
    assert torch.equal(decode(path, 19999)[0], whole[19999:])
    with pytest.raises(AudioError, match=r"noise.*20000 samples, nothing to read from sample 20000"):
        decode(path, 20000)
    for start, frames in ((-1, 10), (0, 0), (0, -1)):
        with pytest.raises(ValueError, match="start >= 0"):
            decode(path, start, frames)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampled(tmp_path, rate):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(rate, rate), rate, subtype="FLOAT")
    waveform = load_audio(path, 16000)
    assert waveform.shape == (16000,)
    expected = torchaudio.functional.resample(torch.from_numpy(tone(rate, rate)), rate, 16000)
    torch.testing.assert_close(waveform, expected, rtol=0, atol=1e-5)
    inner = slice(500, -500)
    torch.testing.assert_close(
        waveform[inner], torch.from_numpy(tone(16000, 16000))[inner], rtol=0, atol=1e-2
    )


def test_bad_files_are_named(tmp_path):
    def bad(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    good = tmp_path / "good.wav"
    soundfile.write(good, tone(1000, 16000), 16000)
    header = good.read_bytes()

    def with_rate(rate: int) -> bytes:
        return header[:24] + struct.pack("<I", rate) + header[28:]

    cases = {
        tmp_path / "missing.wav": "no such file",
        tmp_path: "is a folder, no file",
        bad("text.wav", b"this is not audio" * 100): "cannot be decoded",
        bad("nothing.flac", b""): "cannot be decoded",
        bad("header.wav", header[:20]): "cannot be decoded",
        bad("zero.wav", with_rate(0)): "states no sample rate",
        bad("slow.wav", with_rate(7)): "sample rate of 7 Hz",
        bad("fast.wav", with_rate(2_000_000_000)): "sample rate of 2000000000 Hz",
        bad("prime.wav", with_rate(44101)): "filter would be huge",
    }
    empty = tmp_path / "empty.wav"
    soundfile.write(empty, np.zeros(0), 16000)
    cases[empty] = "0 samples"
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, np.array([0.0, value, 0.0], dtype=np.float32), 16000, subtype="FLOAT")
        cases[path] = "NaN or infinite"
    for path, reason in cases.items():
        with pytest.raises(AudioError, match=reason) as caught:
            load_audio(path)
        assert str(path) in str(caught.value)
    assert issubclass(AudioError, ValueError)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_truncated_or_damaged_files_never_crash(tmp_path, suffix):
    path = tmp_path / f"noise.{suffix}"
    soundfile.write(path, np.random.RandomState(0).uniform(-0.5, 0.5, 20000), 16000)
    content = path.read_bytes()
    for cut in (len(content) // 2, len(content) // 10):
        path.write_bytes(content[:cut])
        try:
            waveform = decode(path)[0]
        except AudioError as error:
            assert str(path) in str(error)
        else:
            assert 0 < len(waveform) < 21000


def test_recordings_and_batches():
    paths = recordings()
    assert len(paths) == 9 and all(path.is_file() for path in paths)
    shortest = [path for path in paths if path.stem in ("sound-bell", "sound-message", "sound-complete")]
    frontend = Frontend.named("esc50")
    waveform, lengths = load_batch(shortest, frontend)
    assert waveform.shape == (3, lengths.max()) and lengths.dtype == torch.int64
    for row, path, length in zip(waveform, shortest, lengths.tolist(), strict=True):
        assert torch.equal(row[:length], load_audio(path)) and not row[length:].any()
    assert frontend(waveform, lengths).shape == (3, 512, 128)


def test_the_extra_is_imported_when_it_is_needed(monkeypatch):
    path = recordings()[0]
    for name in ("soundfile", "torchaudio"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    for package, name in ((audiomae, "frontend"), (audiomae.data, "audio")):
        module = getattr(package, name)
        monkeypatch.setattr(package, name, module)  # put back at the end, after the import below replaced it
        monkeypatch.delitem(sys.modules, module.__name__)
    assert importlib.import_module("audiomae.frontend").fbank(torch.zeros(400)).shape == (1, 128)
    with pytest.raises(ImportError, match=r'pip install "audiomae\[audio\]"'):
        importlib.import_module("audiomae.data.audio").decode(path)
