"""A crop is what the whole recording would have there, and no more than it is decoded."""

import io

import numpy as np
import pytest
import torch
from tiny_audio import noise, ten_hours, write

from audiomae.data import audio, load_audio, load_crop
from audiomae.data.audio import AudioError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_a_crop_is_that_of_the_whole(tmp_path, suffix, rate):
    """The same products are summed, so float32 rounding of sums of |x| <= 1 is all that may differ: 1e-6."""
    path = write(tmp_path / f"noise.{suffix}", 3 * rate + 17, rate)
    whole = load_audio(path)
    assert len(whole) == -(-(3 * rate + 17) * 16000 // rate)
    for start, samples in ((0, 1), (0, 500), (1, 8000), (12345, 16000), (39999, 8000), (40000, 9000)):
        crop = load_crop(path, 16000, samples, start)
        torch.testing.assert_close(crop, whole[start : start + samples], rtol=0, atol=1e-6)
    with pytest.raises(AudioError, match=r"nothing to read"):
        load_crop(path, 16000, 100, 60000)


def test_a_crop_of_a_file_object(tmp_path):
    path = write(tmp_path / "noise.flac", 50000, 22050)
    with path.open("rb") as file:
        assert torch.equal(load_crop(file, start=999, samples=5000), load_crop(path, start=999, samples=5000))
    with pytest.raises(AudioError, match=r"^a member: cannot be decoded"):
        load_crop(io.BytesIO(b"no audio" * 100), name="a member")


def test_random_starts_reach_both_ends_and_no_further(tmp_path):
    path = write(tmp_path / "noise.wav", 1003)
    whole, random = load_audio(path), np.random.default_rng(0)
    found = set()
    for _ in range(100):
        crop = load_crop(path, samples=1000, start=random)
        found.add(next(i for i in range(4) if torch.equal(crop, whole[i : i + 1000])))
    assert found == {0, 1, 2, 3}
    assert torch.equal(load_crop(path, samples=2000, start=random), whole)


def test_only_the_crop_is_decoded(tmp_path, monkeypatch):
    path, read = ten_hours(tmp_path / "long.wav"), []

    def spy(self, start, count, original=audio._Soundfile.read):
        chunk = original(self, start, count)
        read.append(len(chunk))
        return chunk

    monkeypatch.setattr(audio._Soundfile, "read", spy)
    for seed in range(5):
        crop = load_crop(path, 16000, 160000, np.random.default_rng(seed))
        assert crop.shape == (160000,)
    assert max(read) < 80000 + 100  # 10 s at its own 8 kHz, and the filter's margin
    assert load_crop(path, 16000, 16000).abs().max() > 0.4


def test_channels_and_rates_do_not_mix_up(tmp_path):
    path = tmp_path / "stereo.wav"
    audio._extra("soundfile").write(path, np.stack((noise(9000), -noise(9000)), 1), 44100, subtype="FLOAT")
    assert load_crop(path, 16000, 1000, 500).abs().max() == 0


def test_a_size_that_nobody_knew_is_no_damage(tmp_path):
    """ffmpeg writing WAV into a pipe leaves 0xFFFFFFFF for both sizes."""
    path = write(tmp_path / "piped.wav", 16000)
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 4 + content[8:40] + b"\xff" * 4 + content[44:])
    assert load_audio(path).shape == (16000,)
    path.write_bytes(content[:-2000])
    with pytest.raises(AudioError, match=r"piped.wav: is cut short: 30000 of 32000 bytes"):
        load_audio(path)
