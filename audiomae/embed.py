"""`audiomae embed` and `audiomae tag`: embeddings of recordings into a file, and the labels of recordings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .embedding import Embedder, Tagger
from .options import (
    Recording,
    add_any_length,
    add_model,
    check_device,
    check_writable,
    file_to_write,
    find_recordings,
    layer,
    load_batches,
    open_model,
    positive,
    replacing,
)
from .words import plural

_MARK = b"audiomae"  # in the metadata of our Parquet files


def add_commands(commands: Any) -> None:
    embed = commands.add_parser(
        "embed",
        help="embeddings of recordings, per clip or per frame",
        description="Writes embeddings of recordings of any length. An npz file holds `files` (paths) and "
        "`embeddings`: (files, width), or at level frame (steps of all files, width), where `steps` says how many "
        "belong to each file and `times` when they are, in milliseconds. A Parquet file (--out name.parquet) has the "
        "columns file, embedding and at level frame time. A recording that cannot be used is named and left out, "
        "and the exit status is 1 then.",
    )
    _add_recordings(embed)
    embed.add_argument("--level", choices=("clip", "frame"), default="clip", help="default: %(default)s")
    embed.add_argument(
        "--layer",
        type=layer,
        default="last",
        help="last (after the final norm), a block's number from 1, or mean over all blocks; default: %(default)s",
    )
    embed.add_argument(
        "--pad",
        choices=("exclude", "attend"),
        default="exclude",
        help="read a short clip's own frames only, or fill it up to the model's length as published; "
        "default: %(default)s",
    )
    embed.add_argument(
        "--out",
        type=file_to_write("", ".npz", ".parquet"),
        default=Path("embeddings.npz"),
        help="file to write; default: %(default)s",
    )
    add_any_length(embed)
    add_model(embed)
    embed.set_defaults(run=_embed)

    tag = commands.add_parser(
        "tag",
        help="the top labels of recordings, by a classifier",
        description="Prints the labels of each recording with the highest scores. The names of the labels come with "
        "the classifier's weights.",
    )
    _add_recordings(tag)
    tag.add_argument(
        "--top", type=positive, default=5, help="labels for each recording; default: %(default)s"
    )
    tag.add_argument(
        "--scores",
        choices=("sigmoid", "softmax"),
        help="of a classifier of any number of labels per clip, or of one; default: softmax where it was fine-tuned "
        "with cross-entropy, else sigmoid",
    )
    add_any_length(tag)
    add_model(tag)
    tag.set_defaults(run=_tag)


def _add_recordings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="recordings, or folders or manifests of them"
    )


# -- embed ---------------------------------------------------------------------------------------------------


def _embed(options: argparse.Namespace) -> int:
    check_writable(options.out)
    writer = ParquetWriter if options.out.suffix == ".parquet" else NpzWriter
    writer.check(options.out)
    found, device = find_recordings(options.files), check_device(options.device)
    model = open_model(options.model, options, random="a baseline, not an embedding").float()
    embedder = Embedder(
        model,
        level=options.level,
        layer=options.layer,
        pad=options.pad,
        long=options.long,
        batch_size=options.batch_size,
        device=device,
    )
    failed: list[str] = []
    rows = 0
    with replacing(options.out) as temporary, writer(temporary, embedder) as out:
        for good, waveforms in load_batches(found, embedder.sample_rate, options.batch_size, "embed", failed):
            for recording, values in zip(good, embedder(waveforms), strict=True):
                values = values.reshape(-1, embedder.width).cpu()
                out.add(recording, values)
                rows += len(values)
                times = (
                    f", {plural(len(values), 'step')} of {embedder.step_ms:g} ms"
                    if options.level == "frame"
                    else ""
                )
                norm = values.norm(dim=1).mean()
                print(f"{recording.name}  {embedder.width} values{times}, norm {norm:.3f}")
        if not rows:
            raise ValueError(
                f"none of {plural(len(found), 'recording')} could be used: {options.out} was not written"
            )
    print(f"wrote {options.out}: embeddings {(rows, embedder.width)}")
    if failed:
        print(f"audiomae embed: left out {len(failed)} of {plural(len(found), 'recording')}", file=sys.stderr)
    return 1 if failed else 0


class NpzWriter:
    """All embeddings in one npz file, written at the end. The file holds no pickled objects."""

    def __init__(self, path: Path, embedder: Embedder):
        self.path, self.embedder = path, embedder
        self.files: list[str] = []
        self.rows: list[np.ndarray] = []

    @staticmethod
    def check(path: Path) -> None:
        """Refuses to write over what is no file of ours.

        Raises:
            FileExistsError: it is there and something else.
        """
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as content:
                    ours = {"files", "embeddings"} <= set(content.files)
            except Exception:  # whatever it is, it is none
                ours = False
            _check_ours(path, ours)

    def __enter__(self) -> NpzWriter:
        return self

    def add(self, recording: Recording, values: torch.Tensor) -> None:
        self.files.append(recording.name)
        self.rows.append(values.numpy())

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            return
        content = {"files": np.array(self.files), "embeddings": np.concatenate(self.rows)}
        if self.embedder.level == "frame":
            content["steps"] = np.array([len(values) for values in self.rows])
            content["times"] = np.concatenate([self.embedder.times(n).numpy() for n in content["steps"]])
        with self.path.open("wb") as out:  # given a name, savez would append .npz
            np.savez(out, **content)


class ParquetWriter:
    """A row for each clip or step, written as they come."""

    def __init__(self, path: Path, embedder: Embedder):
        pa = _pyarrow()
        self.embedder = embedder
        columns = {
            "file": pa.string(),
            "time": pa.float64(),
            "embedding": pa.list_(pa.float32(), embedder.width),
        }
        if embedder.level == "clip":
            del columns["time"]
        self.schema = pa.schema(list(columns.items())).with_metadata({_MARK: b"embeddings"})
        self.writer = pa.parquet.ParquetWriter(path, self.schema)

    @staticmethod
    def check(path: Path) -> None:
        """Refuses to write over what is no file of ours, and to begin without pyarrow."""
        pa = _pyarrow()
        if path.exists():
            try:
                ours = _MARK in (pa.parquet.read_schema(path).metadata or {})
            except Exception:  # whatever it is, it is none
                ours = False
            _check_ours(path, ours)

    def __enter__(self) -> ParquetWriter:
        return self

    def add(self, recording: Recording, values: torch.Tensor) -> None:
        pa = _pyarrow()
        flat = pa.array(values.flatten().numpy())
        columns = {
            "file": pa.array([recording.name] * len(values)),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, self.embedder.width),
        }
        if self.embedder.level == "frame":
            columns["time"] = pa.array(self.embedder.times(len(values)).numpy())
        self.writer.write_table(pa.table([columns[name] for name in self.schema.names], schema=self.schema))

    def __exit__(self, *error: Any) -> None:
        self.writer.close()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "a Parquet file needs pyarrow, which cannot be imported: pip install pyarrow, or write an npz file"
        ) from error
    return pyarrow


def _check_ours(path: Path, ours: bool) -> None:
    if not ours:
        raise FileExistsError(
            f"{path} exists already and holds no embeddings of this command: choose another name for --out"
        )


# -- tag -----------------------------------------------------------------------------------------------------


def _tag(options: argparse.Namespace) -> int:
    found, device = find_recordings(options.files), check_device(options.device)
    tagger = Tagger(
        open_model(options.model, options).float(),
        scores=options.scores,
        long=options.long,
        batch_size=options.batch_size,
        device=device,
    )
    if tagger.model.config.frontend.labels is None:
        print(
            f"{options.model} comes without names of its labels: their numbers are printed", file=sys.stderr
        )
    failed: list[str] = []
    for good, waveforms in load_batches(found, tagger.sample_rate, options.batch_size, "tag", failed):
        for recording, scores in zip(good, tagger(waveforms).cpu(), strict=True):
            print(recording.name)
            values, numbers = scores.topk(min(options.top, len(scores)))
            print_top(values.tolist(), [tagger.labels[i] for i in numbers.tolist()])
    return 1 if failed else 0


def print_top(scores: Sequence[float], labels: Sequence[str]) -> None:
    for score, label in zip(scores, labels, strict=True):
        print(f"  {score:.3f}  {label}")
