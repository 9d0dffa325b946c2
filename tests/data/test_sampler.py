"""Each clip on one rank per epoch, whatever the sizes; the same order after a resume, on any number of ranks."""

import itertools
import json

import pytest

from audiomae.data import Clip, ClipSampler, Source


def source(clips, name="test"):
    return Source(name, [Clip(f"{name}{i}") for i in range(clips)])


def samplers(sources, world_size, **options):
    return [ClipSampler(sources, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("clips", "world_size", "batch_size"),
    [
        (12, 1, 4),
        (13, 1, 4),
        (16, 2, 4),
        (17, 2, 4),
        (23, 4, 2),
        (29, 3, 4),
        (9, 4, 2),
        (100, 8, 3),
        (30, 1, 1),
    ],
)
def test_each_clip_once(clips, world_size, batch_size, shuffle, drop_last):
    ranks = samplers([source(clips)], world_size, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
    for epoch in range(3):
        batches = [list(sampler) for sampler in ranks]
        assert {len(b) for b in batches} == {len(ranks[0])} and len(ranks[0]) > 0
        keys = [key for rank in batches for batch in rank for key in batch]
        assert {turn for turn, _ in keys} == {epoch}
        seen = sorted(index for _, index in keys)
        sizes = {len(batch) for rank in batches for batch in rank}
        if drop_last:
            assert sizes == {batch_size} and len(set(seen)) == len(seen)
            assert len(seen) == clips // (batch_size * world_size) * batch_size * world_size
        else:
            assert seen == list(range(clips))
            assert min(sizes) >= 1 and max(sizes) <= batch_size + 1
            assert max(len(b[-1]) for b in batches) - min(len(b[-1]) for b in batches) <= 1
        for sampler in ranks:
            for _ in range(len(sampler)):
                sampler.advance()


def test_what_is_left_out_is_another_part_each_epoch():
    sampler, left = ClipSampler([source(10)], batch_size=4), set()
    for _ in range(10):
        seen = {index for batch in sampler for _, index in batch}
        left |= set(range(10)) - seen
        for _ in range(len(sampler)):
            sampler.advance()
    assert len(left) > 5


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_the_batches_of_one_process(drop_last):
    options = {"seed": 5, "drop_last": drop_last}
    one = list(ClipSampler([source(51)], batch_size=12, **options))
    ranks = [list(sampler) for sampler in samplers([source(51)], 3, batch_size=4, **options)]
    for i, joined in enumerate(one):
        assert joined == [key for rank in ranks for key in rank[i]]


def test_order_depends_on_seed_and_epoch():
    def epoch(seed, number):
        sampler = ClipSampler([source(40)], batch_size=8, seed=seed)
        sampler.epoch = number
        return [index for batch in sampler for _, index in batch]

    orders = [epoch(seed, number) for seed in (0, 1) for number in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert epoch(1, 1) == orders[3]
    unshuffled = ClipSampler([source(10)], batch_size=3, shuffle=False, drop_last=False)
    assert [index for batch in unshuffled for _, index in batch] == list(range(10))


def test_iterating_moves_nothing_and_advancing_does():
    sampler = ClipSampler([source(10)], batch_size=3)
    first = list(sampler)
    assert list(sampler) == first and (sampler.epoch, sampler.position) == (0, 0)
    iterator = iter(sampler)
    next(iterator), next(iterator)  # two drawn, as by workers that prefetch, one trained on
    sampler.advance()
    assert list(sampler) == first[1:] and len(sampler) == 3
    sampler.advance(), sampler.advance()
    assert (sampler.epoch, sampler.position) == (1, 0)


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 9, 14])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resumed_equals_not_stopped(stop, world_size):
    sources, options = [source(30), source(11, "b")], {"weights": [1, 0.5], "seed": 2}

    def run(sampler, steps):
        keys = []
        while steps:
            for batch in sampler:
                keys.append(batch)
                sampler.advance()
                steps -= 1
                if not steps:
                    break
        return keys

    whole = [run(sampler, 20) for sampler in samplers(sources, 2, batch_size=4, **options)]
    stopped = samplers(sources, 2, batch_size=4, **options)
    for sampler in stopped:
        run(sampler, stop)
    states = [json.loads(json.dumps(sampler.state_dict())) for sampler in stopped]
    assert states[0] == states[1]
    resumed = samplers(sources, world_size, batch_size=8 // world_size, **options)
    for sampler in resumed:
        sampler.load_state_dict(states[0])
    parts = [run(sampler, 20 - stop) for sampler in resumed]
    for i in range(20 - stop):
        joined = [key for rank in whole for key in rank[stop + i]]
        assert joined == [key for rank in parts for key in rank[i]]


def test_another_global_batch():
    sampler = ClipSampler([source(48)], batch_size=8)
    sampler.advance()
    sampler.advance()
    state = sampler.state_dict()
    smaller = ClipSampler([source(48)], batch_size=4)
    smaller.load_state_dict(state)
    assert (smaller.epoch, smaller.position) == (0, 4)
    with pytest.raises(ValueError, match="no whole number of batches of 12"):
        sampler.advance()
        ClipSampler([source(48)], batch_size=12).load_state_dict(smaller.state_dict() | {"position": 7})


def test_weights():
    sources = [source(20, "a"), source(8, "b"), source(4, "c")]
    sampler = ClipSampler(sources, batch_size=1, weights=[1, 0.5, 3])
    assert len(sampler) == 20 + 4 + 12
    keys = []
    for _ in range(2):
        epoch = [key for batch in sampler for key in batch]
        assert sorted(index for _, index in epoch if index < 20) == list(range(20))
        assert len({index for _, index in epoch if 20 <= index < 28}) == 4
        assert sorted(index for _, index in epoch if index >= 28) == sorted([28, 29, 30, 31] * 3)
        keys += epoch
        for _ in range(len(sampler)):
            sampler.advance()
    assert len(set(keys)) == len(keys)  # what comes again is cropped anew
    assert {index for _, index in keys if 20 <= index < 28} == set(range(20, 28))
    plain = ClipSampler(sources, batch_size=4)
    assert list(plain) == list(ClipSampler(sources, batch_size=4, weights=[1, 1, 1]))


@pytest.mark.parametrize(
    ("clips", "options", "said"),
    [
        (3, {"batch_size": 1, "world_size": 4}, "3 clips for 4 processes"),
        (3, {"batch_size": 1, "world_size": 4, "drop_last": False}, "3 clips for 4 processes"),
        (7, {"batch_size": 4, "world_size": 2}, "does not fill one batch of 4 in 2 processes"),
        (7, {"batch_size": 0}, "batch_size is 0"),
        (7, {"batch_size": 1, "rank": 1}, "rank is 1, but 0 to 0"),
        (7, {"batch_size": 1, "seed": -1}, "seed"),
        (7, {"batch_size": 1, "weights": [1, 1]}, "for each of 1 source$"),
        (7, {"batch_size": 1, "weights": [0]}, "positive"),
        (7, {"batch_size": 1, "weights": [float("nan")]}, "positive"),
    ],
)
def test_refused(clips, options, said):
    with pytest.raises(ValueError, match=said):
        ClipSampler([source(clips)], **options)
    with pytest.raises(ValueError, match="sources is empty"):
        ClipSampler([], batch_size=1)


def test_states_of_other_data_are_refused():
    state = ClipSampler([source(20)], batch_size=4).state_dict()
    for sampler in (
        ClipSampler([source(21)], batch_size=4),
        ClipSampler([source(20)], batch_size=4, seed=1),
        ClipSampler([source(20)], batch_size=4, shuffle=False),
        ClipSampler([source(20)], batch_size=4, weights=[2]),
    ):
        with pytest.raises(ValueError, match="the order of the clips would be another"):
            sampler.load_state_dict(state)
    own = ClipSampler([source(20)], batch_size=4)
    with pytest.raises(ValueError, match="lacks position"):
        own.load_state_dict({key: value for key, value in state.items() if key != "position"})
    with pytest.raises(ValueError, match="no whole number"):
        own.load_state_dict(state | {"position": 5})
    own.load_state_dict(state)
