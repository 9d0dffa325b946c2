"""What fine-tuning draws: bands of SpecAugment, smoothed labels, clips by the rarity of their labels."""

import numpy as np
import pytest
import torch

from audiomae.data import BalancedSampler, Clip, RepeatingSampler, Source, smooth, spec_augment


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


def test_balanced_tells_of_clips_without_labels(source, caplog):
    with_none = Source("more", [*source, Clip("none.wav")], source.label_names)
    BalancedSampler([with_none], batch_size=5, clips=20)
    assert "never draws clips without a label: 1 of 101" in caplog.text


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


@pytest.fixture
def keywords():
    """Of labels 0 to 3: 2, 20 ("unknown"), 7 and 13 clips."""
    labels = [0] * 2 + [1] * 20 + [2] * 7 + [3] * 13
    clips = [Clip(f"{i}.wav", (label,)) for i, label in enumerate(labels)]
    return Source("keywords", clips, ("silence", "unknown", "yes", "no")), np.array(labels)


def test_repeated_classes(keywords):
    """Each class has half as many clips as the largest in every epoch, and none of them is left out."""
    source, labels = keywords
    sampler, passes, total = RepeatingSampler([source], share=0.5, batch_size=1), set(), np.zeros(len(labels))
    assert len(sampler) == 10 + 20 + 10 + 13  # what has more than the half stays
    for epoch in range(7):
        sampler.epoch = epoch
        keys = drawn(sampler)
        assert not passes & set(keys) and len(set(keys)) == len(keys)  # a crop of its own for each repetition
        passes |= set(keys)
        times = np.bincount([index for _, index in keys], minlength=len(labels))
        assert [times[labels == c].sum() for c in range(4)] == [10, 20, 10, 13]
        assert times[labels == 0].tolist() == [5, 5] and times.min() == 1 and times[labels == 2].max() <= 3
        assert (times[(labels == 1) | (labels == 3)] == 1).all()
        total += times
    assert total[labels == 2].tolist() == [10] * 7  # 7 epochs of 10 clips: the part is another one each time
    assert keys != sorted(keys, key=lambda key: labels[key[1]])


def test_repeated_classes_on_ranks_and_resumed(keywords):
    source, _ = keywords
    one = RepeatingSampler([source], share=0.5, batch_size=6)
    ranks = [RepeatingSampler([source], share=0.5, batch_size=3, rank=r, world_size=2) for r in range(2)]
    joined = [a + b for a, b in zip(*ranks, strict=True)]
    assert list(one) == joined
    one.advance()
    ranks[0].load_state_dict(one.state_dict())
    assert list(ranks[0]) == [batch[:3] for batch in joined[1:]]
    with pytest.raises(ValueError, match=r"saved with share = 0\.5, but it is 0\.4 now"):
        RepeatingSampler([source], share=0.4, batch_size=6).load_state_dict(one.state_dict())


def test_repeated_classes_refusals(source, keywords):
    with pytest.raises(ValueError, match="with none or several there are 1 of 100 clips"):
        RepeatingSampler([source], share=0.5, batch_size=1)
    with pytest.raises(ValueError, match=r"share is 1.5, but a share in \(0, 1\]"):
        RepeatingSampler([keywords[0]], share=1.5, batch_size=1)
