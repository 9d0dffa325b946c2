"""What is measured: a row of the table is a `Case`. New models, providers, dtypes and modes enter here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from audiomae.config import DECODERS, model_config
from audiomae.config import MODELS as CONFIGS
from audiomae.masking import num_kept

from . import flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPELLINGS = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}  # float32 -> fp32
MODEL_DTYPES = ("fp32", "bf16")
PROVIDERS = ("plain", "ours", "compiled")
DEFAULT_PROVIDERS = ("plain", "ours")
MODES = ("training", "inference", "embeddings")

# The benchmark's name of a model -> the library's name, and what is changed in its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in CONFIGS},
    **{
        f"audiomae_base/{decoder}": ("audiomae_base", {"decoder": decoder})
        for decoder in ("hybrid", "global", "cross")
        if decoder in DECODERS
    },
    # MAE-AST's two published depths of the encoder: 12, and 6.
    **{
        f"mae_ast_{tokens}_base/6+2": (f"mae_ast_{tokens}_base", {"depth": 6})
        for tokens in ("patch", "frame")
    },
}
DEFAULT_MODELS = ("audiomae_base", "mae_ast_patch_base", "ssast_patch_base")
# What is interleaved with what in the full run; each group has the SSAST that it is to be compared with.
FULL_GROUPS = (
    DEFAULT_MODELS,
    tuple(name for name in MODELS if name.startswith("audiomae_base/")),
    ("mae_ast_patch_base/6+2", "ssast_patch_base"),
    ("mae_ast_frame_base", "mae_ast_frame_base/6+2", "ssast_frame_base"),
)

FRAMES = 1024  # 512 tokens
FULL_FRAMES = (992, 1024, 2048, 4096)  # 496, 512, 1024 and 2048 tokens
FULL_MASK_RATIOS = (0.5, 0.75, 0.8)
FULL_BATCHES = (8, 1, 32)
SWEEP_BATCH = 2  # of the full run's lengths and mask ratios

# Benchmarked without dropout, so that every provider's loss can be checked against the reference's.
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "layer_drop": 0.0}


@dataclass(frozen=True)
class Point:
    """What all rows of a group have in common; a mask ratio of None is each model's published one."""

    batch: int
    frames: int = FRAMES
    mode: str = "training"
    mask_ratio: float | None = None


@dataclass(frozen=True)
class Case:
    """One row: a model, who computes it, in what precision and on how much.

    Attributes:
        model: of `MODELS`.
        passes: of SSAST: 1, or 2 as its published code does; 1 for the others.
        provider: "plain" (PyTorch with SDPA, bench/plain), "ours", or "compiled" (ours, each Transformer block
            through `torch.compile`).
        dtype: "fp32", or "bf16" for fp32 weights under bf16 autocast.
        mode: "training": forward, backward and an AdamW step; "inference": the forward pass with its losses,
            without gradients; "embeddings": the encoder over all tokens, without gradients.
        mask_ratio: None for the published one.
        overrides: of the model's configuration.
    """

    model: str
    provider: str
    dtype: str
    batch: int
    passes: int = 1
    frames: int = FRAMES
    mode: str = "training"
    mask_ratio: float | None = None
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        passes = ", two passes" if self.passes == 2 else ""
        return f"{self.model}{passes} | {PROVIDER_NAMES[self.provider]} | {self.dtype}"

    def config(self):
        """The configuration that all providers build."""
        name, changed = MODELS[self.model]
        family = CONFIGS[name].family
        options = {"frames": self.frames, **NO_DROPOUT, **changed, **self.overrides}
        if self.mask_ratio is not None:
            options["mask_ratio"] = self.mask_ratio
        if family == "ssast":
            options["passes"] = self.passes
        else:
            options["bias_dropout"] = 0.0
        if family == "mae_ast":
            options["input_norm"] = "batch" if self.mode == "training" else "running"
        return model_config(name, **options)

    @property
    def has_baseline(self) -> bool:
        """Whether bench/plain has this model."""
        return getattr(self.config(), "decoder", None) != "cross"

    @property
    def num_tokens(self) -> int:
        rows, columns = self.config().grid(self.frames)
        return rows * columns

    @property
    def kept(self) -> int:
        """Tokens that are not masked; of embeddings all."""
        if self.mode == "embeddings":
            return self.num_tokens
        return num_kept(self.num_tokens, self.config().mask_ratio)

    @property
    def times_forward(self) -> int:
        """Products of a step for one of the forward pass: in training there are two more for its gradients."""
        return 3 if self.mode == "training" else 1

    def cost(self) -> flops.Cost:
        """Of one clip's forward pass, as published."""
        return self._cost(least=False)

    def least(self) -> flops.Cost:
        """As `cost`, without what nobody reads."""
        return self._cost(least=True)

    def _cost(self, least: bool) -> flops.Cost:
        if self.mode == "embeddings":
            return flops.encoding_cost(self.config(), self.frames)
        return flops.cost(self.config(), self.kept, self.frames, least)

    @property
    def weights(self) -> tuple[str, bool]:
        """Cases with the same value share one set of parameters and optimizer state."""
        return self.model, self.provider == "plain"

    @property
    def build(self) -> tuple[str, str, int]:
        """Cases with the same value run the same model."""
        return self.model, self.provider, self.passes

    @property
    def recomputed(self) -> str:
        """What the backward pass computes again, as `EncoderConfig.recompute` names it."""
        if self.provider == "compiled" and self.config().recompute == "activations":
            return "compiler's choice"
        return "none" if self.provider == "plain" or self.mode != "training" else self.config().recompute

    def columns(self) -> dict[str, Any]:
        """The case's columns in the CSV."""
        own = {key: value for key, value in dataclasses.asdict(self).items() if key != "overrides"}
        ratio = None if self.mode == "embeddings" else float(self.config().mask_ratio)
        return {**own, "mask_ratio": ratio, "tokens": self.num_tokens, "kept": self.kept}


