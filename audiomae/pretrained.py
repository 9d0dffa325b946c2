"""Models on disk and on the Hugging Face hub: a folder with `config.json` and `model.safetensors`.

What is loaded may come from anybody. Nothing in it is executed, and it is checked for names, shapes and size before
anything is built or copied.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import config as configs
from .words import plural

if TYPE_CHECKING:
    from .model import SpectrogramModel

_CARD = """---
{{ card_data }}
---

{{ body }}
"""

# Filled by the model classes: which configuration builds which of them.
_MODELS: dict[type, type[SpectrogramModel]] = {}

CONFIG, WEIGHTS, EXTRAS, RECORD = "config.json", "model.safetensors", "upstream.safetensors", "record.json"
PUBLISHED = "pytorch_model.bin"  # timm's port of Audio-MAE on the hub

MOST_JSON = 2**24  # bytes; hundreds of kilobytes of labels are plenty
MOST_BUFFERED = 2**28  # values; MAE-AST's longest positions are 2**25


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


@dataclass(frozen=True)
class Record:
    """How weights came about; saved with them, and told by their model card.

    Attributes:
        recipe: name of published settings, if it was one.
        settings: of the run, JSON-able.
        metrics: by name, as measured at its end.

    Raises:
        TypeError: they are something else.
    """

    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, (str, types.NoneType)) or not isinstance(self.settings, dict):
            raise TypeError("the recipe should be a name, and the settings values by name")
        if not isinstance(self.metrics, dict) or not all(
            isinstance(v, (int, float)) for v in self.metrics.values()
        ):
            raise TypeError("the metrics should be numbers by name")


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
    `audiomae.to_upstream` gives all of it back. One that was trained takes along how (`record`): the model card states
    it.
    """

    config_class: type | None = None  # set by each concrete model
    upstream: Upstream | None = None  # set by `audiomae.from_upstream`
    record: Record | None = None  # set by training

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if cls.config_class is not None:
            _MODELS[cls.config_class] = cls

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / CONFIG).write_text(self.config.to_json_string())
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        _save_tensors(state, save_directory / WEIGHTS, {"format": "pt"})
        (save_directory / EXTRAS).unlink(missing_ok=True)  # of a model that was here before
        if self.upstream is not None:
            # MAE-AST's two tables of positions may be one tensor, which safetensors refuses.
            extras = {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in self.upstream.extras.items()
            }
            metadata = {"kind": self.upstream.kind, "prefix": self.upstream.prefix}
            _save_tensors(extras, save_directory / EXTRAS, metadata)
        (save_directory / RECORD).unlink(missing_ok=True)
        if self.record is not None:
            (save_directory / RECORD).write_text(json.dumps(dataclasses.asdict(self.record), indent=2) + "\n")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """What the model is, how to load it, and, where it is known, its recipe and metrics."""
        return super().generate_model_card(*args, body=_card_body(self), **kwargs)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision=None, cache_dir=None, force_download=False, local_files_only=False,
        token=None, **overrides: Any,
    ) -> SpectrogramModel:  # fmt: skip
        """The model in a folder, in a published file or on the hub, some fields of its configuration replaced.

        The keywords with a default are those of `huggingface_hub.snapshot_download`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files are broken, or hold a model of another class.
        """
        path = Path(source)
        if path.is_file():
            from .upstream import load_upstream  # which imports this module

            model = load_upstream(path, **overrides)
        else:
            if not path.is_dir():
                try:
                    path = Path(
                        snapshot_download(
                            str(source),
                            revision=revision,
                            cache_dir=cache_dir,
                            force_download=force_download,
                            local_files_only=local_files_only,
                            token=token,
                            allow_patterns=[CONFIG, WEIGHTS, EXTRAS, RECORD, PUBLISHED],
                        )
                    )
                except HFValidationError:
                    raise FileNotFoundError(
                        f"there is no file or folder {source} (a hub id looks like owner/name)"
                    ) from None
            model = load_folder(path, overrides)
        if not isinstance(model, cls):
            raise ValueError(f"{source} holds a {type(model).__name__}, not a {cls.__name__}")
        return model


def load_folder(folder: Path, overrides: dict[str, Any]) -> SpectrogramModel:
    """The model in a folder written by `save_pretrained`, or by a run, some fields of its configuration replaced.

    Also published weights beside a configuration of somebody else's (timm's); the overrides are those of
    `audiomae.from_upstream` then. `decoder="none"` leaves the decoder of a pre-trained model out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the configuration or the weights are broken, hold NaN, or do not belong together.
    """
    folder = _model_in(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: it is no folder that save_pretrained wrote")
    settings = _read_json(folder / CONFIG)
    if settings and isinstance(settings, dict) and "type" not in settings:
        return _load_published(folder, overrides)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}: it is no folder that save_pretrained wrote")
    try:
        config = configs.replace(configs.from_dict(settings), **overrides)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is no model configuration: {error}") from error
    state = read_safetensors(folder / WEIGHTS)
    if overrides.get("decoder") == "none":
        state = {n: t for n, t in state.items() if n.startswith(("encoder.", "spectrogram_norm."))}
    _check_size(config, state, folder)
    check_finite(state, folder / WEIGHTS)
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
    if (folder / RECORD).is_file():
        content = _read_json(folder / RECORD)
        try:
            model.record = Record(**content)
        except TypeError as error:
            raise ValueError(f"{folder / RECORD} is no record of a training run: {error}") from error
    return model


