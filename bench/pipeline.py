"""The input pipeline: what a worker decodes, resamples and batches, and how many workers feed a training rate.

Its CSV has a row per stage, kind of recording and round; `value` is the seconds that `clips` clips took.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import audiomae
from audiomae import Frontend
from audiomae.data import (
    ClipDataset,
    ClipSampler,
    Source,
    load_audio,
    make_loader,
    open_source,
    recordings,
)
from audiomae.words import plural

from . import device as devices
from . import results
from .report import environment as describe_environment
from .report import markdown, warnings, with_spread, within_rounds
from .timing import Progress, ProviderError, interleave, measure_cpu, quantile, spread

COLUMNS = [*results._RUN, "stage", "kind", "workers", "clips", *results._MEASUREMENT, *results._ENVIRONMENT]

QUICK_ROUNDS, FULL_ROUNDS = 7, 21

#: Kinds of recordings that are made from those of the package: name -> (suffix, Hz, channels).
KINDS = {
    "FLAC, 16 kHz": ("flac", 16000, 1),
    "WAV, 44.1 kHz stereo": ("wav", 44100, 2),
    "OGG, 48 kHz stereo": ("ogg", 48000, 2),
    "MP3, 44.1 kHz stereo": ("mp3", 44100, 2),
}

#: Seconds of such a recording, longer than the crop, so that reading it starts with a seek.
LENGTH = 15

FBANK_CLIPS = 32

KALDI, BATCHED = "fbank, torchaudio clip by clip", "fbank, batched"
PLAIN = "fbank, batched, in PyTorch"


@dataclass(frozen=True)
class Options:
    """What `python -m bench data` was asked for; None chooses by the preset."""

    out: Path
    source: str | None = None
    clips_per_second: float | None = None
    measured: Path | None = None
    workers: Sequence[int] | None = None
    batch: int = 8
    full: bool = False
    rounds: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Stage:
    """A variant to time: `run` handles `clips` clips of `kind`, in `workers` processes beside this one."""

    name: str
    kind: str
    clips: int
    workers: int | None
    run: Callable[[], object]

    def columns(self) -> dict:
        workers = "" if self.workers is None else self.workers
        return {"stage": self.name, "kind": self.kind, "clips": self.clips, "workers": workers}


def write_recordings(folder: Path, count: int) -> dict[str, Source]:
    """kind -> `count` recordings: slices of the package's own, in a row."""
    import soundfile
    from torchaudio.functional import resample

    audio = torch.cat([load_audio(path) for path in recordings()])
    sources = {}
    for number, (kind, (suffix, rate, channels)) in enumerate(KINDS.items()):
        below = folder / str(number)
        below.mkdir()
        for i in range(count):
            start = i * len(audio) // count
            clip = audio.roll(-start)[: LENGTH * 16000]
            wave = resample(clip, 16000, rate).clamp(-1, 1)
            soundfile.write(below / f"{i:03d}.{suffix}", wave.unsqueeze(1).repeat(1, channels).numpy(), rate)
        sources[kind] = open_source(below)
    return sources


def first_clips(whole: Source, count: int) -> Source:
    """A source of the first clips of another, which opens them: those of shards are no files."""
    part = Source(whole.name, (whole[i] for i in range(min(count, len(whole)))), whole.label_names)
    part.file = whole.file
    return part


def check_fbank(waveform: torch.Tensor) -> None:
    """Raises ProviderError unless batched fbank is as near float64 as torchaudio's on average, or a quarter farther."""
    double = kaldi_loop(waveform.double())
    errors = [(run(waveform).double() - double).abs().mean().item() for run in (batched, kaldi_loop)]
    rounding = torch.finfo(torch.float32).eps * double.abs().max().item()
    if not errors[0] <= 1.25 * errors[1] + rounding:
        raise ProviderError(
            f"batched fbank is off by {errors[0]:.2g} on average, torchaudio's by {errors[1]:.2g}"
        )


def kaldi_loop(waveform: torch.Tensor) -> torch.Tensor:
    """(B, S) -> (B, T, 128), as the published code does it: one clip after another."""
    from torchaudio.compliance.kaldi import fbank

    clips = [
        fbank(
            clip.unsqueeze(0),
            htk_compat=True,
            sample_frequency=16000,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=128,
            dither=0.0,
            frame_shift=10,
        )
        for clip in waveform
    ]
    return torch.stack(clips)


def batched(waveform: torch.Tensor, impl: str | None = None) -> torch.Tensor:
    return audiomae.fbank(waveform, 16000, window="hanning", impl=impl)


def _alone(run: Callable[[], object]) -> Callable[[], object]:
    """As in a worker: with one thread."""

    def alone():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(threads)

    return alone


