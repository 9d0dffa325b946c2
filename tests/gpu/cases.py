"""Inputs on the device: the shared cases, calls at published sizes, and awkward layouts in memory."""

from __future__ import annotations

import torch
from kernel_cases import CASES, Case, info_nce_case, patch_case, unshuffle_case, window_attention_case
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Clips of 1024 frames x 128 mel bins; Audio-MAE keeps 102 of 512 tokens, MAE-AST masks 384.
PUBLISHED = [
    window_attention_case("published", (64, 8), (4, 4), H=16, d=32),
    window_attention_case("published, shifted", (64, 8), (4, 4), (2, 0), H=16, d=32),
    window_attention_case("published, dot", (64, 8), (4, 4), (2, 0), scoring="dot", H=16, d=32),
    patch_case("patch_gather", "published", 1024, 128, (16, 16), K=102),
    patch_case("patch_gather", "published, overlapping", 1024, 128, (16, 16), (10, 10), K=242),
    patch_case("patch_gather", "published, frames", 1024, 128, (2, 128), K=128),
    unshuffle_case("published", 2, 102, 512, 512),
    patch_case("masked_mse", "published", 1024, 128, (16, 16), K=410),
    patch_case("masked_mse", "published, frames", 1024, 128, (2, 128), K=384),
    info_nce_case("published", 2, 384, 256),
    info_nce_case("published, over prediction", 2, 384, 256, over="prediction"),
]

# Attention on a GPU is PyTorch's.
SHARED = [case for case in CASES if case.op != "attention"]

# One of each op, for what does not depend on the shape.
ONE_EACH = [case for case in PUBLISHED if case.name in ("published", "published, shifted")][1:]

LAYOUTS = ("transposed", "expanded", "gapped", "unaligned")


def named(cases: list[Case]) -> dict:
    """Arguments for `pytest.mark.parametrize("case", ...)`."""
    return {"argvalues": cases, "ids": [f"{case.op}: {case.name}" for case in cases]}


def inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor | None]:
    """The case's tensors on the device; the taus away from 0, where a gradient's error grows like tau^-3."""
    tensors = case.tensors(dtype, seed)
    if tensors.get("tau") is not None:
        tensors["tau"] += 0.4
    return {name: x if x is None else x.to(device) for name, x in tensors.items()}


def laid_out(x: Tensor | None, layout: str) -> Tensor | None:
    """The values of `x` (of its first row for "expanded") in another layout.

    "transposed": the first two dimensions change places in memory; "expanded": one row for all, stride 0;
    "gapped": memory of others between the last dimension's rows; "unaligned": one value after a 16-byte
    boundary.
    """
    if x is None or x.numel() == 0 or x.dim() == 1:
        return x
    fill = float("nan") if x.is_floating_point() else 10**9
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "gapped":
        rows = torch.full((*x.shape[:-1], x.shape[-1] + 3), fill, dtype=x.dtype, device=x.device)
        rows[..., 1:-2] = x
        return rows[..., 1:-2]
    buffer = torch.full((x.numel() + 1,), fill, dtype=x.dtype, device=x.device)
    buffer[1:] = x.flatten()
    return buffer[1:].view(x.shape)