def _model_in(folder: Path) -> Path:
    """The folder itself, or where it is that of a run (`audiomae.train`), its model's."""
    if (folder / CONFIG).is_file() or (folder / "model" / CONFIG).is_file():
        return folder if (folder / CONFIG).is_file() else folder / "model"
    if (folder / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{folder} holds a run that has not come to its end, and has no model yet: go on with it with --resume"
        )
    if (folder / "fold-1").is_dir():
        raise FileNotFoundError(
            f"{folder} holds a run of all folds, which have a model each: name one, such as {folder / 'fold-1'}"
        )
    return folder


def _load_published(folder: Path, overrides: dict[str, Any]) -> SpectrogramModel:
    """Weights of a published kind in a folder or repository of somebody else's."""
    from .upstream import load_upstream  # which imports this module

    for name in (WEIGHTS, PUBLISHED):
        if (folder / name).is_file():
            return load_upstream(folder / name, **overrides)
    raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {PUBLISHED}: it holds no weights")


def _read_json(path: Path) -> Any:
    size = path.stat().st_size
    if size > MOST_JSON:
        raise ValueError(f"{path} has {size:,} bytes, more than any model's")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no model configuration: {str(error) or 'nested too deeply'}") from error


def _check_size(config: configs.Config, state: dict[str, Tensor], folder: Path) -> None:
    """Refuses weights that do not fit the configuration before anything of the configuration's size is made."""
    blocks = config.depth + getattr(config, "num_decoder_blocks", 0)
    if blocks > len(state):
        raise ValueError(
            f"{folder / CONFIG} asks for {blocks} blocks, but {folder / WEIGHTS} has {len(state)} tensors in all"
        )
    try:
        with torch.device("meta"):  # shapes alone, whatever is installed here
            model = build(configs.replace(config, attention=None, impl=None))
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder / CONFIG} asks for a model of impossible size: {reason}") from error
    check_weights(model, state, folder / WEIGHTS)
    stored = set(state)
    extra = sum(buffer.numel() for name, buffer in model.named_buffers() if name not in stored)
    if extra > MOST_BUFFERED:
        raise ValueError(
            f"{folder / CONFIG} asks for {extra:,} values beside its weights, more than any model has"
        )


def _card_body(model: SpectrogramModel) -> str:
    """Markdown of a model card."""
    c, record = model.config, model.record
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        f"# {type(model).__name__}, {c.family}",
        "",
        f"{parameters:,} parameters: {plural(c.depth, 'block')} of width {c.width} with "
        f"{plural(c.heads, 'head')}, patches of {c.patch[0]} frames x {c.patch[1]} mel bins. "
        f"Clips of {c.frames} frames (10 ms each), at {c.frontend.sample_rate} Hz.",
    ]
    if model.upstream is not None:
        lines += ["", f"Converted from a published checkpoint of {model.upstream.kind}."]
    lines += ["", "```python", "import audiomae", "", "model = audiomae.load(FOLDER_OR_HUB_ID)", "```"]
    if c.frontend.labels is not None:
        labels = c.frontend.labels
        lines += [
            "",
            f"{plural(len(labels), 'label')}: {', '.join(labels[:8])}" + (", ..." if len(labels) > 8 else ""),
        ]
    lines += ["", "## Training", ""]
    if record is None:
        return "\n".join([*lines, "How these weights were trained is not recorded."])
    lines.append(f"Recipe `{record.recipe}`." if record.recipe else "No published recipe.")
    if record.settings:
        lines += ["", "| setting | value |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in record.settings.items()]
    lines += ["", "## Metrics", ""]
    if not record.metrics:
        return "\n".join([*lines, "None were measured."])
    lines += ["| metric | value |", "| --- | --- |"]
    shown = {name: f"{v:.4f}" if isinstance(v, float) else v for name, v in record.metrics.items()}
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in shown.items()])


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    save_file(tensors, path, metadata=metadata)
    # safetensors lets its owner alone read a file, whatever the umask; the configuration beside it obeys that.
    shutil.copymode(path.with_name(CONFIG), path)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from error


def check_finite(state: dict[str, Tensor], source: object) -> None:
    """Refuses weights that a run that diverged has left behind, or that were made to harm."""
    bad = [name for name, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise ValueError(f"{source}: NaN or infinity in {plural(len(bad), 'tensor')}, the first is {bad[0]}")


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
