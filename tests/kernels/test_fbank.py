"""fbank of the native CPU library: float64's values, and the refusals."""

from functools import partial

import audiomae_kernels as ak
import pytest
import torch
from audiomae_kernels import _native
from audiomae_kernels.fbank import _native_constants, fbank_ref
from tiers import OTHER_TIERS, check_in_tier

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.why_not() or "loaded")

native, reference = partial(ak.fbank, impl="native"), partial(ak.fbank, impl="reference")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that C++ asks for is NaN too, so that an element which no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.ops.aten.new_empty(torch.zeros(1), [4]).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def assert_right(waveform, **settings):
    """Powers beside float64's: twice what the reference is off, and 8 units of the largest, for the FFT."""
    actual = native(waveform, **settings)
    exact, eager = reference(waveform.double(), **settings).exp(), reference(waveform, **settings)
    assert actual.dtype == torch.float32 and actual.shape == eager.shape
    if actual.numel():
        error, of_eager = ((x.double().exp() - exact).abs().max() for x in (actual, eager))
        assert error <= 2 * of_eager + 8 * torch.finfo(torch.float32).eps * exact.max(), (error, settings)


@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17, 33, 63, 998])
def test_every_number_of_frames(frames):
    assert_right(noise(2, 400 + 160 * (frames - 1)))
    assert_right(noise(400 + 160 * (frames - 1) + 159))


@pytest.mark.parametrize("fft_size", [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
def test_every_size_of_fft(fft_size):
    for size in {fft_size, max(2, fft_size // 2 + 1), max(2, fft_size - 3)}:
        settings = {"frame_length": (size + 0.5) / 16, "frame_shift": 3.1, "mel_bins": 40}
        assert_right(noise(1, size + 700, seed=size), **settings)


@pytest.mark.parametrize("mel_bins", [1, 15, 16, 17, 40, 80, 128, 600])
def test_every_number_of_filters(mel_bins):
    assert_right(noise(1, 4000), mel_bins=mel_bins)
    assert_right(noise(1, 4000), mel_bins=mel_bins, low_freq=100.0, high_freq=3000.0, preemphasis=0.5)


@pytest.mark.parametrize("hertz", [440.0, 1000.0, 2000.0, 5000.0, 7800.0])
def test_a_tone_is_where_it_belongs(hertz):
    """In the filter whose centre is nearest on the mel scale, 1127 ln(1 + f / 700)."""
    edges = 1127 * torch.log1p(torch.tensor([20.0, 8000.0, hertz], dtype=torch.float64) / 700)
    expected = (edges[2] - edges[0]) / (edges[1] - edges[0]) * 129 - 1
    mel = native(torch.cos(2 * torch.pi * hertz / 16000 * torch.arange(4000)))
    assert (mel.argmax(1) - expected).abs().max() <= 0.5 + 0.2  # a bin of 31 Hz is up to 0.4 of a filter here


def test_layouts():
    batch = noise(3, 5000)
    expected = native(batch)
    apart = torch.stack([batch, torch.full_like(batch, float("nan"))], -1)[..., 0]
    gaps = torch.full((3, 5007), float("nan"))
    gaps[:, 4:5004] = batch
    raw = bytearray(b"\xff" + batch.numpy().tobytes() + b"\xff\xff\xff")
    misaligned = torch.frombuffer(raw, dtype=torch.float32, offset=1, count=batch.numel()).view(3, 5000)
    for same in (apart, gaps[:, 4:5004], batch.T.contiguous().T, misaligned):
        assert torch.equal(native(same), expected)
    assert torch.equal(native(batch[:1].expand(4, -1)), expected[:1].expand(4, -1, -1))
    assert native(noise(0, 5000)).shape == (0, 29, 128)


def test_a_frame_gives_the_same_bits_wherever_it_lies():
    long = noise(160 * 40 + 400)
    whole = native(long)
    for frame in (0, 1, 7, 16, 31, 40):
        assert torch.equal(native(long[frame * 160 : frame * 160 + 400])[0], whole[frame])
    assert torch.equal(native(long.repeat(3, 1))[2], whole)


def check_threads():
    batch, results = noise(5, 30000), []
    before = torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(native(batch))
    torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results[1:])


def test_the_number_of_threads_changes_no_bit():
    check_threads()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_visible_and_alone(value):
    batch = noise(2, 16000)
    clean = native(batch)
    batch[1, 8000] = value
    mel = native(batch)
    touched = torch.zeros(98, dtype=torch.bool)
    touched[(8000 - 399 + 159) // 160 : 8000 // 160 + 1] = True
    assert mel[1, touched].isnan().all()
    assert torch.equal(mel[1, ~touched], clean[1, ~touched]) and torch.equal(mel[0], clean[0])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, 1e4, 1e16])
def test_extreme_levels(scale):
    waveform = noise(1, 4000) * scale
    actual, exact = native(waveform), reference(waveform.double())
    if scale == 1e16:  # powers beyond 1e30, whose sum still fits
        assert exact.max() > 69
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-3)


def check_everything():
    """Run in a process of its own, once per tier."""
    for frames in (1, 17, 50):
        assert_right(noise(2, 400 + 160 * (frames - 1)))
    for rate in (8000, 22050, 48000):
        assert_right(noise(1, rate), sample_rate=rate, window="povey")
    check_threads()


@pytest.mark.parametrize("tier", OTHER_TIERS)
def test_other_tiers(tier):
    check_in_tier("test_fbank", tier)


# --- dispatch, refusals ---------------------------------------------------------------------------------


def test_which_implementation_serves():
    lines = {line.name: line for line in ak.implementations("fbank")}
    assert lines["native"].chosen and lines["reference"].available and not lines["triton"].available
    assert ak.implementations("fbank", "cpu", torch.float64)[-1].chosen
    assert ak.implementations("fbank", "cuda")[-1].chosen
    batch = noise(2, 4000)
    assert torch.equal(ak.fbank(batch), native(batch)) and not torch.equal(native(batch), reference(batch))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: native(noise(1, 4000).requires_grad_()), "It has no gradient"),
        (lambda: native(noise(1, 4000).double()), "It serves float32, not float64"),
        (lambda: native(noise(1, 20000), frame_length=600.0), "at most 8192 samples, where .* takes 16384"),
        (lambda: torch.func.vmap(native)(noise(2, 4000)), r"no tensors of torch\.func"),
        (lambda: ak.fbank(noise(1, 4000), impl="triton"), "There is no triton implementation of fbank"),
    ],
)
def test_native_says_what_it_does_not_serve(given, message):
    with pytest.raises(RuntimeError, match=message):
        given()


