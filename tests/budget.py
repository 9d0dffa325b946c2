"""Error budgets taken from data.

An op, plain PyTorch in the same dtype ("eager") and plain PyTorch in float64 ("exact") see the same inputs,
already rounded to the dtype under test. The op's error may be twice eager's plus one rounding band of the
dtype. Outputs and every gradient are judged, each by name; NaN never passes.

The error of a tensor is its largest. Of a result with few values (a loss, one number per head) that would be
a matter of luck, so it is the root mean square over draws of the inputs: the chance that the RMS of `FEW` equally good
errors is twice that of as many others is below 1e-3.

The benchmark, which meets every shape and machine, judges the same figures with some room (`bench.budget.Errors`).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bench.budget import FEW, draws_needed, evaluate
from bench.budget import in_float64 as to_exact

__all__ = ["FEW", "assert_within_budget", "compare", "evaluate", "to_exact"]


def assert_within_budget(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    draw: Callable[[int], Mapping[str, Tensor | None]],
    wrt: Sequence[str] = (),
    draws: int = 1,
) -> None:
    """Judge ``op(**draw(seed))`` and its gradients; ``reference(..., upcast=...)`` is eager and exact.

    `draws` is the least number of them. Where rare inputs make large errors, one draw's largest is a matter of luck.
    """
    triples = []
    while len(triples) < draws:
        tensors = draw(len(triples))
        with torch.no_grad():
            output = op(**tensors)
        cotangent = torch.randn(output.shape, dtype=torch.float64, device=output.device).to(output.dtype)
        actual = evaluate(op, tensors, wrt, cotangent)
        eager = evaluate(lambda **t: reference(**t, upcast=False), tensors, wrt, cotangent)
        exact = evaluate(lambda **t: reference(**t, upcast=True), to_exact(tensors), wrt, cotangent)
        triples.append((actual, eager, exact))
        draws = max(draws, *(draws_needed(value) for value in actual.values() if value.numel()), 1)
    compare(*zip(*triples, strict=True))


def compare(
    actual: Sequence[Mapping[str, Tensor]],
    eager: Sequence[Mapping[str, Tensor]],
    exact: Sequence[Mapping[str, Tensor]],
) -> None:
    """Raise AssertionError unless each result is within its budget, over all draws."""
    over = []
    for name, value in actual[0].items():
        shape, expected = tuple(value.shape), tuple(exact[0][name].shape)
        assert shape == expected, f"{name}: shape {shape}, not {expected}"
        truth = torch.stack([draw[name] for draw in exact])
        error = _size(torch.stack([draw[name] for draw in actual]).double() - truth)
        eager_error = _size(torch.stack([draw[name] for draw in eager]).double() - truth)
        budget = 2 * eager_error + torch.finfo(value.dtype).eps * _size(truth)
        if not error <= budget:  # NaN compares false
            over.append(f"{name}: error {error:.3g}, eager error {eager_error:.3g}, budget {budget:.3g}")
    assert not over, "; ".join(over)


def _size(draws: Tensor) -> float:
    if draws.numel() == 0:
        return 0.0
    return (draws.square().mean().sqrt() if draws[0].numel() < FEW else draws.abs().max()).item()
