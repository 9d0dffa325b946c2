"""The batched fbank against torchaudio's, and the front end's normalisation, padding and lengths."""

import json
from functools import lru_cache

import pytest
import torch
from audiomae_kernels.fbank import reference
from torch import Tensor

from audiomae import frontend
from audiomae.data.audio import decode, recordings
from audiomae.frontend import FRONTENDS, Frontend, fbank, num_frames

torchaudio = pytest.importorskip("torchaudio")
kaldi = pytest.importorskip("torchaudio.compliance.kaldi")

RATES = (8000, 16000, 22050, 44100, 48000)


def kaldi_fbank(waveform: Tensor, sample_rate: int, window: str = "hanning") -> Tensor:
    """One clip (S,) -> (T, 128) by torchaudio, with the arguments that the published code gives."""
    return kaldi.fbank(
        waveform.unsqueeze(0),
        htk_compat=True,
        use_energy=False,
        window_type=window,
        num_mel_bins=128,
        dither=0.0,
        sample_frequency=sample_rate,
    )


@lru_cache(maxsize=1)
def sounds() -> dict[str, tuple[Tensor, int]]:
    """At most 2 s of every recording."""
    clips = {}
    for path in recordings():
        rate = decode(path, 0, 1)[1]
        clips[path.stem] = decode(path, 0, 2 * rate)
    return clips


def clip(name: str, sample_rate: int) -> Tensor:
    if name == "silence":
        return torch.zeros(sample_rate)
    if name == "noise":
        return torch.randn(sample_rate, generator=torch.Generator().manual_seed(0)) * 0.1
    if name == "faint noise on an offset":  # frames at the floor, where a wrong order of operations shows
        return 0.1 + torch.randn(sample_rate, generator=torch.Generator().manual_seed(1)) * 1e-6
    waveform, rate = sounds()[name]
    return torchaudio.functional.resample(waveform, rate, sample_rate)


