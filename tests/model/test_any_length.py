"""Clips of any length: each gives what it gives alone, chunks are joined, positions interpolated."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import compare

import audiomae
from audiomae.embedding import Embedder, Piece, Tagger, stretched
from audiomae.model import sincos_2d, sinusoids_1d

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"width": 32, "heads": 2, "depth": 2, "mel_bins": 16}
CASES = {
    "audiomae": ("audiomae_base", {"decoder": "none"}),
    "overlap": ("audiomae_base", {"decoder": "none", "stride": (10, 16)}),
    "mae_ast_patch": ("mae_ast_patch_base", {"decoder": "none"}),
    "mae_ast_frame": ("mae_ast_frame_base", {"decoder": "none", "patch": (2, 16)}),
    "ssast_patch": ("ssast_patch_base", {}),
}
# One frame, around a patch, around the positions' end, twice that and a bit, and whatever else up to 30 s.
EDGES = [1, 2, 15, 16, 17, 500, 1008, 1009, 1023, 1024, 1025, 1040, 1041, 2047, 2049, 3000]
LENGTHS = EDGES + np.random.RandomState(0).randint(1, 3001, 8).tolist()


def build(case, **options):
    name, fields = CASES[case]
    return audiomae.create_model(name, **SMALL | fields | options).eval()


def clips(lengths=LENGTHS, bins=16):
    return [torch.randn(n, bins) for n in lengths]


def within_budget(make, spectrograms, name):
    """Together in fp32, alone in fp32, alone in fp64: the error of the batch may be twice that of a clip alone."""
    single, double = make(torch.float32), make(torch.float64)
    together = single(spectrograms)
    alone = [single([clip])[0] for clip in spectrograms]
    exact = [double([clip.double()])[0] for clip in spectrograms]
    assert all(
        x.dtype == torch.float32 and y.dtype == torch.float64 for x, y in zip(together, exact, strict=True)
    )
    results = (torch.cat([x.flatten() for x in each]) for each in (together, alone, exact))
    draws = [[{name: result}] for result in results]
    compare(*draws)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("long", ["chunks", "interpolate"])
def test_a_clip_gives_what_it_gives_alone(case, long):
    model = build(case)

    def make(dtype):
        embedder = Embedder(copy.deepcopy(model).to(dtype), level="frame", long=long, batch_size=5)
        return embedder.embed

    within_budget(make, clips(), "frames")


@pytest.mark.parametrize("pad", ["exclude", "attend"])
def test_a_clip_is_labelled_as_it_is_alone(pad):
    model = audiomae.create_classifier("audiomae_base", 5, **SMALL, pad=pad).eval()
    torch.nn.init.normal_(model.head.weight)

    def make(dtype):
        return Tagger(copy.deepcopy(model).to(dtype), batch_size=5).tag

    within_budget(make, clips(), "probabilities")


def test_what_a_batch_is_filled_up_with_is_not_read():
    """Through the front end: rows of a padded batch with garbage behind a clip's end."""
    embedder = Embedder(build("audiomae", mel_bins=128))
    waveform, lengths = torch.randn(3, 30_000), [30_000, 400, 12_345]
    alone = [embedder(row[:n])[0] for row, n in zip(waveform, lengths, strict=True)]
    for garbage in (0.0, 1e3, float("nan")):
        for row, n in zip(waveform, lengths, strict=True):
            row[n:] = garbage
        torch.testing.assert_close(embedder(waveform, lengths), torch.stack(alone), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="399 samples"):
        embedder(waveform[0, :399])


