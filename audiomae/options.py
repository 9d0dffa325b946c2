"""What several commands share: options that describe a model, and checks before any work."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import is_name, list_models
from .create import create_model, load
from .data import AudioError, Source, load_crop, open_source
from .model import SpectrogramModel
from .words import plural


class UsageError(ValueError):
    """The words of the command line are wrong by themselves, whatever is on the disk."""


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def file_to_write(*suffixes: str) -> Callable[[str], Path]:
    """For argparse: a path whose suffix says the format."""

    def path(text: str) -> Path:
        if Path(text).suffix not in suffixes:
            known = " or ".join(filter(None, suffixes))
            raise argparse.ArgumentTypeError(f"{text}: the suffix says the format, and should be {known}")
        return Path(text)

    return path


def layer(text: str) -> int | str:
    if text in ("last", "mean"):
        return text
    try:
        return positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected last, mean or a block's number, got {text!r}") from None


def add_model(parser: argparse.ArgumentParser, what: str = "") -> None:
    """--model, --device and what describes a published checkpoint."""
    parser.add_argument(
        "--model", required=True, help=f"a path, a hub id, or a name{what}: " + ", ".join(list_models())
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1; default: %(default)s")
    add_overrides(parser)


def add_any_length(parser: argparse.ArgumentParser) -> None:
    """What is done with clips that are shorter or longer than the model's."""
    parser.add_argument(
        "--long",
        choices=("chunks", "interpolate"),
        default="chunks",
        help="clips beyond the model's length: overlapping chunks, or interpolated positions; default: %(default)s",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="clips at a time; default: %(default)s"
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what a published checkpoint's tensors cannot say")
    group.add_argument("--tokens", choices=("patch", "frame"), help="which MAE-AST this is")
    group.add_argument("--num-heads", type=positive, help="attention heads (default: of 64 channels each)")
    group.add_argument(
        "--stride", type=positive, nargs=2, metavar=("TIME", "FREQUENCY"), help="of overlapping patches"
    )
    group.add_argument(
        "--raw-target",
        action="store_true",
        help="Audio-MAE trained without normalised targets (norm_pix_loss)",
    )


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    given = {"tokens": options.tokens, "num_heads": options.num_heads}
    if options.stride:
        given["stride"] = tuple(options.stride)
    if options.raw_target:
        given["normalize_target"] = False
    return {key: value for key, value in given.items() if value is not None}


def open_model(
    source: str | Path, options: argparse.Namespace, random: str = "it has learned nothing"
) -> SpectrogramModel:
    """The model that the options name. A bare name has random weights, of which `random` is said on stderr.

    Raises:
        UsageError: options that do not go with a name.
        ValueError: or with this folder.
    """
    given = overrides(options)
    if is_name(source):
        if given:
            raise UsageError(f"the name {source} says all of the model: leave out what describes a file")
        beside = f"; ./{source} names what is here" if Path(source).exists() else ""
        print(f"{source} has random weights: {random}{beside}", file=sys.stderr)
        return create_model(source)
    if Path(source).is_dir() and given:
        raise ValueError(
            f"{source} is a folder of ours, whose config.json says all of the model: leave out what describes "
            "a published file"
        )
    return load(source, **given)


def check_device(name: str) -> torch.device:
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if "device type" in reason:
            reason = "devices are called cpu, cuda or cuda:1"
        raise ValueError(f"--device {name} cannot be used: {reason}") from error
    return torch.device(name)


def check_writable(out: Path, name: str = "--out") -> None:
    """Refuses a file that cannot be written, before there is anything to lose."""
    if out.is_dir():
        raise IsADirectoryError(f"{name} is a file to write, but {out} is a folder")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder {out.parent} of {name} does not exist: make it first")
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise OSError(f"{name} {out} cannot be written: {error.strerror}; choose another") from error


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A temporary path beside `out`, which takes its place at the end, or is removed if there is an error."""
    temporary = out.with_name(out.name + ".part")
    try:
        yield temporary
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Recording:
    """A file named on the command line, or a clip of a source that was.

    Attributes:
        name: its path, or "shard.tar::member".
        source, index: where it lies; None for a file.
    """

    name: str
    source: Source | None = None
    index: int = 0

    def load(self, sample_rate: int) -> torch.Tensor:
        """(S,) float32, mono.

        Raises:
            AudioError: it cannot be used; the message begins with its name.
        """
        file = self.name if self.source is None else self.source.file(self.index)
        with nullcontext() if isinstance(file, str) else file:
            waveform = load_crop(file, sample_rate, name=self.name)
        if len(waveform) < sample_rate // 40:
            raise AudioError(
                f"{self.name}: {plural(len(waveform), 'sample')} at {sample_rate} Hz: too short, a frame is 25 ms"
            )
        return waveform


def find_recordings(arguments: Sequence[Path]) -> list[Recording]:
    """Files as they are, folders, manifests and shards clip by clip; see `audiomae.data.open_source`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        AudioError: a folder without recordings, a damaged manifest or shard.
    """
    found = []
    for path in arguments:
        if path.is_dir() or path.suffix.lower() in (".json", ".tsv", ".tar"):
            source = open_source(path)
            found += [Recording(source[i].path, source, i) for i in range(len(source))]
        elif path.is_file():
            found.append(Recording(str(path)))
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    return found


def load_batches(
    found: Sequence[Recording], sample_rate: int, size: int, command: str, failed: list[str]
) -> Iterator[tuple[list[Recording], list[torch.Tensor]]]:
    """Recordings and their waveforms, up to `size` at a time. One that cannot be used is named, and left out.

    The sentences about these are printed on stderr and added to `failed`.
    """
    for start in range(0, len(found), size):
        good, waveforms = [], []
        for recording in found[start : start + size]:
            try:
                waveforms.append(recording.load(sample_rate))
                good.append(recording)
            except AudioError as error:
                print(f"audiomae {command}: {error}", file=sys.stderr)
                failed.append(str(error))
        if good:
            yield good, waveforms
