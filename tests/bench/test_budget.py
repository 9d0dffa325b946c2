"""The budget that providers keep before they are timed."""

import pytest
import torch

from bench.budget import FEW, Errors, draws_needed, evaluate, in_float64


def judged(error, eager_error, values=1000, dtype=torch.float32, draws=1):
    """Errors of results whose truth is 1, off by the given factors in one value or all."""
    truth = torch.ones(values, dtype=torch.float64)
    mine, eager = Errors(values), Errors(values)
    for draw in range(draws):
        for errors, off in ((mine, error), (eager, eager_error)):
            off = off(draw) if callable(off) else off
            errors.add({"output": (truth + off).to(dtype)}, {"output": truth})
    return mine.over_budget(eager)


def test_twice_the_eager_error_and_two_roundings_pass():
    assert not judged(1.9e-3, 1e-3)
    assert judged(2.1e-3, 1e-3).startswith("output: error 0.0021, eager error 0.001, budget")
    eps = torch.finfo(torch.float32).eps
    assert not judged(2 * eps, 0.0) and judged(4 * eps, 0.0)


def test_one_wrong_value_among_many_does_not_pass():
    truth = torch.zeros(10000, dtype=torch.float64)
    mine, eager = Errors(10000), Errors(10000)
    eager.add({"output": torch.full((10000,), 1e-3)}, {"output": truth})
    one = torch.full((10000,), 1e-3)
    one[7] = 5e-3
    mine.add({"output": one}, {"output": truth})
    assert mine.over_budget(eager).startswith("output: largest error 0.005, eager largest error 0.001")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_never_passes(bad):
    assert judged(bad, 1.0)
    assert judged(lambda draw: bad if draw == 1 else 0.0, 1.0, values=1, draws=3)


def test_few_values_are_judged_by_their_rms_over_draws():
    by_luck = lambda draw: 0.0 if draw % 2 else 1e-3  # noqa: E731
    assert not judged(1e-3, by_luck, values=1, draws=4)
    assert judged(3e-3, by_luck, values=1, draws=4)
    assert draws_needed(torch.ones(())) == FEW and draws_needed(torch.ones(16)) == 2
    assert draws_needed(torch.ones(100)) == draws_needed(torch.ones(0, FEW)[:0].new_ones(FEW)) == 1


def test_a_sum_in_another_order_passes_and_a_wrong_one_does_not():
    """One after the other in float32, where the reference sums pairwise."""
    terms = torch.randn(1 << 16, 64)
    truth = {"grad of tau": terms.double().sum(0)}
    for function, good in ((lambda x: x.cumsum(0)[-1], True), (lambda x: x[:-1].sum(0), False)):
        mine, eager = Errors(terms.numel()), Errors(terms.numel())
        eager.add({"grad of tau": terms.sum(0)}, truth)
        mine.add({"grad of tau": function(terms)}, truth)
        assert (not mine.over_budget(eager)) == good


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"output: shape \(2,\), not \(3,\)"):
        Errors(3).add({"output": torch.ones(2)}, {"output": torch.ones(3)})


def test_evaluate_names_gradients():
    tensors = {"x": torch.randn(3), "y": torch.randn(3), "ids": torch.tensor([0, 1, 2]), "none": None}
    found = evaluate(lambda x, y, ids, none: (x * y)[ids], tensors, wrt=("x", "y"), cotangent=torch.ones(3))
    assert torch.equal(found["grad of x"], tensors["y"]) and torch.equal(found["grad of y"], tensors["x"])
    assert set(evaluate(lambda **t: t["x"] * t["y"], tensors)) == {"output"}
    assert set(evaluate(lambda **t: t["x"].sum(), tensors, wrt=("x", "y"), gradients=["x"])) == {
        "output",
        "grad of x",
    }
    exact = in_float64(tensors)
    assert exact["x"].dtype == torch.float64 and exact["ids"].dtype == torch.int64 and exact["none"] is None
