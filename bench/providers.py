"""From a case to something that can be run: models, their shared weights, and the step that is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import audiomae
from audiomae.config import replace as replace_fields
from audiomae.model import Block
from audiomae.pretrained import build as build_model

from . import plain
from .data import visible_tokens
from .registry import DTYPES, Case
from .timing import ProviderError


def build_plain(case: Case) -> nn.Module:
    config = case.config()
    sizes = {key: getattr(config, key) for key in ("frames", "width", "depth", "heads")}
    if config.family == "ssast":
        return plain.SSAST(**sizes, patch=config.patch, passes=case.passes)
    if config.family == "mae_ast":
        return plain.MAEAST(**sizes, patch=config.patch, decoder_depth=config.num_decoder_blocks)
    return plain.AudioMAE(
        **sizes,
        decoder=config.decoder,
        decoder_width=config.decoder_width,
        decoder_depth=config.num_decoder_blocks,
        decoder_heads=config.decoder_heads,
        global_blocks=config.global_blocks,
        normalize_target=config.normalize_target,
    )


def build(case: Case) -> nn.Module:
    """The provider's model with random weights, on the CPU, in training mode or, for other modes, in evaluation."""
    model = build_plain(case) if case.provider == "plain" else build_model(case.config())
    if case.provider == "compiled":
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
    return model.train(case.mode == "training")


def build_reference(case: Case, model: nn.Module) -> nn.Module:
    """What the results of a case without a baseline are held to: our model on the ops' references, in fp32.

    Args:
        model: ours, whose weights it uses.
    """
    case = replace(case, provider="ours", dtype="fp32")
    reference = build_model(replace_fields(case.config(), impl="reference", recompute="none"))
    share_weights(reference, model)
    return reference.to(next(model.parameters()).device).train(case.mode == "training")


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
    """What is timed of a case; call it to run it. The optimizer may be shared between cases.

    Of training a step: forward, backward, AdamW. The learning rate is 0: AdamW does all its work and the weights
    stay, so that the loss of every timed step can be compared with the reference's.

    Args:
        optimizer: of training, else None.
    """

    case: Case
    model: nn.Module
    spectrogram: torch.Tensor
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self):
        ours = self.case.provider != "plain"
        self._arguments: dict[str, Any] = {}
        if self.case.mode == "embeddings":
            self._function = self.model.encode if ours else self.model.embeddings
            return
        self._function = self.model
        ids = visible_tokens(len(self.spectrogram), self.case.num_tokens, self.case.kept)
        ids = ids.to(self.spectrogram.device)
        self._arguments["mask" if ours else "ids_keep"] = (
            audiomae.Mask.from_keep(ids, self.case.num_tokens) if ours else ids
        )

    def forward(self) -> torch.Tensor:
        """The loss, or the embeddings (B, tokens, D); under autocast for a half-precision case."""
        device = self.spectrogram.device.type
        with torch.autocast(device, DTYPES[self.case.dtype], enabled=self.case.dtype != "fp32"):
            result = self._function(self.spectrogram, **self._arguments)
        return result if self.case.mode == "embeddings" else result.loss

    def __call__(self) -> torch.Tensor:
        if self.case.mode != "training":
            with torch.no_grad():
                return self.forward()
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def figure(result: torch.Tensor) -> float:
    """The one number that stands for a step's result: the loss; the root mean square of embeddings."""
    return result.item() if result.ndim == 0 else result.float().square().mean().sqrt().item()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW whose state exists already, as it does in every step but a training's first."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Of the optimizer's state."""
    states = optimizer.state.values() if optimizer else ()
    return sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor))
