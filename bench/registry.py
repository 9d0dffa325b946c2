"""What is measured: a row of the table is a `Case`. New models, providers, dtypes and modes enter here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from audiomae.config import MODELS as CONFIGS
from audiomae.config import model_config
from audiomae.masking import num_kept

from . import flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPELLINGS = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}  # float32 -> fp32
MODEL_DTYPES = ("fp32", "bf16")
PROVIDERS = ("plain", "ours")

# Models with a baseline in bench/plain (square patches); the default ones are the published base sizes.
MODELS = tuple(name for name, config in CONFIGS.items() if config.patch == (16, 16))
DEFAULT_MODELS = ("audiomae_base", "mae_ast_patch_base", "ssast_patch_base")

# Benchmarked without dropout, so that every provider's loss can be checked against the reference's.
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "layer_drop": 0.0}


@dataclass(frozen=True)
class Case:
    """One row: a model, who computes it, in what precision and on how much.

    Attributes:
        passes: of SSAST: 1, or 2 as its published code does; 1 for the others.
        provider: "plain" (PyTorch with SDPA, bench/plain) or "ours".
        dtype: "fp32", or "bf16" for fp32 weights under bf16 autocast.
        mode: "training": forward, backward and an AdamW step.
        overrides: of the model's configuration.
    """

    model: str
    provider: str
    dtype: str
    batch: int
    passes: int = 1
    frames: int = 1024
    mode: str = "training"
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        return f"{self.model}{', two passes' if self.passes == 2 else ''} | {self.provider} | {self.dtype}"

    def config(self):
        """The configuration that both providers build."""
        options = {"frames": self.frames, **NO_DROPOUT, **self.overrides}
        if CONFIGS[self.model].family == "ssast":
            options["passes"] = self.passes
        else:
            options["bias_dropout"] = 0.0
        if CONFIGS[self.model].family == "mae_ast":
            options["input_norm"] = "batch"
        return model_config(self.model, **options)

    @property
    def num_tokens(self) -> int:
        rows, columns = self.config().grid(self.frames)
        return rows * columns

    @property
    def kept(self) -> int:
        return num_kept(self.num_tokens, self.config().mask_ratio)

    def cost(self) -> flops.Cost:
        """Of one clip's forward pass."""
        return flops.cost(self.config(), self.kept, self.frames)

    @property
    def weights(self) -> tuple[str, str]:
        """Cases with the same value share one set of parameters and optimizer state."""
        return self.model, self.provider

    @property
    def build(self) -> tuple[str, str, int]:
        """Cases with the same value run the same model."""
        return self.model, self.provider, self.passes

    def columns(self) -> dict[str, Any]:
        """The case's columns in the CSV."""
        own = {key: value for key, value in dataclasses.asdict(self).items() if key != "overrides"}
        return {**own, "tokens": self.num_tokens, "kept": self.kept}


def cases(models, dtypes, batch: int, frames: int = 1024, overrides: dict | None = None) -> list[Case]:
    """All rows for these models and dtypes: SSAST in one pass and in two, each with every provider."""
    return [
        Case(model, provider, dtype, batch, passes, frames, overrides=(overrides or {}).get(model, {}))
        for dtype in dtypes
        for model in models
        for passes in ((1, 2) if CONFIGS[model].family == "ssast" else (1,))
        for provider in PROVIDERS
    ]