def test_without_gradients_a_parameter_is_a_waveform():
    waveform = torch.nn.Parameter(noise(1, 4000))
    with torch.no_grad():
        assert torch.equal(native(waveform), native(waveform.detach()))
    assert torch.equal(ak.fbank(waveform), reference(waveform.detach()))


def arguments(**changes):
    names = ("window", "first", "bins", "weights")
    constants = dict(
        zip(names, _native_constants(16000.0, "hanning", 128, 20.0, 8000.0, 400, 512), strict=True)
    )
    given = {"waveform": noise(1, 4000), **constants, "fft_size": 512, "shift": 160, "preemphasis": 0.97}
    return given | {"remove_dc_offset": True} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"waveform": torch.zeros(4000)}, r"shape \(batch, samples\), got \(4000,\)"),
        ({"waveform": torch.zeros(1, 4000).bfloat16()}, "float32 CPU tensors, got BFloat16"),
        ({"waveform": torch.zeros(1, 399)}, "frames of 1 to 399 samples"),
        ({"first": torch.zeros(129, dtype=torch.int32)}, "int64"),
        ({"first": torch.zeros(128, dtype=torch.int64)}, r"first \(filters \+ 1,\)"),
        ({"first": torch.full((129,), 2**62)}, "filter 0 is not"),
        ({"bins": torch.full((128,), -1)}, "filter 0 is not"),
        ({"bins": torch.full((128,), 256)}, "filter 0 is not"),
        ({"bins": torch.full((128,), 2**63 - 1)}, "filter 0 is not"),
        ({"fft_size": 511}, "power of two"),
        ({"fft_size": 256}, "power of two"),
        ({"fft_size": 16384}, "to 8192"),
        ({"shift": 0}, "every 0"),
    ],
)
def test_the_library_checks_what_it_reads(changes, message):
    torch.ops.audiomae_native.fbank.default(**arguments())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.audiomae_native.fbank.default(**arguments(**changes))


def test_the_reference_is_differentiable_in_float64():
    settings = {
        "sample_rate": 16000.0,
        "window": "hanning",
        "mel_bins": 8,
        "frame_length": 25.0,
        "frame_shift": 10.0,
        "low_freq": 20.0,
        "high_freq": 8000.0,
        "preemphasis": 0.97,
        "remove_dc_offset": True,
    }
    waveform = noise(2, 720).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fbank_ref(x, **settings), waveform, fast_mode=True)
