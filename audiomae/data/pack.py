"""``audiomae prepare``: any source into webdataset shards, with an index, checksums and the mean and std.

A shard is written under a temporary name, synced, renamed, and counts once its index, written in the same way,
stands beside it. What a shard holds depends on the source and the settings alone, so a run that was interrupted goes
on with the shards that are missing.
"""

import argparse
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from audiomae.data.audio import (
    AUDIO_SUFFIXES,
    AudioError,
    Reader,
    _extra,
    check_file,
    open_audio,
    read_crop,
    resampled_length,
)
from audiomae.data.dataset import MAX_FAILURES, crop_samples, describe
from audiomae.data.shards import MANIFEST, Member, index_of, scan
from audiomae.data.sources import Clip, Source, load_json, open_source
from audiomae.frontend import FRONTENDS, Frontend
from audiomae.words import plural

__all__ = ["Statistics", "prepare"]


@dataclass(frozen=True)
class Statistics:
    """Sums over the log-mel values of all frames, without padding."""

    values: int = 0
    total: float = 0.0
    squares: float = 0.0

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(self.values + other.values, self.total + other.total, self.squares + other.squares)

    @classmethod
    def of(cls, spectrogram: torch.Tensor) -> "Statistics":
        values = spectrogram.double()
        return cls(values.numel(), values.sum().item(), values.square().sum().item())

    @property
    def mean(self) -> float:
        return self.total / self.values

    @property
    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.values - self.mean**2))


@dataclass(frozen=True)
class _Job:
    """What the shards are made of; the same in all workers."""

    source: Source
    out: Path
    frontend: Frontend
    shard_size: int
    flac: bool
    digest: str

    def clips(self, shard: int) -> range:
        return range(shard * self.shard_size, min(len(self.source), (shard + 1) * self.shard_size))

    def tar(self, shard: int) -> Path:
        return self.out / f"shard-{shard:06d}.tar"


