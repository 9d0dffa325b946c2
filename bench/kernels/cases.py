"""What is measured: ops at the shapes of the models, their inputs, and the least they must move and compute.

Legend as in `audiomae_kernels`: B clips, L tokens of width D, K kept, M masked, H heads of d channels, N tokens in
a window, V values in a patch, e bytes in a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from audiomae_kernels.attention.reference import attention_ref
from audiomae_kernels.info_nce.reference import info_nce_ref
from audiomae_kernels.masked_mse.reference import masked_mse_ref
from audiomae_kernels.patch_gather.reference import patch_gather_ref
from audiomae_kernels.unshuffle.reference import unshuffle_ref
from audiomae_kernels.window_attention.reference import window_attention_ref
from torch import Tensor

from ..data import visible_tokens
from ..registry import DTYPES

MODES = ("forward", "backward", "forward+backward")
REFERENCES = {
    "window_attention": window_attention_ref,
    "patch_gather": patch_gather_ref,
    "unshuffle": unshuffle_ref,
    "masked_mse": masked_mse_ref,
    "info_nce": info_nce_ref,
    "attention": attention_ref,
}
# Parameters stay in float32, as they do in training.
PARAMETERS = ("tau", "bias", "mask_token", "pos")

GRID, WINDOW, HEADS, HEAD_DIM = (64, 8), (4, 4), 16, 32
FRAMES, BINS, PATCH = 1024, 128, (16, 16)
TOKENS, KEPT, WIDTH = 512, 102, 512
MASKED, VALUES = TOKENS - KEPT, PATCH[0] * PATCH[1]


class Work(NamedTuple):
    """The least that a pass moves (bytes: every operand read once, every result written once) and computes."""

    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Shape:
    """An op at one size.

    Attributes:
        make: batch -> the op's tensors in float32 (ids in int64).
        work: (bytes in a value, the op's tensors) -> `Work` forward and, if there is one, backward.
        wrt: tensors that take a gradient in training.
        quick: whether the quick preset measures it.
    """

    op: str
    name: str
    description: str
    make: Callable[[int], dict[str, Tensor | None]] = field(compare=False)
    work: Callable[..., tuple[Work, ...]] = field(compare=False)
    wrt: tuple[str, ...] = ()
    options: dict = field(default_factory=dict, hash=False)
    quick: bool = True


@dataclass(frozen=True)
class Case:
    """A shape in one precision and batch size: what all providers are given."""

    shape: Shape
    dtype: str
    batch: int

    @property
    def op(self) -> str:
        return self.shape.op

    @property
    def label(self) -> str:
        return f"{self.op}, {self.shape.name} | {self.dtype} | batch {self.batch}"

    def tensors(self, seed: int, device: torch.device | str = "cpu") -> dict[str, Tensor | None]:
        """Random inputs, activations rounded to the case's dtype."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.shape.make(self.batch)
        return {
            name: tensor
            if tensor is None
            else tensor.to(device, DTYPES[self.dtype])
            if tensor.is_floating_point() and name not in PARAMETERS
            else tensor.to(device)
            for name, tensor in made.items()
        }

    def reference(self, upcast: bool) -> Callable[..., Tensor]:
        return partial(REFERENCES[self.op], **self.shape.options, upcast=upcast)

    def without_dropout(self) -> Case:
        """The same but for the dropout among its options; the case itself if it has none."""
        if not self.shape.options.get("dropout"):
            return self
        return replace(self, shape=replace(self.shape, options=self.shape.options | {"dropout": 0.0}))

    def work(self, tensors: dict[str, Tensor | None]) -> dict[str, Work]:
        """By mode; forward and backward together move and compute what the two do one after the other."""
        passes = self.shape.work(DTYPES[self.dtype].itemsize, tensors)
        if len(passes) == 1:
            return {"forward": passes[0]}
        return dict(zip(MODES, (*passes, Work(*map(sum, zip(*passes, strict=True)))), strict=True))

    def columns(self) -> dict:
        """The case's columns in the CSV."""
        return {"op": self.op, "shape": self.shape.name, "dtype": self.dtype, "batch": self.batch}


def _window_attention(scoring: str, shift: tuple[int, int], quick: bool) -> Shape:
    cosine, N, D = scoring == "cosine", WINDOW[0] * WINDOW[1], HEADS * HEAD_DIM

    def make(batch):
        return {
            "qkv": torch.randn(batch, GRID[0] * GRID[1], 3, HEADS, HEAD_DIM),
            "tau": torch.rand(HEADS) + 0.1 if cosine else None,
            "bias": torch.randn(HEADS, N, N) if cosine else None,
        }

    def work(e, tensors):
        tokens = tensors["qkv"].shape[0] * tensors["qkv"].shape[1]
        # Forward: q kᵀ and P v. Backward: dv, dP, dq, dk; S computed again is a choice and not counted.
        return Work(4 * D * e * tokens, 4 * N * D * tokens), Work(7 * D * e * tokens, 8 * N * D * tokens)

    return Shape(
        "window_attention",
        scoring + (f", shift {shift[0]}x{shift[1]}" if any(shift) else ""),
        f"{GRID[0]}x{GRID[1]} tokens in windows of {WINDOW[0]}x{WINDOW[1]}, {HEADS} heads of {HEAD_DIM}; "
        + ("cosine scores with tau and bias" if cosine else "scaled dot products, no bias"),
        make,
        work,
        ("qkv", "tau", "bias") if cosine else ("qkv",),
        {"grid": GRID, "window": WINDOW, "shift": shift, "scoring": scoring},
        quick,
    )


def _patch_gather(stride: tuple[int, int]) -> Shape:
    rows, columns = ((size - p) // s + 1 for size, p, s in zip((FRAMES, BINS), PATCH, stride, strict=True))
    kept = rows * columns // 5

    def make(batch):
        ids = visible_tokens(batch, rows * columns, kept, seed=torch.randint(2**31, ()).item())
        return {"spectrogram": torch.randn(batch, FRAMES, BINS), "ids": ids}

    def work(e, tensors):
        ids = tensors["ids"].cpu()
        # What overlapping patches share is read once.
        corner = ids // columns * stride[0] * BINS + ids % columns * stride[1]
        inside = (torch.arange(PATCH[0])[:, None] * BINS + torch.arange(PATCH[1])).flatten()
        read = torch.zeros(len(ids), FRAMES * BINS, dtype=torch.bool)
        read.scatter_(1, (corner[..., None] + inside).flatten(1), True)
        return (Work(e * read.sum().item() + (VALUES * e + 8) * ids.numel()),)

    return Shape(
        "patch_gather",
        "x".join(map(str, PATCH)) + ("" if stride == PATCH else f", stride {stride[0]}"),
        f"{kept} of {rows * columns} patches of {FRAMES}x{BINS}; a spectrogram takes no gradient",
        make,
        work,
        options={"patch": PATCH, "stride": stride},
    )


def _unshuffle() -> Shape:
    def make(batch):
        return {
            "tokens": torch.randn(batch, KEPT, WIDTH),
            "ids_keep": visible_tokens(batch, TOKENS, KEPT, seed=torch.randint(2**31, ()).item()),
            "mask_token": torch.randn(WIDTH),
            "pos": torch.randn(TOKENS, WIDTH),
        }

    def work(e, tensors):
        batch = len(tensors["tokens"])
        both = batch * ((KEPT + TOKENS) * WIDTH * e + 8 * KEPT)
        forward = Work(both + 4 * TOKENS * WIDTH, batch * TOKENS * WIDTH)
        return forward, Work(both, batch * (TOKENS - KEPT) * WIDTH)

    description = f"{KEPT} tokens of width {WIDTH} among {TOKENS}; positions are fixed"
    return Shape("unshuffle", f"{KEPT} to {TOKENS}", description, make, work, ("tokens", "mask_token"))


def _masked_mse() -> Shape:
    def make(batch):
        return {
            "pred": torch.randn(batch, MASKED, VALUES),
            "spectrogram": torch.randn(batch, FRAMES, BINS),
            "ids_masked": visible_tokens(batch, TOKENS, MASKED, seed=torch.randint(2**31, ()).item()),
        }

    def work(e, tensors):
        patches = tensors["pred"].shape[0] * MASKED
        # Under ten FLOPs a value: mean, variance, difference, square.
        forward = Work((2 * VALUES * e + 8) * patches, 7 * VALUES * patches)
        return forward, Work((3 * VALUES * e + 8) * patches, 7 * VALUES * patches)

    description = (
        f"{MASKED} masked patches of {PATCH[0]}x{PATCH[1]} out of {FRAMES}x{BINS}, normalised targets"
    )
    return Shape("masked_mse", "normalised", description, make, work, ("pred",), {"patch": PATCH})


def _info_nce(masked: int = 384, values: int = 256) -> Shape:
    def make(batch):
        return {
            "pred": torch.randn(batch, masked, values) * values**-0.5,
            "target": torch.randn(batch, masked, values),
        }

    def work(e, tensors):
        values_, batch = masked * values, len(tensors["pred"])
        product = 2 * batch * masked * masked * values
        # Targets are data: one gradient. S computed again is a choice and not counted.
        return Work(2 * values_ * e * batch, product), Work(3 * values_ * e * batch, product)

    description = f"{masked} predictions and targets of {values} values a clip; targets take no gradient"
    return Shape("info_nce", f"{masked}x{values}", description, make, work, ("pred",))


def _attention(tokens: int, dropout: float, quick: bool, heads: int = 12, head_dim: int = 64) -> Shape:
    def make(batch):
        return {"qkv": torch.randn(batch, tokens, 3, heads, head_dim), "seed": torch.randint(2**62, ())}

    def work(e, tensors):
        rows, D = tensors["qkv"].shape[0] * tokens, heads * head_dim
        # Forward: q kᵀ and P v. Backward: dv, dP, dq, dk; S computed again is a choice and not counted.
        return Work(4 * D * e * rows, 4 * tokens * D * rows), Work(7 * D * e * rows, 8 * tokens * D * rows)

    return Shape(
        "attention",
        f"{tokens} tokens" + (f", dropout {dropout}" if dropout else ""),
        f"{tokens} tokens, {heads} heads of {head_dim}" + (f"; dropout {dropout}" if dropout else ""),
        make,
        work,
        ("qkv",),
        {"dropout": dropout},
        quick,
    )


SHAPES = (
    _window_attention("cosine", (0, 0), quick=True),
    _window_attention("cosine", (2, 0), quick=True),
    _window_attention("dot", (0, 0), quick=False),
    _window_attention("dot", (2, 0), quick=False),
    _patch_gather((16, 16)),
    _patch_gather((10, 10)),
    _unshuffle(),
    _masked_mse(),
    _info_nce(),
    _attention(128, 0.0, quick=True),
    _attention(128, 0.1, quick=True),
    _attention(512, 0.0, quick=False),
    _attention(512, 0.1, quick=False),
)
OPS = tuple(dict.fromkeys(shape.op for shape in SHAPES))


def cases(ops, dtypes, batches, quick: bool) -> list[Case]:
    """All cases, or those of the quick preset."""
    return [
        Case(shape, dtype, batch)
        for shape in SHAPES
        if shape.op in ops and (shape.quick or not quick)
        for batch in batches
        for dtype in dtypes
    ]
