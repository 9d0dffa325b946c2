"""unshuffle's Triton kernels, interpreted."""

from functools import partial

import audiomae_kernels as ak
import pytest
import torch
from audiomae_kernels import _partials
from budget import assert_within_budget, evaluate
from interpreter import cases_and_dtypes, guarded_allocations, in_the_middle, needs_interpreter
from kernel_cases import choose, unshuffle_case

pytestmark = needs_interpreter

LARGE = (
    unshuffle_case("more kept tokens than a block", 1, 140, 150, 8),
    unshuffle_case("rows of several blocks", 2, 3, 9, 600),
    unshuffle_case("more clips than slices", 19, 2, 5, 8),
)
WRT = ("tokens", "mask_token", "pos")


@pytest.mark.parametrize("case, dtype", cases_and_dtypes(*LARGE, op="unshuffle"))
def test_error_budget(case, dtype, monkeypatch):
    with guarded_allocations(monkeypatch):
        assert_within_budget(case.call("triton"), case.reference(), partial(case.tensors, dtype), case.wrt())


def test_kept_gradients_are_copied_bit_for_bit():
    case = unshuffle_case("", 2, 5, 24, 32)
    tensors = case.tensors(torch.bfloat16)
    cotangent = torch.randn(2, 24, 32).bfloat16()
    actual = evaluate(case.call("triton"), tensors, WRT, cotangent)
    expected = evaluate(case.call("reference"), tensors, WRT, cotangent)
    assert torch.equal(actual["grad of tokens"], expected["grad of tokens"])


def test_ids_out_of_range_place_nothing_and_get_no_gradient(monkeypatch):
    ids = torch.tensor([[-1, 2, 2**40 + 1], [6, 2**32 + 3, 0]])
    tensors = {
        "tokens": in_the_middle(torch.randn(2, 3, 8)),
        "ids_keep": ids,
        "mask_token": in_the_middle(torch.randn(8)),
        "pos": in_the_middle(torch.randn(6, 8)),
    }
    cotangent = in_the_middle(torch.randn(2, 6, 8))
    with guarded_allocations(monkeypatch):
        actual = evaluate(partial(ak.unshuffle, impl="triton"), tensors, WRT, cotangent)
    expected = (tensors["mask_token"] + tensors["pos"]).repeat(2, 1, 1)
    expected[0, 2] = tensors["tokens"][0, 1] + tensors["pos"][2]
    expected[1, 0] = tensors["tokens"][1, 2] + tensors["pos"][0]
    assert torch.equal(actual["output"], expected)
    kept = torch.zeros(2, 3, 8)
    kept[0, 1], kept[1, 2] = cotangent[0, 2], cotangent[1, 0]
    assert torch.equal(actual["grad of tokens"], kept)
    torch.testing.assert_close(actual["grad of mask_token"], cotangent.sum((0, 1)) - kept.sum((0, 1)))


def test_strided_and_expanded_inputs():
    tensors = {
        "tokens": torch.randn(4, 3, 2).permute(2, 1, 0),
        "ids_keep": torch.tensor([[4, 0, 2]]).expand(2, 3),
        "mask_token": torch.randn(1).expand(4),
        "pos": torch.randn(4, 5).t(),
    }
    for cotangent in (torch.randn(4, 5, 2).permute(2, 1, 0), torch.randn(()).expand(2, 5, 4)):
        actual, expected = (
            evaluate(partial(ak.unshuffle, impl=impl), tensors, WRT, cotangent)
            for impl in ("triton", "reference")
        )
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, msg=name)


@pytest.mark.parametrize("wrt", [("tokens",), ("mask_token",), ("pos",), ("mask_token", "pos")])
def test_each_gradient_alone(wrt):
    case = unshuffle_case("", 2, 3, 7, 13)
    tensors, cotangent = case.tensors(torch.float32), torch.randn(2, 7, 13)
    together = evaluate(case.call("triton"), tensors, WRT, cotangent)
    alone = evaluate(case.call("triton"), tensors, wrt, cotangent)
    for name in wrt:
        assert torch.equal(alone[f"grad of {name}"], together[f"grad of {name}"])


def test_repeats_bit_for_bit_with_as_many_partials_for_any_batch(monkeypatch):
    rows = []
    second_stage = _partials.sum_partials_kernel

    class Recorder:
        def __getitem__(self, grid):
            return lambda partials, *args, **options: (
                rows.append(partials.shape[0]),
                second_stage[grid](partials, *args, **options),
            )

    monkeypatch.setattr(_partials, "sum_partials_kernel", Recorder())
    for B in (1, 3, 40):
        tensors = unshuffle_case("", B, 2, 5, 4).tensors(torch.float32)
        runs = [evaluate(partial(ak.unshuffle, impl="triton"), tensors, WRT) for _ in range(2)]
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert rows == rows[:2] * 6


def test_undoes_a_shuffle():
    x = torch.randn(3, 10, 4)
    order = choose(3, 10, 10)
    tokens = x.gather(1, order[..., None].expand_as(x))
    assert torch.equal(ak.unshuffle(tokens, order, torch.zeros(4), torch.zeros(10, 4), impl="triton"), x)