def prepare(
    source: Source,
    out: str | os.PathLike,
    frontend: Frontend,
    *,
    shard_size: int = 1000,
    flac: bool = False,
    workers: int = 1,
    say=print,
) -> dict[str, Any]:
    """Pack a source into shards below the folder `out`, or go on where an earlier call stopped.

    Recordings that cannot be read from start to end are left out and named in the manifest.

    Args:
        frontend: whose log-mel values the mean and the standard deviation are of.
        shard_size: clips per shard.
        flac: pack mono FLAC of 16 bits at the front end's rate in place of the files as they are.
        workers: processes, each with a shard of its own.
        say: called with a line of progress per shard.

    Returns:
        The manifest, as written to `out`/manifest.json: clips, seconds, mean, std, frontend, labels, shards (file,
        clips, seconds, bytes, sha256), skipped (sentences).

    Raises:
        AudioError: 100 recordings in a row could not be read, or none at all; or `out` holds shards of another
            source or of other settings.
        OSError: `out` cannot be written, or the disk is full. What was finished stays.
        RuntimeError: a worker was killed. What was finished stays.
    """
    if shard_size < 1 or workers < 1:
        raise ValueError(
            f"shard_size is {shard_size} and workers {workers}, but positive numbers were expected"
        )
    _extra("webdataset", "train", "writing shards")
    out = Path(out)
    frontend = replace(frontend, mean=None, std=None, labels=None)
    job = _Job(source, out, frontend, shard_size, flac, _digest(source, frontend, shard_size, flac))
    shards = range(-(-len(source) // shard_size))
    out.mkdir(parents=True, exist_ok=True)
    done = {}
    for shard in shards:
        if (index := _finished(job, shard)) is not None:
            done[shard] = index
    if done:
        say(f"there already, with the right checksums: {len(done)} of {plural(len(shards), 'shard')}")
    for shard, index in _work(job, [shard for shard in shards if shard not in done], workers):
        done[shard] = index
        seconds, skipped = index["seconds"], len(index["skipped"])
        say(
            f"{job.tar(shard).name}: {plural(len(index['clips']), 'clip')}, {_duration(seconds)}"
            + (f", {skipped} left out" if skipped else "")
            + f" ({len(done)} of {plural(len(shards), 'shard')})"
        )
    return _write_manifest(job, [done[shard] for shard in shards])


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.1f} s"


def _digest(source: Source, frontend: Frontend, shard_size: int, flac: bool) -> str:
    """Of everything that decides what the shards hold, but for the contents of the recordings."""
    digest = hashlib.sha256(json.dumps([frontend.to_dict(), shard_size, flac, source.label_names]).encode())
    for clip in source:
        digest.update(json.dumps([os.fsencode(clip.path).hex(), clip.labels]).encode())
    return digest.hexdigest()


def _finished(job: _Job, shard: int) -> dict[str, Any] | None:
    """The index of a shard that is complete."""
    tar = job.tar(shard)
    tar.with_name(tar.name + ".part").unlink(missing_ok=True)
    if not index_of(tar).is_file():
        return None
    try:
        index = load_json(index_of(tar))
        if index["digest"] != job.digest:
            raise AudioError(
                f"{job.out}: holds shards of another source, of other settings, or of this source before it changed; "
                "choose another --out, or delete it"
            )
        whole = tar.is_file() and tar.stat().st_size == index["bytes"] and _sha256(tar) == index["sha256"]
    except (KeyError, TypeError) as error:
        raise AudioError(f"{index_of(tar)}: is not an index of `audiomae prepare`") from error
    return index if whole else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _work(job: _Job, shards: list[int], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    if workers == 1 or len(shards) < 2:
        for shard in shards:
            yield shard, _write_shard(job, shard)
        return
    with ProcessPoolExecutor(min(workers, len(shards)), initializer=_adopt, initargs=(job,)) as pool:
        futures = {pool.submit(_write_adopted, shard): shard for shard in shards}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker was killed, perhaps for want of memory; the shards that were finished stay: run the same "
                "command again, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_adopted: _Job | None = None  # by a worker, once: its source may list millions of clips


def _adopt(job: _Job) -> None:
    global _adopted
    _adopted = job
    torch.set_num_threads(1)


def _write_adopted(shard: int) -> dict[str, Any]:
    return _write_shard(_adopted, shard)


def _write_shard(job: _Job, shard: int) -> dict[str, Any]:
    import webdataset

    tar = job.tar(shard)
    part = tar.with_name(tar.name + ".part")
    known, skipped, statistics, in_a_row = {}, [], Statistics(), 0
    try:
        with part.open("wb") as file:
            with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
                for number in job.clips(shard):
                    clip = job.source[number]
                    try:
                        content, suffix, described, values = _pack(job, number, clip)
                    except (AudioError, OSError) as error:
                        skipped.append(describe(clip.path, error))
                        in_a_row += 1
                        if in_a_row == MAX_FAILURES:
                            raise AudioError(
                                f"{MAX_FAILURES} recordings in a row could not be read; the first: "
                                f"{skipped[-MAX_FAILURES]}; the last: {skipped[-1]}"
                            ) from error
                        continue
                    in_a_row = 0
                    statistics += values
                    key = f"{number:09d}"
                    known[f"{key}{suffix}"] = described
                    writer.write(
                        {"__key__": key, suffix[1:]: content, "json": json.dumps(described).encode()}
                    )
            file.flush()
            os.fsync(file.fileno())
        members = [
            Member(**{**known[m.member], "member": m.member, "offset": m.offset, "size": m.size})
            for m in scan(part)
        ]
        digest = _sha256(part)
        part.replace(tar)
    except OSError as error:
        raise OSError(
            f"{tar} cannot be written: {error.strerror or error}; the shards that were finished stay"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    index = {
        "digest": job.digest,
        "bytes": tar.stat().st_size,
        "sha256": digest,
        "seconds": sum(member.samples / member.sample_rate for member in members),
        "statistics": [statistics.values, statistics.total, statistics.squares],
        "skipped": skipped,
        "clips": [member.to_dict() for member in members],
    }
    _write_json(index_of(tar), index)
    return index


def _pack(job: _Job, number: int, clip: Clip) -> tuple[bytes, str, dict[str, Any], Statistics]:
    """A recording's bytes, the suffix of its name, what is known of it, and its statistics."""
    file = job.source.file(number)
    if isinstance(file, str):
        check_file(file, file)
        file = open(file, "rb")  # noqa: SIM115 -- closed below
    with closing(file):
        content = file.read()
    rate, crop = job.frontend.sample_rate, crop_samples(job.frontend)
    shortest = crop_samples(replace(job.frontend, frames=1))
    raw = replace(job.frontend, frames=None)
    recoded, statistics = io.BytesIO(), Statistics()
    with open_audio(io.BytesIO(content), clip.path) as reader:
        suffix = ".flac" if job.flac else _suffix(clip.path, reader)
        total = resampled_length(reader.samples, reader.sample_rate, rate)
        if total < shortest:
            raise AudioError(
                f"{clip.path}: has {plural(total, 'sample')} at {rate} Hz, fewer than one frame of {shortest}"
            )
        with _flac_writer(recoded, rate) if job.flac else nullcontext() as flac:
            for start in range(0, total, crop):
                waveform = read_crop(reader, start, min(crop, total - start), rate, clip.path)
                if len(waveform) >= shortest:
                    statistics += Statistics.of(raw(waveform))
                if flac is not None:
                    flac.write(waveform.clamp(-1, 1).numpy())
        samples, sample_rate = (total, rate) if job.flac else (reader.samples, reader.sample_rate)
    if job.flac:
        content = recoded.getvalue()
    described = {
        "source": clip.path,
        "labels": list(clip.labels),
        "samples": samples,
        "sample_rate": sample_rate,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return content, suffix, described, statistics


def _suffix(path: str, reader: Reader) -> str:
    """The name's own if shards know it, that of the format otherwise: they tell audio by it."""
    suffix = Path(path).suffix.lower()
    for known in (suffix, reader.suffix):
        if known in AUDIO_SUFFIXES:
            return known
    raise AudioError(
        f"{path}: has {suffix or 'no suffix'} in its name, by which shards do not know audio; rename it, or pack "
        "everything as FLAC (--flac)"
    )


def _flac_writer(file: io.BytesIO, rate: int) -> Any:
    return _extra("soundfile").SoundFile(file, "w", rate, 1, "PCM_16", format="FLAC")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renames themselves
    finally:
        os.close(folder)


def _write_manifest(job: _Job, indices: list[dict[str, Any]]) -> dict[str, Any]:
    statistics = sum((Statistics(*index["statistics"]) for index in indices), Statistics())
    skipped = [sentence for index in indices for sentence in index["skipped"]]
    if not statistics.values:
        raise AudioError(
            f"{job.source.name}: none of {plural(len(job.source), 'recording')} can be read; {skipped[0]}"
        )
    shards = [
        {
            "file": job.tar(shard).name,
            "clips": len(index["clips"]),
            "seconds": index["seconds"],
            "bytes": index["bytes"],
            "sha256": index["sha256"],
        }
        for shard, index in enumerate(indices)
        if index["clips"]
    ]
    manifest = {
        "source": job.source.name,
        "clips": sum(shard["clips"] for shard in shards),
        "seconds": sum(shard["seconds"] for shard in shards),
        "frontend": job.frontend.to_dict(),
        "mean": statistics.mean,
        "std": statistics.std,
        "labels": list(job.source.label_names),
        "shards": shards,
        "skipped": skipped,
    }
    _write_json(job.out / MANIFEST, manifest)
    return manifest


# -- the command ---------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def add_command(commands: Any) -> None:
    """The parser of ``audiomae prepare``."""
    parser = commands.add_parser(
        "prepare",
        help="recordings into webdataset shards, with checksums and the data set's mean and std",
        description="Packs recordings into shards that training reads without millions of small files, and prints "
        "the mean and the standard deviation of their log-mel values, which a front end wants. Interrupted, it "
        "goes on where it stopped when the same command is given again.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder, an AST manifest (.json), an MAE-AST manifest (.tsv) or shards",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--labels", type=Path, metavar="CSV", help="names of the labels: index, mid, display_name"
    )
    parser.add_argument(
        "--shard-size",
        type=_positive,
        default=1000,
        metavar="N",
        help="clips per shard; default: %(default)s",
    )
    parser.add_argument(
        "--flac",
        action="store_true",
        help="mono FLAC at the front end's rate in place of the files as they are",
    )
    parser.add_argument(
        "--workers", type=_positive, default=1, metavar="N", help="processes; default: %(default)s"
    )
    settings = parser.add_mutually_exclusive_group()
    settings.add_argument(
        "--frontend",
        choices=list(FRONTENDS),
        default="audioset",
        help="of the statistics; default: %(default)s",
    )
    settings.add_argument("--model", help="take the front end of this model: a name, a path or a hub id")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    source = open_source(options.source, options.labels)
    manifest = prepare(
        source,
        options.out,
        _frontend(options),
        shard_size=options.shard_size,
        flac=options.flac,
        workers=options.workers,
        say=lambda line: print(line, flush=True),
    )
    for sentence in manifest["skipped"]:
        print(f"left out: {sentence}", file=sys.stderr)
    print(
        f"wrote {options.out}: {plural(manifest['clips'], 'clip')}, {_duration(manifest['seconds'])}, in "
        f"{plural(len(manifest['shards']), 'shard')}; {plural(len(manifest['skipped']), 'recording')} left out"
    )
    print(f"mean {manifest['mean']:.7f}, std {manifest['std']:.7f} (log-mel, all frames, no padding)")


def _frontend(options: argparse.Namespace) -> Frontend:
    if options.model is None:
        return Frontend.named(options.frontend)
    from audiomae.config import is_name, model_config
    from audiomae.create import load

    if is_name(options.model):
        return model_config(options.model).frontend
    return load(options.model).config.frontend
