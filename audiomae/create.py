"""Models by name, by path, or by hub id."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .classifier import Classifier
from .config import ClassifierConfig, EncoderConfig, list_models, model_config, replace, suggest
from .masking import Grid
from .model import MaskedAutoencoder, Positions, SpectrogramModel
from .pretrained import build, load_folder
from .ssast import SSAST
from .upstream import load_upstream

_REGULARISATION = ("dropout", "attention_dropout", "input_dropout", "layer_drop", "drop_path")
_CHECKPOINTS = (".pth", ".pt", ".bin", ".safetensors")


def create_model(
    name: str, pretrained: str | Path | None = None, **overrides: Any
) -> MaskedAutoencoder | SSAST:
    """A pre-training model, freshly initialised or with its weights.

    Args:
        name: one of `list_models()`.
        pretrained: path or hub id of the weights (`load`), ours or published. They must be those of the named model;
            their front end, positions and target stay as they are there.
        overrides: fields of its configuration (`MAEConfig`, `SSASTConfig`), for example `mask_ratio=0.75`,
            `patch=(32, 16), stride=(16, 16)`, `decoder="hybrid"`, `frames=512`; `decoder="none"` takes the encoder of
            pre-trained weights alone.

    Raises:
        ValueError: an unknown name or field (near ones are suggested), a value out of range, or weights of another
            architecture.
    """
    config = model_config(name, **overrides)
    if pretrained is None:
        return build(config)
    model = load(pretrained, **_what_the_name_says(config, pretrained), **overrides)
    if type(model).config_class is not type(config):
        raise ValueError(
            f"{pretrained} holds a {type(model).__name__}, which is no {name}; audiomae.load loads it as it is"
        )
    _check_same_architecture(config, {}, model.config, pretrained)
    return model


def _what_the_name_says(config: EncoderConfig | None, pretrained: str | Path) -> dict[str, Any]:
    """What a published checkpoint's tensors cannot say, and the name of the model does."""
    if config is None or config.family != "mae_ast" or not Path(pretrained).is_file():
        return {}
    return {"tokens": "frame" if config.patch[1] == config.mel_bins else "patch"}


def create_classifier(
    name: str | None,
    num_classes: int,
    frames: int | None = 1024,
    pretrained: str | Path | None = None,
    **overrides: Any,
) -> Classifier:
    """A classifier on the encoder of a named model.

    Args:
        name: one of `list_models()`; None takes the architecture of the pre-trained weights.
        num_classes: outputs of the head.
        frames: length of the clips; None takes that of the pre-trained weights, or the named model's.
        pretrained: path or hub id of the weights to start from (`load`); their encoder and positions are
            taken, head and fc_norm start fresh. Without it positions are on the right grid ("grid").
        overrides: fields of `ClassifierConfig`, for example
            `drop_path=0.1, mask_time=0.2, mask_frequency=0.2`.

    Raises:
        ValueError: an unknown name or field, no name and no weights, or weights of another architecture.
    """
    if name is None and pretrained is None:
        raise ValueError(
            "a classifier needs the name of a model, or pre-trained weights to take its encoder from"
        )
    named = None if name is None else model_config(name)
    source = None if pretrained is None else load(pretrained, **_what_the_name_says(named, pretrained))
    encoder = named if source is None else source.config
    if source is not None and named is not None:
        _check_same_architecture(named, overrides, encoder, pretrained)
    fields = {f.name: getattr(encoder, f.name) for f in dataclasses.fields(EncoderConfig)}
    # Audio-MAE pools before its norm, SSAST after it. Pre-training's dropout is not fine-tuning's.
    fields |= {"final_norm": encoder.family == "ssast", **dict.fromkeys(_REGULARISATION, 0.0)}
    if source is None and fields["positions"] == "transposed":
        fields["positions"] = "grid"
    frames = encoder.frames if frames is None else frames
    fields |= {"frames": frames, "frontend": replace(encoder.frontend, frames=frames, labels=None)}
    model = Classifier(replace(ClassifierConfig(**fields, num_classes=num_classes), **overrides))
    if source is not None:
        _copy_encoder(source, model)
    return model


def _check_same_architecture(
    named: EncoderConfig, overrides: dict[str, Any], found: EncoderConfig, source: object
) -> None:
    for key in ("family", "width", "depth", "heads", "mel_bins", "patch"):
        wanted = overrides.get(key, getattr(named, key))
        if getattr(found, key) != wanted:
            raise ValueError(
                f"the weights in {source} have {key}={getattr(found, key)!r}, "
                f"but the wanted model has {wanted!r}"
            )


def _copy_encoder(source: SpectrogramModel, model: Classifier) -> None:
    state = source.encoder.state_dict()
    own = model.encoder.state_dict()
    for name in [name for name in state if name not in own]:
        del state[name]  # the final norm, where pooling comes before it
    if source.encoder.positions.kind == "learned":
        state["positions.table"] = _resampled(source.encoder.positions, model.encoder.positions.grid)
    elif "positions.table" in state:
        wanted, found = model.encoder.positions.grid, source.encoder.positions.grid
        if wanted[1] != found[1]:
            raise ValueError(
                f"the pre-trained positions are for {found[1]} frequency bands of patches, "
                f"but stride={model.config.step} gives {wanted[1]}"
            )
        if wanted[0] > found[0]:
            raise ValueError(
                f"the pre-trained positions reach {source.config.frames} frames, "
                f"which is less than frames={model.config.frames}"
            )
        with torch.no_grad():
            state["positions.table"] = torch.cat(source.encoder.positions(wanted))[None]
    model.encoder.load_state_dict(state)
    model.spectrogram_norm.load_state_dict(source.spectrogram_norm.state_dict())


@torch.no_grad()
def _resampled(positions: Positions, wanted: Grid) -> Tensor:
    """(1, P + L, D): learned positions on another grid, cut in time or interpolated, as SSAST fine-tunes."""
    grid = (min(wanted[0], positions.grid[0]), positions.grid[1])
    prefix, table = positions(grid)
    if grid != wanted:
        planes = table.T.unflatten(1, grid)[None]  # (1, D, T', F')
        table = F.interpolate(planes, size=wanted, mode="bilinear", align_corners=False)[0].flatten(1).T
    return torch.cat((prefix, table))[None]


def load(source: str | Path, **overrides: Any) -> SpectrogramModel:
    """A model with its weights.

    Args:
        source: a folder written by `save_pretrained` or by a run, a published checkpoint (`.pth`, `.pt`, `.bin`,
            `.safetensors`; see `from_upstream`), or a Hugging Face hub id.
        overrides: fields of the configuration to replace; for a published checkpoint those of `from_upstream`.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a file or folder that holds no model of ours.
    """
    path = Path(source)
    if path.is_dir():
        return load_folder(path, overrides)
    if path.is_file():
        return load_upstream(path, **overrides)
    if str(source) in list_models():
        raise FileNotFoundError(f"{source} names an untrained model: create_model({str(source)!r}) makes it")
    if path.suffix in _CHECKPOINTS or path.is_absolute() or str(source).count("/") != 1:
        raise FileNotFoundError(
            f"there is no file or folder {source}{suggest(str(source), list_models())} (a hub id looks like "
            "owner/name)"
        )
    return SpectrogramModel.from_pretrained(str(source), **overrides)
