"""Checkpoints that survive: a power cut, `kill -9` or a full disk at any moment leaves the last complete one.

`<folder>/step-00001000/` holds the files of one checkpoint and its marker, `complete.json`, with every file's size and
SHA-256. Files are written below a temporary name and synced; the folder is renamed; then comes the marker. What has
no marker, or files that are not those of its marker, is no checkpoint: it does not count among the last that are kept.
Sizes are looked at whenever checkpoints are counted, checksums of what is about to be loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

MARKER = "complete.json"
_PARTIAL, _REMOVED = ".partial", ".removed"

_log = logging.getLogger("audiomae.train")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has a marker; :func:`damage` tells whether the files are still those of the marker.

    Attributes:
        path: the folder.
        step: optimizer steps that were made.
        metric: what the best one is chosen by, the lower the better; None where it is not known.
        files: name -> (bytes, SHA-256).
    """

    path: Path
    step: int
    metric: float | None
    files: dict[str, tuple[int, str]]

    def damage(self, checksums: bool = True) -> str | None:
        """A sentence about what is wrong with the files, None if nothing is; without `checksums` by their sizes."""
        for name, (size, digest) in self.files.items():
            file = self.path / name
            try:
                if file.stat().st_size != size:
                    return f"{name} has {file.stat().st_size} bytes instead of {size}"
                if checksums and _sha256(file) != digest:
                    return f"{name} does not have the checksum it was written with"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
        return None


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: made by the first :meth:`save`.
        keep: how many of the last ones are kept, beside the one with the best metric.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3):
        self.folder, self.keep = Path(folder), keep
        self._passed_over: set[Path] = set()  # whose checksums were wrong; sizes do not tell

    def save(self, step: int, write: Callable[[Path], None], metric: float | None = None) -> Checkpoint:
        """Write a checkpoint: `write` puts its files into the folder it is given. Older ones are removed then.

        Raises:
            OSError: see :meth:`explained`.
        """
        with self.explained(step):
            write(self.begin(step))
            return self.finish(step, metric)

    @contextmanager
    def explained(self, step: int) -> Iterator[None]:
        """For the work on a checkpoint, piece by piece; one that fails is removed.

        Raises:
            OSError: it could not be written (a full disk, a folder that is read-only); the sentence names the last
                complete checkpoint, which is as it was.
        """
        try:
            yield
        except (Exception, CheckpointException) as error:
            final = self._path(step)
            shutil.rmtree(self.partial(step), ignore_errors=True)  # the space may be needed
            cause = _os_error(error)
            if cause is None and not isinstance(error, CheckpointException):
                raise
            last = next(self.complete(), None)
            rest = "there is no earlier one" if last is None else f"the last complete one is {last.path}"
            reason = getattr(cause, "strerror", None) or cause or error
            done = last is not None and last.path == final
            what = (
                "was written, but not synced, or older ones not removed" if done else "could not be written"
            )
            raise OSError(
                f"the checkpoint {final} {what}: {reason}; {rest}. Make room or choose another folder, "
                "then go on with --resume"
            ) from error

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.folder / f"step-{step:08d}{suffix}"

    def partial(self, step: int) -> Path:
        """The temporary folder of a checkpoint that is being written."""
        return self._path(step, _PARTIAL)

    def begin(self, step: int) -> Path:
        """An empty folder under a temporary name."""
        partial = self.partial(step)
        self.clean()
        partial.mkdir(parents=True)
        return partial

    def finish(self, step: int, metric: float | None = None) -> Checkpoint:
        """The temporary folder becomes a checkpoint."""
        final, partial = self._path(step), self.partial(step)
        files = {}
        for file in sorted(partial.iterdir()):
            _sync(file)
            files[file.name] = (file.stat().st_size, _sha256(file))
        _sync(partial)
        if final.exists():  # damaged, or of a run that was taken back to an earlier step
            self._remove(final)
        partial.rename(final)
        self._passed_over.discard(final)
        _sync(self.folder)
        marker = final / (MARKER + _PARTIAL)
        with marker.open("w") as file:
            json.dump({"step": step, "metric": metric, "files": files}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        marker.rename(final / MARKER)
        _sync(final)
        self._prune(step)
        return Checkpoint(final, step, metric, files)

    def complete(self) -> Iterator[Checkpoint]:
        """Those with a marker and files of its sizes, but for those that were passed over; the newest first."""
        for path in self._folders():
            checkpoint = _read_marker(path)
            if checkpoint and path not in self._passed_over and checkpoint.damage(checksums=False) is None:
                yield checkpoint

    def started(self) -> bool:
        """Whether a checkpoint has ever been completed here, and is there yet, damaged or not."""
        return any((path / MARKER).exists() for path in self._folders())

    def latest(self) -> Checkpoint | None:
        """The newest complete and undamaged one; a warning names each newer one that is passed over."""
        for path in self._folders():
            checkpoint = _read_marker(path)
            reason = "it was not written to its end" if checkpoint is None else checkpoint.damage()
            if reason is None:
                return checkpoint
            self._pass_over(path, reason)
        return None

    def best(self) -> Checkpoint | None:
        """The undamaged one with the lowest metric, the newest of several; a warning names what is passed over."""
        while (best := _best(self.complete())) is not None and (reason := best.damage()) is not None:
            self._pass_over(best.path, reason)
        return best

    def _pass_over(self, path: Path, reason: str) -> None:
        self._passed_over.add(path)
        _log.warning("%s is passed over: %s", path, reason)

    def clean(self) -> None:
        """Remove what an interrupted process left behind."""
        for path in self.folder.glob("step-*"):
            if path.name.endswith((_PARTIAL, _REMOVED)):
                shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """All that may be checkpoints, the newest first; half-written ones too, so that they get named."""
        found = [path for path in self.folder.glob("step-*") if _step_of(path) is not None]
        return sorted(found, key=_step_of, reverse=True)

    def _prune(self, step: int) -> None:
        # Later ones are those that a resumed run passed over. It will write them anew.
        complete = [checkpoint for checkpoint in self.complete() if checkpoint.step <= step]
        if not complete or complete[0].step != step:
            raise OSError(f"{self._path(step)} is not as it was written: the file system lost a part of it")
        kept = {checkpoint.path for checkpoint in complete[: self.keep]}
        if (best := _best(complete)) is not None:
            kept.add(best.path)
        for path in self._folders():
            if path not in kept and _step_of(path) <= step:
                if (old := _read_marker(path)) and (reason := old.damage(checksums=False)):
                    _log.warning("%s is removed: %s", path, reason)
                self._remove(path)

    @staticmethod
    def _remove(path: Path) -> None:
        # Renamed first: half a folder under its own name would look like damage.
        removed = path.with_name(path.name + _REMOVED)
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)
        shutil.rmtree(removed)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Tensors and plain values to a file that :func:`read_state` reads."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def read_state(path: Path) -> dict[str, Any]:
    """What :func:`write_state` wrote, on the CPU; nothing in the file is executed."""
    return torch.load(path, map_location="cpu", weights_only=True)


