"""The error budget that a kernel keeps before it is timed, taken from data.

A provider, the eager reference in the same dtype and the reference in float64 see the same inputs, already
rounded to the dtype under test. The provider's error may be twice the eager one in the root mean square and four
times in its largest value (which of two equally good ones has the larger is a matter of luck), plus one rounding band
of the dtype, plus what the order of a float32 sum is worth: n roundings of a random walk, sqrt(n) bands of float32 for
n terms. The output and every gradient are judged, each by name; NaN never passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# Results of fewer values (a loss, a number per head) are judged over so many draws of the inputs.
FEW = 32


def evaluate(
    function: Callable[..., Tensor],
    tensors: Mapping[str, Tensor | None],
    wrt: Sequence[str] = (),
    cotangent: Tensor | None = None,
    gradients: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """``{"output": ..., "grad of NAME": ...}`` of ``function(**tensors)``.

    Args:
        wrt: the tensors that require gradients.
        gradients: those whose gradients are computed; all by default.
    """
    leaves = {
        name: tensor if tensor is None else tensor.detach().requires_grad_(name in wrt)
        for name, tensor in tensors.items()
    }
    with torch.set_grad_enabled(bool(wrt)):
        output = function(**leaves)
    results = {"output": output.detach()}
    if gradients := wrt if gradients is None else gradients:
        cotangent = torch.ones_like(output) if cotangent is None else cotangent.to(output.dtype)
        found = torch.autograd.grad(output, [leaves[name] for name in gradients], cotangent)
        results |= {f"grad of {name}": gradient for name, gradient in zip(gradients, found, strict=True)}
    return results


def in_float64(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values in float64."""
    return {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def draws_needed(result: Tensor) -> int:
    """How many draws of the inputs judge a result of this size."""
    return -(-FEW // max(result.numel(), 1))


class Errors:
    """Errors against float64 by name, gathered over draws.

    Args:
        values: in the largest tensor of the call; so many per value of a result are taken for its terms.
    """

    def __init__(self, values: int):
        self._values = values
        self._of: dict[str, list[tuple[float, float]]] = {}  # of each draw: mean square, largest
        self._truth: dict[str, list[tuple[float, float]]] = {}
        self._eps: dict[str, float] = {}
        self._terms: dict[str, float] = {}

    def add(self, results: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
        """One draw.

        Raises:
            ValueError: a result has another shape than the reference's.
        """
        for name, value in results.items():
            if value.shape != exact[name].shape:
                raise ValueError(f"{name}: shape {tuple(value.shape)}, not {tuple(exact[name].shape)}")
            self._eps[name] = torch.finfo(value.dtype).eps
            self._terms[name] = max(1.0, self._values / max(value.numel(), 1))
            for sizes, tensor in ((self._of, value.double() - exact[name]), (self._truth, exact[name])):
                size = (
                    (tensor.square().mean().item(), tensor.abs().max().item())
                    if tensor.numel()
                    else (0.0, 0.0)
                )
                sizes.setdefault(name, []).append(size)

    def over_budget(self, eager: Errors) -> str:
        """What is out of the budget that the eager errors set, as text; empty if nothing is."""
        lines = []
        for name in self._of:
            band = self._eps[name] + torch.finfo(torch.float32).eps * self._terms[name] ** 0.5
            for size, factor, kind in ((_rms, 2, "error"), (_largest, 4, "largest error")):
                error, allowed = size(self._of[name]), size(eager._of[name])
                budget = factor * allowed + band * size(self._truth[name])
                if not error <= budget:  # NaN compares false
                    lines.append(
                        f"{name}: {kind} {error:.2g}, eager {kind} {allowed:.2g}, budget {budget:.2g}"
                    )
                    break
        return "; ".join(lines)


def _rms(draws: Sequence[tuple[float, float]]) -> float:
    return (sum(square for square, _ in draws) / len(draws)) ** 0.5


def _largest(draws: Sequence[tuple[float, float]]) -> float:
    return max(largest for _, largest in draws)
