"""Masks: counts, partitions, determinism, distributions, and the published algorithms in plain loops."""

import dataclasses
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from audiomae import Mask, masking
from audiomae.masking import STRATEGIES

GRID = (64, 8)
pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 512
# How many tokens spans_upstream keeps depends on what it drew: it waits for the device, as documented.
NEVER_WAITING = [s for s in STRATEGIES if s != "spans_upstream"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(strategy, batch=3, grid=GRID, ratio=0.75, seed=0):
    return Mask.draw(strategy, batch, grid, ratio, seeded(seed))


def assert_partition(mask, batch, tokens):
    """Each token is kept or masked, once, and masked ids ascend."""
    assert mask.num_tokens == tokens
    assert mask.ids_keep.dtype == mask.ids_masked.dtype == torch.int64
    assert mask.ids_keep.shape[0] == mask.ids_masked.shape[0] == batch
    assert mask.ids_keep.shape[1] >= 1
    both = torch.cat([mask.ids_keep, mask.ids_masked], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(tokens).expand(batch, -1))
    assert (mask.ids_masked.diff(dim=1) > 0).all()
    dense = mask.dense()
    assert dense.dtype == torch.bool and dense.shape == (batch, tokens)
    assert not dense.gather(1, mask.ids_keep).any() and dense.gather(1, mask.ids_masked).all()


# -- every strategy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.75, 0.995])
@pytest.mark.parametrize("grid", [GRID, (62, 8), (5, 3), (13, 1)], ids=str)
def test_partition(strategy, ratio, grid):
    assert_partition(draw(strategy, grid=grid, ratio=ratio), 3, grid[0] * grid[1])


@pytest.mark.parametrize("strategy", NEVER_WAITING)
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 2), (3, 2)], ids=str)
def test_tiny_grids(strategy, grid):
    for ratio in (0.01, 0.5, 0.99):
        assert_partition(draw(strategy, grid=grid, ratio=ratio), 3, grid[0] * grid[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seeded_by_its_generator(strategy):
    """The same seed gives the same mask whatever the global stream does, and leaves that stream alone."""
    before = torch.get_rng_state()
    a = draw(strategy, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    random.seed(99)
    b, other = draw(strategy, seed=1), draw(strategy, seed=2)
    assert torch.equal(a.ids_keep, b.ids_keep) and torch.equal(a.ids_masked, b.ids_masked)
    assert not torch.equal(a.ids_masked, other.ids_masked)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_global_stream_without_a_generator(strategy):
    masks = []
    for _ in range(2):
        torch.manual_seed(5)
        masks.append(Mask.draw(strategy, 2, GRID, 0.75))
    assert torch.equal(masks[0].ids_keep, masks[1].ids_keep)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clips_differ_unless_shared(strategy):
    different = len(draw(strategy, batch=8).dense().unique(dim=0))
    assert different == 1 if strategy in ("random_shared", "chunk_upstream") else different > 4


@pytest.mark.parametrize("strategy", NEVER_WAITING)
def test_meta_and_fake_tensors(strategy):
    shapes = [ids.shape for ids in (draw(strategy).ids_keep, draw(strategy).ids_masked)]
    meta = Mask.draw(strategy, 3, GRID, 0.75, device="meta")
    assert [meta.ids_keep.shape, meta.ids_masked.shape] == shapes
    with FakeTensorMode():
        fake = Mask.draw(strategy, 3, GRID, 0.75)
        assert [fake.ids_keep.shape, fake.ids_masked.shape] == shapes
        assert fake.dense().shape == (3, TOKENS)
        gpu = Mask.draw(strategy, 3, GRID, 0.75, device="cuda")
        assert gpu.ids_keep.device.type == gpu.ids_masked.device.type == "cuda"


@pytest.mark.no_poison
@pytest.mark.parametrize("strategy", NEVER_WAITING)
def test_compiles_in_one_graph(strategy):
    def function():
        mask = Mask.draw(strategy, 2, (8, 4), 0.75)
        return mask.ids_keep, mask.ids_masked

    torch.compiler.reset()
    torch.manual_seed(3)
    expected = function()
    torch.manual_seed(3)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")()
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_big_batch():
    for strategy in ("random", "cluster"):
        assert_partition(draw(strategy, batch=300, grid=(16, 8)), 300, 128)


def test_batch_of_nothing():
    for strategy in STRATEGIES:
        for batch in (0, -1):
            with pytest.raises(ValueError, match="at least one clip"):
                Mask.draw(strategy, batch, (16, 8), 0.75)


# -- counts of the papers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "ratio", "kept"),
    [
        ("random", 0.8, 102),
        ("random", 0.75, 128),
        ("random_shared", 0.75, 128),
        ("time", 0.7, 19 * 8),
        ("frequency", 0.3, 64 * 5),
        ("time_frequency", (0.7, 0.3), 95),
        ("time_frequency", (0.3, 0.3), 220),
        ("time_frequency", 0.3, 220),
        ("time_frequency", (0.2, 0.2), 306),
        ("cluster", 400 / 512, 112),
        ("cluster_upstream", 400 / 512, 112),
        ("chunk", 0.75, 128),
        ("chunk_upstream", 0.75, 128),
        ("spans", 0.75, 128),
    ],
)
def test_published_counts(strategy, ratio, kept):
    mask = draw(strategy, ratio=ratio)
    assert mask.ids_keep.shape == (3, kept)
    assert mask.ids_masked.shape == (3, TOKENS - kept)


def test_frame_tokens():
    """MAE-AST's frame model on 998 frames: 499 tokens, 75 % masked."""
    assert Mask.random(2, 499, 0.75).ids_keep.shape == (2, int(499 * 0.25))


def test_one_token_is_always_kept():
    assert Mask.random(2, 5, 0.95).ids_keep.shape == (2, 1)
    assert Mask.time_frequency(2, (4, 4), 0.99, 0.99).ids_keep.shape == (2, 1)


# -- random --------------------------------------------------------------------------------------------------


def chi_square(counts, expected):
    return ((counts.double() - expected).square() / expected).sum().item()


def test_random_is_uniform():
    """Which token comes first is uniform, and so is how often each is kept; so the order is shuffled."""
    batch, tokens = 4000, 32
    mask = Mask.random(batch, tokens, 0.75, seeded())
    # 31 degrees of freedom: a value above 85 has probability 1e-6; the seed is fixed.
    for column in (0, 3, 7):
        assert chi_square(mask.ids_keep[:, column].bincount(minlength=tokens), batch / tokens) < 85
    kept = mask.ids_keep.flatten().bincount(minlength=tokens)
    assert chi_square(kept, batch / 4) < 85
    assert not (mask.ids_keep.diff(dim=1) > 0).all(dim=1).float().mean() > 0.01
    # Pairs too: tokens 0 and 1 are kept together with probability 8/32 * 7/31.
    dense = ~mask.dense()
    together = (dense[:, 0] & dense[:, 1]).double().mean().item()
    p = 8 / 32 * 7 / 31
    assert abs(together - p) < 5 * (p * (1 - p) / batch) ** 0.5


def test_shared_mask_keeps_one_order():
    mask = Mask.random(4, 20, 0.5, seeded(), shared=True)
    assert torch.equal(mask.ids_keep, mask.ids_keep[:1].expand(4, -1))
    mask.ids_keep[0, 0] = -1  # rows own their memory
    assert (mask.ids_keep[1:] >= 0).all()


# -- time and frequency --------------------------------------------------------------------------------------


def test_structured_masks_are_rectangles():
    times, bands = 19, 5
    grid = ~Mask.time_frequency(50, GRID, 0.7, 0.3, seeded()).dense().view(50, *GRID)
    kept_times, kept_bands = grid.any(dim=2), grid.any(dim=1)
    assert (kept_times.sum(dim=1) == times).all() and (kept_bands.sum(dim=1) == bands).all()
    assert torch.equal(grid, kept_times[:, :, None] & kept_bands[:, None])
    assert kept_times.any(dim=0).all() and kept_bands.any(dim=0).all()  # all of them are drawn now and then

    only_time = ~Mask.time(3, GRID, 0.5, seeded()).dense().view(3, *GRID)
    assert torch.equal(only_time.all(dim=2), only_time.any(dim=2))
    only_frequency = ~Mask.frequency(3, GRID, 0.5, seeded()).dense().view(3, *GRID)
    assert torch.equal(only_frequency.all(dim=1), only_frequency.any(dim=1))


@pytest.mark.parametrize(
    "strategy", ["time", "frequency", "time_frequency", "cluster", "chunk", "spans", "spans_upstream"]
)
def test_kept_in_ascending_order(strategy):
    assert (draw(strategy).ids_keep.diff(dim=1) > 0).all()


# -- clusters and chunks, against loops ----------------------------------------------------------------------


@pytest.fixture
def draws(monkeypatch):
    """The starts (B, S) and sizes (B,) that went into the last mask."""
    seen = {}

    def spy(name):
        function = getattr(masking, name)

        def spied(start, size, *rest):
            seen["starts"], seen["sizes"] = start.tolist(), size.flatten().tolist()
            return function(start, size, *rest)

        monkeypatch.setattr(masking, name, spied)

    spy("_squares")
    spy("_square_cells")
    return seen


def published_loop(starts, size, row, tokens, count, lowest):
    """SSAST's and MAE-AST's loop: squares on the flat index until more than enough, then the lowest ids."""
    masked = set()
    for start in starts:
        if len(masked) > count:
            break
        for i in range(size):
            for j in range(size):
                cell = start + row * i + j
                if lowest <= cell < tokens:
                    masked.add(cell)
    return sorted(masked)[:count]


def square_loop(starts, size, grid, count):
    """Squares that end at the grid's edges; of the last one only as much as is wanted."""
    masked = []
    for start in starts:
        t, f = divmod(start, grid[1])
        for i in range(t, min(t + size, grid[0])):
            for j in range(f, min(f + size, grid[1])):
                if i * grid[1] + j not in masked and len(masked) < count:
                    masked.append(i * grid[1] + j)
    return sorted(masked)


CLUSTER_CASES = [
    (GRID, 400 / 512),
    (GRID, 0.75),
    ((62, 8), 0.1),
    ((13, 3), 0.9),
    ((5, 3), 0.5),
    ((4, 2), 0.99),
]


@pytest.mark.parametrize(("grid", "ratio"), CLUSTER_CASES, ids=str)
def test_cluster_upstream_is_the_published_loop(draws, grid, ratio):
    """Its ids are frequency-major, f * T' + t."""
    mask = Mask.cluster(6, grid, ratio, seeded(), upstream=True)
    count = mask.ids_masked.shape[1]
    for row, starts, size in zip(mask.dense(), draws["starts"], draws["sizes"], strict=True):
        expected = published_loop(starts, size, grid[0], grid[0] * grid[1], count, lowest=1)
        frequency_major = row.view(grid).T.flatten()
        assert frequency_major.nonzero().flatten().tolist() == expected
        assert not row[0]


@pytest.mark.parametrize(("grid", "ratio"), CLUSTER_CASES, ids=str)
def test_chunk_upstream_is_the_published_loop(draws, grid, ratio):
    """Time-major, one mask for the batch."""
    mask = Mask.chunk(3, grid, ratio, seeded(), upstream=True)
    assert len(draws["starts"]) == 1
    count = mask.ids_masked.shape[1]
    expected = published_loop(
        draws["starts"][0], draws["sizes"][0], grid[1], mask.num_tokens, count, lowest=0
    )
    assert mask.ids_masked.tolist() == [expected] * 3


@pytest.mark.parametrize("strategy", ["cluster", "chunk"])
@pytest.mark.parametrize(("grid", "ratio"), CLUSTER_CASES, ids=str)
def test_squares_stay_inside(draws, strategy, grid, ratio):
    mask = getattr(Mask, strategy)(6, grid, ratio, seeded())
    count = mask.ids_masked.shape[1]
    for ids, starts, size in zip(mask.ids_masked.tolist(), draws["starts"], draws["sizes"], strict=True):
        assert ids == square_loop(starts, size, grid, count)


@pytest.mark.parametrize("upstream", [False, True])
def test_sizes_and_places_of_squares(draws, upstream):
    """Sizes 3, 4, 5 equally often, one per clip; places uniform; a tail that begins at each token once."""
    Mask.cluster(1500, (6, 4), 0.5, seeded(), upstream=upstream)
    sizes = torch.tensor(draws["sizes"]).bincount(minlength=6)
    assert sizes[:3].sum() == 0
    assert chi_square(sizes[3:], 500.0) < 28  # 2 degrees of freedom: above with probability 1e-6
    starts = torch.tensor(draws["starts"])
    assert starts.shape == (1500, 48)
    for column in (0, 1):
        assert chi_square(starts[:, column].bincount(minlength=24), 1500 / 24) < 72  # 23 degrees of freedom
    assert torch.equal(starts[:, 24:].sort(dim=1).values, torch.arange(24).expand(1500, -1))


def test_upstream_truncation_spares_the_highest_bands():
    """What is too much is taken from the end of upstream's order, which is SSAST's highest band."""
    masks = [Mask.cluster(200, GRID, 400 / 512, seeded(), upstream=upstream) for upstream in (False, True)]
    ours, published = (mask.dense().view(200, *GRID).float().mean((0, 1)) for mask in masks)
    assert ours[7] > ours[4:7].min() - 0.01
    assert published[7] < published[4:7].min() - 0.03


def test_chunk_upstream_spills_into_the_next_time_step(draws):
    """A square that starts in the last band goes on in the first band of the next time step."""
    for seed in range(200):
        mask = Mask.chunk(1, GRID, 0.02, seeded(seed), upstream=True)
        start = draws["starts"][0][0]
        if start % 8 == 7 and start < 256:
            assert start + 1 in mask.ids_masked
            return
    raise AssertionError("no square started in the last band")


# -- spans ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "ratio", "length"), [(499, 0.75, 10), (64, 0.4, 10), (20, 0.9, 7), (7, 0.5, 10)]
)
def test_spans_are_masked(monkeypatch, tokens, ratio, length):
    """Documented meaning: whole spans are masked until there are enough, the last one in part."""
    seen = {}
    original = masking._starts

    def spied(*args):
        seen["starts"] = original(*args)
        return seen["starts"]

    monkeypatch.setattr(masking, "_starts", spied)
    mask = Mask.spans(5, tokens, ratio, seeded(), length=length)
    count = tokens - max(1, int(tokens * (1 - ratio)))
    for ids, starts in zip(mask.ids_masked.tolist(), seen["starts"].tolist(), strict=True):
        expected = []
        for start in starts:
            for token in range(start, min(start + length, tokens)):
                if token not in expected and len(expected) < count:
                    expected.append(token)
        assert ids == sorted(expected)


def test_spans_upstream_keeps_what_it_marks():
    """Upstream keeps about 1 - exp(-1.45) = 76.5 % in spans of ten, and the ratio plays no part."""
    mask = Mask.draw("spans_upstream", 8, (499, 1), 0.75, seeded())
    share = mask.ids_keep.shape[1] / 499
    assert 0.70 < share < 0.80
    other = Mask.draw("spans_upstream", 8, (499, 1), 0.2, seeded())
    assert torch.equal(mask.ids_keep, other.ids_keep)
    # Only the cut to the shortest clip takes tokens out of a span: in one clip alone all spans are whole.
    alone = (~Mask.draw("spans_upstream", 1, (499, 1), 0.75, seeded()).dense()[0]).tolist()
    runs = "".join("k" if keep else "." for keep in alone).split(".")
    assert all(len(run) >= 10 for run in runs if run)


def test_spans_upstream_needs_room():
    with pytest.raises(ValueError, match="more than 10 tokens"):
        Mask.spans(2, 10, 0.5, upstream=True)


# -- from_keep, Mask itself ----------------------------------------------------------------------------------


def test_from_keep_keeps_the_order():
    ids = torch.tensor([[4, 0, 3], [1, 5, 2]])
    mask = Mask.from_keep(ids, 6)
    assert torch.equal(mask.ids_keep, ids)
    assert mask.ids_masked.tolist() == [[1, 2, 5], [0, 3, 4]]
    assert mask.dense().tolist()[0] == [False, True, True, False, False, True]
    assert Mask.from_keep(torch.tensor([[1, 0]]), 2).ids_masked.shape == (1, 0)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[0, 1]], TypeError, "int64 tensor of token ids, got list"),
        (torch.tensor([[0, 1]], dtype=torch.int32), TypeError, "int64 tensor of token ids, got torch.int32"),
        (torch.tensor([[0.0, 1.0]]), TypeError, "got torch.float32"),
        (torch.tensor([[True, False]]), TypeError, "got torch.bool"),
        (torch.tensor([0, 1]), ValueError, r"shape \(B, K\).*got \(2,\)"),
        (torch.tensor([[[0]]]), ValueError, r"got \(1, 1, 1\)"),
        (torch.empty(0, 2, dtype=torch.int64), ValueError, r"B >= 1.*got \(0, 2\)"),
        (torch.empty(2, 0, dtype=torch.int64), ValueError, r"1 <= K <= 4.*got \(2, 0\)"),
        (torch.tensor([[0, 1, 2, 3, 0]]), ValueError, r"1 <= K <= 4"),
        (torch.tensor([[0, 4]]), ValueError, r"in \[0, 4\), got ids from 0 to 4"),
        (torch.tensor([[-1, 2]]), ValueError, r"got ids from -1 to 2"),
        (torch.tensor([[0, 1], [2, 2]]), ValueError, "clip 1 keeps one twice"),
    ],
)
def test_from_keep_refuses(ids, error, message):
    with pytest.raises(error, match=message):
        Mask.from_keep(ids, 4)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratio_must_leave_something(ratio):
    for strategy in STRATEGIES:
        with pytest.raises(ValueError, match="between 0 and 1"):
            Mask.draw(strategy, 2, GRID, ratio)
    for direct in (Mask.time, Mask.frequency, Mask.cluster, Mask.chunk):
        with pytest.raises(ValueError, match="between 0 and 1"):
            direct(2, GRID, ratio)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Mask.random(2, 8, ratio)


