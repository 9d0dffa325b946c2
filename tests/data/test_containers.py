"""m4a and mkv: torchcodec where it works, and a sentence where it does not."""

import sys
import types

import pytest
import torch
from tiny_audio import noise, write

from audiomae.data import AudioError, load_audio, load_crop
from audiomae.data.audio import open_audio

pytestmark = pytest.mark.usefixtures("one_thread")


class AudioDecoder:
    """torchcodec.decoders.AudioDecoder as documented, with 'STANDIN!' files of two seconds at 44.1 kHz."""

    wave = torch.from_numpy(noise(88200)).repeat(2, 1)

    def __init__(self, source):
        if hasattr(source, "read"):
            content = source.read()
        else:
            with open(source, "rb") as file:
                content = file.read()
        if not content.startswith(b"STANDIN!"):
            raise RuntimeError(
                "SingleStreamDecoder, /src/SingleStreamDecoder.cpp:41, Could not open input file"
            )
        self.metadata = types.SimpleNamespace(sample_rate=44100, num_channels=2, duration_seconds=2.0)

    def get_samples_played_in_range(self, start_seconds=0.0, stop_seconds=None):
        start, stop = round(start_seconds * 44100), round(stop_seconds * 44100)
        data = self.wave[:, start:stop]
        if not data.shape[1]:
            raise RuntimeError("SingleStreamDecoder.cpp:1217, No audio frames were decoded.")
        return types.SimpleNamespace(data=data, sample_rate=44100, pts_seconds=start_seconds)


class Unfinished(AudioDecoder):
    """A stream of an hour and a bit that states no duration, as browsers record them."""

    wave = torch.from_numpy(noise(44100)).repeat(3601)[None, : 3600 * 44100 + 777]
    decoded = 0

    def __init__(self, source):
        super().__init__(source)
        self.metadata.duration_seconds = None

    def get_samples_played_in_range(self, start_seconds=0.0, stop_seconds=None):
        chunk = super().get_samples_played_in_range(start_seconds, stop_seconds)
        Unfinished.decoded += chunk.data.shape[1]
        return chunk


@pytest.fixture
def stand_in(monkeypatch):
    module = types.ModuleType("torchcodec.decoders")
    module.AudioDecoder = AudioDecoder
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)


def test_served_by_torchcodec(tmp_path, stand_in):
    path = tmp_path / "clip.m4a"
    path.write_bytes(b"STANDIN!")
    whole = load_audio(path)
    assert whole.shape == (32000,)
    torch.testing.assert_close(load_crop(path, samples=3000, start=777), whole[777:3777], rtol=0, atol=1e-6)
    with path.open("rb") as file:
        assert torch.equal(load_crop(file, name="shard.tar::clip.m4a"), whole)
    path.write_bytes(b"something else")
    with pytest.raises(AudioError, match=r"clip.m4a: .*; nor by torchcodec: Could not open input file$"):
        load_audio(path)
    (tmp_path / "empty.mkv").write_bytes(b"")
    with pytest.raises(AudioError, match="the file is empty"):
        load_audio(tmp_path / "empty.mkv")


def test_a_stream_without_a_duration(tmp_path, stand_in, monkeypatch):
    """Its end is found, and a crop read, by decoding some seconds of it."""
    monkeypatch.setattr(sys.modules["torchcodec.decoders"], "AudioDecoder", Unfinished)
    path = tmp_path / "clip.webm"
    path.write_bytes(b"STANDIN!")
    with open_audio(path) as reader:
        assert reader.samples == Unfinished.wave.shape[1]
    crop = load_crop(path, 44100, 20000, 3590 * 44100 + 5)
    assert torch.equal(crop, Unfinished.wave[0, 3590 * 44100 + 5 :][:20000])
    assert Unfinished.decoded < 60 * 44100
    for seconds, samples in ((8, 0), (7, 44099), (2, 1), (2, 0), (1, 0), (0, 5), (0, 0)):
        monkeypatch.setattr(Unfinished, "wave", Unfinished.wave[:, : seconds * 44100 + samples])
        with open_audio(path) as reader:
            assert reader.samples == seconds * 44100 + samples


def test_without_torchcodec(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    (tmp_path / "clip.m4a").write_bytes(b"STANDIN!")
    with pytest.raises(
        AudioError, match=r'clip.m4a: .*torchcodec reads such files, .* pip install "audiomae\[codecs\]"'
    ):
        load_audio(tmp_path / "clip.m4a")
    assert load_audio(write(tmp_path / "clip.wav")).shape == (16000,)


def test_without_ffmpeg(tmp_path, stand_in, monkeypatch):
    def broken(source):
        raise RuntimeError(
            "Could not load libtorchcodec. Likely causes:\n 1. FFmpeg is not properly installed"
        )

    monkeypatch.setattr(sys.modules["torchcodec.decoders"], "AudioDecoder", broken)
    (tmp_path / "clip.m4a").write_bytes(b"STANDIN!")
    with pytest.raises(AudioError, match="install FFmpeg"):
        load_audio(tmp_path / "clip.m4a")


@pytest.mark.parametrize("suffix", ["m4a", "mkv"])
def test_the_real_one(tmp_path, suffix):
    """A tone, since AAC makes up noise anew each time; Matroska's places are off by up to a millisecond.

    That is 16 samples, of which the nearest is up to half a sample away: 0.5 * 0.5 * 2 pi * 440 / 16000 = 0.043.
    """
    encoders = pytest.importorskip("torchcodec.encoders")
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(2 * 44100) / 44100)
    path = tmp_path / f"tone.{suffix}"
    try:
        encoders.AudioEncoder(torch.stack((tone, tone)), sample_rate=44100).to_file(path)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    whole, crop = load_audio(path), load_crop(path, samples=8000, start=12345)
    errors = [(crop - whole[start : start + 8000]).abs().max() for start in range(12345 - 16, 12345 + 17)]
    assert min(errors) < 0.05
    if suffix == "m4a":
        assert errors[16] < 1e-3
