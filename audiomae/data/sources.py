"""Where clips come from: folders, manifests and shards, all as a :class:`Source`.

A source knows names and labels and decodes nothing. Two million clips are normal, so they are kept in a few
flat arrays: Python objects would be copied into every worker as soon as it counts a reference.
"""

import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from audiomae.data.audio import AUDIO_SUFFIXES, AudioError
from audiomae.words import plural

__all__ = ["Clip", "Source", "labelled_folder", "open_source"]

_log = logging.getLogger("audiomae.data")


@dataclass(frozen=True)
class Clip:
    """One recording of a source, nothing decoded.

    Attributes:
        path: of the file, or "shard.tar::member" inside a shard.
        labels: positions in the source's `label_names`.
        samples, sample_rate: where the source knows them, per channel and in Hz; `samples` alone is at the
            file's own rate.
    """

    path: str
    labels: tuple[int, ...] = ()
    samples: int | None = None
    sample_rate: int | None = None


class Strings(Sequence):
    """A list of strings in two arrays."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


class Source(Sequence):
    """A named sequence of clips; :func:`open_source` makes them.

    Attributes:
        name: what logs and errors call it.
        label_names: what the clips' labels stand for; () where nothing is labelled.
    """

    def __init__(self, name: str, clips: Iterable[Clip], label_names: Sequence[str] = ()):
        clips = list(clips)
        if not clips:
            raise AudioError(f"{name}: holds no clips")
        self.name, self.label_names = name, tuple(label_names)
        self._paths = Strings(clip.path for clip in clips)
        self._label_ends = np.cumsum([0, *(len(clip.labels) for clip in clips)], dtype=np.int64)
        self._labels = np.array([label for clip in clips for label in clip.labels], dtype=np.int32)
        # 0 is "not known".
        self._samples = np.array([clip.samples or 0 for clip in clips], dtype=np.int64)
        self._rates = np.array([clip.sample_rate or 0 for clip in clips], dtype=np.int32)
        if len(self._labels) and not 0 <= self._labels.min() <= self._labels.max() < len(self.label_names):
            raise ValueError(
                f"{name}: labels reach from {self._labels.min()} to {self._labels.max()}, but there are "
                f"{len(self.label_names)} label names"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Clip:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: there is no clip {index} of {len(self)}")
        index = int(index) % len(self)
        labels = self._labels[self._label_ends[index] : self._label_ends[index + 1]]
        return Clip(
            self._paths[index],
            tuple(labels.tolist()),
            int(self._samples[index]) or None,
            int(self._rates[index]) or None,
        )

    def label_counts(self) -> np.ndarray:
        """(C,) int64: clips of each label."""
        return np.bincount(self._labels, minlength=len(self.label_names))

    def label_sums(self, values: np.ndarray) -> np.ndarray:
        """(clips,) float64: the sum of a clip's labels' values, of (C,) `values`."""
        sums = np.concatenate(([0.0], np.cumsum(values[self._labels], dtype=np.float64)))
        return sums[self._label_ends[1:]] - sums[self._label_ends[:-1]]

    def file(self, index: int) -> str | BinaryIO:
        """What :func:`load_crop` opens: a path, or a binary file that the caller closes."""
        return self[index].path


def open_source(spec: str | os.PathLike, labels: str | os.PathLike | None = None) -> Source:
    """Recognise and open a source of recordings.

    Args:
        spec: a folder of audio files, searched recursively; an AST manifest (.json); an MAE-AST manifest (.tsv);
            or webdataset shards: a .tar, a folder of them (with the indices of ``audiomae prepare``, or
            without) and of no recordings, or a pattern such as ``shards/train-{000..511}.tar`` or
            ``shards/*.tar``.
        labels: a CSV file with the columns index, mid and display_name. It gives names to the labels of an
            AST manifest (a ``class_labels_indices.csv`` beside it is found) and of shards without an index.

    Raises:
        AudioError: nothing is there, a manifest or a shard is damaged, a folder holds recordings and shards, or
            labels were given to a source that has none.
    """
    from audiomae.data.shards import MANIFEST, is_shard, open_shards, tars_in

    text = os.fspath(spec)
    if "://" in text or text.startswith("pipe:"):
        raise AudioError(f"{text}: only local sources can be read at random; copy the shards to a disk first")
    path = Path(text).expanduser()
    if path.is_dir():
        files, tars = _audio_files(path), tars_in(path)
        if not files and (tars or (path / MANIFEST).is_file()):
            return open_shards(path, labels)
        if not files:
            raise AudioError(
                f"{path}: holds no audio files (looked for {', '.join(AUDIO_SUFFIXES)} here and below)"
            )
        if shard := next(filter(is_shard, tars), None):  # other archives are no business of ours
            raise AudioError(
                f"{path}: holds recordings ({files[0].relative_to(path)}) and shards ({shard.name}); which are meant? "
                f"Give {path / '*.tar'} for the shards, or move them elsewhere for the recordings"
            )
        _no_labels(path, labels, "a folder of audio files")
        return Source(text, (Clip(str(file)) for file in files))
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".json":
            return _open_json(path, labels)
        if suffix == ".tsv":
            _no_labels(path, labels, "an MAE-AST manifest")
            return Source(text, _read_tsv(path))
        if suffix == ".tar":
            return open_shards(path, labels)
        raise AudioError(
            f"{text}: is a file, but no source; expected a folder of audio files, a manifest (.json, .tsv) or "
            "shards (.tar)"
        )
    if any(character in text for character in "{*?["):
        return open_shards(path, labels)
    raise AudioError(f"{text}: no such file or folder")


def labelled_folder(folder: str | os.PathLike, least: int = 2) -> Source:
    """The recordings of a folder that holds a folder of them for each class; others beside these are told.

    Each clip has one label, the number of its class; the classes' names, in order, are `label_names`.

    Args:
        least: classes that are expected.

    Raises:
        AudioError: there is no such folder, it holds fewer folders, or one without recordings.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AudioError(f"there is no folder {folder}")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < least:
        raise AudioError(
            f"{folder}: should hold a folder of recordings for each class, of which {least} at least were expected"
        )
    loose = sorted(path.name for path in folder.iterdir() if _is_audio(path) and path.is_file())
    if loose:
        _log.warning(
            "%s: left out %s beside the folders of classes: %s%s", folder, plural(len(loose), "recording"),
            ", ".join(loose[:3]), ", ..." if len(loose) > 3 else "",
        )  # fmt: skip
    clips = []
    for number, name in enumerate(names):
        source = open_source(folder / name)
        if type(source) is not Source:
            raise AudioError(f"{folder / name}: holds shards, and recordings were expected")
        clips += [Clip(clip.path, (number,)) for clip in source]
    return Source(str(folder), clips, names)


def _no_labels(path: Path, labels: str | os.PathLike | None, kind: str) -> None:
    if labels is not None:
        raise AudioError(f"{path}: is {kind}, which has no labels; leave {os.fspath(labels)} out")


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".")


def _audio_files(folder: Path) -> list[Path]:
    """All audio files below a folder in a fixed order; links are followed once."""

    def unreadable(error: OSError) -> None:
        _log.warning("%s: left out: %s", error.filename, error.strerror)

    found, seen = [], set()
    for parent, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [path for path in (Path(parent, name) for name in files) if _is_audio(path)]
    return sorted(found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AudioError(f"{path}: is not a text file in UTF-8") from error


def load_json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise AudioError(f"{path}: is no valid JSON: {error}") from error


def read_labels(path: str | os.PathLike) -> tuple[dict[str, int], tuple[str, ...]]:
    """({mid: index}, display names) of a CSV file with the columns index, mid, display_name."""
    path = Path(path)
    rows = list(csv.DictReader(_text(path).splitlines()))
    columns = {"index", "mid", "display_name"}
    if not rows or not columns <= rows[0].keys():
        raise AudioError(
            f"{path}: expected a CSV file with the columns index, mid and display_name, and rows"
        )
    try:
        mids = {row["mid"]: int(row["index"]) for row in rows}
    except (TypeError, ValueError) as error:
        raise AudioError(f"{path}: an index is not a whole number: {error}") from error
    if sorted(mids.values()) != list(range(len(rows))):
        raise AudioError(f"{path}: the {len(rows)} indices are not 0 to {len(rows) - 1}, each once")
    names = sorted(rows, key=lambda row: int(row["index"]))
    return mids, tuple(row["display_name"] for row in names)


def label_indices(mids: Mapping[str, int], given: str | Sequence[str], where: str) -> tuple[int, ...]:
    """Positions of labels that are mids: a list of them, or one string with commas."""
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AudioError(
            f"{where}: the labels are {given!r:.80}, but mids were expected, as a text or a list"
        )
    names = [name.strip() for name in names if name.strip()]
    if unknown := [name for name in names if name not in mids]:
        raise AudioError(f"{where}: the label {unknown[0]!r} is not in the label CSV")
    return tuple(mids[name] for name in names)


def _open_json(path: Path, labels: str | os.PathLike | None) -> Source:
    """AST's ``{"data": [{"wav": path, "labels": "mid,mid"}]}``; relative paths start at the manifest."""
    content = load_json(path)
    entries = content.get("data") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise AudioError(f'{path}: expected {{"data": [{{"wav": ..., "labels": ...}}, ...]}}')
    beside = path.with_name("class_labels_indices.csv")
    if labels is None and beside.is_file():
        labels = beside
    mids, names = ({}, ()) if labels is None else read_labels(labels)

    def clips() -> Iterator[Clip]:
        for number, entry in enumerate(entries):
            where = f"{path}, entry {number}"
            if not isinstance(entry, dict) or not isinstance(entry.get("wav"), str):
                raise AudioError(f'{where}: expected {{"wav": path, "labels": mids}}, got {entry!r:.80}')
            given = entry.get("labels", "")
            yield Clip(
                str(path.parent / entry["wav"]),
                label_indices(mids, given, where) if labels is not None else (),
            )

    return Source(str(path), clips(), names)


def _read_tsv(path: Path) -> Iterator[Clip]:
    """The root folder in the first line, then ``path<TAB>samples``."""
    lines = _text(path).splitlines()
    root = path.parent / lines[0].strip() if lines else None
    if root is None or "\t" in lines[0]:
        raise AudioError(
            f"{path}: expected the root folder in the first line, then lines of path, tab, samples"
        )
    if not root.is_dir():
        raise AudioError(f"{path}: its first line names the root folder {root}, which does not exist")
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        name, tab, samples = line.rpartition("\t")
        if not tab or not samples.strip().isascii() or not samples.strip().isdigit():
            raise AudioError(
                f"{path}, line {number}: expected a path, a tab and a number of samples, got {line!r:.80}"
            )
        yield Clip(str(root / name), samples=int(samples))