def _decoded(source: Source, seconds: float) -> list[tuple[torch.Tensor, int]]:
    """(waveform, Hz) of a crop of each clip, at its own rate."""
    from audiomae.data.audio import open_audio, read_crop

    found = []
    for i, clip in enumerate(source):
        file = source.file(i)
        with (
            nullcontext(file) if isinstance(file, str) else file as opened,
            open_audio(opened, clip.path) as reader,
        ):
            rate = reader.sample_rate
            count = int(seconds * rate)
            start = _offset(i, reader.samples, count)
            found.append((read_crop(reader, start, count, rate, clip.path), rate))
    return found


def _offset(i: int, total: int, count: int) -> int:
    """The same places in each round, spread over what is possible."""
    return (i * 7919) % max(1, total - count)


def stages_of(kind: str, source: Source, frontend: Frontend) -> list[Stage]:
    """Decoding, resampling and both with all that makes a sample, by one worker's thread."""
    from torchaudio.transforms import Resample

    data = ClipDataset([source], frontend)
    seconds = data.crop / frontend.sample_rate
    decoded = _decoded(source, seconds)
    resamplers = {rate: Resample(rate, frontend.sample_rate) for _, rate in decoded}

    def decode():
        _decoded(source, seconds)

    def resample():
        for waveform, rate in decoded:
            resamplers[rate](waveform)

    def sample():
        for i in range(len(source)):
            data[0, i]

    stages = [Stage("decode", kind, len(source), 1, _alone(decode))]
    if any(rate != frontend.sample_rate for rate in resamplers):
        stages.append(Stage("resample", kind, len(source), 1, _alone(resample)))
    return [*stages, Stage("sample", kind, len(source), 1, _alone(sample))]


def loader_stages(
    sources: Sequence[Source], frontend: Frontend, batch: int, workers: Iterable[int]
) -> list[Stage]:
    """Whole batches from a loader; its workers stay, as in training."""
    data = ClipDataset(sources, frontend)

    def stage(count: int) -> Stage:
        loader = make_loader(data, ClipSampler(sources, batch_size=batch), count)

        def run():
            for _ in loader:
                pass

        return Stage("batch", "all", len(loader) * batch, count, run)

    return [stage(count) for count in workers]


def fbank_stages(clips: int, device: torch.device) -> list[Stage]:
    """Batched against clip by clip on the CPU, and the whole front end on the training device."""
    audio = torch.cat([load_audio(path) for path in recordings()])
    starts = torch.arange(clips) * len(audio) // clips
    waveform = audio[(starts[:, None] + torch.arange(160000)) % len(audio)]
    check_fbank(waveform[: min(clips, 8)])
    stages = [
        Stage(BATCHED, "10 s, CPU", clips, None, lambda: batched(waveform)),
        Stage(PLAIN, "10 s, CPU", clips, None, lambda: batched(waveform, "reference")),
        Stage(KALDI, "10 s, CPU", clips, None, lambda: kaldi_loop(waveform)),
    ]
    if device.type != "cpu":
        frontend, there = Frontend.named("audioset"), waveform.to(device)

        def on_device():
            frontend(there)
            torch.cuda.synchronize()

        on_device()
        stages.append(Stage("front end", f"10 s, {device.type}", clips, None, on_device))
    return stages


def measured_rate(path: Path) -> tuple[float, str]:
    """(clips per second, what they are of) of the fastest training step in a `bench models` record.

    Raises:
        ValueError: it is no such record, or holds no time of ours.
    """
    seconds: dict[tuple, list[float]] = {}
    for row in results.read(path):
        if row["metric"] == "seconds" and row["provider"] == "ours" and row["mode"] in ("training", ""):
            where = (
                row["model"],
                row["dtype"],
                row["device_name"],
                row["batch"],
                row["passes"],
                row["group"],
            )
            seconds.setdefault(where, []).append(row["value"])
    if not seconds:
        raise ValueError(f"{path} holds no training step of ours.")
    rates = {key: key[3] / quantile(values, 0.5) for key, values in seconds.items()}
    model, dtype, device, *_ = fastest = max(rates, key=rates.get)
    return rates[fastest], f"{model} in {dtype} on {device}"


