"""What a fine-tuning or an evaluation is made of, and the published recipes by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..config import is_name, suggest
from ..data import Augment
from ..train.config import RunConfig, check_least, option
from .tasks import TASKS

TaskName = Literal["as20k", "as2m", "esc50", "spc2", "spc1", "voxceleb1", "iemocap", "custom"]
Fold = Literal["1", "2", "3", "4", "5", "all"]


@dataclass
class TuneConfig(RunConfig):
    """A fine-tuning run.

    Attributes:
        task: what to tell apart, and in which data set; without --recipe it brings its own published settings
        pretrained: weights to start from: a run's model, a published checkpoint, or a hub id; without them --model is
            trained from random ones
        model: a name (`audiomae.list_models()`), which pre-trained weights must agree with; default: their architecture
        model_overrides: fields of the classifier's configuration, for example {stride: [10, 10]}
        frames: length of the clips in frames of 10 ms; default: the task's, or the pre-trained model's
        mean: of the data set's log-mel values; default: the task's, or the pre-trained model's
        std: likewise, the standard deviation
        data: the folder of the data set, as it was unpacked; for one's own data a folder of class folders or a CSV
        val_data: for AudioSet in manifests or shards, and for one's own data: what to evaluate on
        out: folder of the run: config.yaml, metrics.jsonl, checkpoints, and in the end the model and its test results
        fold: the data set's fold that is the test (1 to 5); all makes a run for each, below --out
        loss: ce, cross-entropy, or bce, binary cross-entropy of each class; default: ce; bce where clips have
            several labels
        base_lr: or relative: times (batch size x accumulate x processes) / 256; default: 1e-3
        min_lr: where the schedule ends
        schedule: after the warm-up: half a cosine to min_lr, a line to min_lr, constant, halved whenever the validation
            loss did not improve three times in a row, or step: see step_decay
        step_decay: factor, first epoch and epochs between: the rate is multiplied by the factor after that epoch, and
            each so many epochs again
        layer_decay: of the learning rate, per block from the head down
        drop_path: rate of the last block; that of the others rises to it linearly
        mask_time: share of time steps that is masked in training
        mask_freq: share of frequency bands
        spec_augment: widest bands of time (frames) and frequency (bins) that are blanked out in training
        spectrogram_noise: added to spectrograms in training: white noise at a signal-to-noise ratio in decibels, 20 in
            Audio-MAE's paper; or released, evenly drawn noise and a shift in time, as in the released code of Audio-MAE
            and SSAST; null for none
        label_smoothing: share of the labels that is spread over all classes
        ema: decay of an exponential moving average of the weights, which is then what is validated and kept
        average_from: or from the end of this epoch on, the mean of the weights at the ends of epochs
        repeat_classes: go over the clips of each class but the largest again until an epoch has this share of the
            largest one's
        balanced: draw clips by the rarity of their labels
        replacement: when drawing so, one clip several times in an epoch, perhaps
        epoch_clips: clips drawn per epoch; default: as many as there are
        select: which weights become the model: the best by the task's metric on the validation split, or the last;
            default: best where the data set has a validation split of its own (validation is on the test split where it
            has none), else last
        val_every: steps between validations; default: an epoch
        save_every: steps between checkpoints; default: val_every
    """

    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "linear", "constant", "plateau", "step"] = "cosine"
    min_lr: float = 1e-6
    save_every: int | None = None
    keep: int = 1

    task: TaskName | None = None
    pretrained: str | None = None
    frames: int | None = None
    fold: Fold | None = None
    loss: Literal["ce", "bce"] | None = None
    step_decay: tuple[float, float, float] = (0.5, 10.0, 5.0)
    layer_decay: float = 0.75
    drop_path: float = 0.1
    mask_time: float = 0.0
    mask_freq: float = 0.0
    spec_augment: tuple[int, int] = (0, 0)
    spectrogram_noise: float | Literal["released"] | None = None
    label_smoothing: float = 0.0
    ema: float | None = None
    average_from: int | None = None
    repeat_classes: float | None = None
    balanced: bool = False
    replacement: bool = False
    epoch_clips: int | None = None
    select: Literal["best", "last"] | None = None

    default_base_lr: ClassVar[float] = 1e-3
    needed: ClassVar[dict[str, str]] = {"task": "a task"} | RunConfig.needed

    def check(self) -> None:
        super().check()
        _check_task(self.task)
        task = TASKS[self.task]
        if self.model is None and self.pretrained is None:
            raise ValueError(
                "there is nothing to fine-tune: give --pretrained weights, or --model for random ones"
            )
        if is_name(self.pretrained):
            raise ValueError(f"--pretrained {self.pretrained} names an untrained model: give it as --model")
        if bool(task.folds) != (self.fold is not None):
            raise ValueError(
                f"{task.title} has folds 1 to {task.folds}: give --fold with one of them, or --fold all"
                if task.folds
                else f"{task.title} has no folds: leave --fold out"
            )
        for name in ("frames", "epoch_clips", "average_from"):
            check_least(name, getattr(self, name), 1)
        for name in ("mask_time", "mask_freq", "drop_path", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{option(name)} is {getattr(self, name)!r}, but a share in [0, 1) was expected"
                )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer-decay is {self.layer_decay}, but a factor in (0, 1] was expected")
        if min(self.spec_augment) < 0:
            raise ValueError(
                f"--spec-augment is {self.spec_augment}, but two widths of at least 0 were expected"
            )
        factor, first, every = self.step_decay
        if not (0 < factor <= 1 and first >= 0 and every > 0 and math.isfinite(first + every)):
            raise ValueError(
                f"--step-decay is {self.step_decay}, but a factor, an epoch and epochs were expected"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"--ema is {self.ema}, but a decay in (0, 1) was expected")
        if self.ema is not None and self.average_from is not None:
            raise ValueError("--ema and --average-from average the weights in two ways: give one of them")
        if self.fsdp and (self.ema is not None or self.average_from is not None):
            raise ValueError("averages of the weights are not kept under --fsdp: leave one of the two out")
        noise = self.spectrogram_noise
        number = isinstance(noise, (int, float)) and not isinstance(noise, bool) and math.isfinite(noise)
        if not (number or noise in (None, "released")):
            raise ValueError(
                f"--spectrogram-noise is {noise!r}, but a ratio in decibels, released or null was expected"
            )
        if self.repeat_classes is not None and not 0 < self.repeat_classes <= 1:
            raise ValueError(
                f"--repeat-classes is {self.repeat_classes}, but a share in (0, 1] of the largest class was expected"
            )
        if self.repeat_classes is not None and self.balanced:
            raise ValueError("--repeat-classes and --balanced balance classes in two ways: give one of them")
        if (self.replacement or self.epoch_clips is not None) and not self.balanced:
            raise ValueError("--replacement and --epoch-clips say how --balanced draws clips: add it")

    @property
    def start(self) -> str | None:
        return self.pretrained or self.model

    @classmethod
    def of_recipe(cls, name: str | None, task: str | None = None) -> dict[str, Any]:
        """The settings of a recipe; without a name, those of the task's own."""
        own = next((name for name, settings in cls.recipes.items() if settings["task"] == task), None)
        return super().of_recipe(name or own)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TuneConfig:
        pairs = {name: tuple(values[name]) for name in ("spec_augment", "step_decay") if name in values}
        return super().from_dict({**values, **pairs})


@dataclass
class EvaluateConfig:
    """An evaluation.

    Attributes:
        model: the folder of a run, a folder with a saved model, a published fine-tuned checkpoint, or a hub id
        task: default: the run's
        data: the folder of the data set; default: the run's
        val_data: where --data are manifests or shards, those to evaluate on; default: the run's
        fold: 1 to 5, or all, of a run of all; default: the run's
        split: of the data set
        out: folder for metrics.json, per_class.csv and confusion.png; default: below the run's folder, or beside
            the model
        batch_size: clips per process at a time
        precision: of products
        workers: processes that decode
        device: cpu, cuda, or auto: cuda where there is one
    """

    model: str | None = None
    task: TaskName | None = None
    data: list[str] = field(default_factory=list)
    val_data: list[str] = field(default_factory=list)
    fold: Fold | None = None
    split: Literal["train", "val", "test"] = "test"
    out: str | None = None
    batch_size: int = 16
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: int = 2
    device: str = "auto"

    @classmethod
    def of_recipe(cls, name: str | None, task: str | None = None) -> dict[str, Any]:
        return {}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvaluateConfig:
        return cls(**values)

    to_dict = RunConfig.to_dict

    def check(self) -> None:
        """Raises ValueError for what cannot be evaluated."""
        if not self.model:
            raise ValueError(
                "there is no --model: name a run, a saved model or a published fine-tuned checkpoint"
            )
        check_least("batch_size", self.batch_size, 1)
        check_least("workers", self.workers, 0)
        if self.task is not None:
            _check_task(self.task)


