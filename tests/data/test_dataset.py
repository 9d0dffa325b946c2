"""Samples depend on seed and key alone; batches are what the front end wants; augmentation as published."""

import math

import numpy as np
import pytest
import torch
from tiny_audio import folder, noise, write

from audiomae import Frontend
from audiomae.data import (
    Augment,
    Clip,
    ClipDataset,
    ClipSampler,
    Source,
    collate,
    load_audio,
    make_loader,
    open_source,
    spectrogram_noise,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FRONTEND = Frontend(frames=20, mean=-4.0, std=4.0)
EVERYTHING = Augment(gain=6.0, roll=True, noise=(5, 20), mixup=0.5)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    parent = tmp_path_factory.mktemp("clips")
    labelled = [
        Clip(str(write(parent / "labelled" / f"{i}.wav", 5000, seed=90 + i)), (i % 3,)) for i in range(4)
    ]
    return [open_source(folder(parent / "plain", 9)), Source("labelled", labelled, ("a", "b", "c"))]


def same(one, two):
    return all(
        torch.equal(getattr(one, name), getattr(two, name))
        for name in ("waveform", "lengths", "labels", "indices", "seeds")
    )


def test_batches(sources):
    data = ClipDataset(sources, FRONTEND)
    assert len(data) == 13 and data.label_names == ("a", "b", "c")
    batch = collate([data[0, 3], data[0, 11]])
    assert batch.waveform.dtype == torch.float32 and batch.waveform.shape == (2, 400 + 19 * 160)
    assert batch.lengths.tolist() == [3440, 3440] and batch.lengths.dtype == torch.int64
    assert batch.labels.tolist() == [[0, 0, 0], [0, 0, 1]] and batch.indices.tolist() == [3, 11]
    assert batch.failures == [] and len(batch) == 2
    assert FRONTEND(batch.waveform, batch.lengths).shape == (2, 20, 128)
    assert (
        same(batch.to("cpu"), batch)
        and batch.to("meta").waveform.is_meta
        and not batch.to("meta").seeds.is_meta
    )
    for index in (-1, 13):
        with pytest.raises(IndexError, match="of 13"):
            data[0, index]
    assert collate([ClipDataset(sources[:1], FRONTEND)[0, 0]]).labels is None
    with pytest.raises(ValueError, match="no samples"):
        collate([])


def test_short_clips_are_padded_as_published(tmp_path):
    """By zeros after the logarithm, before normalising: -mean / (2 std) = 0.5 here."""
    paths = [write(tmp_path / "short.wav", 1000, seed=1), write(tmp_path / "long.wav", 9000)]
    data = ClipDataset([Source("test", [Clip(str(path)) for path in paths])], FRONTEND)
    batch = collate([data[0, 0], data[0, 1]])
    assert batch.lengths.tolist() == [1000, 3440] and not batch.waveform[0, 1000:].any()
    assert torch.equal(batch.waveform[0, :1000], load_audio(paths[0]))
    assert (FRONTEND(batch.waveform, batch.lengths)[0, 4:] == 0.5).all()
    free = ClipDataset(data.sources, Frontend.named("mae_ast"))
    assert [len(free[0, i].waveform) for i in range(2)] == [1000, 9000]


def test_crops(sources):
    data = ClipDataset(sources, FRONTEND)
    whole = load_audio(sources[0][0].path)
    assert not torch.equal(data[0, 0].waveform, data[1, 0].waveform)
    first = ClipDataset(sources, FRONTEND, random_crop=False)
    for epoch in range(3):
        assert torch.equal(first[epoch, 0].waveform, whole[:3440])
        crop = data[epoch, 0].waveform
        assert any(torch.equal(crop, whole[i : i + 3440]) for i in range(len(whole) - 3439))


@pytest.mark.parametrize("augment", [None, EVERYTHING])
def test_samples_depend_on_seed_and_key_alone(sources, augment):
    one, two = (ClipDataset(sources, FRONTEND, augment=augment, seed=7) for _ in range(2))
    torch.manual_seed(1)
    forwards = [one[2, i] for i in range(13)]
    torch.manual_seed(2)
    np.random.seed(2)
    backwards = [two[2, i] for i in reversed(range(13))][::-1]
    assert same(collate(forwards), collate(backwards))
    other = ClipDataset(sources, FRONTEND, augment=augment, seed=8)
    assert not torch.equal(other[2, 0].waveform, one[2, 0].waveform)
    assert len({sample.seed for sample in forwards}) == 13


def test_loaders_give_the_same_whatever_the_workers(sources):
    data = ClipDataset(sources, FRONTEND, augment=EVERYTHING)

    def epochs(workers, joined=1):
        samplers = [
            ClipSampler(sources, batch_size=4 // joined, rank=rank, world_size=joined)
            for rank in range(joined)
        ]
        loaders, found = [make_loader(data, sampler, workers) for sampler in samplers], []
        for _ in range(2):
            for batches in zip(*loaders, strict=True):
                found.append(batches)
                for sampler in samplers:
                    sampler.advance()
        return found

    state = torch.get_rng_state()
    alone = epochs(0)
    assert len(alone) == 6 and not same(alone[0][0], alone[3][0])
    for batch, other in zip(alone, epochs(2), strict=True):
        assert same(batch[0], other[0])
    for (batch,), (one, two) in zip(alone, epochs(0, joined=2), strict=True):
        assert torch.equal(batch.indices, torch.cat((one.indices, two.indices)))
        assert torch.equal(batch.waveform, torch.cat((one.waveform, two.waveform)))
    assert torch.equal(torch.get_rng_state(), state)  # training's stream is untouched


def test_refused(sources):
    other = Source("other", [Clip("a.wav", (0,))], ("x",))
    with pytest.raises(ValueError, match="labelled and other have different label names"):
        ClipDataset([*sources, other], FRONTEND)
    with pytest.raises(ValueError, match="sources is empty"):
        ClipDataset([], FRONTEND)
    with pytest.raises(ValueError, match="seed is -1"):
        ClipDataset(sources, FRONTEND, seed=-1)
    data = ClipDataset(sources, FRONTEND)
    with pytest.raises(ValueError, match="workers is -1"):
        make_loader(data, ClipSampler(sources, batch_size=1), -1)
    with pytest.raises(ValueError, match="give both the same sources"):
        make_loader(data, ClipSampler(sources[:1], batch_size=1), 0)


# -- augmentation --------------------------------------------------------------------------------------------

WAVE = torch.from_numpy(noise(2000))


def draws(augment, count=400):
    return [augment.on_clip(WAVE, np.random.default_rng(i)) for i in range(count)]


def test_gain_and_roll_as_in_the_paper():
    decibels = [20 * math.log10(wave.norm() / WAVE.norm()) for wave in draws(Augment(gain=6.0))]
    assert -6.001 < min(decibels) < -5.8 and 5.8 < max(decibels) < 6.001
    rolled = draws(Augment(roll=True), 50)
    shifts = [next(i for i in range(2000) if torch.equal(WAVE.roll(i), wave)) for wave in rolled]
    assert min(shifts) < 200 and max(shifts) > 1800
    assert all(torch.equal(wave, WAVE) for wave in draws(Augment(), 3))


def test_what_upstream_does_under_that_name():
    """mag = Beta(10, 10) + 0.5: mean 1, variance 1 / (4 * 21); its roll is by randint(1) = 0."""
    factors = torch.stack([(wave / WAVE).median() for wave in draws(Augment(upstream_roll_mag=True))])
    assert factors.min() > 0.5 and factors.max() < 1.5
    assert abs(factors.mean() - 1) < 4 * math.sqrt(1 / 84 / 400)
    assert abs(factors.std() - math.sqrt(1 / 84)) < 0.015
    for wave, factor in zip(draws(Augment(upstream_roll_mag=True)), factors, strict=True):
        torch.testing.assert_close(wave, WAVE * factor)


def test_noise():
    for seed in range(20):
        noisy = Augment(noise=(10, 20)).on_mixture(WAVE, np.random.default_rng(seed))
        ratio = 20 * math.log10(WAVE.norm() / (noisy - WAVE).norm())
        assert 9.7 < ratio < 20.3  # the noise's own power varies by 1 / sqrt(2000 / 2), 0.14 dB
    silence = torch.zeros(100)
    assert torch.equal(Augment(noise=(10, 20)).on_mixture(silence, np.random.default_rng(0)), silence)


def test_mixup(sources):
    one, other = WAVE + 0.25, torch.from_numpy(noise(1500, 1))
    shares = []
    for seed in range(200):
        mixed, share = Augment(mixup=1.0).mix(one, other, np.random.default_rng(seed))
        expected = (one - one.mean()) * share
        expected[:1500] += (other - other.mean()) * (1 - share)
        torch.testing.assert_close(mixed, expected)
        shares.append(share)
    assert abs(np.mean(shares) - 0.5) < 4 * math.sqrt(1 / 84 / 200)
    longer, _ = Augment(mixup=1.0).mix(other, one, np.random.default_rng(0))
    assert longer.shape == (1500,)

    data = ClipDataset(sources[1:], FRONTEND, augment=Augment(mixup=1.0))
    labels = torch.stack([data[epoch, 0].labels for epoch in range(40)])
    torch.testing.assert_close(labels.sum(1), torch.ones(40))
    assert ((labels[:, 1] > 0) & (labels[:, 1] < 1)).any()
    half = ClipDataset(sources[1:], FRONTEND, augment=Augment(mixup=0.5), random_crop=False)
    plain = ClipDataset(sources[1:], FRONTEND, random_crop=False)
    kept = sum(torch.equal(half[epoch, 1].waveform, plain[epoch, 1].waveform) for epoch in range(100))
    assert 30 < kept < 70


def test_published_noise_on_spectrograms():
    spectrogram = torch.randn(3, 40, 8)
    seeds = torch.tensor([5, 6, 5])
    noisy = spectrogram_noise(spectrogram, seeds)
    assert torch.equal(noisy, spectrogram_noise(spectrogram, seeds)) and noisy.shape == spectrogram.shape
    assert torch.equal(spectrogram_noise(spectrogram[1:], seeds[1:]), noisy[1:])  # not on the batch
    shifts = set()
    for seed in range(60):
        result = spectrogram_noise(spectrogram[:1], torch.tensor([seed]))[0]
        differences = {s: result.roll(-s, dims=0) - spectrogram[0] for s in range(-10, 10)}
        shift = min(differences, key=lambda s: differences[s].abs().max())
        assert differences[shift].min() >= 0 and differences[shift].max() < 0.1
        shifts.add(shift)
    assert min(shifts) == -10 and max(shifts) == 9
    with pytest.raises(ValueError, match="were expected"):
        spectrogram_noise(spectrogram, seeds[:2])


@pytest.mark.parametrize("snr", [20.0, 6.0])
def test_noise_at_a_ratio(snr):
    """Gaussian, at its place, so many decibels below the clip's own power."""
    spectrogram = torch.randn(2, 300, 128) * torch.tensor([0.5, 3.0]).view(2, 1, 1) + 0.2
    noise = spectrogram_noise(spectrogram, torch.tensor([5, 6]), snr) - spectrogram
    power = spectrogram.square().mean((1, 2)) / noise.square().mean((1, 2))
    # The power of 38,400 normal numbers is known to 2 / sqrt(2 * 38,400), 0.03 dB: five times that.
    torch.testing.assert_close(10 * power.log10(), torch.full((2,), snr), atol=0.16, rtol=0)
    normal = noise / noise.std((1, 2), keepdim=True)
    assert normal.mean().abs() < 0.02 and abs(normal.pow(4).mean() - 3) < 0.1
    alone = spectrogram_noise(spectrogram[1:], torch.tensor([6]), snr)
    assert torch.equal(alone - spectrogram[1:], noise[1:])  # not on the batch


@pytest.mark.parametrize(
    "fields",
    [
        {"gain": -1},
        {"gain": math.nan},
        {"mixup": 1.1},
        {"mixup": math.nan},
        {"noise": (20, 10)},
        {"noise": (0, math.inf)},
        {"upstream_roll_mag": True, "roll": True},
        {"upstream_roll_mag": True, "gain": 6.0},
    ],
)
def test_augmentation_refused(fields):
    with pytest.raises(ValueError, match=r"expected|give one or the other"):
        Augment(**fields)
