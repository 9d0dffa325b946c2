"""Results that the backward pass computes again instead of keeping."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class _Complete(Exception):
    """All that autograd saved is there again."""


class _Input(torch.autograd.Function):
    """Has x saved by autograd itself: hooks of others see it, and a change in place is an error."""

    @staticmethod
    def forward(ctx, x: Tensor, _: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[None, None]:
        return None, None


def again(function: Callable[[Tensor], Any], x: Tensor, *modules: nn.Module) -> Any:
    """function(x), of which only x is kept: what autograd saves in between is computed again when it asks for it.

    The second run stops at the last value that autograd saved, so a linear layer at the function's end is not
    computed again. The function must draw no random numbers. `torch.utils.checkpoint` does the same for anything,
    random streams included, and counts the GPUs for it, after which a process cannot fork any more.

    Args:
        modules: whose own parameters the function uses. If others are in their place in the backward pass, or these
            were changed, it raises a RuntimeError: the gradients would be wrong.
    """
    # Compilers choose for themselves what to compute again.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(x)
    device = x.device.type
    autocast = contextlib.nullcontext()
    if torch.amp.is_autocast_available(device):
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        autocast = torch.autocast(device, dtype, enabled)
    kept = _Input.apply(x, torch.empty(0, device=device, requires_grad=True)).grad_fn
    weights = _weights(modules)
    saved, values = 0, {}

    def pack(_: Tensor) -> int:
        nonlocal saved
        saved += 1
        return saved - 1

    def collect(value: Tensor) -> Tensor:
        values[len(values)] = value.detach()
        if len(values) == saved:
            raise _Complete
        return value

    def unpack(place: int) -> Tensor:
        if place not in values:
            values.clear()
            now = _weights(modules)
            if any(a is not b or v != w for (a, v), (b, w) in zip(weights, now, strict=True)):
                raise RuntimeError(
                    "a layer's parameters were changed or exchanged between the forward and the backward pass, which "
                    'computes its activations again: run the backward pass before, or choose recompute="none"'
                )
            (x,) = kept.saved_tensors
            with (
                contextlib.suppress(_Complete),
                torch.enable_grad(),
                autocast,
                saved_tensors_hooks(collect, _keep),
            ):
                function(x.detach().requires_grad_(x.requires_grad))
        return values.pop(place)

    with saved_tensors_hooks(pack, unpack):
        return function(x)


def _weights(modules: tuple[nn.Module, ...]) -> list[tuple[Tensor, int]]:
    return [(p, p._version) for module in modules for p in module.parameters(recurse=False)]


def _keep(value: Tensor) -> Tensor:
    return value
