"""The error budget must be able to fail."""

import pytest
import torch
from budget import assert_within_budget


def reference(x, upcast):
    return (x.float() if upcast and x.dtype != torch.float64 else x).exp().to(x.dtype)


def draw(seed):
    return {"x": torch.randn(100, generator=torch.Generator().manual_seed(seed)).bfloat16()}


def test_a_good_op_passes():
    assert_within_budget(lambda x: reference(x, upcast=True), reference, draw, ("x",))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda y: torch.cat([y[:-1], y[-1:] * 1.5 + 1]), r"output: error .*, eager error .*, budget"),
        (lambda y: torch.cat([y[:-1], y[-1:] * float("nan")]), "output: error nan"),
        (lambda y: y[:-1], r"output: shape \(99,\), not \(100,\)"),
    ],
)
def test_one_wrong_value_fails(spoil, message):
    with pytest.raises(AssertionError, match=message):
        assert_within_budget(lambda x: spoil(reference(x, upcast=True)), reference, draw)


def test_a_wrong_gradient_fails_by_name():
    def op(x):
        y = reference(x, upcast=True)
        return y + 0.5 * (x - x.detach())

    with pytest.raises(AssertionError, match=r"^grad of x: error"):
        assert_within_budget(op, reference, draw, ("x",))


def test_uninitialised_memory_is_nan():
    for tensor in (
        torch.empty(3),
        torch.empty_like(torch.ones(3)),
        torch.empty_strided((3,), (1,)),
        torch.ones(1).new_empty(3, dtype=torch.bfloat16),
        torch.ones(1).new_empty_strided((3,), (1,)),
        torch.empty(3, requires_grad=True),
    ):
        assert tensor.isnan().all()


@pytest.mark.no_poison
def test_the_marker_leaves_empty_alone():
    assert not hasattr(torch.empty, "__wrapped__")
