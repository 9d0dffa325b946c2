"""Results that the backward pass computes again instead of keeping."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Complete(Exception):
    """All that autograd saved is there again."""


def again(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """function(x), of which only x is kept: what autograd saves in between is computed again when it asks for it.

    The second run stops at the last value that autograd saved, so a linear layer at the function's end is not
    computed again. The function must draw no random numbers. `torch.utils.checkpoint` does the same for anything,
    random streams included, and counts the GPUs for it, after which a process cannot fork any more.
    """
    # Compilers choose for themselves what to compute again.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(x)
    device = x.device.type
    autocast = contextlib.nullcontext()
    if torch.amp.is_autocast_available(device):
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        autocast = torch.autocast(device, dtype, enabled)
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


def _keep(value: Tensor) -> Tensor:
    return value
