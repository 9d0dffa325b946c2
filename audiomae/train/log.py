"""What a run tells: JSON lines and TensorBoard for programs, a progress bar or plain lines for people."""

from __future__ import annotations

import json
import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from .checkpoints import replace_file


class Log:
    """Metrics of a run; silent in every process but the first.

    Args:
        folder: of the run; `metrics.jsonl` is continued, lines of steps after `start` are taken out.
        start, total: steps made, and to make.
        active: False in all processes but one.
    """

    def __init__(self, folder: Path, start: int, total: int, active: bool = True):
        self.active, self.start, self.total = active, start, total
        self._began = time.perf_counter()
        self._file = self._board = self._progress = None
        if not active:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            replace_file(path, "".join(_lines_until(path, start)))
        self._file = path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            pass
        else:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        if sys.stdout.isatty():
            self._progress = _progress_bar()
            self._progress.start()
            self._task = self._progress.add_task("", total=total, completed=start, text="")

    def metrics(self, step: int, **values: float | str) -> None:
        """One line; what is a number goes to TensorBoard too."""
        if not self.active:
            return
        # NaN is no JSON.
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"{self._file.name} cannot be written: {error.strerror}; go on with --resume"
            ) from error
        if self._board is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._board.add_scalar(name, value, step)
            self._board.flush()

    def progress(self, step: int, loss: float, lr: float, clips_per_second: float) -> None:
        if not self.active:
            return
        text = f"loss {loss:.4f}  lr {lr:.2e}  {clips_per_second:.1f} clips/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
            return
        pace = (time.perf_counter() - self._began) / max(1, step - self.start)
        left = timedelta(seconds=round(pace * (self.total - step)))
        print(f"step {step}/{self.total}  {text}  {left} left", flush=True)

    def say(self, sentence: str) -> None:
        if not self.active:
            return
        if self._progress is not None:
            self._progress.console.print(sentence, highlight=False, markup=False)
        else:
            print(sentence, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            self._file.close()


def _progress_bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    left = TimeRemainingColumn(elapsed_when_finished=True)
    return Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"), left
    )


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines up to a step; a process that was killed may have left half a line."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept
