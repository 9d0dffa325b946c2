"""The calls that are inspected: each op, forward and backward, at the sizes of the published models.

10-second clips of 1024 frames x 128 mel bins in 16 x 16 patches: a grid of 64 x 8 tokens, V = 256. Audio-MAE
keeps 102 of 512 tokens and has a decoder of width 512; MAE-AST keeps 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import audiomae_kernels as ak

FRAMES, MEL, PATCH, VALUES = 1024, 128, (16, 16), 256
GRID, TOKENS, KEPT, WIDTH, HEADS = (64, 8), 512, 102, 512, 16


@dataclass(frozen=True)
class Launch:
    """A call of an op with ``impl="triton"`` and what its kernels have to move.

    `call` takes a factory ``tensor(*shape)`` of float tensors in the dtype and alignment under inspection,
    and the number of clips. `streams` gives, for each kernel, its streaming operands and their values per
    clip: the fewest bytes, and the operands that are to be accessed 128 bits at a time.
    """

    name: str
    call: Callable[[Callable[..., Tensor], int], None]
    streams: dict[str, dict[str, int]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)  # of matrix products, for each clip
    slack: dict[str, float | None] = field(default_factory=dict)  # bytes moved over the fewest, if not 1.05
    quick: bool = True  # whether the quick selection has it

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that the call has to launch."""
        return tuple(dict.fromkeys((*self.streams, *self.flops)))

    def allowed(self, kernel: str) -> float | None:
        """Bound on bytes moved over the fewest; None where the operands are read again from a cache."""
        return self.slack.get(kernel, 1.05)


