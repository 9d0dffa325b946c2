"""Inputs of the kernel ops, nice and odd, shared by the tests of every implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import audiomae_kernels as ak
import torch
from audiomae_kernels.attention.reference import attention_ref
from audiomae_kernels.info_nce.reference import info_nce_ref
from audiomae_kernels.masked_mse.reference import masked_mse_ref
from audiomae_kernels.patch_gather.reference import patch_gather_ref
from audiomae_kernels.unshuffle.reference import unshuffle_ref
from audiomae_kernels.window_attention.reference import clip_window, window_attention_ref
from torch import Tensor

REFERENCES = {
    "window_attention": window_attention_ref,
    "patch_gather": patch_gather_ref,
    "unshuffle": unshuffle_ref,
    "masked_mse": masked_mse_ref,
    "info_nce": info_nce_ref,
    "attention": attention_ref,
}
GRADIENTS = {
    "window_attention": ("qkv", "tau", "bias"),
    "patch_gather": (),
    "unshuffle": ("tokens", "mask_token", "pos"),
    "masked_mse": ("pred",),
    "info_nce": ("pred", "target"),
    "attention": ("qkv",),
    "fbank": (),
}
# Parameters stay in float32 while activations are rounded to the dtype under test.
PARAMETERS = ("tau", "bias", "mask_token", "pos")


@dataclass
class Case:
    """One call of an op: `make` gives its tensors in float64 (ids in int64), `options` its keywords."""

    op: str
    name: str
    make: Callable[[], dict[str, Tensor | None]]
    options: dict = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor | None]:
        """The inputs with activations in `dtype` and parameters in float32 or, for float64, float64."""
        torch.manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            name: tensor.to(wide if name in PARAMETERS else dtype)
            if tensor is not None and tensor.is_floating_point()
            else tensor
            for name, tensor in self.make().items()
        }

    def wrt(self) -> tuple[str, ...]:
        given = self.make()
        return tuple(name for name in GRADIENTS[self.op] if given[name] is not None)

    def call(self, impl: str | None = None) -> Callable[..., Tensor]:
        """The public function with this case's options."""
        return partial(getattr(ak, self.op), **self.options, impl=impl)

    def reference(self) -> Callable[..., Tensor]:
        return partial(REFERENCES[self.op], **self.options)

    def op_options(self) -> dict:
        """Keywords of the op underneath, ``torch.ops.audiomae.<op>``."""
        options = dict(self.options)
        if self.op == "window_attention":
            options.setdefault("shift", (0, 0))
            options.setdefault("scoring", "cosine")
            window, shift = clip_window(options["grid"], options["window"], options["shift"])
            options |= {"window": window, "shift": shift}
        if self.op in ("patch_gather", "masked_mse"):
            options["stride"] = options["stride"] or options["patch"]
        if self.op == "masked_mse":
            options.setdefault("normalize", True)
        if self.op == "info_nce":
            options.setdefault("over", "target")
        if self.op == "attention":
            options.setdefault("dropout", 0.0)
        return options | {"impl": "reference"}


def choose(rows: int, count: int, total: int) -> Tensor:
    """(rows, count) int64: distinct ids of [0, total) in random order."""
    return torch.stack([torch.randperm(total)[:count] for _ in range(rows)]).view(rows, count)


def window_attention_case(name, grid, window, shift=(0, 0), scoring="cosine", B=2, H=4, d=16, bias=True):
    def make():
        (wt, wf), _ = clip_window(grid, window, shift)
        return {
            "qkv": torch.randn(B, grid[0] * grid[1], 3, H, d, dtype=torch.float64),
            "tau": torch.rand(H, dtype=torch.float64) + 0.1 if scoring == "cosine" else None,
            "bias": torch.randn(H, wt * wf, wt * wf, dtype=torch.float64) if bias else None,
        }

    options = {"grid": grid, "window": window, "shift": shift, "scoring": scoring}
    return Case("window_attention", name, make, options)


