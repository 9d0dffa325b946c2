"""webdataset shards, read at random.

A shard is a plain tar file, in which ``key.flac`` and ``key.json`` are one clip. The webdataset library reads
shards as streams, in which order, ranks and resuming belong to the stream. Here a clip is a number that any
process can ask for, so members are read in place, by an index of offsets: that of ``audiomae prepare``, or
one made by stepping through the tar headers. The shards themselves stay the library's, which reads them too.
"""

import glob
import io
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from audiomae.data.audio import AUDIO_SUFFIXES, AudioError, _extra
from audiomae.data.sources import Clip, Source, Strings, _log, label_indices, load_json, read_labels
from audiomae.words import plural

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Member:
    """A clip in a shard: its place in the tar file and what is known of it.

    Attributes:
        member: name in the tar file.
        offset, size: in bytes.
        samples, sample_rate: as :class:`Clip`.
        labels: positions in the label names.
        sha256: of the audio file.
        source: the path it was packed from.
    """

    member: str
    offset: int
    size: int
    samples: int | None = None
    sample_rate: int | None = None
    labels: tuple[int, ...] = ()
    sha256: str | None = None
    source: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, path: str, offset: int, size: int):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 -- closed with the window
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(view)
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_member(tar: str | os.PathLike, offset: int, size: int) -> BinaryIO:
    """A member of a tar file, read in place."""
    return io.BufferedReader(_Window(os.fspath(tar), offset, size), 1 << 16)


class ShardSource(Source):
    """The clips of several shards; see :func:`open_source`."""

    def __init__(
        self, name: str, shards: Sequence[tuple[str, Sequence[Member]]], label_names: Sequence[str] = ()
    ):
        members = [(number, member) for number, (_, found) in enumerate(shards) for member in found]
        super().__init__(
            name,
            (Clip(f"{shards[i][0]}::{m.member}", m.labels, m.samples, m.sample_rate) for i, m in members),
            label_names,
        )
        self._tars = Strings(tar for tar, _ in shards)
        # (clips, 3): shard, offset, size
        self._places = np.array([(i, m.offset, m.size) for i, m in members], dtype=np.int64)

    def file(self, index: int) -> BinaryIO:
        shard, offset, size = self._places[index].tolist()
        return open_member(self._tars[shard], offset, size)


def expand(pattern: str) -> list[str]:
    """The existing paths that a pattern with braces or wildcards stands for."""
    names = [pattern]
    if "{" in pattern:
        names = list(_extra("braceexpand", "train", "a pattern with braces").braceexpand(pattern))
    found = []
    for name in names:
        matches = sorted(glob.glob(name)) or ([name] if os.path.exists(name) else [])
        if not matches:
            raise AudioError(f"{pattern}: there is no {name}")
        found += matches
    return found


def tars_in(folder: Path) -> list[Path]:
    return sorted(tar for tar in folder.glob("*.tar") if not tar.name.startswith("."))


def is_shard(tar: Path) -> bool:
    """Whether it has an index, or holds audio among its first hundred members."""
    if index_of(tar).is_file():
        return True
    try:
        with tarfile.open(tar, "r:") as file:
            return any(_suffix(info.name) in AUDIO_SUFFIXES for info in islice(file, 100))
    except (tarfile.TarError, OSError, EOFError):
        return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def scan(tar: str | os.PathLike, mids: dict[str, int] | None = None) -> list[Member]:
    """The audio members of a shard in the order of its tar headers, with labels of ``key.cls`` and ``key.json``.

    Raises:
        AudioError: it is no plain tar file, or is cut short.
    """
    audio, labels = [], defaultdict(tuple)
    try:
        with tarfile.open(tar, "r:") as file:
            for info in file:
                if not info.isfile():
                    continue
                folder, slash, name = info.name.rpartition("/")
                key = folder + slash + name.partition(".")[0]
                suffix = _suffix(name)
                if suffix in AUDIO_SUFFIXES:
                    audio.append((key, info.name, info.offset_data, info.size))
                elif suffix in (".cls", ".json"):
                    labels[key] = labels[key] or _labels(
                        file.extractfile(info).read(), f"{tar}::{info.name}", mids
                    )
    except (tarfile.TarError, OSError, EOFError) as error:
        said = getattr(error, "strerror", None) or error
        raise AudioError(f"{tar}: is no plain tar file, or a damaged one: {said}") from error
    size = os.path.getsize(tar)
    if audio and audio[-1][2] + audio[-1][3] > size:
        raise AudioError(f"{tar}: is cut short inside {audio[-1][1]}")
    return [Member(name, offset, length, labels=labels[key]) for key, name, offset, length in audio]


