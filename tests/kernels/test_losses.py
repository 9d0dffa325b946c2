"""masked_mse and info_nce against sums of one term at a time."""

import math
import statistics

import audiomae_kernels as ak
import pytest
import torch
from budget import evaluate
from kernel_cases import by_slices, cases


def mse_by_terms(pred, spectrogram, ids_masked, patch, stride=None, normalize=True):
    terms = []
    targets = by_slices(spectrogram, ids_masked, patch, stride).tolist() if ids_masked.numel() else []
    for row, row_pred in zip(targets, pred.tolist(), strict=False):
        for target, prediction in zip(row, row_pred, strict=True):
            if normalize:
                mean, var = statistics.fmean(target), statistics.variance(target)
                target = [(x - mean) / math.sqrt(var + 1e-6) for x in target]
            terms += [(p - x) ** 2 for p, x in zip(prediction, target, strict=True)]
    return math.fsum(terms) / max(len(terms), 1)


def info_nce_by_terms(pred, target, over):
    terms = []
    for p, t in zip(pred, target, strict=True):
        for i in range(len(p)):
            logits = [
                float(p[i] @ x) if over == "target" else float(x @ t[i]) for x in (t, p)[over != "target"]
            ]
            highest = max(logits)
            terms.append(highest + math.log(math.fsum(math.exp(x - highest) for x in logits)) - logits[i])
    return math.fsum(terms) / max(len(terms), 1)


@pytest.mark.parametrize("case", cases("masked_mse"))
def test_masked_mse_definition(case):
    tensors = case.tensors()
    actual = case.call("reference")(**tensors)
    assert actual.shape == () and actual.dtype == torch.float64
    assert actual.item() == pytest.approx(mse_by_terms(**tensors, **case.options), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("case", cases("info_nce"))
def test_info_nce_definition(case):
    tensors = case.tensors()
    actual = case.call("reference")(**tensors)
    assert actual.shape == () and actual.dtype == torch.float64
    assert actual.item() == pytest.approx(info_nce_by_terms(**tensors, **case.options), rel=1e-12, abs=1e-14)


def test_info_nce_directions_are_transposes():
    pred, target = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    over_prediction = ak.info_nce(pred, target, over="prediction")
    torch.testing.assert_close(over_prediction, ak.info_nce(target, pred, over="target"))
    assert over_prediction != ak.info_nce(pred, target)


def test_info_nce_survives_large_logits():
    """Raw patches as keys, no temperature: logits in the thousands, where exp alone overflows."""
    pred, target = 100 * torch.randn(2, 6, 16), 100 * torch.randn(2, 6, 16)
    results = evaluate(ak.info_nce, {"pred": pred, "target": target}, ("pred", "target"))
    assert all(value.isfinite().all() for value in results.values())
    assert results["output"].item() == pytest.approx(
        info_nce_by_terms(pred.double(), target.double(), "target"), rel=1e-5
    )


def test_constant_patches_have_finite_targets():
    """Digital silence: no variance, so the normalised target is 0."""
    pred, spectrogram = torch.randn(1, 2, 6), torch.full((1, 6, 4), -15.94)
    loss = ak.masked_mse(pred, spectrogram, torch.tensor([[0, 3]]), patch=(3, 2))
    # The mean of six equal float32 values is one rounding (2^-20 of 15.94) off, magnified by 1 / sqrt(eps).
    assert loss.item() == pytest.approx(pred.square().mean().item(), abs=2e-3)


@pytest.mark.parametrize("case", [c for c in cases("masked_mse", "info_nce") if "no " in c.id])
def test_nothing_masked_is_zero_with_zero_gradients(case):
    tensors = case.tensors(torch.float32)
    results = evaluate(case.call(), tensors, case.wrt())
    assert results["output"].item() == 0
    assert all(results[f"grad of {name}"].shape == tensors[name].shape for name in case.wrt())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_losses_are_float32_and_take_mixed_dtypes(low):
    pred, spectrogram = torch.randn(2, 3, 6).to(low), torch.randn(2, 9, 8)
    ids = torch.tensor([[0, 5, 2], [7, 1, 3]])
    target = torch.randn(2, 3, 6)
    for function, other in (
        (lambda pred, other: ak.masked_mse(pred, other, ids, patch=(3, 2)), spectrogram),
        (lambda pred, other: ak.info_nce(pred, other), target),
    ):
        leaf = pred.clone().requires_grad_()
        loss = function(leaf, other)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, function(pred.float(), other))
        assert function(pred, other.double()).dtype == torch.float64
        loss.backward()
        assert leaf.grad.dtype == low


def test_info_nce_without_a_gradient_for_the_target():
    pred, target = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    (alone,) = torch.autograd.grad(ak.info_nce(pred, target), pred)
    both = torch.autograd.grad(ak.info_nce(pred, target.requires_grad_()), (pred, target))
    assert torch.equal(alone, both[0])


PRED, S, IDS = torch.zeros(4, 3, 6), torch.zeros(2, 9, 8), torch.zeros(4, 3, dtype=torch.int64)
GOOD_MSE = {"pred": PRED, "spectrogram": S, "ids_masked": IDS, "patch": (3, 2)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"pred": PRED[:, :2]},
            ValueError,
            r"pred must have shape \(B \* m, M, pt \* pf\), here \(4, 3, 6\)",
        ),
        ({"pred": PRED[..., :5]}, ValueError, "pred must have shape"),
        ({"pred": PRED.int()}, TypeError, "pred must be float32"),
        ({"pred": PRED.to("meta")}, ValueError, "pred must be on the device of spectrogram, cpu"),
        ({"ids_masked": IDS.int()}, TypeError, "ids_masked must be int64"),
        (
            {"ids_masked": IDS[:3], "pred": PRED[:3]},
            ValueError,
            "ids_masked must have a whole number of rows",
        ),
        ({"patch": (3, 9)}, ValueError, "a patch of 3 x 9 .* does not fit"),
        ({"patch": (1, 1), "pred": PRED[..., :1]}, ValueError, "one value has no variance"),
        ({"impl": "cuda"}, ValueError, "impl must be None, .* got 'cuda'"),
    ],
)
def test_masked_mse_errors(change, error, message):
    ak.masked_mse(**GOOD_MSE)
    with pytest.raises(error, match=message):
        ak.masked_mse(**GOOD_MSE | change)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"pred": PRED[0]}, ValueError, r"pred must have shape \(B, M, V\)"),
        (
            {"target": PRED[:, :2]},
            ValueError,
            r"target must have shape \(B, M, V\) like pred, here \(4, 3, 6\)",
        ),
        ({"pred": PRED.int()}, TypeError, "pred must be float32"),
        ({"target": PRED.int()}, TypeError, "target must be float32"),
        ({"target": PRED.to("meta")}, ValueError, "target must be on the device of pred, cpu"),
        ({"over": "targets"}, ValueError, "over must be 'target' or 'prediction', got 'targets'"),
        ({"impl": "cuda"}, ValueError, "impl must be None, .* got 'cuda'"),
    ],
)
def test_info_nce_errors(change, error, message):
    ak.info_nce(PRED, PRED)
    with pytest.raises(error, match=message):
        ak.info_nce(**{"pred": PRED, "target": PRED} | change)
