"""Scores of a classifier: mean average precision and accuracy, class by class, and a confusion matrix to look at."""

from __future__ import annotations

import csv
import json
import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

_log = logging.getLogger("audiomae.finetune")


def average_precision(scores: np.ndarray, positives: np.ndarray) -> float:
    """Area under the precision-recall steps, as scikit-learn's `average_precision_score` has it.

    The sum over all thresholds, the highest first, of the precision there times the recall gained there. Clips of equal
    score are one threshold. Without positives it is 0.

    Args:
        scores: (N,), the higher the more likely.
        positives: (N,) bool.
    """
    total = int(positives.sum())
    if not total:
        return 0.0
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], positives[order].cumsum(dtype=np.int64)
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # of each run of equal scores
    precision = hits[last] / (last + 1)
    gained = np.diff(hits[last], prepend=0)
    return float((precision * gained).sum() / total)


@dataclass(frozen=True)
class Report:
    """What :func:`measure` found.

    Attributes:
        metrics: by name, in [0, 1]: "mAP", "mAP_of_classes_with_clips" (the same without those that would count 0), and
            with one label a clip "accuracy"; counts: "clips", "classes", "classes_with_clips".
        classes: a row for each class.
        confusion: (C, C). One label a clip: the share of the row's clips that went to the column's class. Several: the
            mean score of the column's class among the row's clips. NaN where a class has no clips.
    """

    metrics: dict[str, float]
    classes: list[dict[str, float | str | int]]
    confusion: np.ndarray
    main: str

    @property
    def value(self) -> float:
        """The main metric."""
        return self.metrics[self.main]


def measure(logits: np.ndarray, targets: np.ndarray, names: tuple[str, ...], multi_label: bool) -> Report:
    """Measures a classifier.

    Args:
        logits: (N, C) float, N at least 1.
        targets: (N, C), 1 where a label holds; one per row unless `multi_label`.
        names: of the classes.
        multi_label: whether a clip may have any number of labels.

    Raises:
        ValueError: shapes do not fit, logits are not finite, or nothing was measured.
    """
    if logits.shape != targets.shape or logits.ndim != 2 or not len(logits) or logits.shape[1] != len(names):
        raise ValueError(
            f"logits are {logits.shape} and targets {targets.shape}, of {len(names)} classes; expected two equal "
            "shapes (clips, classes), and a clip"
        )
    if not np.isfinite(logits).all():
        raise ValueError("the model gives NaN or infinity")
    positives = targets > 0.5
    counts = positives.sum(0)
    precisions = [average_precision(logits[:, c], positives[:, c]) for c in range(len(names))]
    rows = [
        {"index": c, "label": name, "clips": int(counts[c]), "average_precision": precisions[c]}
        for c, name in enumerate(names)
    ]
    metrics = {"clips": len(logits), "classes": len(names), "classes_with_clips": int((counts > 0).sum())}
    # As published: a class without clips counts 0.
    metrics["mAP"] = float(np.mean(precisions))
    metrics["mAP_of_classes_with_clips"] = float(np.sum(precisions)) / max(1, metrics["classes_with_clips"])
    if multi_label:
        shares = 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -50, 50)))
    else:
        guess, truth = logits.argmax(1), targets.argmax(1)
        metrics["accuracy"] = float((guess == truth).mean())
        shares = np.eye(len(names))[guess]
        for c, row in enumerate(rows):
            right = int(((guess == c) & (truth == c)).sum())
            guessed = int((guess == c).sum())
            row["recall"] = right / row["clips"] if row["clips"] else 0.0
            row["precision"] = right / guessed if guessed else 0.0
    with np.errstate(invalid="ignore"):
        confusion = positives.T.astype(np.float64) @ shares / np.where(counts, counts, np.nan)[:, None]
    return Report(metrics, rows, confusion, "mAP" if multi_label else "accuracy")


def write_report(folder: str | os.PathLike, report: Report, title: str) -> None:
    """`metrics.json`, `per_class.csv` and `confusion.png` (where matplotlib is installed) in a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(report.metrics, indent=2) + "\n")
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, report.classes[0])
        writer.writeheader()
        writer.writerows(report.classes)
    if find_spec("matplotlib") is None:  # no reason to end a run of five folds after the first
        _log.warning("%s: no confusion.png, matplotlib is not installed", folder)
    else:
        draw_confusion(folder / "confusion.png", report, title)


def draw_confusion(path: str | os.PathLike, report: Report, title: str = "") -> None:
    """A PNG of the confusion matrix. Needs matplotlib."""
    from matplotlib.figure import Figure

    names = [str(row["label"]) for row in report.classes]
    named = len(names) <= 60
    size = min(16.0, 4 + 0.22 * len(names)) if named else 10.0
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(report.confusion, vmin=0, vmax=1, interpolation="nearest")
    if named:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    what = "mean score" if report.main == "mAP" else "share of its clips"
    axis.set(
        xlabel="class of the score" if report.main == "mAP" else "taken for", ylabel="class", title=title
    )
    figure.colorbar(image, label=what, shrink=0.8)
    figure.savefig(path, format="png", dpi=100)
