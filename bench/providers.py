"""From a case to something that can be run: models, their shared weights, and the training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import audiomae
from audiomae.pretrained import build as build_model

from . import plain
from .data import visible_tokens
from .registry import DTYPES, Case
from .timing import ProviderError


def build_plain(case: Case) -> nn.Module:
    config = case.config()
    sizes = {key: getattr(config, key) for key in ("frames", "width", "depth", "heads")}
    if config.family == "ssast":
        return plain.SSAST(**sizes, passes=case.passes)
    if config.family == "mae_ast":
        return plain.MAEAST(**sizes, decoder_depth=config.num_decoder_blocks)
    return plain.AudioMAE(
        **sizes,
        decoder=config.decoder,
        decoder_width=config.decoder_width,
        decoder_depth=config.num_decoder_blocks,
        decoder_heads=config.decoder_heads,
        normalize_target=config.normalize_target,
    )


def build(case: Case) -> nn.Module:
    """The provider's model with random weights, on the CPU, in training mode."""
    model = build_plain(case) if case.provider == "plain" else build_model(case.config())
    return model.train()


def allocate(case: Case, device: str) -> nn.Module:
    """The provider's model on a device with all weights 0.01: for what does not depend on their values."""
    with torch.device("meta"):
        model = build(case)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)
    return model


def share_weights(model: nn.Module, other: nn.Module) -> None:
    """Make `model` use the very parameters of `other`, which has the same names."""
    model.load_state_dict(other.state_dict(keep_vars=True), assign=True)


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Our model's weights into a baseline, through upstream's names.

    Raises:
        ProviderError: a weight of the baseline is missing.
    """
    result = target.load_state_dict(audiomae.to_upstream(source), strict=False)
    if result.missing_keys:
        raise ProviderError(
            f"to_upstream() lacks {', '.join(result.missing_keys[:3])}, which the baseline has"
        )


@dataclass
class Step:
    """One training step of a case; call it to run it. The optimizer may be shared between cases.

    The learning rate is 0: AdamW does all its work and the weights stay, so that the loss of every timed step
    can be compared with the reference's.
    """

    case: Case
    model: nn.Module
    spectrogram: torch.Tensor
    optimizer: torch.optim.Optimizer

    def __post_init__(self):
        ids = visible_tokens(len(self.spectrogram), self.case.num_tokens, self.case.kept)
        ids = ids.to(self.spectrogram.device)
        if self.case.provider == "ours":
            mask = audiomae.Mask.from_keep(ids, self.case.num_tokens)
            self._arguments: dict[str, Any] = {"mask": mask}
        else:
            self._arguments = {"ids_keep": ids}

    def forward(self) -> torch.Tensor:
        """The loss, under autocast for a half-precision case."""
        device = self.spectrogram.device.type
        with torch.autocast(device, DTYPES[self.case.dtype], enabled=self.case.dtype != "fp32"):
            return self.model(self.spectrogram, **self._arguments).loss

    def __call__(self) -> torch.Tensor:
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW whose state exists already, as it does in every step but a training's first."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer
