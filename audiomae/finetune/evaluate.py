"""Evaluation: what a classifier makes of a split, each clip once, in one process or in many."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from ..classifier import Classifier
from ..create import load
from ..data import Batch, ClipDataset, ClipSampler, FailureLog, make_loader
from ..train.loop import autocast
from ..train.processes import Processes, ignore_signals
from ..words import plural
from .config import EvaluateConfig, TuneConfig
from .metrics import Report, measure, write_report
from .tasks import TASKS

_log = logging.getLogger("audiomae.finetune")

#: Where a run has noted which of one's own recordings are in which split, if that was drawn.
SPLITS_FILE = "splits.csv"


@dataclass(frozen=True)
class Predictions:
    """Of a split, in its order; the same in every process.

    Attributes:
        logits: (N, C) float32.
        targets: (N, C) float32, 1 where a label holds.
        indices: (N,) int64, clips of the split.
        unreadable: clips that could not be read, and are left out.
    """

    logits: np.ndarray
    targets: np.ndarray
    indices: np.ndarray
    unreadable: int


class _LeftOut(FailureLog):
    def _say(self, failure: str) -> None:
        _log.warning("%s; left out", failure)


@torch.no_grad()
def predict(
    model: Classifier,
    loader: DataLoader,
    spectrogram_of: Callable[[Batch], tuple[Tensor, list[int]]],
    processes: Processes,
    failures: FailureLog,
) -> Predictions:
    """What a model in evaluation mode makes of all clips of a loader whose sampler deals them out, each to one process.

    Raises:
        ValueError: none of the clips could be read.
    """
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    unreadable = 0
    for batch in loader:
        failures.add(batch.failures)
        spectrogram, frames = spectrogram_of(batch)
        logits = model(spectrogram, lengths=frames).logits.float().cpu()
        # Another clip stood in for what could not be read: that is no measurement.
        dataset, failed = loader.dataset, {failure.path for failure in batch.failures}
        read = torch.tensor([dataset.sources[0][i].path not in failed for i in batch.indices.tolist()])
        unreadable += int((~read).sum())
        rows.append((logits[read], batch.labels[read], batch.indices[read]))
    gathered = processes.gather((*(torch.cat(part).numpy() for part in zip(*rows, strict=True)), unreadable))
    logits, targets, indices = (np.concatenate([part[i] for part in gathered]) for i in range(3))
    unreadable = sum(part[3] for part in gathered)
    if not len(indices):
        raise ValueError(
            f"none of {plural(unreadable, 'clip')} of {loader.dataset.sources[0].name} could be read"
        )
    if unreadable and processes.first:
        _log.warning(
            "%s: left out %s that could not be read",
            loader.dataset.sources[0].name,
            plural(unreadable, "clip"),
        )
    order = np.argsort(indices)
    return Predictions(logits[order], targets[order], indices[order], unreadable)


def evaluate(config: EvaluateConfig) -> dict[str, Report]:
    """Measure a fine-tuned model; of a run of all folds, each fold's model on its own fold.

    Writes `metrics.json`, `per_class.csv` and `confusion.png`, and prints a table.

    Returns:
        A report for each fold; "" is the key where there are none.

    Raises:
        ValueError: a setting, the model or the data set is wrong.
        OSError: the results cannot be written.
    """
    config.check()
    with Processes(config.device) as processes:
        folder, fold = Path(config.model), config.fold
        place = folder if folder.is_dir() else folder.parent if folder.is_file() else Path()
        out = Path(config.out) if config.out else place / config.split
        if fold is None and (folder / "fold-1").is_dir():
            fold = "all"
        if fold == "all":
            folds = sorted(path for path in folder.glob("fold-*") if path.is_dir())
            if not folds:
                raise ValueError(f"--fold all needs the folder of a run of all folds, and {folder} is none")
            runs = {path.name.removeprefix("fold-"): path for path in folds}
            _require_all(runs, config, folder)
        elif (inside := folder / f"fold-{fold}").is_dir():
            runs = {fold: inside}
            out = out if config.out else inside / config.split  # the folder's own has what all folds gave
        else:
            runs = {fold or "": folder}
        reports, task = {}, None
        for number, path in runs.items():
            task, number, reports_of = _evaluate_one(config, path, number or None, out, processes)
            reports[number or ""] = reports_of
        title = f"{TASKS[task].title}, {config.split}" + (
            f", fold {fold}" if fold not in (None, "all") else ""
        )
        tell(reports, title, out, processes)
    return reports


def _require_all(runs: Mapping[str, Path], config: EvaluateConfig, folder: Path) -> None:
    """Refuses the mean of a part of the folds."""
    task = config.task or _run_settings(next(iter(runs.values())) / "config.yaml").get("task")
    missing = [n for n in range(1, TASKS[task].folds + 1) if str(n) not in runs] if task in TASKS else []
    if missing:
        raise ValueError(
            f"{folder} has no fold {', '.join(map(str, missing))} yet, and the mean is of {TASKS[task].folds}: go on "
            "with audiomae finetune --fold all --resume, or evaluate one with --fold"
        )


def _evaluate_one(
    config: EvaluateConfig, path: Path, fold: str | None, out: Path, processes: Processes
) -> tuple[str, str | None, Report]:
    run, source, data = {}, path, config.data
    for folder in (path, path.parent) if path.name == "model" else (path,):  # of the run
        if (folder / "config.yaml").is_file() and (folder / "model").is_dir():
            run, source = _run_settings(folder / "config.yaml"), folder / "model"
            data = as_noted(folder, config.task or run.get("task"), data or run.get("data", []))
            break
    if (path / "checkpoints").is_dir() and not (path / "model").is_dir():
        raise ValueError(
            f"{path} holds a run that has not come to its end: go on with it, with audiomae finetune --resume"
        )
    task = config.task or run.get("task")
    val_data = config.val_data or run.get("val_data", [])
    trained = run.get("fold")
    if fold and trained and fold != str(trained):
        raise ValueError(
            f"{path} was trained with fold {trained} left out for the test, and on the clips of fold {fold}, which was "
            "asked for: leave --fold out"
        )
    fold = fold or trained
    for name, value in (("task", task), ("data", data)):
        if not value:
            raise ValueError(
                f"there is no --{name}, and {path} is no run of audiomae finetune that would say it"
            )
    model = load(source if source.exists() else str(config.model))
    if not isinstance(model, Classifier):
        raise ValueError(
            f"{source} holds a {type(model).__name__}, which has no classes yet: fine-tune it first, with audiomae "
            "finetune --pretrained"
        )
    with processes.warn_once():
        splits = TASKS[task].open(data, val_data, None if fold is None else int(fold))
    names = model.config.frontend.labels or splits.label_names
    if model.config.num_classes != len(splits.label_names) or names != splits.label_names:
        held = (
            "; recordings of some of its classes are --val-data, with --split val" if task == "custom" else ""
        )
        raise ValueError(
            f"{source} tells {model.config.num_classes} classes apart ({', '.join(names[:3])}, ...), but "
            f"{TASKS[task].title} has {len(splits.label_names)} ({', '.join(splits.label_names[:3])}, ...){held}"
        )
    split, frontend = splits[config.split], model.config.frontend
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}; choose another folder") from error
    dataset = ClipDataset([split], frontend, random_crop=False, seconds=TASKS[task].seconds)
    sampler = ClipSampler(
        [split], batch_size=config.batch_size, shuffle=False, drop_last=False,
        rank=processes.rank, world_size=processes.world_size,
    )  # fmt: skip
    loader = make_loader(dataset, sampler, config.workers, pin_memory=processes.device.type == "cuda")
    loader.worker_init_fn = ignore_signals

    def spectrogram_of(batch: Batch) -> tuple[Tensor, list[int]]:
        waveform = batch.waveform.to(processes.device, non_blocking=True)
        return frontend(waveform, batch.lengths), frontend.num_frames(batch.lengths).tolist()

    model.to(processes.device).eval()
    with closing(loader), autocast(processes.device, config.precision):
        found = predict(model, loader, spectrogram_of, processes, _LeftOut())
    return task, fold, measure(found.logits, found.targets, splits.label_names, splits.multi_label)


def as_noted(folder: Path, task: str | None, data: list[str]) -> list[str]:
    """`data`, or where the run in this folder drew its splits from them, the file in which it noted these.

    Recordings that were added since would be dealt out anew, some that were trained on for the test.
    """
    noted, run = folder / SPLITS_FILE, _run_settings(folder / "config.yaml")
    same = run.get("task") == task and _paths(run.get("data", [])) == _paths(data)
    return [str(noted)] if same and noted.is_file() else data


def _paths(data: Sequence[str]) -> list[str]:
    return [os.path.realpath(os.path.expanduser(path)) for path in data]


def _run_settings(path: Path) -> dict[str, Any]:
    try:
        return TuneConfig.from_dict(yaml.safe_load(path.read_text())).to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}  # a run of pre-training: its model says so better


def tell(reports: Mapping[str, Report], title: str, folder: Path, processes: Processes) -> None:
    """Write reports of one or several folds, and print their table; in the first process."""
    error = None
    if processes.first:
        try:
            for fold, report in reports.items():
                write_report(folder / f"fold-{fold}" if len(reports) > 1 else folder, report, title)
            if len(reports) > 1:
                (folder / "metrics.json").write_text(json.dumps(summary(reports), indent=2) + "\n")
        except OSError as caught:
            error = OSError(f"{folder} could not be written: {caught}")
        print(table(reports, title), f"wrote {folder}" if error is None else "", sep="\n", flush=True)
    processes.agree(error)


def summary(reports: Mapping[str, Report]) -> dict[str, Any]:
    """Of several folds: the main metric's mean, its standard deviation between folds, and its values."""
    values = {fold: report.value for fold, report in reports.items()}
    main = next(iter(reports.values())).main
    return {
        "metric": main,
        "mean": float(np.mean(list(values.values()))),
        "std": float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else 0.0,
        "folds": values,
    }


def table(reports: Mapping[str, Report], title: str) -> str:
    """For people: a line per fold, and their mean."""
    lines = [title]
    for fold, report in reports.items():
        m = report.metrics
        name = f"fold {fold}  " if len(reports) > 1 else ""
        empty = m["classes"] - m["classes_with_clips"]
        note = ""
        if empty:
            note = f", {empty} of them without a clip here"
            note += (
                f", which count 0: {m['mAP_of_classes_with_clips']:.4f} without them"
                if report.main == "mAP"
                else ""
            )
        counted = f"{plural(m['clips'], 'clip')}, {plural(m['classes'], 'class')}{note}"
        lines.append(f"  {name}{report.main} {report.value:.4f}  ({counted})")
    if len(reports) > 1:
        found = summary(reports)
        lines.append(
            f"  mean    {found['metric']} {found['mean']:.4f} (standard deviation {found['std']:.4f})"
        )
    return "\n".join(lines)