PROVIDER_NAMES = {"plain": "plain", "ours": "ours", "compiled": "ours, compiled"}


def cases(
    models: Sequence[str],
    dtypes: Sequence[str],
    point: Point,
    providers: Sequence[str] = DEFAULT_PROVIDERS,
    overrides: dict | None = None,
) -> list[Case]:
    """All rows of a group: SSAST in one pass and in two, each with every provider that has it.

    Embeddings have no losses, so one pass alone.
    """
    rows = [
        Case(
            model,
            provider,
            dtype,
            passes=passes,
            overrides=(overrides or {}).get(model, {}),
            **dataclasses.asdict(point),
        )
        for dtype in dtypes
        for model in models
        for passes in ((1, 2) if model.startswith("ssast") and point.mode != "embeddings" else (1,))
        for provider in providers
    ]
    return [row for row in rows if row.provider != "plain" or row.has_baseline]


def quick_points(
    batch: int,
    modes: Sequence[str] | None,
    frames: Sequence[int] | None,
    mask_ratios: Sequence[float] | None,
    batches: Sequence[int] | None,
) -> list[Point]:
    """All combinations of what was asked for; training of 1024 frames at the published mask ratio otherwise."""
    return _distinct(
        Point(b, f, mode, ratio)
        for mode, b, f, ratio in product(
            modes or MODES[:1], batches or (batch,), frames or (FRAMES,), mask_ratios or (None,)
        )
    )


def full_points(
    modes: Sequence[str] | None,
    frames: Sequence[int] | None,
    mask_ratios: Sequence[float] | None,
    batches: Sequence[int] | None,
) -> list[Point]:
    """The full run's points, the training steps of the published models first.

    What was not asked for varies one at a time: the batch at 1024 frames and the published mask ratio, the length
    and the mask ratio at `SWEEP_BATCH` clips. What was asked for is combined with all of that.
    """
    points = []
    for mode in modes or MODES:
        sweeps = [
            (b, f, r)
            for b in batches or FULL_BATCHES
            for f in frames or (FRAMES,)
            for r in mask_ratios or (None,)
        ]
        some = batches or (SWEEP_BATCH,)
        if not frames:
            sweeps += [(b, f, r) for b in some for f in FULL_FRAMES for r in mask_ratios or (None,)]
        if not mask_ratios:
            sweeps += [(b, f, r) for b in some for f in frames or (FRAMES,) for r in FULL_MASK_RATIOS]
        points += [Point(b, f, mode, r) for b, f, r in sweeps]
    return _distinct(points)


def _distinct(points) -> list[Point]:
    """Without repetitions; embeddings know no mask."""
    return list(dict.fromkeys(replace(p, mask_ratio=None) if p.mode == "embeddings" else p for p in points))
