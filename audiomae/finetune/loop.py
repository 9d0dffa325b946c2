"""Fine-tuning: the loop's hooks for labels, augmentation, layer-wise rates and averaged weights."""

from __future__ import annotations

import logging
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.data import DataLoader

from ..classifier import Classifier
from ..config import ClassifierConfig
from ..create import create_classifier
from ..data import (
    BalancedSampler,
    Batch,
    ClipDataset,
    ClipSampler,
    RepeatingSampler,
    Source,
    smooth,
    spec_augment,
    spectrogram_noise,
)
from ..masking import Mask
from ..train.checkpoints import read_state
from ..train.loop import STATE, Loop, schedule
from ..train.processes import Processes, StopSignal
from .config import TuneConfig
from .datasets import write_splits
from .evaluate import SPLITS_FILE, Predictions, as_noted, predict, tell
from .metrics import Report, measure
from .tasks import TASKS

_log = logging.getLogger("audiomae.finetune")


def finetune(config: TuneConfig) -> Path | None:
    """Run or go on with a fine-tuning; of all folds, one after another.

    Returns:
        The folder with the model (of all folds: the run's, with `fold-1` to `fold-5` in it and their summary); None if
        the run was asked to end before its last step, and has saved.

    Raises:
        ValueError: a setting, the data set or a model is wrong.
        OSError: the folder of the run cannot be written.
        TrainingError: the loss is NaN or infinite.
    """
    config.check()
    with StopSignal() as stop, Processes(config.device) as processes:
        if config.fold != "all":
            return Tuner(config, processes).train(stop)
        return _all_folds(config, processes, stop)


def _all_folds(config: TuneConfig, processes: Processes, stop: StopSignal) -> Path | None:
    reports = {}
    for fold in range(1, TASKS[config.task].folds + 1):
        tuner = Tuner(replace(config, fold=str(fold), out=str(config.folder / f"fold-{fold}")), processes)
        if tuner.train(stop) is None:
            return None
        reports[str(fold)] = tuner.report
    tell(reports, f"{TASKS[config.task].title}, test", config.folder / "test", processes)
    return config.folder


class Tuner(Loop):
    """A fine-tuning run.

    Attributes:
        splits: the data set's.
        average: the averaged weights, once there are any; what is validated and kept then.
        report: on the test split, after the last step.
    """

    config: TuneConfig

    def __init__(self, config: TuneConfig, processes: Processes):
        self.average: AveragedModel | None = None
        self.report: Report | None = None
        with processes.warn_once():
            super().__init__(config, processes)
        if config.ema is not None:
            if processes.first and self.total * (1 - config.ema) < 1:
                _log.warning(
                    "--ema %s averages over some %d steps, and the run has %d: much of its first weights stays",
                    config.ema, round(1 / (1 - config.ema)), self.total,
                )  # fmt: skip
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        elif config.average_from is not None:
            if config.average_from * self._epoch > self.total:
                raise ValueError(
                    f"--average-from {config.average_from} is never reached: the run ends in epoch "
                    f"{self.total / self._epoch:.3g}. Name an earlier epoch, or null for no average"
                )
            self.average = AveragedModel(self.model, multi_avg_fn=get_swa_multi_avg_fn())

    def _create(self) -> Classifier:
        c = self.config
        task = TASKS[c.task]
        data = as_noted(c.folder, c.task, c.data) if c.resume else c.data
        self.splits = task.open(data, c.val_data, None if c.fold is None else int(c.fold))
        if self.splits.multi_label and c.loss == "ce":
            raise ValueError(
                f"clips of {task.title} have several labels: --loss ce takes one each; give --loss bce"
            )
        if c.schedule == "plateau" and self.splits.val is None:
            raise ValueError(
                f"--schedule plateau follows the loss on the validation split, and {task.title} has none: it would "
                "follow the test split. Choose another schedule"
            )
        self.loss = c.loss or ("bce" if self.splits.multi_label else "ce")
        published = task.settings
        names = self.splits.label_names
        model = create_classifier(
            c.model,
            len(names),
            frames=c.frames or (published and published.frames),
            pretrained=c.pretrained,
            **{
                "drop_path": c.drop_path,
                "mask_time": c.mask_time,
                "mask_frequency": c.mask_freq,
                **c.model_overrides,
            },
        )
        frontend = replace(model.config.frontend, labels=names)
        if c.mean is not None:
            frontend = replace(frontend, mean=c.mean, std=c.std)
        elif published is not None and frontend.mean is not None:
            frontend = replace(frontend, mean=published.mean, std=published.std)
        model.config.frontend = frontend
        return model

    def _open_data(self) -> tuple[ClipSampler, DataLoader, DataLoader]:
        c = self.config
        train = [self.splits.train]
        options: dict[str, Any] = {"seed": c.seed, **self._ranks}
        if c.balanced:
            sampler = BalancedSampler(train, clips=c.epoch_clips, replacement=c.replacement, **options)
        elif c.repeat_classes is not None:
            sampler = RepeatingSampler(train, share=c.repeat_classes, **options)
        else:
            sampler = ClipSampler(train, **options)
        dataset = ClipDataset(
            train, self.frontend, augment=c.augment, seconds=TASKS[c.task].seconds, seed=c.seed
        )
        val, test = (split and self._in_order(split) for split in (self.splits.val, self.splits.test))
        self.test_loader = test or val
        return sampler, self._loader(dataset, sampler), val or test

    def _in_order(self, source: Source) -> DataLoader:
        dataset = ClipDataset(
            [source], self.frontend, random_crop=False, seconds=TASKS[self.config.task].seconds
        )
        return self._loader(dataset, ClipSampler([source], shuffle=False, drop_last=False, **self._ranks))

    # -- a step ----------------------------------------------------------------------------------------------

    def _groups(self) -> list[dict[str, Any]]:
        """By layer and by weight decay: the rate of a layer is `layer_decay` times that of the one above it."""
        c, named = self.config, dict(self.model.named_parameters())
        skip = self.model.no_weight_decay()
        if (
            c.optimizer == "adamw"
        ):  # in fine-tuning; SSAST's Adam decays all, and pre-training decays some of them
            skip = skip | {name for name, p in named.items() if p.ndim <= 1}
            skip |= {"encoder.prefix", "encoder.positions.table"}
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in named.items():
            layer, decays = layer_of(name, self.model.config), name not in skip
            scale = c.layer_decay ** (self.model.config.depth + 1 - layer)
            empty = {"params": [], "weight_decay": c.weight_decay if decays else 0.0, "lr_scale": scale}
            groups.setdefault((layer, decays), empty)["params"].append(parameter)
        return [groups[key] for key in sorted(groups)]

    def _rate(self) -> float:
        c = self.config
        if c.schedule != "step":
            return super()._rate()
        factor, first, every = c.step_decay
        epoch = self.step * c.accumulate / len(self.sampler)
        times = 0 if epoch < first else 1 + int((epoch - first) / every)
        lr = schedule("constant", self.step, self.total, self.warmup, self.lr, c.min_lr)
        return lr * factor**times

    @property
    def _epoch(self) -> int:
        """Steps in an epoch."""
        return max(1, round(len(self.sampler) / self.config.accumulate))

    def _every(self) -> tuple[int, int, int]:
        validations = self.config.val_every or self._epoch
        return validations, self.config.save_every or validations, 0

    def _inputs(
        self, batch: Batch, *stream: int, random_start: bool = True
    ) -> tuple[Tensor, Mask | None, list[int]]:
        c, model = self.config, self.model.config
        spectrogram, frames = self._spectrogram(batch)
        if any(c.spec_augment):
            mean, std = self.frontend.mean, self.frontend.std
            fill = 0.0 if mean is None else -mean / (2 * std)
            spectrogram = spec_augment(spectrogram, batch.seeds, *c.spec_augment, fill=fill)
        if (noise := c.spectrogram_noise) is not None:
            spectrogram = spectrogram_noise(spectrogram, batch.seeds, None if noise == "released" else noise)
        masks = model.mask_time or model.mask_frequency
        return spectrogram, self._mask(spectrogram, frames, *stream) if masks else None, frames

    def _settings(self) -> dict[str, Any]:
        start = self.config.pretrained
        if start and Path(start).is_absolute():
            start = Path(start).name  # where it lies is nobody's business
        return super()._settings() | {"loss": self.loss, "pretrained": start}

    def _losses(self, batch: Batch, inputs: tuple) -> dict[str, Tensor]:
        logits = self.wrapped(*inputs).logits.float()
        labels = batch.labels.to(self.device, non_blocking=True)
        return {"loss": self._loss(logits, smooth(labels, self.config.label_smoothing))}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of (B, C) logits and (B, C) labels, which mixup and smoothing make fractions."""
        if self.loss == "bce":
            return F.binary_cross_entropy_with_logits(logits, labels)
        return F.cross_entropy(logits, labels)

    def _step(self, micro: list[Batch]) -> None:
        super()._step(micro)
        if self.average is None:
            return
        epoch, rest = divmod(self.step + 1, self._epoch)
        if self.config.ema is not None or (rest == 0 and epoch >= self.config.average_from):
            self.average.update_parameters(self.model)

    # -- measuring -------------------------------------------------------------------------------------------

    @property
    def _kept(self) -> Classifier:
        """What is validated: the averaged model once there is one."""
        return self.average.module if self.average is not None and self.average.n_averaged else self.model

    def _predict(self, loader: DataLoader) -> Predictions:
        model = self._kept
        with self._aside():
            model.eval()
            found = predict(model, loader, self._spectrogram, self.processes, self.failures)
        return found

    def _validate(self) -> None:
        found = self._predict(self.val_loader)
        report = measure(found.logits, found.targets, self.splits.label_names, self.splits.multi_label)
        loss = self._loss(torch.from_numpy(found.logits), torch.from_numpy(found.targets)).item()
        self.metric = -report.value
        self.plateau.update(loss)
        self.log.metrics(self.step, val_loss=loss, **{f"val_{report.main}": report.value})
        self.log.say(f"step {self.step}: validation {report.main} {report.value:.4f}, loss {loss:.4f}")

    # -- what it keeps ---------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        super()._prepare_folder()
        if self.splits.drawn:
            write_splits(self.config.folder / SPLITS_FILE, self.splits)

    def _own_state(self) -> dict[str, Any]:
        return {} if self.average is None else {"average": self.average.state_dict()}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        if (self.average is None) != ("average" not in state):
            raise ValueError(
                f"{self.config.out} holds a run {'without' if self.average else 'with'} averaged weights: go on with "
                "the same --ema and --average-from, or choose another --out"
            )
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _metrics(self) -> dict[str, float]:
        return {} if self.report is None else dict(self.report.metrics)

    def _finish(self) -> None:
        """The weights that were asked for become the model, which is then tested."""
        select = self.config.select or ("last" if self.splits.val is None else "best")
        best = self.checkpoints.best() if self.processes.first else None
        best = self.processes.gather(best)[0]
        if select == "best" and best is not None:
            state = read_state(best.path / STATE)
            self._load_weights(best, state)
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.log.say(f"the best checkpoint is that of step {best.step}, metric {-best.metric:.4f}")
        if self._kept is not self.model:
            self.model.load_state_dict(self._kept.state_dict())
            self.average = None
        super()._finish()
        with closing(self.test_loader):
            found = self._predict(self.test_loader)
        self.report = measure(found.logits, found.targets, self.splits.label_names, self.splits.multi_label)
        self._write_model()  # once more, for its record
        split = "validation" if self.splits.test is None else "test"
        task, fold = TASKS[self.config.task], self.config.fold
        title = f"{task.title}, {split}" + (f", fold {fold}" if fold else "")
        tell({fold or "": self.report}, title, self.config.folder / split, self.processes)


def layer_of(name: str, config: ClassifierConfig) -> int:
    """A parameter's layer: 0 for what is before the blocks, i + 1 for block i, depth + 1 for what is after them."""
    if match := re.match(r"encoder\.blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    before = ("encoder.prefix", "encoder.patch_embed", "encoder.positions", "encoder.input_norm")
    return 0 if name.startswith(before) else config.depth + 1