def replace_file(path: Path, text: str) -> None:
    """Write a text file such that it has its old or its new content at any moment."""
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder anew: `write` fills a temporary one, which then takes the place of the old."""
    partial, removed = path.with_name(path.name + _PARTIAL), path.with_name(path.name + _REMOVED)
    for leftover in (partial, removed):
        shutil.rmtree(leftover, ignore_errors=True)
    write(partial)
    for file in partial.iterdir():
        _sync(file)
    if path.exists():
        path.rename(removed)
    partial.rename(path)
    _sync(path.parent)
    shutil.rmtree(removed, ignore_errors=True)


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(rf"step-(\d+)(?:{re.escape(_PARTIAL)})?", path.name)
    return int(match[1]) if match else None


def _best(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    rated = [c for c in checkpoints if c.metric is not None and not math.isnan(c.metric)]
    return min(rated, key=lambda checkpoint: checkpoint.metric, default=None)


def _read_marker(path: Path) -> Checkpoint | None:
    try:
        marker = json.loads((path / MARKER).read_text())
        files = {name: (int(size), str(digest)) for name, (size, digest) in marker["files"].items()}
        return Checkpoint(path, int(marker["step"]), marker["metric"], files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:  # hashlib.file_digest is newer than Python 3.10
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind another one: torch reports a full disk as a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
