"""masked_mse's Triton kernels, interpreted."""

from functools import partial
from importlib import import_module

import audiomae_kernels as ak
import pytest
import torch
from budget import assert_within_budget, compare, evaluate, to_exact
from interpreter import cases_and_dtypes, guarded_allocations, in_the_middle, needs_interpreter
from kernel_cases import patch_case

pytestmark = needs_interpreter

LARGE = (
    patch_case("masked_mse", "tokens of several blocks", 96, 64, (4, 4), K=300, B=1),
    patch_case("masked_mse", "large patches", 80, 80, (65, 65), (4, 4), K=2, B=1),
)


@pytest.mark.parametrize("case, dtype", cases_and_dtypes(*LARGE, op="masked_mse"))
def test_gradient_budget(case, dtype, monkeypatch):
    tensors, cotangent = case.tensors(dtype), torch.randn((), dtype=torch.float64).float()
    with guarded_allocations(monkeypatch):
        actual = evaluate(case.call("triton"), tensors, ("pred",), cotangent)
    eager = evaluate(partial(case.reference(), upcast=False), tensors, ("pred",), cotangent)
    exact = evaluate(case.reference(), to_exact(tensors), ("pred",), cotangent)
    loss = actual.pop("output")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact["output"], rtol=1e-5, atol=1e-6)
    compare([actual], [eager], [exact])


# A loss is one value: its error is judged over 32 draws.
@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(*param.values, id=param.id, marks=() if i in (0, 4) else (pytest.mark.slow,))
        for i, param in enumerate(cases_and_dtypes(op="masked_mse"))
    ],
)
def test_error_budget(case, dtype):
    assert_within_budget(case.call("triton"), case.reference(), partial(case.tensors, dtype), case.wrt())


def test_few_programs_go_through_all_tiles(monkeypatch):
    case = patch_case("masked_mse", "", 96, 64, (4, 4), K=300, B=3)
    tensors = case.tensors(torch.float32)
    expected = case.call("triton")(**tensors)
    kernels = import_module("audiomae_kernels.masked_mse.triton_kernels")
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    torch.testing.assert_close(case.call("triton")(**tensors), expected, rtol=1e-6, atol=0)


def test_ids_out_of_range_have_a_target_of_zeros(monkeypatch):
    spectrogram, ids = in_the_middle(torch.randn(1, 8, 8)), torch.tensor([[-1, 3, 4, 2**40 + 1]])
    pred = in_the_middle(torch.randn(1, 4, 16))
    with guarded_allocations(monkeypatch):
        actual = evaluate(
            partial(ak.masked_mse, spectrogram=spectrogram, ids_masked=ids, patch=(4, 4), impl="triton"),
            {"pred": pred},
            ("pred",),
        )
    patch = spectrogram[0, 4:, 4:].flatten()
    target = torch.zeros(1, 4, 16)
    target[0, 1] = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    torch.testing.assert_close(actual["output"], (pred - target).square().mean())
    torch.testing.assert_close(actual["grad of pred"], (pred - target) / 32)


@pytest.mark.parametrize("normalize", [True, False])
def test_nothing_beyond_the_last_token_is_used(monkeypatch, normalize):
    """13 tokens in tiles of 8, NaN and wild ids before and after: the last tile of the last row is partial."""
    case = patch_case("masked_mse", "", 64, 64, (16, 16), K=13, m=2, normalize=normalize)
    tensors = {name: in_the_middle(tensor) for name, tensor in case.tensors(torch.float32).items()}
    with guarded_allocations(monkeypatch):
        actual = evaluate(case.call("triton"), tensors, ("pred",))
    expected = evaluate(case.call("reference"), tensors, ("pred",))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


def test_nan_stays_in_its_token():
    case = patch_case("masked_mse", "", 64, 64, (16, 16), K=13)
    tensors = case.tensors(torch.float32)
    clean = evaluate(case.call("triton"), tensors, ("pred",))["grad of pred"]
    tensors["pred"][1, 12, 3] = float("nan")
    dirty = evaluate(case.call("triton"), tensors, ("pred",))["grad of pred"]
    others = torch.ones_like(clean, dtype=torch.bool)
    others[1, 12, 3] = False
    assert clean.isfinite().all()
    assert torch.equal(dirty[others], clean[others]) and dirty[1, 12, 3].isnan()


def test_strided_inputs_and_mixed_dtypes():
    pred = torch.randn(16, 3, 2).bfloat16().permute(2, 1, 0)
    spectrogram, ids = torch.randn(2, 8, 8).mT, torch.tensor([[3, 0, 1]]).expand(2, 3)
    tensors = {"pred": pred, "spectrogram": spectrogram}
    actual, expected = (
        evaluate(partial(ak.masked_mse, ids_masked=ids, patch=(4, 4), impl=impl), tensors, ("pred",))
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(actual["output"], expected["output"])
    torch.testing.assert_close(actual["grad of pred"], expected["grad of pred"], rtol=2**-7, atol=1e-6)


def test_constant_patches_have_finite_targets():
    pred, spectrogram = torch.randn(1, 2, 6), torch.full((1, 6, 4), -15.94)
    loss = ak.masked_mse(pred, spectrogram, torch.tensor([[0, 3]]), patch=(3, 2), impl="triton")
    assert loss.item() == pytest.approx(pred.square().mean().item(), abs=2e-3)


def test_repeats_bit_for_bit():
    case = LARGE[0]
    tensors = case.tensors(torch.bfloat16)
    first, second = (evaluate(case.call("triton"), tensors, case.wrt()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_patches_beyond_the_registers_are_refused():
    pred, spectrogram = torch.zeros(1, 1, 10000), torch.zeros(1, 100, 100)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="It serves patches of up to 8192 values, not of 10000"):
        ak.masked_mse(pred, spectrogram, ids, patch=(100, 100), impl="triton")
