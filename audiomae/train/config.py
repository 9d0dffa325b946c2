"""What a run is made of: one typed configuration, and the published recipes of pre-training by name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..config import suggest
from ..data import Augment

#: Where neither `lr` nor `base_lr` is given: Audio-MAE's base rate.
BASE_LR = 2e-4
#: Where neither `warmup_steps` nor `warmup_epochs` is given: Audio-MAE's 3 of 33 epochs.
WARMUP = 3 / 33


@dataclass
class RunConfig:
    """What every run has, pre-training and fine-tuning alike.

    Attributes:
        model: a name (`audiomae.list_models()`), or a path or hub id of weights to go on from
        model_overrides: fields of the model's configuration, for example {frames: 512, mask_ratio: 0.75}
        mean: of the data set's log-mel values (`audiomae prepare` prints it), in place of the model's own
        std: likewise, the standard deviation
        data: recordings
        val_data: recordings that are evaluated every --val-every steps
        out: folder of the run: config.yaml, metrics.jsonl, checkpoints, and in the end the model
        steps: optimizer steps of the whole run
        epochs: or passes over the data
        batch_size: clips per process and micro-batch
        accumulate: micro-batches per optimizer step
        lr: highest learning rate, absolute
        base_lr: or relative: times (batch size x accumulate x processes) / 256
        min_lr: where the schedule ends
        warmup_steps: steps in which the rate rises from 0
        warmup_epochs: or epochs; default: 3/33 of the run
        schedule: after the warm-up: half a cosine to min_lr, a line to min_lr, constant, or halved whenever the
            validation loss did not improve three times in a row
        optimizer: adamw, or adam with coupled weight decay
        betas: of the optimizer
        eps: of the optimizer
        weight_decay: of the parameters that the published recipe decays (`model.no_weight_decay()`)
        clip_grad: largest gradient norm; null leaves gradients alone
        precision: of products; weights and losses are fp32 in any case
        workers: processes that decode, for each training process
        seed: of weights, order, crops, augmentation, masks and dropout
        augment: of the waveforms
        log_every: steps between lines of metrics, for which the device is waited for
        save_every: steps between checkpoints
        keep: how many of the last checkpoints are kept, beside the best
        val_every: steps between validations; default: save_every
        resume: go on from the newest complete checkpoint in --out, or start if there is none
        fsdp: shard weights, gradients and optimizer state over the processes (FSDP2) instead of replicating them (DDP)
        device: cpu, cuda, or auto: cuda where there is one
        recipe: published settings by name; what else is given replaces them
    """

    #: Published settings by name; the base rate where neither `lr` nor `base_lr` is given; what `check` asks for.
    recipes: ClassVar[dict[str, dict[str, Any]]] = {}
    default_base_lr: ClassVar[float] = BASE_LR
    needed: ClassVar[dict[str, str]] = {"data": "recordings", "out": "a folder for the run"}

    model: str | None = None
    model_overrides: dict[str, Any] = field(default_factory=dict)
    mean: float | None = None
    std: float | None = None
    data: list[str] = field(default_factory=list)
    val_data: list[str] = field(default_factory=list)
    out: str | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    accumulate: int = 1
    lr: float | None = None
    base_lr: float | None = None
    min_lr: float = 0.0
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    schedule: Literal["cosine", "linear", "constant", "plateau"] = "cosine"
    optimizer: Literal["adamw", "adam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip_grad: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: int = 2
    seed: int = 0
    augment: Augment = field(default_factory=Augment)
    log_every: int = 10
    save_every: int = 1000
    keep: int = 3
    val_every: int | None = None
    resume: bool = False
    fsdp: bool = False
    device: str = "auto"
    recipe: str | None = None

    def check(self) -> None:
        """Refuses what cannot be trained, before anything is loaded or written.

        Raises:
            ValueError: something is missing, out of range, or given twice.
        """
        for name, what in self.needed.items():
            if not getattr(self, name):
                raise ValueError(
                    f"there is no {option(name)}: name {what} with it, or in the configuration file"
                )
        for one, other in EITHER:
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(
                    f"{option(one)} and {option(other)} say the same in two ways: give one of them"
                )
        if self.steps is None and self.epochs is None:
            raise ValueError("how long to train is not said: give --steps or --epochs")
        least = {"batch_size": 1, "accumulate": 1, "log_every": 1, "save_every": 1, "keep": 1, "steps": 0}
        least |= {"val_every": 1, "workers": 0, "seed": 0, "warmup_steps": 0}
        for name, bound in least.items():
            check_least(name, getattr(self, name), bound)
        for name in (
            "lr",
            "base_lr",
            "min_lr",
            "epochs",
            "warmup_epochs",
            "eps",
            "weight_decay",
            "clip_grad",
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{option(name)} is {value!r}, but a number of at least 0 was expected")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas are {self.betas}, but two numbers in [0, 1) were expected")
        if (self.mean is None) != (self.std is None):
            raise ValueError("--mean and --std belong together: give both, or neither")

    def learning_rate(self, processes: int) -> float:
        """The highest, of a run with so many processes."""
        if self.lr is not None:
            return self.lr
        base = self.default_base_lr if self.base_lr is None else self.base_lr
        return base * self.batch_size * self.accumulate * processes / 256

    def total_steps(self, batches: int) -> int:
        """Optimizer steps, where an epoch has so many micro-batches per process."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * batches / self.accumulate))

    def warmup(self, batches: int) -> int:
        """Steps of the warm-up, likewise."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_epochs is not None:
            return round(self.warmup_epochs * batches / self.accumulate)
        return round(WARMUP * self.total_steps(batches))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML has them; :meth:`from_dict` reads them back."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(v) for key, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The configuration whose :meth:`to_dict` is `values`; fields left out keep their defaults."""
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"a run has no setting {unknown[0]!r}{suggest(unknown[0], known)}")
        values = dict(values)
        if isinstance(values.get("augment"), dict):
            values["augment"] = Augment(**values["augment"])
        if "betas" in values:
            values["betas"] = tuple(values["betas"])
        return cls(**values)

    @property
    def start(self) -> str | None:
        """What a run starts from, for its first line."""
        return self.model

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @classmethod
    def of_recipe(cls, name: str | None, task: str | None = None) -> dict[str, Any]:
        """The settings of a recipe; nothing without a name.

        Raises:
            ValueError: there is none of that name; near ones are suggested.
        """
        if name is None:
            return {}
        if name not in cls.recipes:
            raise ValueError(
                f"there is no recipe {name!r}{suggest(name, cls.recipes)}; there are {', '.join(cls.recipes)}"
            )
        return {**cls.recipes[name], "recipe": name}


