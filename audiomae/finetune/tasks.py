"""The tasks that encoders are judged by: where the data are, what is measured, and what was published."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..data import AudioError
from ..frontend import FRONTENDS, Frontend
from . import datasets
from .datasets import Splits

_log = logging.getLogger("audiomae.finetune")


@dataclass(frozen=True)
class Task:
    """A data set with its split and its metric.

    Attributes:
        name: on the command line.
        title: for people.
        reader: of the data set's folder.
        layout: what that folder is, for errors and `--help`.
        frontend: whose length, mean and standard deviation are the data set's (`FRONTENDS`); None has none of its own.
        folds: of a cross-validation; 0 is a fixed split.
        seconds: longest crop; None takes what the model's frames cover.
    """

    name: str
    title: str
    reader: datasets.Reader
    layout: str
    frontend: str | None = None
    folds: int = 0
    seconds: float | None = None

    @property
    def settings(self) -> Frontend | None:
        return None if self.frontend is None else FRONTENDS[self.frontend]

    def open(self, data: Sequence[str], val_data: Sequence[str] = (), fold: int | None = None) -> Splits:
        """The data set in the folder that the user downloaded.

        Raises:
            AudioError: the folder is not the data set's, or was unpacked half; a fold is missing or too many.
            ImportError: torchaudio, which knows some of the data sets, is not installed.
        """
        if self.folds and fold not in range(1, self.folds + 1):
            raise AudioError(f"{self.title} has folds 1 to {self.folds}, and fold {fold} was asked for")
        if not self.folds and fold is not None:
            raise AudioError(f"{self.title} has no folds: leave --fold out")
        manifests = self.name in ("as20k", "as2m", "custom")
        if not manifests and (val_data or len(data) != 1):
            raise AudioError(
                f"{self.title} is one folder, which has its own splits: give one --data and no --val-data"
            )
        splits = self.reader(data, val_data, fold)
        counts = splits.train.label_counts()
        if unheard := [splits.label_names[i] for i in np.flatnonzero(counts == 0)]:
            _log.warning(
                "%s: no recording to train on for %d of %d classes: %s%s", splits.train.name, len(unheard),
                len(counts), ", ".join(unheard[:5]), ", ..." if len(unheard) > 5 else "",
            )  # fmt: skip
        return splits


_AS20K, _AS2M = (partial(datasets.audioset, full=full) for full in (False, True))
_SPC1, _SPC2 = datasets.SPEECH_COMMANDS_V1, datasets.SPEECH_COMMANDS_V2

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("as20k", "AudioSet-20K", _AS20K, datasets.AUDIOSET, "audioset"),
        Task("as2m", "AudioSet-2M", _AS2M, datasets.AUDIOSET, "audioset"),
        Task("esc50", "ESC-50", datasets.esc50, datasets.ESC50, "esc50", folds=5),
        Task(
            "spc2", "Speech Commands v2", datasets.speech_commands_v2, _SPC2, "speech_commands", seconds=1.0
        ),
        Task(
            "spc1",
            "Speech Commands v1",
            datasets.speech_commands_v1,
            _SPC1,
            "speech_commands_v1",
            seconds=1.0,
        ),
        Task("voxceleb1", "VoxCeleb1 speakers", datasets.voxceleb1, datasets.VOXCELEB1, "voxceleb"),
        Task("iemocap", "IEMOCAP emotions", datasets.iemocap, datasets.IEMOCAP, "audioset", folds=5),
        Task("custom", "custom data", datasets.custom, datasets.CUSTOM),
    )
}