def _labels(content: bytes, where: str, mids: dict[str, int] | None) -> tuple[int, ...]:
    """Labels of a .cls (a number) or .json member ({"labels": numbers, or mids where a label CSV was given})."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise AudioError(f"{where}: is no valid JSON: {error}") from error
    value = value.get("labels", ()) if isinstance(value, dict) else value
    value = [value] if isinstance(value, int) else value
    if isinstance(value, (list, tuple)) and all(type(label) is int for label in value):
        return tuple(value)
    if mids is None:  # names without a list of them
        return ()
    return label_indices(mids, value, where)


def index_of(tar: str | os.PathLike) -> Path:
    return Path(tar).with_suffix(".index.json")


def open_shards(spec: Path, labels: str | os.PathLike | None = None) -> Source:
    """See :func:`open_source`."""
    manifest, expected = None, {}
    if spec.is_dir() and (spec / MANIFEST).is_file():
        manifest = load_json(spec / MANIFEST)
        try:
            expected = {str(spec / shard["file"]): shard["bytes"] for shard in manifest["shards"]}
        except (TypeError, KeyError) as error:
            raise AudioError(f"{spec / MANIFEST}: is not a manifest of `audiomae prepare`") from error
        tars = list(expected)
    elif spec.is_dir():
        if list(spec.glob("*.index.json")):
            raise AudioError(
                f"{spec}: holds shards but no {MANIFEST}: `audiomae prepare` has not finished; run it again"
            )
        tars = list(map(str, tars_in(spec)))
    else:
        tars = expand(str(spec))
    mids, names = (None, None) if labels is None else read_labels(labels)

    shards = []
    for tar in tars:
        if not os.path.isfile(tar):
            raise AudioError(f"{tar}: no such shard; run `audiomae prepare` again, or correct the pattern")
        if expected.get(tar, os.path.getsize(tar)) != os.path.getsize(tar):
            raise AudioError(
                f"{tar}: has {os.path.getsize(tar)} bytes, but {MANIFEST} states {expected[tar]}; run `audiomae "
                "prepare` again, or copy the shard again"
            )
        index = index_of(tar)
        members = _read_index(index, tar) if index.is_file() and mids is None else scan(tar, mids)
        if members:
            shards.append((tar, members))
        else:
            _log.warning("%s: holds no audio", tar)
    if not shards:
        raise AudioError(f"{spec}: there is no audio in {plural(len(tars), 'shard')}")
    if names is None:
        names = _stated_names(manifest, Path(tars[0]))
    if not names and any(member.labels for _, found in shards for member in found):
        highest = max(label for _, found in shards for member in found for label in member.labels)
        names = tuple(map(str, range(highest + 1)))  # numbers are all that is known of them
    return ShardSource(str(spec), shards, names)


def _stated_names(manifest: dict | None, tar: Path) -> tuple[str, ...]:
    """The label names of the manifest; that of the folder where shards are given one by one."""
    beside = tar.with_name(MANIFEST)
    if manifest is None and index_of(tar).is_file() and beside.is_file():
        manifest = load_json(beside)
    return tuple(manifest.get("labels", ())) if manifest else ()


def _read_index(path: Path, tar: str) -> list[Member]:
    index = load_json(path)
    try:
        members = [Member(**entry | {"labels": tuple(entry["labels"])}) for entry in index["clips"]]
        size = index["bytes"]
    except (TypeError, KeyError) as error:
        raise AudioError(
            f"{path}: is not an index of `audiomae prepare`; delete it and run it again"
        ) from error
    if size != os.path.getsize(tar):
        raise AudioError(
            f"{tar}: has {os.path.getsize(tar)} bytes, but its index states {size}; run `audiomae prepare` again, or "
            "copy the shard again"
        )
    return members