@pytest.mark.parametrize("case", CASES)
def test_short_clips_use_the_first_positions(case):
    """A clip within the positions is one call of encode, filled up with zeros to whole patches."""
    model = build(case)
    c, spectrogram = model.config, torch.randn(500, 16)
    steps, _ = c.grid_of_filled(500)
    filled = F.pad(spectrogram, (0, 0, 0, (steps - 1) * c.step[0] + c.patch[0] - 500))
    for layer, expected in (
        ("last", model.encode(filled[None])),
        (2, model.encode(filled[None], layers=[2])[0]),
        ("mean", sum(model.encode(filled[None], layers=[1, 2])) / 2),
    ):
        frames = expected[0, model.num_prefix_tokens :].unflatten(0, c.grid(len(filled))).mean(dim=1)
        actual = Embedder(model, level="frame", layer=layer).embed([spectrogram])[0]
        torch.testing.assert_close(actual, frames, rtol=0, atol=1e-5)
        clip = Embedder(model, layer=layer).embed([spectrogram])[0]
        torch.testing.assert_close(clip, frames.mean(dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_chunks_cover_a_clip_and_overlap(overlap):
    embedder = Embedder(build("audiomae"), overlap=overlap)
    for frames in LENGTHS:
        pieces = embedder._pieces(0, frames)
        total, _ = embedder.model.config.grid_of_filled(frames)
        seen = np.zeros(total, int)
        for piece in pieces:
            seen[piece.first : piece.first + piece.steps] += 1
            assert piece.start == 16 * piece.first and piece.frames <= 1024
        assert seen.all() and pieces[0].first == 0 and pieces[-1].start + pieces[-1].frames == frames
        assert all(p.steps == min(total, 64) for p in pieces)
        hops = np.diff([p.first for p in pieces])
        assert (hops <= max(1, round(64 * (1 - overlap)))).all()


def test_chunks_are_joined_where_they_overlap():
    """A step seen by one chunk is that chunk's; between two, the weight passes from one to the other."""
    one, other = torch.ones(4, 2), torch.full((4, 2), 5.0)
    joined = Embedder._joined([(Piece(0, 0, 4, 0, 64), one), (Piece(0, 2, 4, 32, 64), other)])
    assert joined.shape == (6, 2)
    # weights 1 2 2 1: at steps 2 and 3 the first has 2 and 1, the second 1 and 2
    torch.testing.assert_close(joined[:, 0], torch.tensor([1, 1, 7 / 3, 11 / 3, 5, 5]))


def test_a_long_clip_is_read_in_chunks():
    model = build("audiomae")
    spectrogram = torch.randn(2000, 16)
    frames = Embedder(model, level="frame", overlap=0.0).embed([spectrogram])[0]
    first, last = (model.encode(part[None])[0, 1:] for part in (spectrogram[:1024], spectrogram[976:]))
    torch.testing.assert_close(frames[:61], first[:61], rtol=0, atol=1e-5)
    torch.testing.assert_close(frames[64:], last[3:], rtol=0, atol=1e-5)
    assert frames.shape == (125, 32)
    tagger = Tagger(
        audiomae.create_classifier("audiomae_base", 5, **SMALL).eval(), scores="softmax", overlap=0.0
    )
    each = [tagger.tag([part])[0] for part in (spectrogram[:1024], spectrogram[976:])]
    torch.testing.assert_close(tagger.tag([spectrogram])[0], sum(each) / 2)
    torch.testing.assert_close(tagger.tag([spectrogram]).sum(), torch.tensor(1.0))


# -- positions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_stretched_positions(case):
    """At both ends and, with twice the steps less one, at every second step they are the old ones."""
    model = build(case, frames=160)
    old = model.encoder.positions
    table, (steps, bands) = old.table[0, old.prefix :].detach().unflatten(0, old.grid), old.grid
    longer = stretched(model, (2 * steps - 2) * model.config.step[0] + model.config.patch[0])
    new = longer.encoder.positions
    assert new.grid == longer.config.grid() == (2 * steps - 1, bands)
    assert torch.equal(new.table[0, : new.prefix], old.table[0, : old.prefix])
    between = new.table[0, new.prefix :].detach().unflatten(0, new.grid)
    torch.testing.assert_close(between[::2], table, rtol=0, atol=1e-5)
    assert len(between.flatten(0, 1).unique(dim=0)) == between.shape[0] * bands  # every token has its own
    assert longer.encoder.blocks[0].mlp.fc1.weight is model.encoder.blocks[0].mlp.fc1.weight
    assert model.config.frames == 160 and stretched(model, 160) is model
    longer.encode(torch.randn(1, longer.config.frames, 16))


def test_interpolated_formulas():
    """Halfway between two steps: the formula there, not the mean of two sinusoids."""
    table = sincos_2d(32, (9, 2), steps=17).unflatten(0, (17, 2))
    time = torch.tensor([0.5], dtype=torch.float64) * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    torch.testing.assert_close(table[1, 0, 16:], torch.cat([time.sin(), time.cos()]).float())
    assert torch.equal(table[1, :, :16], table[0, :, :16])  # the same bands
    transposed = sincos_2d(32, (8, 2), transposed=True, steps=15).unflatten(0, (15, 2))
    assert torch.equal(transposed[1, 0], transposed[0, 1])  # half a step on is where the next band is
    places = torch.tensor([0.0, 1.0, 2.0])
    assert torch.equal(sinusoids_1d(8, places), sinusoids_1d(8, 3))


def test_a_table_of_no_formula_is_interpolated_linearly():
    model = build("audiomae", frames=48)
    torch.nn.init.normal_(model.encoder.positions.table)
    table = model.encoder.positions.table[0, 1:]
    new = stretched(model, 80).encoder.positions.table[0, 1:]
    torch.testing.assert_close(new[1], (table[0] + table[1]) / 2)
    torch.testing.assert_close(new[::2], table)


# -- settings ------------------------------------------------------------------------------------------------


def test_the_model_given_stays_as_it_is():
    model = build("audiomae").train()
    embedder = Embedder(model)
    assert model.training and model.config.pad == "attend" and not embedder.model.training
    embedder.embed(clips([2000]))
    assert {id(p) for p in embedder.parameters()} == {id(p) for p in model.parameters()}
    assert not embedder.embed(clips([20])).requires_grad
    assert embedder.embed([]).shape == (0, 32)


def test_from_names_and_folders(tmp_path):
    model = build("audiomae")
    model.save_pretrained(tmp_path)
    x = clips([300])
    torch.testing.assert_close(Embedder(tmp_path).embed(x), Embedder(model).embed(x))
    assert Embedder(tmp_path, drop_path=0.5).model.config.drop_path == 0.5
    assert Embedder("ssast_frame_tiny", depth=1).width == 192


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"level": "word"}, "level must be"),
        ({"layer": 3}, "from 1 to 2, got 3"),
        ({"layer": 0}, "from 1 to 2, got 0"),
        ({"layer": True}, "got True"),
        ({"long": "cut"}, "long must be"),
        ({"overlap": 1.0}, r"overlap must lie in \[0, 1\)"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"pad": "drop"}, "pad must be one of 'attend', 'exclude'"),
    ],
)
def test_refused_settings(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Embedder(build("audiomae"), **options)


def test_other_refusals():
    with pytest.raises(TypeError, match="no option 'colour'"):
        Embedder(build("audiomae"), colour="red")
    with pytest.raises(ValueError, match="which has no classes"):
        Tagger(build("audiomae"))
    with pytest.raises(ValueError, match="clip 1 has no frame"):
        Embedder(build("audiomae")).embed(clips([20, 0]))
    with pytest.raises(ValueError, match="16 mel bins"):
        Embedder(build("audiomae")).embed(clips([20], bins=8))
    with pytest.raises(ValueError, match="scores must be"):
        Tagger(audiomae.create_classifier("audiomae_base", 5, **SMALL), scores="raw")


@pytest.fixture(scope="module")
def embedder():
    return Embedder(audiomae.create_model("audiomae_base", width=32, heads=2, depth=1, decoder="none"))


def test_waveforms_are_tensors_or_arrays(embedder):
    """In float32 or float64, as a batch or one by one."""
    rows = torch.randn(2, 8000) / 9
    expected = embedder(rows)
    for given in (rows.numpy(), list(rows), list(rows.numpy()), [rows[0].numpy(), rows[1]]):
        torch.testing.assert_close(embedder(given), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(embedder(rows.numpy().astype(np.float64)), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(embedder(rows[0].numpy()), expected[:1], rtol=0, atol=1e-5)
    assert embedder([]).shape == (0, 32) and embedder(torch.zeros(0, 8000)).shape == (0, 32)
    assert embedder(torch.zeros(8000)).isfinite().all()  # silence


NAN = torch.tensor([0.0, float("nan")]).repeat(4000)


@pytest.mark.parametrize(
    ("waveform", "lengths", "sentence"),
    [
        (
            [torch.zeros(8000), torch.zeros(399)],
            None,
            "clip 1 has 399 samples, fewer than one frame of 25 ms",
        ),
        ([torch.zeros(2, 8000)], None, r"clip 0 has shape \(2, 8000\), but mono"),
        (torch.zeros(1, 2, 8000), None, r"clip 0 has shape \(2, 8000\), but mono"),
        (torch.tensor(0.5), None, "clip 0 has 1 sample,"),
        ([torch.zeros(8000), NAN], None, "clip 1 holds NaN"),
        (torch.full((2, 8000), float("inf")), None, "clip 0 holds NaN or infinity"),
        (torch.zeros(8000, dtype=torch.int16), None, "scale integer samples"),
        ([np.zeros(8000, np.int16)], None, "scale integer samples"),
        ("clip.wav", None, "got a str; audiomae.data.load_audio reads files"),
        ([0.5] * 8000, None, "got a float"),
        (torch.zeros(2, 8000), [8000], "one integer up to 8000 for each of 2 clips"),
        (torch.zeros(2, 8000), [8000, 9000], r"one integer .* got \[8000, 9000\]"),
        (torch.zeros(2, 8000), [8000, -5], "one integer up to 8000"),
        (torch.zeros(2, 8000), [8000.0, 700.0], "one integer up to 8000"),
        (torch.zeros(2, 8000), [8000, 0], "clip 1 has 0 samples"),
        ([torch.zeros(8000)], [8000], "not to a list of clips"),
    ],
)
def test_refused_waveforms(embedder, waveform, lengths, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        embedder(waveform, lengths)