def run(options: Options, started: float) -> Path:
    """Measure; write measurements.csv and report.md into `options.out`; return the CSV's path."""
    progress = Progress(started)
    target, target_of = options.clips_per_second, "as asked for"
    if target is None and options.measured is not None:
        target, target_of = measured_rate(options.measured)
    device = devices.select(options.device)
    others = devices.others_running()
    common = {
        **devices.environment(device),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "preset": "full" if options.full else "quick",
        "level": "data",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "measurements.csv"
    cores = common["cores"]
    workers = options.workers if options.workers is not None else sorted({0, 1, 2, cores})
    rounds = options.rounds or (FULL_ROUNDS if options.full else QUICK_ROUNDS)
    frontend = Frontend.named("audioset")
    with tempfile.TemporaryDirectory() as folder, results.Writer(path, common, COLUMNS) as write:
        write.add("others_running", others)
        if target is not None:
            write.add("target", target, "clips/s", note=target_of)
        if options.source is None:
            progress(f"recordings: {', '.join(KINDS)}")
            sources = write_recordings(Path(folder), 16)
        else:
            whole = open_source(options.source)
            sources = {whole.name: first_clips(whole, 64)}
        progress("check: batched fbank against torchaudio's, in float64")
        stages = fbank_stages(FBANK_CLIPS, device)
        for kind, source in sources.items():
            stages += stages_of(kind, source, frontend)
        stages += loader_stages(list(sources.values()), frontend, options.batch, workers)
        for stage in stages:
            stage.run()  # filters are made, workers started
        progress(f"timing: {plural(rounds, 'interleaved round')} of {plural(len(stages), 'stage')}")
        for sample in interleave({i: stage.run for i, stage in enumerate(stages)}, rounds, measure_cpu):
            stage = stages[sample.variant]
            metric, unit = ("error", "") if sample.error else ("seconds", "s")
            write.add(
                metric, sample.seconds, unit, note=sample.error or "", round=sample.round, **stage.columns()
            )
    report = text(results.read(path, COLUMNS))
    (options.out / "report.md").write_text(report)
    progress(f"wrote {path} and report.md")
    print("\n" + report)
    return path


# -- the report, from the CSV alone --------------------------------------------------------------------------


def collect(records: Iterable[dict]) -> dict[tuple[str, str, str], tuple[int, dict[int, float]]]:
    """(stage, kind, workers) -> clips, {round: seconds}; stages that failed are left out."""
    rows: dict[tuple[str, str, str], tuple[int, dict[int, float]]] = {}
    failed = set()
    for record in records:
        key = (record["stage"], record["kind"], record["workers"])
        if record["metric"] == "error":
            failed.add(key)
        elif record["metric"] == "seconds":
            rows.setdefault(key, (int(record["clips"]), {}))[1][record["round"]] = record["value"]
    return {key: row for key, row in rows.items() if key not in failed}


def _rate(row: tuple[int, dict[int, float]]) -> float:
    return row[0] / quantile(list(row[1].values()), 0.5)


def _shown(row: tuple[int, dict[int, float]]) -> str:
    low, high = spread(list(row[1].values()))
    return with_spread(_rate(row), row[0] / high, row[0] / low, 0)


def workers_needed(rows: dict, target: float) -> int | None:
    """How many workers give `target` clips per second, each doing what one alone does."""
    one = next(
        (_rate(row) for (stage, _, workers), row in rows.items() if (stage, workers) == ("batch", "1")), None
    )
    return None if one is None else max(1, math.ceil(target / one))


def text(records: Sequence[dict]) -> str:
    """The whole report in Markdown."""
    rows, first = collect(records), records[0]
    rounds = max(len(row[1]) for row in rows.values())
    kinds = list(dict.fromkeys(kind for stage, kind, _ in rows if stage == "decode"))

    def cell(stage: str, kind: str) -> str:
        row = rows.get((stage, kind, "1"))
        return "—" if row is None else _shown(row)

    sections = [
        "# Benchmark: the input pipeline",
        describe_environment(first),
        *(f"**{sentence}**" for sentence in warnings(records)),
        f"Clips per second, crops of 10.255 s (1024 frames): medians of {plural(rounds, 'round')}, in brackets "
        + ("the 10 % and 90 % quantiles." if rounds >= 5 else "the lowest and the highest."),
        "## One worker, by stage",
        markdown(
            ("recordings", "decode", "resample", "sample (both, and the rest)"),
            [(kind, *(cell(stage, kind) for stage in ("decode", "resample", "sample"))) for kind in kinds],
        ),
        "## Batches, by workers",
        markdown(
            ("workers", "clips/s"),
            [
                ("0, in the training process" if workers == "0" else workers, _shown(row))
                for (stage, _, workers), row in rows.items()
                if stage == "batch"
            ],
        ),
    ]
    for record in records:
        if record["metric"] == "target" and (needed := workers_needed(rows, record["value"])) is not None:
            sections.append(
                f"**{plural(needed, 'worker')}** feed{'s' if needed == 1 else ''} {record['value']:.1f} clips/s "
                f"({record['note']}), where each has a core of its own; {first['cores']} are here."
            )
    sections.append("## Front end, per batch")
    sections.append(
        markdown(
            ("what", "where", "clips/s"),
            [(stage, kind, _shown(row)) for (stage, kind, workers), row in rows.items() if workers == ""],
        )
    )
    one, loop = (
        next((row[1] for key, row in rows.items() if key[0] == name), None) for name in (BATCHED, KALDI)
    )
    if one and loop:
        sections.append(
            f"Batched, fbank is {with_spread(*within_rounds(loop, one), 1)} times as fast as torchaudio's clip by "
            f"clip, on {plural(first['threads'], 'thread')}; as near to float64 (checked first)."
        )
    errors = [r for r in records if r["metric"] == "error"]
    sections += [f"- {r['stage']}, {r['kind']}: {r['note']}" for r in errors]
    return "\n\n".join(sections) + "\n"
