"""info_nce's Triton kernels, interpreted."""

from functools import partial
from importlib import import_module

import audiomae_kernels as ak
import pytest
import torch
from budget import assert_within_budget, compare, evaluate, to_exact
from interpreter import cases_and_dtypes, guarded_allocations, in_the_middle, needs_interpreter
from kernel_cases import info_nce_case

pytestmark = needs_interpreter

WRT = ("pred", "target")
LARGE = tuple(
    info_nce_case(f"over {over}, several blocks", 2, 70, 300, over) for over in ("target", "prediction")
)


@pytest.mark.parametrize("case, dtype", cases_and_dtypes(*LARGE, op="info_nce"))
def test_gradient_budget(case, dtype, monkeypatch):
    tensors, cotangent = case.tensors(dtype), torch.randn((), dtype=torch.float64).float()
    with guarded_allocations(monkeypatch):
        actual = evaluate(case.call("triton"), tensors, WRT, cotangent)
    eager = evaluate(partial(case.reference(), upcast=False), tensors, WRT, cotangent)
    exact = evaluate(case.reference(), to_exact(tensors), WRT, cotangent)
    loss = actual.pop("output")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact["output"], rtol=1e-5, atol=1e-6)
    compare([actual], [eager], [exact])


# A loss is one value: its error is judged over 32 draws.
@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(*param.values, id=param.id, marks=() if i == 0 else (pytest.mark.slow,))
        for i, param in enumerate(cases_and_dtypes(op="info_nce"))
    ],
)
def test_error_budget(case, dtype):
    assert_within_budget(case.call("triton"), case.reference(), partial(case.tensors, dtype), case.wrt())


@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_extreme_logits_stay_finite(scale):
    """All logits equal, and logits in the thousands, where exp alone overflows."""
    tensors = {name: scale * torch.randn(2, 6, 16) for name in WRT}
    actual, expected = (
        evaluate(partial(ak.info_nce, impl=impl), tensors, WRT) for impl in ("triton", "reference")
    )
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_nothing_beyond_the_last_row_or_value_is_used(monkeypatch):
    """NaN before and after the inputs; 5 rows and 7 values leave most of each tile outside."""
    tensors = {name: in_the_middle(torch.randn(2, 5, 7)) for name in WRT}
    with guarded_allocations(monkeypatch):
        actual = evaluate(partial(ak.info_nce, impl="triton"), tensors, WRT)
    expected = evaluate(partial(ak.info_nce, impl="reference"), tensors, WRT)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


def test_strided_inputs_and_mixed_dtypes():
    tensors = {"pred": torch.randn(6, 5, 2).bfloat16().permute(2, 1, 0), "target": torch.randn(1, 5, 6)}
    tensors["target"] = tensors["target"].expand(2, 5, 6)
    actual, expected = (
        evaluate(partial(ak.info_nce, impl=impl), tensors, WRT) for impl in ("triton", "reference")
    )
    torch.testing.assert_close(actual["output"], expected["output"])
    torch.testing.assert_close(actual["grad of target"], expected["grad of target"])
    torch.testing.assert_close(actual["grad of pred"], expected["grad of pred"], rtol=2**-7, atol=1e-6)


def test_nan_stays_in_its_clip():
    tensors = {name: torch.randn(2, 5, 6) for name in WRT}
    tensors["pred"][0, 0, 0] = float("nan")
    actual = evaluate(partial(ak.info_nce, impl="triton"), tensors, WRT)
    assert actual["output"].isnan()
    for name in WRT:
        assert actual[f"grad of {name}"][0].isnan().any()
        assert actual[f"grad of {name}"][1].isfinite().all()


def test_few_programs_go_through_all_tiles_and_repeat_bit_for_bit(monkeypatch):
    case = info_nce_case("", 3, 70, 8)
    tensors = case.tensors(torch.float32)
    first, second = (evaluate(case.call("triton"), tensors, WRT) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    monkeypatch.setattr(import_module("audiomae_kernels.info_nce.triton_kernels"), "PROGRAMS", 2)
    torch.testing.assert_close(case.call("triton")(**tensors), first["output"], rtol=1e-6, atol=0)


def test_a_gradient_alone():
    tensors = {name: torch.randn(2, 5, 6) for name in WRT}
    both = evaluate(partial(ak.info_nce, impl="triton"), tensors, WRT)
    for name in WRT:
        alone = evaluate(partial(ak.info_nce, impl="triton"), tensors, (name,))
        assert torch.equal(alone[f"grad of {name}"], both[f"grad of {name}"])
