"""unshuffle, masked_mse and info_nce of the native CPU library: the references' values and gradients."""

import sys
from functools import partial

import audiomae_kernels as ak
import pytest
import torch
from audiomae_kernels import _native
from budget import assert_within_budget, evaluate
from kernel_cases import CASES, cases, choose, info_nce_case, patch_case, unshuffle_case
from tiers import OTHER_TIERS, check_in_tier

OPS = ("unshuffle", "masked_mse", "info_nce")
DTYPES = (torch.float32, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.why_not() or "loaded")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that C++ asks for is NaN too, so that an element which no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.ops.aten.new_empty(torch.zeros(1), [4]).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    as_bits = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    assert torch.equal(actual.contiguous().view(as_bits), expected.contiguous().view(as_bits))


@pytest.mark.parametrize("case", cases(*OPS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget(case, dtype):
    assert_within_budget(case.call("native"), case.reference(), partial(case.tensors, dtype), case.wrt())


# --- determinism, tiers --------------------------------------------------------------------------------

LARGE = [
    unshuffle_case("large", 9, 30, 150, 72),
    patch_case("masked_mse", "large", 160, 128, (16, 16), B=4, K=70),
    info_nce_case("large", 3, 290, 70, "target"),
    info_nce_case("large", 3, 290, 70, "prediction"),
]


def check_threads(case, dtype):
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(evaluate(case.call("native"), case.tensors(dtype), case.wrt()))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert_same_bits(other[name], value)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.op)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(case, dtype):
    check_threads(case, dtype)


def check_everything():
    """Run in a process of its own, once per tier."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pred = torch.randn(1, 8192, 8).requires_grad_()
    ak.info_nce(pred, torch.randn(1, 8192, 8), impl="native").backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux, bytes on macOS
    assert grown * (1 if sys.platform == "darwin" else 1024) < 8192 * 8192, "The logits were stored."
    for dtype in DTYPES:
        for case in CASES:
            if case.op in OPS:
                draw = partial(case.tensors, dtype)
                assert_within_budget(case.call("native"), case.reference(), draw, case.wrt())
        for case in LARGE:
            check_threads(case, dtype)


@pytest.mark.parametrize("tier", OTHER_TIERS)
def test_every_tier(tier):
    check_in_tier("test_native_ops", tier)


# --- ids that a caller should not give -----------------------------------------------------------------

BAD = (-1, 24, 2**40, -(2**62))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unshuffle_leaves_ids_out_of_range_out(dtype):
    B, L, D, bad = 2, 24, 33, len(BAD)
    good = choose(B, 5, L)
    ids = torch.cat([torch.tensor(BAD).expand(B, bad), good], 1)
    tokens, mask_token, pos = torch.randn(B, bad + 5, D).to(dtype), torch.randn(D), torch.randn(L, D)
    tokens[:, :bad] = float("nan")  # read by nobody
    out, grad = ak.unshuffle(tokens, ids, mask_token, pos, impl="native"), torch.randn(B, L, D).to(dtype)
    assert_same_bits(out, ak.unshuffle(tokens[:, bad:], good, mask_token, pos, impl="reference"))
    backward = torch.ops.audiomae_native.unshuffle_backward
    for sums in (True, False):
        d_tokens, d_mask_token, d_pos = backward(grad, ids, mask_token, pos, True, sums, sums)
        assert_same_bits(d_tokens[:, :bad], torch.zeros(B, bad, D, dtype=dtype))
        assert_same_bits(d_tokens[:, bad:], torch.stack([g[i] for g, i in zip(grad, good, strict=True)]))
        if sums:
            for name, d in (("mask_token", d_mask_token), ("pos", d_pos)):
                inputs = {"tokens": tokens[:, bad:], "mask_token": mask_token, "pos": pos}
                function = partial(ak.unshuffle, ids_keep=good, impl="native")
                assert_same_bits(d, evaluate(function, inputs, [name], grad)[f"grad of {name}"])


def test_unshuffle_takes_the_last_of_duplicates():
    tokens, pos, grad = torch.randn(1, 3, 4), torch.zeros(3, 4), torch.randn(1, 3, 4)
    ids = torch.tensor([[1, 0, 1]])
    out = ak.unshuffle(tokens, ids, torch.zeros(4), pos, impl="native")
    assert_same_bits(out[0, :2], tokens[0, [1, 2]])
    inputs = (grad, ids, torch.zeros(4), pos)
    options = {"output_mask": [True, True, True]}
    expected = torch.ops.audiomae.unshuffle_backward(*inputs, **options, impl="reference")
    for a, e in zip(
        torch.ops.audiomae.unshuffle_backward(*inputs, **options, impl="native"), expected, strict=True
    ):
        assert_same_bits(a, e)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_mse_takes_ids_out_of_range_for_silence(normalize, dtype):
    patch = (3, 4)
    spectrogram = torch.full((2, 12, 24), 7.0)  # 24 patches; its neighbours in memory would show
    pred = torch.randn(2, len(BAD), 12).to(dtype)
    ids = torch.tensor(BAD).expand(2, len(BAD))
    function = partial(
        ak.masked_mse,
        spectrogram=spectrogram,
        ids_masked=ids,
        patch=patch,
        normalize=normalize,
        impl="native",
    )
    results = evaluate(function, {"pred": pred}, ["pred"])
    torch.testing.assert_close(results["output"], pred.float().square().mean(), rtol=8 * EPS, atol=0)
    torch.testing.assert_close(results["grad of pred"], (pred.float() * 2 / pred.numel()).to(dtype))


# --- values at the edges -------------------------------------------------------------------------------


def test_rounding_to_bfloat16_is_to_nearest_even():
    """Ties, the step to infinity, NaNs whose payload rounding would carry away, signed zeros."""
    bits = [
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0x7F7FFFFF,
        0x7F800001,
        0x7FFFFFFF,
        -1,
        0x00008000,
        1,
        0x7F800000,
    ]
    pos = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    pos = torch.cat([pos, -pos, torch.randn(100)])[None]
    zero = torch.zeros(pos.shape[1])
    out = ak.unshuffle(
        torch.zeros(1, 0, len(zero)).bfloat16(), torch.zeros(1, 0).long(), zero, pos, impl="native"
    )
    expected = pos.bfloat16()
    assert torch.equal(out[0].isnan(), expected.isnan())
    assert_same_bits(out[0].nan_to_num(1.0), expected.nan_to_num(1.0))


def test_the_target_of_silence_is_zero():
    """A constant patch: its mean is one rounding off, and dividing by sqrt(1e-6) would show it 1000-fold."""
    pred, spectrogram = torch.randn(1, 2, 77), torch.full((1, 14, 11), -15.94)
    function = partial(ak.masked_mse, spectrogram=spectrogram, patch=(7, 11), impl="native")
    loss = function(pred, ids_masked=torch.tensor([[0, 1]]))
    torch.testing.assert_close(loss, pred.square().mean(), rtol=4 * EPS, atol=0)


def test_a_nan_is_never_lost():
    for row in range(2):
        pred, target = torch.randn(1, 20, 9), torch.randn(1, 20, 9)
        pred[0, 7 * row, 3] = float("nan")
        for over in ("target", "prediction"):
            assert ak.info_nce(pred, target, over=over, impl="native").isnan()
    loss = ak.masked_mse(
        pred[:, :2, :6], torch.randn(1, 6, 2), torch.tensor([[0, 1]]), patch=(3, 2), impl="native"
    )
    assert not loss.isnan()
    pred[0, 1, 5] = float("nan")
    loss = ak.masked_mse(
        pred[:, :2, :6], torch.randn(1, 6, 2), torch.tensor([[0, 1]]), patch=(3, 2), impl="native"
    )
    assert loss.isnan()


def test_info_nce_of_large_and_of_no_values():
    pred, target = 1e4 * torch.randn(2, 300, 4), torch.randn(2, 300, 4)
    for over in ("target", "prediction"):
        actual, expected = (
            ak.info_nce(pred.to(d), target.to(d), over=over) for d in (torch.float32, torch.float64)
        )
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    loss = ak.info_nce(torch.zeros(2, 5, 0), torch.zeros(2, 5, 0), impl="native")
    torch.testing.assert_close(loss, torch.tensor(5.0).log())


# --- what it does not serve ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_half_precision_is_the_reference_s(op):
    case = next(case for case in CASES if case.op == op)
    tensors = case.tensors(torch.float16)
    assert torch.equal(case.call()(**tensors), case.call("reference")(**tensors))
    with pytest.raises(
        RuntimeError, match=r"impl='native' cannot run\. It serves float32, bfloat16, not float16\."
    ):
        case.call("native")(**tensors)


def test_a_half_precision_target_is_refused():
    pred, half = torch.zeros(1, 1, 6), torch.zeros(1, 3, 2).half()
    for function in (
        lambda **impl: ak.masked_mse(pred, half, torch.zeros(1, 1).long(), patch=(3, 2), **impl),
        lambda **impl: ak.info_nce(pred, half.view(1, 1, 6), **impl),
    ):
        function()
        with pytest.raises(RuntimeError, match=r"impl='native' cannot run\. It serves float32 and bfloat16"):
            function(impl="native")


IDS, X, V = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    "op, arguments, message",
    [
        ("unshuffle", (X[0], IDS, V, X[0]), r"tokens of shape \(batch, tokens, width\)"),
        ("unshuffle", (X, IDS[:1], V, X[0]), "ids_keep of 2 clips"),
        ("unshuffle", (X[:, :2], IDS, V, X[0]), "an id for each of 2 kept tokens"),
        ("unshuffle", (X.double(), IDS, V, X[0]), "float32 or bfloat16 tokens, got Double"),
        ("unshuffle", (X, IDS.int(), V, X[0]), "int64 ids_keep, got Int"),
        ("unshuffle_backward", (X, IDS, V, X[0, :2], True, True, True), "gradients of 2 tokens a clip"),
        (
            "masked_mse",
            (X, torch.zeros(2, 4, 4), IDS, 2, 3, 2, 3, True),
            r"shape \(batch \* masks, masked, 6\)",
        ),
        (
            "masked_mse",
            (X, torch.zeros(2, 4, 4).half(), IDS, 2, 2, 2, 2, True),
            "bfloat16 .* spectrograms, got",
        ),
        (
            "masked_mse",
            (X[..., :1], torch.zeros(2, 4, 4), IDS, 1, 1, 1, 1, True),
            "one value has no variance",
        ),
        (
            "masked_mse",
            (X, torch.zeros(2, 4, 4), IDS, 5, 2, 2, 2, True),
            "masked_mse expects a patch that fits",
        ),
        ("masked_mse_backward", (V, X, torch.zeros(2, 4, 4), IDS, 2, 2, 2, 2, True), "one float32 value"),
        ("info_nce", (X, X[:, :2], "target"), r"of one shape \(batch, masked, values\)"),
        ("info_nce", (X, X, "time"), "over to be target or prediction, got time"),
        ("info_nce_backward", (V[0], X, X, X[0], "target", True, True), r"logsumexp of shape \(2, 3\)"),
    ],
)
def test_the_library_checks_its_arguments(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.audiomae_native, op)(*arguments)