def patch_case(op, name, T, F, patch, stride=None, B=2, m=1, K=3, view=lambda x: x, **options):
    """A case of patch_gather or masked_mse; `view` sets the strides of the (B, T, F) spectrogram."""

    def make():
        st, sf = stride or patch
        tokens = ((T - patch[0]) // st + 1) * ((F - patch[1]) // sf + 1)
        spectrogram = view(torch.randn(B, T, F, dtype=torch.float64))
        ids = choose(B * m, K, tokens) if B * m else torch.zeros(0, K, dtype=torch.int64)
        if op == "patch_gather":
            return {"spectrogram": spectrogram, "ids": ids}
        pred = torch.randn(B * m, K, patch[0] * patch[1], dtype=torch.float64)
        return {"pred": pred, "spectrogram": spectrogram, "ids_masked": ids}

    return Case(op, name, make, {"patch": patch, "stride": stride, **options})


def transposed(x: Tensor) -> Tensor:
    """The same (B, T, F) values, stored (B, F, T)."""
    return x.mT.contiguous().mT


def expanded(x: Tensor) -> Tensor:
    """One clip for the whole batch, stride 0."""
    return x[:1].expand_as(x)


def misaligned(x: Tensor) -> Tensor:
    """The same values one element into a larger buffer, rows with a gap between them."""
    buffer = torch.full((x.shape[0], x.shape[1], x.shape[2] + 3), float("nan"), dtype=x.dtype)
    buffer[:, :, 1:-2] = x
    return buffer[:, :, 1:-2]


def unshuffle_case(name, B, K, L, D):
    def make():
        return {
            "tokens": torch.randn(B, K, D, dtype=torch.float64),
            "ids_keep": choose(B, K, L) if B else torch.zeros(0, K, dtype=torch.int64),
            "mask_token": torch.randn(D, dtype=torch.float64),
            "pos": torch.randn(L, D, dtype=torch.float64),
        }

    return Case("unshuffle", name, make)


def info_nce_case(name, B, M, V, over="target"):
    def make():
        return {
            "pred": torch.randn(B, M, V, dtype=torch.float64) * V**-0.5,
            "target": torch.randn(B, M, V, dtype=torch.float64),
        }

    return Case("info_nce", name, make, {"over": over})


def attention_case(name, B=2, L=7, H=3, d=16, lengths=None, dropout=0.0, view=lambda x: x):
    """`lengths`: of packed clips; `view` sets the strides of qkv."""

    def make():
        tokens = (B, L) if lengths is None else (sum(lengths),)
        return {
            "qkv": view(torch.randn(*tokens, 3, H, d, dtype=torch.float64)),
            "cu_seqlens": None
            if lengths is None
            else torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            "seed": torch.tensor(-0x123456789ABCDEF) if dropout else None,
        }

    return Case("attention", name, make, {"dropout": dropout})


def fbank_case(name, B, samples):
    return Case("fbank", name, lambda: {"waveform": torch.randn(B, samples, dtype=torch.float64) * 0.1})


def apart(x: Tensor) -> Tensor:
    """The same values, the last dimension outermost in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def by_slices(spectrogram, ids, patch, stride=None) -> Tensor:
    """patch_gather as slices of the spectrogram, one patch at a time."""
    (pt, pf), (st, sf) = patch, stride or patch
    grid_f = (spectrogram.shape[2] - pf) // sf + 1
    out = spectrogram.new_zeros(*ids.shape, pt * pf)
    for row in range(ids.shape[0]):
        clip = spectrogram[row // (ids.shape[0] // spectrogram.shape[0])]
        for column, token in enumerate(ids[row].tolist()):
            t, f = token // grid_f * st, token % grid_f * sf
            out[row, column] = clip[t : t + pt, f : f + pf].flatten()
    return out


CASES = [
    window_attention_case("whole windows", (8, 4), (4, 4)),
    window_attention_case("shifted in time", (8, 4), (4, 4), (2, 0)),
    window_attention_case("shifted in both", (8, 8), (4, 4), (2, 2), B=1),
    window_attention_case("padded", (7, 5), (4, 3), (0, 0), d=24),
    window_attention_case("padded and shifted", (5, 7), (4, 4), (2, 1), B=1, H=3),
    window_attention_case("window clipped to the grid", (6, 3), (4, 4), (2, 2)),
    window_attention_case("one token", (1, 1), (4, 4), d=8),
    window_attention_case("no bias", (4, 4), (2, 2), (1, 0), bias=False),
    window_attention_case("dot", (6, 6), (3, 3), (1, 2), scoring="dot"),
    window_attention_case("dot, padded, no bias", (5, 5), (4, 2), (1, 1), scoring="dot", bias=False),
    window_attention_case("no clip", (4, 4), (2, 2), (1, 1), B=0),
    *(
        case
        for op in ("patch_gather", "masked_mse")
        for case in (
            patch_case(op, "square", 64, 32, (16, 16)),
            patch_case(op, "overlapping", 37, 29, (16, 16), (10, 10)),
            patch_case(op, "tall, overlapping in frequency", 48, 24, (16, 8), (16, 4), K=5),
            patch_case(op, "frames", 11, 16, (2, 16), K=4),
            patch_case(op, "three masks a clip", 9, 8, (3, 2), m=3),
            patch_case(op, "transposed", 9, 7, (3, 2), view=transposed),
            patch_case(op, "expanded", 9, 7, (3, 2), B=3, view=expanded),
            patch_case(op, "misaligned", 9, 7, (3, 2), view=misaligned),
            patch_case(op, "stride over the patch", 13, 9, (2, 2), (3, 4)),
            patch_case(op, "one patch", 3, 2, (3, 2), K=1),
            patch_case(op, "no token", 9, 8, (3, 2), K=0),
            patch_case(op, "no mask", 9, 8, (3, 2), m=0),
            patch_case(op, "no clip", 9, 8, (3, 2), B=0),
        )
    ),
    patch_case("masked_mse", "raw target", 37, 29, (16, 16), (10, 10), normalize=False),
    unshuffle_case("usual", 2, 5, 24, 32),
    unshuffle_case("odd", 3, 4, 7, 13),
    unshuffle_case("all kept", 2, 6, 6, 8),
    unshuffle_case("one token", 1, 1, 1, 1),
    unshuffle_case("nothing kept", 2, 0, 6, 8),
    unshuffle_case("no clip", 0, 3, 6, 8),
    *(
        case
        for over in ("target", "prediction")
        for case in (
            info_nce_case(f"over {over}", 2, 12, 32, over),
            info_nce_case(f"over {over}, odd", 3, 7, 5, over),
            info_nce_case(f"over {over}, one token", 2, 1, 4, over),
            info_nce_case(f"over {over}, no token", 2, 0, 4, over),
            info_nce_case(f"over {over}, no clip", 0, 3, 4, over),
        )
    ),
    attention_case("three heads"),
    attention_case("three heads, dropout", dropout=0.1),
    attention_case("packed", lengths=(5, 1, 7), H=2, d=8),
    attention_case("packed, dropout", lengths=(3, 9, 0, 1, 6), H=1, dropout=0.3),
    attention_case("odd", B=1, L=103, d=5, dropout=0.5),
    attention_case("a tile and one", B=1, L=129, H=1, d=80),
    attention_case("twelve heads", L=34, H=12, d=64, dropout=0.1),
    attention_case("two blocks of keys", B=1, L=161, H=1, d=32, dropout=0.1),
    attention_case("transposed", view=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    attention_case("expanded", B=3, view=expanded),
    attention_case("last dimension apart", view=apart),
    attention_case("no token", L=0),
    attention_case("no clip", B=0),
    attention_case("no packed token", lengths=()),
]


def cases(*ops: str) -> list:
    """pytest parameters for the cases of `ops`, all of them by default."""
    import pytest

    return [pytest.param(case, id=f"{case.op}: {case.name}") for case in CASES if case.op in (ops or ak.OPS)]