def run(launch: Launch, dtype: torch.dtype, aligned: bool, clips: int) -> None:
    """Make the call on CPU tensors; without `aligned`, each starts one value after a 16-byte boundary."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.zeros(shape, dtype=dtype)
        if not aligned:
            values = torch.cat((values.new_zeros(1), values.flatten()))[1:].view(shape)
        return values.requires_grad_()

    torch.manual_seed(0)
    launch.call(tensor, clips)


def _ids(rows: int, count: int, total: int = TOKENS) -> Tensor:
    return torch.stack([torch.randperm(total)[:count] for _ in range(rows)])


def _backward(tensor, out: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(out, inputs, tensor(*out.shape, dtype=out.dtype).detach())


def _window_attention(tensor, clips, scoring="cosine", window=(4, 4), heads=HEADS, channels=WIDTH // HEADS):
    qkv, N = tensor(clips, TOKENS, 3, heads, channels), window[0] * window[1]
    bias = tensor(heads, N, N, dtype=torch.float32)
    tau = tensor(heads, dtype=torch.float32) if scoring == "cosine" else None
    options = {"grid": GRID, "window": window, "shift": (2, 0), "scoring": scoring, "impl": "triton"}
    out = ak.window_attention(qkv, tau, bias, **options)
    _backward(tensor, out, *(x for x in (qkv, tau, bias) if x is not None))


def _patch_gather(tensor, clips, patch=PATCH, stride=None, kept=KEPT):
    st, sf = stride or patch
    total = ((FRAMES - patch[0]) // st + 1) * ((MEL - patch[1]) // sf + 1)
    spectrogram = tensor(clips, FRAMES, MEL).detach()
    ak.patch_gather(spectrogram, _ids(clips, kept, total), patch=patch, stride=stride, impl="triton")


def _unshuffle(tensor, clips, pos_gradient=False):
    tokens, mask_token = tensor(clips, KEPT, WIDTH), tensor(WIDTH, dtype=torch.float32)
    pos = tensor(TOKENS, WIDTH, dtype=torch.float32).detach().requires_grad_(pos_gradient)
    out = ak.unshuffle(tokens, _ids(clips, KEPT), mask_token, pos, impl="triton")
    _backward(tensor, out, tokens, mask_token, *([pos] if pos_gradient else []))


def _masked_mse(tensor, clips):
    pred = tensor(clips, TOKENS - KEPT, VALUES)
    spectrogram, ids = tensor(clips, FRAMES, MEL).detach(), _ids(clips, TOKENS - KEPT)
    _backward(tensor, ak.masked_mse(pred, spectrogram, ids, patch=PATCH, impl="triton"), pred)


def _info_nce(tensor, clips, **of_target):
    pred, target = tensor(clips, 384, VALUES), tensor(clips, 384, VALUES, **of_target)
    _backward(tensor, ak.info_nce(pred, target, impl="triton"), pred, target)


def _attention(
    name: str, window=(4, 4), heads=HEADS, channels=WIDTH // HEADS, quick=False, **options
) -> Launch:
    row, keys = TOKENS * heads * channels, window[0] * window[1]
    return Launch(
        name,
        partial(_window_attention, window=window, heads=heads, channels=channels, **options),
        {
            "window_attention_fwd_kernel": {"qkv": 3 * row, "out": row},
            "window_attention_bwd_kernel": {"grad": row, "qkv": 3 * row, "dqkv": 3 * row},
        },
        # QK and PV, and in the backward pass QK again and four gradients
        {
            "window_attention_fwd_kernel": 2 * 2 * keys * row,
            "window_attention_bwd_kernel": 5 * 2 * keys * row,
        },
        {"window_attention_bwd_kernel": 1.15},
        quick,
    )


_ROW = TOKENS * WIDTH
_MASKED = (TOKENS - KEPT) * VALUES
_PAIR = 384 * VALUES

LAUNCHES = (
    _attention("window_attention", quick=True),
    _attention("window_attention, dot", scoring="dot"),
    _attention("window_attention, 80 channels", heads=6, channels=80),
    _attention("window_attention, 128 channels", heads=4, channels=128),
    _attention("window_attention, 8x4 windows", window=(8, 4), heads=6, channels=80),
    _attention("window_attention, 8x8 windows", window=(8, 8), heads=8, channels=64),
    Launch(
        "patch_gather",
        _patch_gather,
        {"patch_gather_fwd_kernel": {"spectrogram": KEPT * VALUES, "out": KEPT * VALUES}},
    ),
    Launch(
        "patch_gather, frames",
        partial(_patch_gather, patch=(2, MEL)),
        {"patch_gather_fwd_kernel": {"spectrogram": KEPT * VALUES, "out": KEPT * VALUES}},
        quick=False,
    ),
    # A patch starts at a multiple of 10 values: nothing is 16 bytes apart.
    Launch("patch_gather, overlapping", partial(_patch_gather, stride=(10, 10)), quick=False),
    Launch(
        "unshuffle",
        _unshuffle,
        {
            "unshuffle_fwd_kernel": {"tokens": KEPT * WIDTH, "out": _ROW},
            "unshuffle_bwd_tokens_kernel": {"grad": KEPT * WIDTH, "d_tokens": KEPT * WIDTH},
            "unshuffle_bwd_sums_kernel": {"grad": (TOKENS - KEPT) * WIDTH},
        },
    ),
    Launch(
        "unshuffle, pos",
        partial(_unshuffle, pos_gradient=True),
        {"unshuffle_bwd_sums_kernel": {"grad": _ROW}},
        quick=False,
    ),
    Launch(
        "masked_mse",
        _masked_mse,
        {
            "masked_mse_fwd_kernel": {"pred": _MASKED, "spectrogram": _MASKED},
            "masked_mse_bwd_kernel": {"pred": _MASKED, "spectrogram": _MASKED, "d_pred": _MASKED},
        },
    ),
    Launch(
        "info_nce",
        _info_nce,
        {
            "info_nce_fwd_kernel": {"x": _PAIR, "y": _PAIR},
            "info_nce_bwd_kernel": {"x": _PAIR, "y": _PAIR, "d_x": _PAIR},
        },
        {"info_nce_fwd_kernel": 2 * 384 * _PAIR, "info_nce_bwd_kernel": 4 * 384 * _PAIR},
        # A product of matrices: each program goes through all of y, which a clip's programs share in L2.
        {"info_nce_fwd_kernel": None, "info_nce_bwd_kernel": None},
    ),
    # Targets straight from the spectrogram: products in float32.
    Launch("info_nce, mixed", partial(_info_nce, dtype=torch.float32), quick=False),
)
