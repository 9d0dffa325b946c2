"""What a run tells: JSON lines and TensorBoard for programs, a progress bar or plain lines for people."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..data.dataset import Failure, FailureLog
from .checkpoints import replace_file
from .processes import Processes


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
        where = self._file.name
        try:
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
            if self._board is not None:
                where = self._board.log_dir
                for name, value in values.items():
                    if not isinstance(value, str):
                        self._board.add_scalar(name, value, step)
                self._board.flush()
        except OSError as error:
            raise OSError(f"{where} cannot be written: {error.strerror}; go on with --resume") from error

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
        for file in filter(None, (self._board, self._file)):
            with suppress(OSError):  # of a line that could not be written, which `metrics` has said
                file.close()


class Failures(FailureLog):
    """Recordings of a run that could not be read: whichever process meets one, the first names it, once.

    `failures.jsonl` in the folder of the run keeps what was said, and a run that goes on does not say it again.

    Attributes:
        news: of this process, and not told to the first yet.
    """

    def __init__(self, processes: Processes, path: Path):
        super().__init__()
        self.processes, self.path = processes, path
        self.news: list[Failure] = []
        self._named: set[str] = set()

    def open(self, start: int) -> None:
        """Of a run that goes on at step `start`; one that begins there takes the place of what an earlier one left."""
        if not self.processes.first or not self.path.exists():
            return
        kept = [(line, row) for line, row in _rows(self.path) if start and "recording" in row]
        replace_file(self.path, "".join(line for line, _ in kept))
        self._named = {row["recording"] for _, row in kept}

    def _say(self, failure: Failure) -> None:
        self.news.append(failure)
        if self.processes.world_size == 1:
            self.share()

    def share(self) -> None:
        """Name what is new; called by all processes together."""
        gathered = self.processes.gather(self.news)
        self.news = [failure for news in gathered for failure in news] if self.processes.first else []
        self.flush()

    def flush(self) -> None:
        """Name what is new in this process alone, where an error keeps it from the others."""
        news = {failure.path: failure for failure in self.news if failure.path not in self._named}
        self.news = []
        for failure in news.values():
            super()._say(failure)
        self._named |= news.keys()
        if not news or not self.processes.first:
            return
        try:
            with self.path.open("a") as file:
                file.writelines(
                    json.dumps({"recording": path, "said": said}) + "\n" for path, said in news.items()
                )
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}; go on with --resume") from error


def _progress_bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    left = TimeRemainingColumn(elapsed_when_finished=True)
    return Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"), left
    )


def _lines_until(path: Path, step: int) -> list[str]:
    return [line for line, row in _rows(path) if row.get("step", math.inf) <= step]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines, and what they hold; a process that was killed may have left half a line."""
    for line in path.read_text().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and isinstance(row, dict):
            yield line, row
