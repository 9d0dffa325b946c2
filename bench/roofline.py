"""The machine's ceilings, measured in the same run as the models, and the floor they put under a step."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from .flops import OPTIMIZER_BYTES, Cost
from .registry import DTYPES

KINDS = ("forward", "grad_input", "grad_weight")


def _best_seconds(function, device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(function, warmup=5, rep=20, return_mode="min") / 1e3
    function()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_ceilings(shape, dtype: str, device: torch.device, repeats: int = 3) -> dict[str, float]:
    """FLOP/s of a linear layer's three products.

    Args:
        shape: (rows, inputs, outputs), rows over the whole batch.
    """
    m, k, n = shape
    x = torch.randn(m, k, device=device).to(DTYPES[dtype])
    w = torch.randn(n, k, device=device).to(DTYPES[dtype])
    dy = torch.randn(m, n, device=device).to(DTYPES[dtype])
    products = {"forward": lambda: x @ w.T, "grad_input": lambda: dy @ w, "grad_weight": lambda: dy.T @ x}
    return {kind: 2.0 * m * k * n / _best_seconds(products[kind], device, repeats) for kind in KINDS}


def copy_ceiling(device: torch.device, megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes per second, read plus written, of copying a buffer larger than the caches."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device, repeats)


def floor_seconds(
    cost: Cost,
    batch: int,
    parameters: int,
    matmul: Mapping[tuple, float],
    best: float,
    copy: float,
    training: bool = True,
) -> float:
    """The time below which a step of `batch` clips cannot go on this machine.

    Every product at the rate measured for its own shape, attention's at the best rate of any shape, and the
    optimizer's traffic at the speed of a copy; one after another. What lies between is taken as free. Without
    `training` the forward products alone.

    Args:
        matmul: (rows, inputs, outputs, kind) -> FLOP/s.
        best, copy: the highest matrix-product rate (FLOP/s) and the copy rate (bytes/s).
    """
    products = sum(
        count * 2.0 * batch * m * k * n / matmul[batch * m, k, n, kind]
        for (m, k, n), count in cost.linears.items()
        for kind in (KINDS if training else KINDS[:1])
    )
    if not training:
        return products + batch * cost.attention / best
    return products + 3 * batch * cost.attention / best + OPTIMIZER_BYTES * parameters / copy
