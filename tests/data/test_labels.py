"""What fine-tuning draws: bands of SpecAugment, smoothed labels, clips by the rarity of their labels."""

import numpy as np
import pytest
import torch

from audiomae.data import BalancedSampler, Clip, Source, smooth, spec_augment


def test_spec_augment():
    spectrogram, seeds = torch.randn(64, 100, 32), torch.arange(64)
    found = spec_augment(spectrogram, seeds, 40, 8, fill=7.0)
    masked = found == 7.0
    assert torch.equal(found[~masked], spectrogram[~masked])
    frames, bins = masked.all(2).sum(1), masked.all(1).sum(1)  # widths of the two bands
    assert torch.equal(masked, masked.all(2, keepdim=True) | masked.all(1, keepdim=True))
    assert frames.max() < 40 and bins.max() < 8
    # Even widths: means of 19.5 and 3.5, within five standard errors of 64 draws.
    assert abs(frames.float().mean() - 19.5) < 5 * 40 / 12**0.5 / 8
    assert abs(bins.float().mean() - 3.5) < 5 * 8 / 12**0.5 / 8
    for clip in masked:  # each is one band
        assert (clip.all(1).int().diff() == 1).sum() <= 1 and (clip.all(0).int().diff() == 1).sum() <= 1
    assert torch.equal(spec_augment(spectrogram[5:7], seeds[5:7], 40, 8, fill=7.0), found[5:7])
    assert torch.equal(spec_augment(spectrogram, seeds, 0, 0, fill=7.0), spectrogram)
    assert (spec_augment(spectrogram, seeds, 1000, 0, fill=7.0) == 7.0).all(2).sum(1).max() <= 100
    with pytest.raises(ValueError, match=r"\(batch, frames, bins\) and \(batch,\) were expected"):
        spec_augment(spectrogram, seeds[:3], 4, 4)


def test_smooth():
    labels = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(smooth(labels, 0.2)[0], torch.tensor([0.85, 0.05, 0.05, 0.05]))
    logits, number = torch.randn(1, 4), torch.tensor([0])
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(logits, smooth(labels[:1], 0.2)),
        torch.nn.functional.cross_entropy(logits, number, label_smoothing=0.2),
    )
    assert smooth(labels, 0.0) is labels


@pytest.fixture(scope="module")
def source():
    """90 clips of class a, 9 of b, one of both."""
    labels = [(0,)] * 90 + [(1,)] * 9 + [(0, 1)]
    return Source("x", [Clip(f"{i}.wav", labels) for i, labels in enumerate(labels)], ("a", "b"))


def drawn(sampler):
    return [key for batch in sampler for key in batch]


def test_balanced_weights(source):
    np.testing.assert_array_equal(source.label_counts(), [91, 10])
    sums = source.label_sums(1000 / (source.label_counts() + 0.01))
    np.testing.assert_allclose(sums[[0, 95, 99]], [1000 / 91.01, 1000 / 10.01, 1000 / 91.01 + 1000 / 10.01])


def test_balanced_with_replacement(source):
    sampler = BalancedSampler([source], batch_size=10, clips=20_000, replacement=True)
    assert len(sampler) == 2000
    keys = drawn(sampler)
    share = np.mean([index >= 90 for _, index in keys])
    expected = _share_of(source)
    assert abs(share - expected) < 5 * (expected * (1 - expected) / 20_000) ** 0.5
    assert len(set(keys)) == len(keys)  # each draw has a crop of its own


def _share_of(source):
    weight = source.label_sums(1000 / (source.label_counts() + 0.01))
    return weight[90:].sum() / weight.sum()


def test_balanced_without_replacement(source):
    sampler = BalancedSampler([source], batch_size=5, clips=20)
    counts = np.zeros(100)
    for epoch in range(300):
        sampler.epoch = epoch
        indices = [index for _, index in drawn(sampler)]
        assert len(set(indices)) == 20
        counts[indices] += 1
    assert counts[90:].min() > 2 * counts[:90].mean()  # a rare clip nine times as likely, until it is taken
    # The first of a draw without replacement is a draw with it.
    firsts = [sampler._order(epoch)[0, 1] for epoch in range(2000)]
    expected = _share_of(source)
    assert abs(np.mean(np.array(firsts) >= 90) - expected) < 5 * (expected * (1 - expected) / 2000) ** 0.5


def test_balanced_ranks_and_resume(source):
    one = BalancedSampler([source], batch_size=6, clips=30)
    ranks = [BalancedSampler([source], batch_size=3, clips=30, rank=r, world_size=2) for r in range(2)]
    joined = [a + b for a, b in zip(*ranks, strict=True)]
    assert list(one) == joined
    one.advance()
    ranks[0].load_state_dict(one.state_dict())
    assert list(ranks[0]) == [batch[:3] for batch in joined[1:]]
    other = BalancedSampler([source], batch_size=6, clips=30, replacement=True)
    with pytest.raises(ValueError, match="saved with replacement = False, but it is True now"):
        other.load_state_dict(one.state_dict())


def test_balanced_refusals(source):
    with pytest.raises(ValueError, match="leave nothing to balance; draw fewer, or with replacement"):
        BalancedSampler([source], batch_size=1)
    with pytest.raises(ValueError, match="needs labels, and a source has none"):
        BalancedSampler([Source("y", [Clip("a.wav"), Clip("b.wav")])], batch_size=1, clips=1)