@pytest.mark.parametrize(
    ("strategy", "ratio", "message"),
    [
        ("randon", 0.5, "unknown masking strategy 'randon'; there are random,"),
        ("random", (0.5, 0.5), "'random' takes one ratio, got"),
        ("random", "0.5", "'random' takes one ratio, got '0.5'"),
        ("time_frequency", (0.5, 0.5, 0.5), "one ratio or a pair"),
        ("time_frequency", (), "one ratio or a pair"),
        ("time_frequency", (0.5, 1.0), "between 0 and 1"),
    ],
)
def test_draw_refuses(strategy, ratio, message):
    with pytest.raises(ValueError, match=message):
        Mask.draw(strategy, 2, GRID, ratio)


def test_pytree_round_trip():
    mask = draw("random")
    leaves, spec = pytree.tree_flatten(mask)
    assert len(leaves) == 2
    back = pytree.tree_unflatten(leaves, spec)
    assert isinstance(back, Mask) and back.num_tokens == mask.num_tokens
    assert back.ids_keep is mask.ids_keep and back.ids_masked is mask.ids_masked
    restored = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert restored == spec
    nested = pytree.tree_map(lambda t: t + 0, {"a": (mask,)})
    assert torch.equal(nested["a"][0].ids_keep, mask.ids_keep)


def test_mask_is_frozen_and_moves():
    mask = draw("random")
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.num_tokens = 3
    moved = mask.to("meta")
    assert moved.ids_keep.is_meta and moved.ids_masked.is_meta and moved.num_tokens == TOKENS
