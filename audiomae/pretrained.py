"""Models on disk and on the Hugging Face hub: a folder with `config.json` and `model.safetensors`."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import config as configs

if TYPE_CHECKING:
    from .model import SpectrogramModel

_CARD = """---
{{ card_data }}
---

Weights of an `audiomae` model, of the kind and sizes in `config.json`: `audiomae.load(<this folder or hub id>)`.
"""

# Filled by the model classes: which configuration builds which of them.
_MODELS: dict[type, type[SpectrogramModel]] = {}

CONFIG, WEIGHTS, EXTRAS = "config.json", "model.safetensors", "upstream.safetensors"


@dataclass(frozen=True)
class Upstream:
    """Where a model came from, and what it could not use.

    Attributes:
        kind: which published state dict.
        prefix: "module." where the names had it.
        extras: tensors without a place in the model, by upstream's name.
    """

    kind: str
    prefix: str = ""
    extras: dict[str, Tensor] = field(default_factory=dict)


def build(config: configs.Config) -> SpectrogramModel:
    """The model of a configuration, freshly initialised."""
    return _MODELS[type(config)](config)


def reconfigured(model: SpectrogramModel, **overrides: Any) -> SpectrogramModel:
    """A copy with some fields of its configuration replaced, which shares the model's tensors.

    For fields that no module keeps a copy of: `pad`, `frames`, `frontend`.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo |= {id(model.config): configs.replace(model.config, **overrides), id(model.upstream): model.upstream}
    return copy.deepcopy(model, memo)


class PretrainedMixin(
    ModelHubMixin, library_name="audiomae", tags=["audio", "masked-autoencoder"], model_card_template=_CARD
):
    """`save_pretrained(folder)`, `from_pretrained(folder or hub id)` and `push_to_hub(hub id)`.

    A model that came from a published checkpoint takes along what it had no use for (`upstream`), so that
    `audiomae.to_upstream` gives all of it back.
    """

    config_class: type | None = None  # set by each concrete model
    upstream: Upstream | None = None  # set by `audiomae.from_upstream`

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if cls.config_class is not None:
            _MODELS[cls.config_class] = cls

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / CONFIG).write_text(self.config.to_json_string())
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, save_directory / WEIGHTS, metadata={"format": "pt"})
        (save_directory / EXTRAS).unlink(missing_ok=True)  # of a model that was here before
        if self.upstream is not None:
            # MAE-AST's two tables of positions may be one tensor, which safetensors refuses.
            extras = {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in self.upstream.extras.items()
            }
            metadata = {"kind": self.upstream.kind, "prefix": self.upstream.prefix}
            save_file(extras, save_directory / EXTRAS, metadata=metadata)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision=None, cache_dir=None, force_download=False, local_files_only=False,
        token=None, **overrides: Any,
    ) -> SpectrogramModel:  # fmt: skip
        """The model in a folder or on the hub, some fields of its configuration replaced.

        The keywords with a default are those of `huggingface_hub.snapshot_download`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files are broken, or hold a model of another class.
        """
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    str(source),
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[CONFIG, WEIGHTS, EXTRAS],
                )
            )
        model = load_folder(folder, overrides)
        if not isinstance(model, cls):
            raise ValueError(f"{source} holds a {type(model).__name__}, not a {cls.__name__}")
        return model


def load_folder(folder: Path, overrides: dict[str, Any]) -> SpectrogramModel:
    """The model in a folder written by `save_pretrained`, some fields of its configuration replaced.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the configuration or the weights are broken, or do not belong together.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: it is no folder that save_pretrained wrote")
    try:
        config = configs.from_dict(json.loads((folder / CONFIG).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is no model configuration: {error}") from error
    state = read_safetensors(folder / WEIGHTS)
    config = configs.replace(config, **overrides)
    with torch.device("meta"):  # shapes first: nothing is allocated before everything fits
        check_weights(build(config), state, folder / WEIGHTS)
    model = build(config).to(next((t.dtype for t in state.values() if t.is_floating_point()), None))
    # Each tensor keeps its own dtype; the copy leaves the file's memory, which is not aligned for fast products.
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    if (folder / EXTRAS).is_file():
        extras = read_safetensors(folder / EXTRAS)
        with safe_open(folder / EXTRAS, "pt") as file:
            metadata = file.metadata() or {}
        if not {"kind", "prefix"} <= set(metadata):
            raise ValueError(f"{folder / EXTRAS} does not say which published checkpoint it belongs to")
        model.upstream = Upstream(metadata["kind"], metadata["prefix"], extras)
    return model


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from error


def check_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], source: object) -> None:
    """Compares names and shapes with a model's, and says all that is wrong in one sentence."""
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the weights in {source} do not fit the model: {'; '.join(problems[:5])}{more}")