def _check_task(name: str) -> None:
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}{suggest(name, TASKS)}; there are {', '.join(TASKS)}")


#: Audio-MAE, Table 3 and section 4.2 of the paper; the decay by layer and fp16, which it does not state, are the
#: released code's. Batches are those of all processes together.
_AUDIOMAE: dict[str, Any] = {
    "optimizer": "adamw",
    "betas": (0.9, 0.95),
    "weight_decay": 1e-4,
    "base_lr": 1e-3,
    "min_lr": 1e-6,
    "schedule": "cosine",
    "epochs": 60.0,
    "warmup_epochs": 4.0,
    "layer_decay": 0.75,
    "drop_path": 0.1,
    "mask_time": 0.3,
    "mask_freq": 0.3,
    "precision": "fp16",
    "augment": Augment(roll=True),
}
_MIXED = Augment(roll=True, mixup=0.5)

#: SSAST's released scripts. Betas, weight decay and the length of the warm-up are those of its pre-training: nothing
#: else is stated.
_SSAST: dict[str, Any] = {
    "optimizer": "adam",
    "betas": (0.95, 0.999),
    "weight_decay": 5e-7,
    "schedule": "step",
    "warmup_steps": 1000,
    "layer_decay": 1.0,
    "drop_path": 0.0,
}
_SSAST_TASKS: dict[str, dict[str, Any]] = {
    "as20k": {
        **_SSAST, "task": "as20k", "lr": 5e-5, "epochs": 25.0, "batch_size": 12, "step_decay": (0.5, 10.0, 5.0),
        "average_from": 6, "warmup_steps": 0, "loss": "bce", "spec_augment": (192, 48), "augment": Augment(mixup=0.5),
    },
    "esc50": {
        **_SSAST, "task": "esc50", "lr": 1e-4, "epochs": 50.0, "batch_size": 48, "step_decay": (0.85, 6.0, 1.0),
        "warmup_steps": 0, "loss": "ce", "spec_augment": (96, 24), "spectrogram_noise": "released",
    },
    "spc2": {
        **_SSAST, "task": "spc2", "lr": 2.5e-4, "epochs": 30.0, "batch_size": 128, "step_decay": (0.85, 6.0, 1.0),
        "loss": "bce", "spec_augment": (48, 48), "spectrogram_noise": "released", "augment": Augment(mixup=0.6),
    },
}  # fmt: skip

#: SSAST's patches overlap in fine-tuning.
_OVERLAP = {"model_overrides": {"stride": [10, 10]}}

#: MAE-AST in SUPERB, through s3prl. Stated are Adam, rates, batches and steps.
_SUPERB: dict[str, Any] = {
    "optimizer": "adam",
    "betas": (0.9, 0.999),
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup_steps": 0,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "loss": "ce",
}

#: Published fine-tuning settings, as fields of :class:`TuneConfig`: the model's family and the task. A task's first one
#: is its own.
RECIPES: dict[str, dict[str, Any]] = {
    "audiomae.as20k": {
        **_AUDIOMAE, "task": "as20k", "batch_size": 32, "loss": "bce", "spec_augment": (192, 48), "augment": _MIXED,
    },
    "audiomae.as2m": {
        **_AUDIOMAE, "task": "as2m", "batch_size": 8, "accumulate": 64, "base_lr": 2e-4, "epochs": 100.0,
        "warmup_epochs": 20.0, "loss": "bce", "spec_augment": (192, 48), "augment": _MIXED, "balanced": True,
        "epoch_clips": 200_000,
    },
    "audiomae.esc50": {
        **_AUDIOMAE, "task": "esc50", "batch_size": 64, "loss": "ce", "spec_augment": (96, 24),
    },
    "audiomae.spc2": {
        **_AUDIOMAE, "task": "spc2", "batch_size": 256, "loss": "bce", "spec_augment": (48, 48), "augment": _MIXED,
        "spectrogram_noise": 20.0,
    },
    "audiomae.spc1": {
        **_AUDIOMAE, "task": "spc1", "batch_size": 256, "epochs": 10.0, "warmup_epochs": 1.0, "loss": "bce",
        "spec_augment": (48, 48), "augment": _MIXED, "spectrogram_noise": 20.0, "repeat_classes": 0.5,
    },
    "audiomae.voxceleb1": {
        **_AUDIOMAE, "task": "voxceleb1", "batch_size": 64, "loss": "ce", "spec_augment": (192, 48),
        "spectrogram_noise": 20.0,
    },
    "mae_ast.spc1": {
        **_SUPERB, "task": "spc1", "lr": 1e-5, "batch_size": 512, "steps": 10_000, "balanced": True,
        "replacement": True,
    },
    "mae_ast.voxceleb1": {
        **_SUPERB, "task": "voxceleb1", "lr": 1e-4, "batch_size": 4, "accumulate": 4, "steps": 60_000,
    },
    "mae_ast.iemocap": {
        **_SUPERB, "task": "iemocap", "lr": 1e-4, "batch_size": 6, "accumulate": 5, "steps": 3_000,
    },
    # "SSAST library with no settings changed".
    **{f"mae_ast.{name}": settings for name, settings in _SSAST_TASKS.items()},
    **{f"ssast.{name}": {**settings, **_OVERLAP} for name, settings in _SSAST_TASKS.items()},
}  # fmt: skip


def _released(task: str, **settings: Any) -> dict[str, Any]:
    """The paper's recipe with what Audio-MAE's released code has in place of it."""
    paper = RECIPES[f"audiomae.{task}"]
    augment = Augment(upstream_roll_mag=True, mixup=paper["augment"].mixup)
    return {**paper, "betas": (0.9, 0.999), "augment": augment, **settings}


_SCRIPT = {"weight_decay": 5e-4, "mask_time": 0.2, "mask_freq": 0.2}
_NO_MASKS = {"mask_time": 0.0, "mask_freq": 0.0}  # its grids for clips that are not 10 s long are comments
_NOISE = {**_NO_MASKS, "spectrogram_noise": "released"}
RECIPES |= {
    "audiomae.as20k_released": _released("as20k", **_SCRIPT),
    "audiomae.as2m_released": _released(
        "as2m", **_SCRIPT, accumulate=32, warmup_epochs=10.0, replacement=True
    ),
    "audiomae.esc50_released": _released("esc50", **_NO_MASKS),
    "audiomae.spc2_released": _released("spc2", **_NOISE),
    "audiomae.spc1_released": _released("spc1", **_NOISE),
    "audiomae.voxceleb1_released": _released("voxceleb1", **_NOISE),
}

TuneConfig.recipes = RECIPES