def judge(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """Error budget from float64: torchaudio's own float32 error and a quarter more on average, and four times its
    largest, which of one clip is a matter of luck; one rounding of the largest value beside them."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    errors, of_theirs = (ours - truth).abs(), (theirs - truth).abs()
    rounding = truth.abs().max() * torch.finfo(torch.float32).eps
    assert errors.max() <= 4 * of_theirs.max() + rounding, (
        f"{errors.max():.2e}, torchaudio {of_theirs.max():.2e}"
    )
    assert errors.mean() <= 1.25 * of_theirs.mean() + rounding, (
        f"{errors.mean():.2e}, torchaudio {of_theirs.mean():.2e}"
    )


CLIPS = [path.stem for path in recordings()] + ["silence", "noise", "faint noise on an offset"]


@pytest.mark.parametrize("window", ["hanning", "povey"])
@pytest.mark.parametrize("sample_rate", RATES)
@pytest.mark.parametrize("name", CLIPS)
def test_fbank_is_torchaudios(name, sample_rate, window):
    waveform = clip(name, sample_rate)
    theirs = kaldi_fbank(waveform, sample_rate, window)
    plain = fbank(waveform, sample_rate, window=window, impl="reference")
    torch.testing.assert_close(plain, theirs, rtol=0, atol=1e-4)
    judge(
        fbank(waveform, sample_rate, window=window),
        theirs,
        kaldi_fbank(waveform.double(), sample_rate, window),
    )
    judge(plain, theirs, kaldi_fbank(waveform.double(), sample_rate, window))


@pytest.mark.parametrize("sample_rate", RATES)
def test_fbank_in_float64(sample_rate):
    waveform = clip("speech-vm-options", sample_rate).double()
    ours, theirs = fbank(waveform, sample_rate), kaldi_fbank(waveform, sample_rate)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("preemphasis", "remove_dc_offset", "frame_length"),
    [(0.0, True, 25.0), (0.9, False, 25.0), (0.97, True, 32.0)],
)
def test_fbank_settings(preemphasis, remove_dc_offset, frame_length):
    waveform = clip("speech-vm-options", 16000)
    common = {
        "remove_dc_offset": remove_dc_offset,
        "frame_length": frame_length,
        "frame_shift": 12.5,
        "low_freq": 60.0,
        "high_freq": 7000.0,
    }

    def kaldis(waveform):
        settings = common | {"num_mel_bins": 40, "preemphasis_coefficient": preemphasis}
        return kaldi.fbank(waveform.unsqueeze(0), window_type="hanning", **settings)

    settings = common | {"mel_bins": 40, "preemphasis": preemphasis}
    theirs = kaldis(waveform)
    torch.testing.assert_close(fbank(waveform, impl="reference", **settings), theirs, rtol=0, atol=1e-4)
    judge(fbank(waveform, **settings), theirs, kaldis(waveform.double()))


def test_a_batch_gives_the_bits_of_each_clip():
    batch = torch.stack([clip("noise", 16000).repeat(10).roll(i * 777) * (i + 1) / 8 for i in range(3)])
    batched = fbank(batch)
    assert batched.shape == (3, 998, 128)
    for waveform, mel in zip(batch, batched, strict=True):
        assert torch.equal(fbank(waveform), mel)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_has_a_gradient_or_a_transform_is_the_references():
    batch = torch.stack([clip("faint noise on an offset", 16000), clip("speech-vm-options", 16000)[:16000]])
    given, mel = batch.clone(), fbank(batch, impl="reference")
    assert torch.equal(mel, fbank(batch.clone().requires_grad_()))
    assert torch.equal(mel[0], torch.func.vmap(fbank)(batch)[0])
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(mel, fbank(torch.autograd.forward_ad.make_dual(batch, torch.ones_like(batch))))
    fbank(batch)
    assert torch.equal(batch, given)


@pytest.mark.parametrize("block", [2**9, 2**13, 2**16])
def test_blocks_do_not_show(monkeypatch, block):
    # Short clips share a block, long ones span several: matrix products of other sizes may round another way.
    batch = clip("noise", 16000)[:12000].reshape(5, 2400)
    whole = fbank(batch, impl="reference")
    monkeypatch.setattr(reference, "_BLOCK_CPU", block)
    torch.testing.assert_close(fbank(batch, impl="reference"), whole, rtol=0, atol=1e-5)


def test_strided_and_empty_batches():
    waveform = torch.randn(4000, 3, generator=torch.Generator().manual_seed(2))
    assert torch.equal(fbank(waveform.T), fbank(waveform.T.contiguous()))
    expanded = waveform[:, 0].expand(3, -1)
    assert torch.equal(fbank(expanded), fbank(expanded.contiguous()))
    untouched = waveform.clone()
    Frontend.named("audioset")(waveform.T)
    assert torch.equal(waveform, untouched)
    assert fbank(torch.empty(0, 4000)).shape == (0, 23, 128)
    assert Frontend.named("audioset")(torch.empty(0, 4000)).shape == (0, 1024, 128)


@pytest.mark.parametrize("samples", [400, 401, 559, 560, 16000, 160000])
def test_num_frames(samples):
    assert num_frames(samples, 16000) == len(kaldi_fbank(torch.zeros(samples), 16000))
    counts = num_frames(torch.tensor([[samples, 399], [0, 400]]), 16000)
    assert counts.tolist() == [[num_frames(samples, 16000), 0], [0, 1]]


def test_gradient():
    waveform = torch.randn(2, 720, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(lambda x: fbank(x, mel_bins=8), waveform.requires_grad_(), fast_mode=True)
    single = torch.randn(2, 16000).requires_grad_()
    Frontend.named("speech_commands")(single, lengths=[16000, 9000]).sum().backward()
    assert single.grad[0].abs().sum() > 0 and single.grad.isfinite().all()
    assert not single.grad[1, 9000:].any()


@pytest.mark.parametrize("lengths", [None, [8000, 5000]])
def test_compiles_to_one_graph(lengths):
    batch = torch.stack([clip("noise", 8000), clip("noise", 8000).flip(0)])
    lengths = lengths and torch.tensor(lengths)
    extract = Frontend.named("speech_commands", frames=64)
    compiled = torch.compile(extract, fullgraph=True, backend="aot_eager")
    judge(compiled(batch, lengths), extract(batch, lengths), extract(batch.double(), lengths))


def test_the_cache_holds_ordinary_tensors():
    """Constants made in inference mode or from fake tensors would break the next training step."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    reference._cached_constants.cache_clear()
    with FakeTensorMode() as mode:
        assert fbank(mode.from_tensor(torch.zeros(2, 1600))).shape == (2, 8, 128)
    with torch.inference_mode():
        fbank(torch.zeros(2, 1600), impl="reference")
    fbank(torch.randn(2, 1600).requires_grad_()).sum().backward()


def test_autocast_has_no_effect():
    waveform = clip("noise", 16000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fbank(waveform)
    assert torch.equal(inside, fbank(waveform))


@pytest.mark.parametrize("name", [name for name in FRONTENDS if name != "mae_ast"])
def test_normalised_as_published(name):
    settings = FRONTENDS[name]
    waveform = clip("speech-vm-options", 16000)[:24000]

    def expected(waveform):
        mel = kaldi_fbank(waveform - waveform.mean(), 16000)[: settings.frames]
        padded = torch.nn.functional.pad(mel, (0, 0, 0, settings.frames - len(mel)))
        return (padded - settings.mean) / (2 * settings.std)

    ours = settings(waveform)
    assert torch.equal(settings(waveform.unsqueeze(0))[0], ours)
    judge(ours, expected(waveform), expected(waveform.double()))
    kept = min(num_frames(len(waveform)), settings.frames)
    assert settings.num_frames(len(waveform)) == kept
    if name == "audioset":  # the padding is zero before normalising: 4.2677393 / (2 * 4.5689974)
        torch.testing.assert_close(ours[kept:], torch.full((1024 - kept, 128), 0.4670324), rtol=0, atol=1e-6)


def test_mae_ast_is_left_as_it_is():
    waveform = clip("speech-vm-options", 16000)[:20000] + 0.05
    expected = kaldi_fbank(waveform, 16000, "povey")
    judge(FRONTENDS["mae_ast"](waveform), expected, kaldi_fbank(waveform.double(), 16000, "povey"))


def test_the_mean_of_the_waveform_is_removed():
    settings = {"frames": None, "mean": None, "std": None}
    waveform = clip("speech-vm-options", 16000)[:20000].double()
    removed = Frontend.named("audioset", **settings)(waveform + 0.25)
    torch.testing.assert_close(removed, fbank(waveform - waveform.mean()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["audioset", "speech_commands", "mae_ast"])
def test_a_clip_in_a_batch_gives_what_it_gives_alone(name):
    extract = FRONTENDS[name]
    speech = clip("speech-vm-options", 16000).repeat(2) + 0.01
    lengths = [64000, 400, 16000, 30001, 63999]
    batch = torch.full((5, 64000), float("nan"))  # what lies past a clip's end must not be read
    for row, length in zip(batch, lengths, strict=True):
        row[:length] = speech[:length] * 0.5
    together = extract(batch, lengths)
    for mel, row, length in zip(together, batch, lengths, strict=True):
        alone = extract(row[:length])
        valid = extract.num_frames(length)
        # Matrix products of other sizes may round another way, and nothing else may differ.
        torch.testing.assert_close(mel[:valid], alone[:valid], rtol=0, atol=1e-5)
        pad = 0.0 if extract.mean is None else -extract.mean / (2 * extract.std)
        torch.testing.assert_close(mel[valid:], torch.full_like(mel[valid:], pad), rtol=0, atol=1e-6)
    assert torch.equal(extract(batch, torch.tensor(lengths, dtype=torch.int32)), together)


def test_zeros_do_not_change_the_rounding_of_a_mean():
    generator = torch.Generator().manual_seed(4)
    for samples in (1, 1023, 1024, 1025, 50001):
        waveform = torch.rand(2, samples, generator=generator)
        padded = torch.nn.functional.pad(waveform, (0, 70000))
        assert torch.equal(frontend._clip_sums(waveform), frontend._clip_sums(padded))
        torch.testing.assert_close(frontend._clip_sums(waveform), waveform.double().sum(1, keepdim=True))


def test_settings_survive_json():
    for settings in [*FRONTENDS.values(), Frontend(labels=("dog", "rain"), frames=100)]:
        assert Frontend.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ValueError, match="unknown front-end settings dither"):
        Frontend.from_dict({"dither": 0.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": "hann"}, "'hanning'"),
        ({"mean": 1.0}, "both, or neither"),
        ({"mean": 1.0, "std": 0.0}, "positive"),
        ({"frames": 0}, "frames is 0"),
        ({"sample_rate": 16000.0}, "positive integer"),
        ({"labels": "dog"}, "sequence of strings"),
        ({"labels": ["dog", "\x1b[2Jrain"]}, r"'\\x1b\[2Jrain' holds control characters"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Frontend(**settings)


def test_unknown_name():
    with pytest.raises(ValueError, match="choose one of audioset"):
        Frontend.named("audio-set")


@pytest.mark.parametrize(
    ("waveform", "settings", "error", "message"),
    [
        (torch.zeros(399), {}, ValueError, "399 samples, fewer than one frame of 400"),
        (torch.zeros(2, 0), {}, ValueError, "0 samples"),
        (torch.zeros(1, 2, 1600), {}, ValueError, r"shape \(1, 2, 1600\)"),
        (torch.tensor(0.0), {}, ValueError, r"shape \(\)"),
        (torch.zeros(1600, dtype=torch.int16), {}, TypeError, "int16"),
        (torch.zeros(1600, dtype=torch.bfloat16), {}, TypeError, "bfloat16"),
        (torch.zeros(1600), {"window": "hann"}, ValueError, "unknown window 'hann'"),
        (torch.zeros(1600), {"high_freq": 9000.0}, ValueError, "8000"),
        (torch.zeros(1600), {"mel_bins": 0}, ValueError, "at least one"),
        (torch.zeros(1600), {"frame_shift": 0.0}, ValueError, "at least 2 every 1"),
    ],
)
def test_bad_input(waveform, settings, error, message):
    with pytest.raises(error, match=message):
        fbank(waveform, 16000, **settings)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1600], ValueError, r"\(1,\)"),
        ([1600, 399], ValueError, "clip 1 has 399"),
        ([1601, 400], ValueError, "clip 0 has 1601"),
        ([1600.0, 400.0], TypeError, "integers"),
    ],
)
def test_bad_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        Frontend()(torch.zeros(2, 1600), lengths)


def test_nan_stays_visible():
    waveform = torch.zeros(2, 16000)
    waveform[1, 8000] = float("nan")
    mel = fbank(waveform)
    assert mel[0].isfinite().all()
    assert mel[1, 48:51].isnan().all() and mel[1, :46].isfinite().all() and mel[1, 51:].isfinite().all()