@dataclass
class TrainConfig(RunConfig):
    """A pre-training run.

    Attributes:
        data: a folder of audio, an AST manifest (.json), an MAE-AST manifest (.tsv), or shards; give it once for each
            source
        data_weight: how many times an epoch goes over each source, in the order of --data; default: once
        val_data: sources whose loss is measured every --val-every steps, whole and in order
        out: folder of the run: config.yaml, metrics.jsonl, checkpoints, pictures, and in the end the model
        base_lr: or relative: times (batch size x accumulate x processes) / 256; default: 2e-4
        picture_every: steps between pictures of a reconstruction; default: save_every; 0 draws none
    """

    data_weight: list[float] = field(default_factory=list)
    picture_every: int | None = None

    needed = {"model": "a model"} | RunConfig.needed

    def check(self) -> None:
        super().check()
        check_least("picture_every", self.picture_every, 0)
        if self.schedule == "plateau" and not self.val_data:
            raise ValueError(
                "--schedule plateau halves the rate when the validation loss stops falling: give --val-data, or "
                "choose another schedule"
            )
        if self.data_weight and len(self.data_weight) != len(self.data):
            raise ValueError(
                f"there are {len(self.data)} --data and {len(self.data_weight)} --data-weight: give one weight for "
                "each source, or none"
            )


#: Settings of which a run has one or the other.
EITHER = (("steps", "epochs"), ("lr", "base_lr"), ("warmup_steps", "warmup_epochs"))


def option(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


def check_least(name: str, value: Any, bound: int) -> None:
    """Refuses what is given and no whole number of at least `bound`."""
    if value is not None and not (isinstance(value, int) and value >= bound):
        raise ValueError(f"{option(name)} is {value!r}, but a whole number of at least {bound} was expected")


_MAE_AST = {
    # Released with fairseq's Adam, whose weight decay is decoupled, on one GPU: batches of 8,388,608 samples are 33
    # clips of the longest length, 250,000 samples.
    "batch_size": 33,
    "steps": 550_000,
    "lr": 1e-4,
    "warmup_steps": 32_000,
    "schedule": "linear",
    "betas": (0.9, 0.98),
    "eps": 1e-6,
    "weight_decay": 0.01,
    "clip_grad": 10.0,
    "precision": "fp16",
    "seed": 1337,
}

#: Published pre-training settings, as fields of :class:`TrainConfig`. The names say what they were trained on: 2M
#: clips of AudioSet, or AudioSet and LibriSpeech together (a --data each).
RECIPES: dict[str, dict[str, Any]] = {
    "audiomae_base.as2m": {
        "model": "audiomae_base",
        "batch_size": 8,  # on each of 64 GPUs
        "epochs": 33.0,
        "warmup_epochs": 3.0,
        "base_lr": 2e-4,
        "min_lr": 0.0,
        "schedule": "cosine",
        "betas": (0.9, 0.95),
        "weight_decay": 1e-4,
        "precision": "fp16",
        "augment": Augment(upstream_roll_mag=True),
    },
    "mae_ast_patch_base.as_ls": {"model": "mae_ast_patch_base", **_MAE_AST},
    "mae_ast_frame_base.as_ls": {"model": "mae_ast_frame_base", **_MAE_AST},
    "ssast_patch_base.as_ls": {
        "model": "ssast_patch_base",
        "model_overrides": {"passes": 2},  # a forward pass and a mask for each of the two losses
        "batch_size": 24,
        "epochs": 10.0,
        "lr": 1e-4,
        "warmup_steps": 1000,
        "schedule": "plateau",
        "val_every": 4000,
        "optimizer": "adam",
        "betas": (0.95, 0.999),
        "weight_decay": 5e-7,
        "precision": "fp32",
    },
}


TrainConfig.recipes = RECIPES
