"""Labelled data sets in the folders that their archives unpack to, and one's own data.

A reader takes what the user downloaded and gives :class:`Splits`: nothing is decoded, moved or written. What is missing
or was unpacked half is refused before training starts, in a sentence that says what the folder should hold.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np

from ..data import AudioError, Clip, Source, labelled_folder, open_source
from ..data.audio import AUDIO_SUFFIXES
from ..data.sources import label_indices, read_labels
from ..words import plural

_log = logging.getLogger("audiomae.finetune")

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Splits:
    """A labelled data set.

    Attributes:
        train: to train on.
        val: to choose the best checkpoint by; None where the data set has no such split.
        test: what results are reported on; None where there is none (one's own data).
        multi_label: a clip may have any number of labels, not just one.
        drawn: which clip is in which split was drawn here, and is another one when clips are added.
    """

    train: Source
    val: Source | None
    test: Source | None
    multi_label: bool
    drawn: bool = False

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.train.label_names

    def __getitem__(self, split: str) -> Source:
        source = getattr(self, split)
        if source is None:
            there = ", ".join(name for name in SPLITS if getattr(self, name) is not None)
            raise AudioError(f"{self.train.name}: there is no {split} split, only {there}")
        return source


# -- what the readers share ----------------------------------------------------------------------------------


def _root(folder: Path, title: str, layout: str, inside: Sequence[str], needs: Sequence[str]) -> Path:
    """`folder`, or a folder of one of the names `inside` it, that holds all that is needed."""
    if not folder.is_dir():
        raise AudioError(f"{folder}: there is no such folder. {title} is {layout}")
    places = [folder, *(folder / name for name in inside)]
    missing = [[name for name in needs if not (place / name).exists()] for place in places]
    best = min(range(len(places)), key=lambda i: (len(missing[i]), i))
    if missing[best]:
        raise AudioError(
            f"{places[best]}: holds no whole {title}: {', '.join(missing[best][:5])} is missing. {title} is {layout}"
        )
    return places[best]


#: Share of the listed recordings that may be missing: so many are left out with a warning, more are half an archive.
_FEW = 0.01

Item = TypeVar("Item", bound=tuple)


def _present(root: Path, title: str, listed_in: str, items: Iterable[Item]) -> list[Item]:
    """Of tuples that begin with a path those whose file is there; refuses a folder that was unpacked half."""
    items = list(items)
    missing = [item[0] for item in items if not os.path.isfile(item[0])]
    if not missing:
        return items
    text = (
        f"{root}: {len(missing):,} of {len(items):,} recordings that {listed_in} lists are missing, the first "
        f"{'is' if len(missing) == 1 else 'are'} {', '.join(missing[:3])}"
    )
    if len(missing) > _FEW * len(items):
        raise AudioError(
            f"{text}. {title} was not unpacked to its end, or not where its list is: unpack the archive again"
        )
    _log.warning("%s: they are left out, and results are not quite those of all of %s", text, title)
    gone = set(missing)
    return [item for item in items if item[0] not in gone]


def _expect(root: Path, title: str, counts: Mapping[str, tuple[int, int]]) -> None:
    """Warns where a split has fewer recordings than published: (found, published) by its name."""
    fewer = [f"{found:,} of {all_:,} for {name}" for name, (found, all_) in counts.items() if found < all_]
    if fewer:
        _log.warning(
            "%s: holds fewer recordings than %s has: %s; was it unpacked to its end?", root, title, ", ".join(fewer)
        )  # fmt: skip


def _torchaudio_datasets(title: str) -> ModuleType:
    try:
        from torchaudio import datasets
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the metadata of {title} are read by the package {error.name}: pip install 'audiomae[audio]'"
        ) from error
    return datasets


def _single(name: str, items: Iterable[tuple[str, str]], label_names: Sequence[str]) -> Source:
    """A source of (path, label) pairs."""
    numbers = {label: i for i, label in enumerate(label_names)}
    return Source(name, (Clip(path, (numbers[label],)) for path, label in items), label_names)


def _hold_out(count: int, share: float, seed: int = 0) -> np.ndarray:
    """(count,) bool: a fixed random choice of that share, the same on every machine."""
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = True
    return chosen


def _rows(path: Path, needs: Sequence[str]) -> list[dict[str, str]]:
    """Of a CSV file with a header that has the columns needed."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows = list(reader)
        for row in rows:  # names of files may be any bytes, and nothing else
            "".join(value for name, value in row.items() if name not in (None, "path") and value).encode()
    except (OSError, UnicodeError, csv.Error) as error:
        raise AudioError(f"{path}: cannot be read: {error}") from error
    missing = [name for name in needs if name not in (reader.fieldnames or ())]
    if missing or not rows:
        raise AudioError(f"{path}: expected a CSV file with the columns {', '.join(needs)}, and rows")
    for number, row in enumerate(rows, start=2):
        if any(row[name] is None for name in needs):
            raise AudioError(f"{path}, line {number}: has fewer fields than the header")
    return rows


# -- AudioSet ------------------------------------------------------------------------------------------------

AUDIOSET = (
    "a folder with Google's class_labels_indices.csv, balanced_train_segments.csv and eval_segments.csv (for "
    "AudioSet-2M also unbalanced_train_segments.csv) and, at any depth, recordings named by their YouTube id: "
    "<id>.flac, Y<id>.wav, <id>_30.000_40.000.wav or <id>_30000.flac; or AST manifests "
    "(.json) or shards, --data to train on and --val-data to evaluate on"
)
_SEGMENT = re.compile(r"Y?(.{11})(?:_\d+(?:\.\d+)?){0,2}")


def audioset(data: Sequence[str], val_data: Sequence[str], fold: int | None, full: bool) -> Splits:
    """AudioSet-20K (balanced) or, with `full`, AudioSet-2M (balanced and unbalanced); the eval segments are the test.

    The published code has no validation split of its own either.
    """
    if val_data or len(data) > 1 or Path(data[0]).suffix in (".json", ".tar"):
        return _audioset_manifests(data, val_data)
    lists = ["balanced_train_segments.csv"] + ["unbalanced_train_segments.csv"] * full
    needs = ["class_labels_indices.csv", *lists, "eval_segments.csv"]
    root = _root(Path(data[0]).expanduser(), "AudioSet", AUDIOSET, ("metadata", "csv"), needs)
    mids, names = read_labels(root / "class_labels_indices.csv")
    files = _by_youtube_id(Path(data[0]).expanduser())
    train = [clip for name in lists for clip in _segments(root / name, mids, files)]
    test = list(_segments(root / "eval_segments.csv", mids, files))
    for name, clips in (("training", train), ("eval", test)):
        if not clips:
            raise AudioError(
                f"{data[0]}: none of the {name} segments' recordings are here. AudioSet is {AUDIOSET}"
            )
    name = "AudioSet-2M" if full else "AudioSet-20K"
    return Splits(Source(name, train, names), None, Source(f"{name} eval", test, names), True)


def _by_youtube_id(folder: Path) -> dict[str, str]:
    found = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in AUDIO_SUFFIXES and (match := _SEGMENT.fullmatch(stem)):
                found.setdefault(match[1], os.path.join(parent, name))
    return found


def _segments(path: Path, mids: Mapping[str, int], files: Mapping[str, str]) -> Iterable[Clip]:
    listed = there = declared = 0
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AudioError(f"{path}: cannot be read: {error}") from error
    for number, row in enumerate(csv.reader(lines, skipinitialspace=True), start=1):
        if not row or row[0].startswith("#"):
            if match := re.search(r"num_segs=(\d+)", ",".join(row)):
                declared = int(match[1])
            continue
        if len(row) != 4:
            raise AudioError(
                f'{path}, line {number}: expected a YouTube id, two times and "mids", got {",".join(row)!r:.80}'
            )
        listed += 1
        if file := files.get(row[0]):
            there += 1
            yield Clip(file, label_indices(mids, row[3], f"{path}, line {number}"))
    if listed < declared:
        _log.warning(
            "%s: lists %d segments, and its first lines say %d: it was cut off", path, listed, declared
        )
    if there < listed:
        share = 100 * there / listed
        _log.warning(
            "%s: recordings of %d of %d segments (%.1f %%) are here; the others are left out",
            path, there, listed, share,
        )  # fmt: skip


def _audioset_manifests(data: Sequence[str], val_data: Sequence[str]) -> Splits:
    if not val_data:
        raise AudioError(f"there is nothing to evaluate on: give --val-data. AudioSet is {AUDIOSET}")
    _check_apart(data, val_data)
    return Splits(_joined(data), None, _joined(val_data), True)


def _check_apart(data: Sequence[str], val_data: Sequence[str]) -> None:
    if both := {os.path.abspath(spec) for spec in data} & {os.path.abspath(spec) for spec in val_data}:
        raise AudioError(
            f"{min(both)} is both --data and --val-data: what is trained on says nothing when it is evaluated on. Name "
            "other recordings with --val-data"
        )


def _joined(specs: Sequence[str]) -> Source:
    """Labelled sources one after another; all must have the same label names."""
    sources = [open_source(spec) for spec in specs]
    for source in sources:
        if not source.label_names:
            raise AudioError(
                f"{source.name}: has no labels; an AST manifest needs class_labels_indices.csv beside it"
            )
        if source.label_names != sources[0].label_names:
            raise AudioError(f"{sources[0].name} and {source.name} have different label names")
    if len(sources) == 1:
        return sources[0]
    if any(type(source) is not Source for source in sources):
        raise AudioError(
            "shards cannot be joined with other sources here: pack them together with audiomae prepare"
        )
    return Source(
        ", ".join(s.name for s in sources), (clip for s in sources for clip in s), sources[0].label_names
    )


# -- ESC-50 --------------------------------------------------------------------------------------------------

ESC50 = "a folder ESC-50-master with meta/esc50.csv and audio/ with the 2,000 recordings that it lists"


def esc50(data: Sequence[str], val_data: Sequence[str], fold: int | None) -> Splits:
    """Fold `fold` of five is the test, the others are trained on."""
    root = _root(Path(data[0]).expanduser(), "ESC-50", ESC50, ("ESC-50-master",), ("meta/esc50.csv", "audio"))
    rows = _rows(root / "meta/esc50.csv", ("filename", "fold", "target", "category"))
    try:
        names = {int(row["target"]): row["category"] for row in rows}
        folds = [int(row["fold"]) for row in rows]
    except ValueError as error:
        raise AudioError(f"{root / 'meta/esc50.csv'}: a fold or target is no number: {error}") from error
    if sorted(names) != list(range(len(names))):
        raise AudioError(f"{root / 'meta/esc50.csv'}: the targets are not 0 to {len(names) - 1}")
    paths = [str(root / "audio" / row["filename"]) for row in rows]
    labels = [names[i] for i in sorted(names)]
    items = list(zip(paths, (row["category"] for row in rows), folds, strict=True))
    items = _present(root, "ESC-50", "meta/esc50.csv", items)
    _expect(root, "ESC-50", {"five folds": (len(items), 2_000)})
    train = [(path, label) for path, label, number in items if number != fold]
    test = [(path, label) for path, label, number in items if number == fold]
    if not test or not train:
        raise AudioError(f"{root / 'meta/esc50.csv'}: no recording is in fold {fold}, or all are")
    return Splits(
        _single(f"ESC-50 without fold {fold}", train, labels), None, _single(f"ESC-50 fold {fold}", test, labels), False
    )  # fmt: skip


# -- Speech Commands -----------------------------------------------------------------------------------------

KEYWORDS = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes")
WORDS_V1 = (
    *KEYWORDS, "bed", "bird", "cat", "dog", "eight", "five", "four", "happy", "house", "marvin", "nine", "one", "seven",
    "sheila", "six", "three", "tree", "two", "wow", "zero",
)  # fmt: skip
WORDS_V2 = (*WORDS_V1, "backward", "follow", "forward", "learn", "visual")
_LISTS = ("validation_list.txt", "testing_list.txt")
SPEECH_COMMANDS_V2 = (
    "a folder speech_commands_v0.02 with a folder of recordings for each of 35 words, validation_list.txt and "
    "testing_list.txt"
)
SPEECH_COMMANDS_V1 = (
    "a folder speech_commands_v0.01 with a folder of recordings for each of 30 words, _background_noise_, "
    "validation_list.txt and testing_list.txt, and beside it speech_commands_test_set_v0.01 with a folder for each of "
    "12 classes (SUPERB's keyword spotting); --data names the first or the folder that holds both"
)


def _speech_commands(root: Path, title: str, split: str) -> list[tuple[str, str]]:
    """(path, word) of a split, as torchaudio reads the lists."""
    datasets = _torchaudio_datasets("Speech Commands")
    root = root.resolve()
    found = datasets.SPEECHCOMMANDS(
        root.parent, url=f"{root.name}.tar.gz", folder_in_archive="", subset=split
    )
    items = [found.get_metadata(i)[:3:2] for i in range(len(found))]
    items = [(str(root.parent / path), word) for path, word in items]
    return _present(root, title, f"{split}_list.txt", items)


def speech_commands_v2(data: Sequence[str], val_data: Sequence[str], fold: int | None) -> Splits:
    """The 35 words of version 2, with the lists' splits."""
    inside = ("speech_commands_v0.02", "SpeechCommands/speech_commands_v0.02")
    title, needs = "Speech Commands v2", (*_LISTS, *WORDS_V2)
    root = _root(Path(data[0]).expanduser(), title, SPEECH_COMMANDS_V2, inside, needs)
    published = {"training": 84_843, "validation": 9_981, "testing": 11_005}
    splits = {split: _speech_commands(root, title, split) for split in published}
    _expect(root, title, {split: (len(splits[split]), count) for split, count in published.items()})
    labels = sorted(WORDS_V2)
    train, val, test = (_single(f"{title}, {split}", items, labels) for split, items in splits.items())
    return Splits(train, val, test, False)


def speech_commands_v1(data: Sequence[str], val_data: Sequence[str], fold: int | None) -> Splits:
    """SUPERB's keyword spotting: ten keywords, unknown words, and silence from the background recordings.

    The background recordings are both trained on and validated with, as in SUPERB; the test set is its own archive.
    """
    inside = ("speech_commands_v0.01", "SpeechCommands/speech_commands_v0.01")
    title, needs = "Speech Commands v1", (*_LISTS, "_background_noise_", *WORDS_V1)
    root = _root(Path(data[0]).expanduser(), title, SPEECH_COMMANDS_V1, inside, needs)
    labels = (*KEYWORDS, "_silence_", "_unknown_")
    tests = root.parent / "speech_commands_test_set_v0.01"
    _root(
        root.parent,
        title,
        SPEECH_COMMANDS_V1,
        (),
        (tests.name, *(f"{tests.name}/{label}" for label in labels)),
    )
    noise = [(str(path), "_silence_") for path in sorted((root / "_background_noise_").glob("*.wav"))]
    if not noise:
        raise AudioError(f"{root}/_background_noise_: holds no recordings. {title} is {SPEECH_COMMANDS_V1}")

    words = {split: _speech_commands(root, title, split) for split in ("training", "validation", "testing")}

    def of(split: str) -> list[tuple[str, str]]:
        return [(path, word if word in KEYWORDS else "_unknown_") for path, word in words[split]] + noise

    train, val = of("training"), of("validation")
    test = [(str(path), label) for label in labels for path in sorted((tests / label).glob("*.wav"))]
    counts = {"training": (len(words["training"]), 51_088), "validation": (len(words["validation"]), 6_798)}
    counts |= {"silence": (len(noise), 6), "testing": (len(test), 3_081)}
    _expect(root, title, counts)
    return Splits(
        *(_single(f"{title}, {split}", items, labels) for split, items in zip(SPLITS, (train, val, test), strict=True)),
        False,
    )  # fmt: skip


# -- VoxCeleb1 -----------------------------------------------------------------------------------------------

VOXCELEB1 = (
    "a folder with iden_split.txt (from the data set's site, under meta/) and wav/, into which vox1_dev_wav.zip and "
    "vox1_test_wav.zip were unpacked: wav/id10001/<video>/00001.wav"
)


def voxceleb1(data: Sequence[str], val_data: Sequence[str], fold: int | None) -> Splits:
    """Speaker identification: 1,251 speakers, split by video."""
    root = _root(
        Path(data[0]).expanduser(), "VoxCeleb1", VOXCELEB1, ("VoxCeleb1",), ("iden_split.txt", "wav")
    )
    datasets = _torchaudio_datasets("VoxCeleb1")
    splits, published = {}, {"train": 138_361, "dev": 6_904, "test": 8_251}
    for split in published:
        try:
            found = datasets.VoxCeleb1Identification(root, split, meta_url="iden_split.txt")
        except ValueError as error:
            raise AudioError(
                f"{root / 'iden_split.txt'}: expected lines such as '1 id10006/nLEBBc9oIFs/00003.wav': {error}"
            ) from error
        items = [found.get_metadata(i) for i in range(len(found))]
        splits[split] = [(str(root / "wav" / path), path.split("/")[0], split) for path, *_ in items]
    listed = [item for items in splits.values() for item in items]
    labels = sorted({label for _, label, _ in listed})
    there = _present(root, "VoxCeleb1", "iden_split.txt", listed)
    splits = {split: [(path, label) for path, label, s in there if s == split] for split in published}
    _expect(root, "VoxCeleb1", {split: (len(splits[split]), count) for split, count in published.items()})
    train, val, test = (_single(f"VoxCeleb1, {split}", items, labels) for split, items in splits.items())
    return Splits(train, val, test, False)


# -- IEMOCAP -------------------------------------------------------------------------------------------------

IEMOCAP = (
    "the folder IEMOCAP_full_release with Session1 to Session5, each with sentences/wav/<dialog>/<utterance>.wav and "
    "dialog/EmoEvaluation/<dialog>.txt"
)
_EMOTIONS = {"neu": "neutral", "hap": "happy", "exc": "happy", "ang": "angry", "sad": "sad"}


def iemocap(data: Sequence[str], val_data: Sequence[str], fold: int | None) -> Splits:
    """SUPERB's emotion recognition: four classes, excited counts as happy; session `fold` is the test.

    A fifth of the other sessions, drawn once and for all, is the validation.
    """
    sessions = tuple(range(1, 6))
    needs = [f"Session{i}/{part}" for i in sessions for part in ("sentences/wav", "dialog/EmoEvaluation")]
    inside = ("IEMOCAP_full_release", "IEMOCAP")
    root = _root(Path(data[0]).expanduser(), "IEMOCAP", IEMOCAP, inside, needs)
    items = _present(
        root,
        "IEMOCAP",
        "dialog/EmoEvaluation",
        (item for i in sessions for item in _iemocap_session(root, i)),
    )
    for session in sessions:
        if all(number != session for _, _, number in items):
            raise AudioError(f"{root}/Session{session}: holds no labelled utterances. IEMOCAP is {IEMOCAP}")
    _expect(root, "IEMOCAP", {"four emotions": (len(items), 5_531)})
    labels = ("neutral", "happy", "angry", "sad")
    rest = [(path, label) for path, label, session in items if session != fold]
    test = [(path, label) for path, label, session in items if session == fold]
    held = _hold_out(len(rest), 0.2)
    return Splits(
        _single(f"IEMOCAP without session {fold}", (x for x, out in zip(rest, held, strict=True) if not out), labels),
        _single(f"IEMOCAP, validation of fold {fold}", (x for x, out in zip(rest, held, strict=True) if out), labels),
        _single(f"IEMOCAP session {fold}", test, labels),
        False,
    )  # fmt: skip


def _iemocap_session(root: Path, number: int) -> list[tuple[str, str, int]]:
    """(path, label, session) of each utterance with one of the emotions, whether its recording is there or not.

    torchaudio's reader goes by the recordings, and would pass over those that are missing in silence.
    """
    session, found = root / f"Session{number}", []
    for file in (session / "dialog" / "EmoEvaluation").glob("[!.]*.txt"):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            # [6.2901 - 8.2357]	Ses01F_impro01_F000	neu	[2.5000, 2.5000, 2.5000]
            fields = line.split("\t")
            if line.startswith("[") and len(fields) >= 3 and (label := _EMOTIONS.get(fields[2].strip())):
                dialog = fields[1].rpartition("_")[0]
                path = session / "sentences" / "wav" / dialog / f"{fields[1]}.wav"
                found.append((str(path), label, number))
    return sorted(found)


# -- one's own data ------------------------------------------------------------------------------------------

CUSTOM = (
    "a folder with a folder of recordings for each class (or train, val and test, each with such folders), or a CSV "
    "file with the columns path, label (one per clip) or labels (several, separated by ;) and perhaps split (train, "
    "val, test)"
)
_SPLIT_NAMES = {
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "test",
    "evaluation": "test",
    "training": "train",
}
_SPLIT_NAMES |= {"testing": "test", **{name: name for name in SPLITS}}


def custom(data: Sequence[str], val_data: Sequence[str], fold: int | None) -> Splits:
    """One's own recordings; without splits a tenth of each class is held out for validation, and a tenth for the test.

    `val_data` is a source like `data`, all of which is the validation split; `data` is then trained on but for its own
    test split.
    """
    path = Path(data[0]).expanduser()
    if len(data) > 1:
        raise AudioError("custom data are one folder or CSV file: --data was given several times")
    if len(val_data) > 1:
        raise AudioError("custom data are one folder or CSV file: --val-data was given several times")
    _check_apart(data, val_data)
    rows, multi_label = _custom_rows(path)
    if val_data:
        held, held_multi = _custom_rows(Path(val_data[0]).expanduser())
        if held_multi != multi_label:
            raise AudioError(f"{path} and {val_data[0]}: one has several labels per clip, the other one")
        rows = [(p, l, "test" if s == "test" else "train") for p, l, s in rows] + [
            (p, l, "val") for p, l, _ in held
        ]
    _check_rows(path, rows)
    if drawn := all(split is None for _, _, split in rows):
        rows = _split_at_random(rows, multi_label)
    names = sorted({label for _, labels, _ in rows for label in labels})
    if odd := [name for name in names if name != os.fsencode(name).decode(errors="replace")]:
        raise AudioError(f"{path}: the name of the class {odd[0]!r} is not in UTF-8: rename it")
    if len(names) < 2:
        raise AudioError(
            f"{path}: has {len(names)} class, and two at least were expected. Custom data are {CUSTOM}"
        )
    rows = _present(path, "the data set", str(path), rows)
    numbers = {name: i for i, name in enumerate(names)}
    sources = {}
    for split in SPLITS:
        clips = [Clip(p, tuple(numbers[label] for label in labels)) for p, labels, s in rows if s == split]
        sources[split] = Source(f"{path}, {split}", clips, names) if clips else None
    if sources["train"] is None:
        raise AudioError(f"{path}: no clip is in the training split. Custom data are {CUSTOM}")
    if sources["val"] is None and sources["test"] is None:
        raise AudioError(f"{path}: there is nothing to evaluate on: mark some clips as val or test")
    return Splits(**sources, multi_label=multi_label, drawn=drawn)


def write_splits(path: Path, splits: Splits) -> None:
    """A CSV file that `custom` reads, with every clip, its labels and its split."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "labels" if splits.multi_label else "label", "split"))
        for name in SPLITS:
            for clip in getattr(splits, name) or ():
                labels = ";".join(splits.label_names[i] for i in clip.labels)
                rows.writerow((os.path.abspath(clip.path), labels, name))


Row = tuple[str, tuple[str, ...], str | None]


def _check_rows(path: Path, rows: Sequence[Row]) -> None:
    """Refuses a recording in two splits, or with two opinions of its labels."""
    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(os.path.abspath(row[0]), row)
        if other is not row and (other[1:] != row[1:] or row[2] is None):
            what = [
                f"{';'.join(labels) or 'no label'}{f' in {s}' if s else ''}" for _, labels, s in (other, row)
            ]
            raise AudioError(
                f"{path}: {row[0]} is there twice ({' and '.join(what)}): a recording is in one split, and several "
                "labels go into one row, in the column labels"
            )


def _custom_rows(path: Path) -> tuple[list[Row], bool]:
    if path.is_dir():
        return _custom_folder(path), False
    if path.is_file() and path.suffix.lower() == ".csv":
        return _custom_csv(path)
    raise AudioError(f"{path}: is neither a folder nor a CSV file. Custom data are {CUSTOM}")


def _custom_folder(folder: Path) -> list[Row]:
    children = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not children:
        raise AudioError(f"{folder}: holds no folders, one for each class. Custom data are {CUSTOM}")
    splits = [_SPLIT_NAMES.get(child.name.lower()) for child in children]
    if all(splits):
        if len(set(splits)) < len(splits):
            raise AudioError(f"{folder}: two of {', '.join(c.name for c in children)} are the same split")
        return [
            (clip, label, split) for child, split in zip(children, splits, strict=True)
            for clip, label, _ in _custom_folder_of_classes(child)
        ]  # fmt: skip
    if "train" in splits and {"val", "test"} & set(splits):
        others = [child.name for child, split in zip(children, splits, strict=True) if split is None]
        raise AudioError(
            f"{folder}: holds train, val or test, and {', '.join(others[:3])}: are these splits or classes? Custom "
            f"data are {CUSTOM}"
        )
    return _custom_folder_of_classes(folder)


def _custom_folder_of_classes(folder: Path) -> list[Row]:
    source = labelled_folder(folder, least=1)
    names = [name.strip() for name in source.label_names]  # as in a CSV file
    return [(clip.path, (names[clip.labels[0]],), None) for clip in source]


def _custom_csv(path: Path) -> tuple[list[Row], bool]:
    rows = _rows(path, ("path",))
    multi_label = "labels" in rows[0]
    column = "labels" if multi_label else "label"
    if column not in rows[0]:
        raise AudioError(f"{path}: has no column label or labels. Custom data are {CUSTOM}")
    found = []
    for number, row in enumerate(rows, start=2):
        text = row[column] or ""
        labels = (
            tuple(dict.fromkeys(s.strip() for s in text.split(";") if s.strip()))
            if multi_label
            else (text.strip(),)
        )
        if not multi_label and not labels[0]:
            raise AudioError(f"{path}, line {number}: the label is empty")
        split = None
        if "split" in row:
            split = _SPLIT_NAMES.get((row["split"] or "").strip().lower())
            if split is None:
                raise AudioError(
                    f"{path}, line {number}: split is {row['split']!r}; expected train, val or test"
                )
        found.append((str(path.parent / row["path"]), labels, split))
    return found, multi_label


def _split_at_random(rows: list[Row], multi_label: bool) -> list[Row]:
    """A tenth of each class (of a clip's first label) for validation and another for the test, one clip at least.

    With several labels a clip, classes that are first of fewer than three clips are one class here.
    """
    by_class: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        by_class.setdefault(row[1][:1], []).append(row)
    groups = [members for members in by_class.values() if len(members) >= 3]
    small = [(label, members) for label, members in by_class.items() if len(members) < 3]
    if small and not multi_label:
        label, members = small[0]
        raise AudioError(
            f"the class {''.join(label)!r} has {plural(len(members), 'clip')}, too few to hold some out: "
            "name the splits, in a column split or in folders train, val and test"
        )
    if small:
        groups.append([row for _, members in small for row in members])
    found = []
    for members in groups:
        tenth = max(1, round(len(members) / 10)) if len(members) >= 3 else 0
        order = np.random.default_rng(0).permutation(len(members))
        for place, i in enumerate(order):
            split = "val" if place < tenth else "test" if place < 2 * tenth else "train"
            found.append((*members[i][:2], split))
    return found


Reader = Callable[[Sequence[str], Sequence[str], int | None], Splits]
