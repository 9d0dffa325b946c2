"""The input pipeline's benchmark: figures that can be checked by hand, and one small run."""

import json
import tarfile

import pytest
import torch
from tiny_audio import folder

from audiomae import Frontend
from audiomae.data import open_source, prepare
from bench import pipeline, results
from bench.__main__ import main
from bench.timing import ProviderError

COMMON = dict.fromkeys(pipeline.COLUMNS, "") | {
    "device_name": "A machine", "threads": 2, "cores": 2, "torch": "2.0", "commit": "abc", "preset": "quick",
}  # fmt: skip


def record(path, target):
    with results.Writer(path, COMMON, pipeline.COLUMNS) as write:
        write.add("target", target, "clips/s", note="as asked for")
        for stage, kind, workers, seconds in (
            ("decode", "WAV", 1, (0.1, 0.2, 0.1)),
            ("sample", "WAV", 1, (0.2, 0.4, 0.2)),
            ("batch", "all", 0, (0.5, 1.0, 0.5)),
            ("batch", "all", 1, (0.4, 0.8, 0.4)),
            (pipeline.BATCHED, "10 s, CPU", "", (0.1, 0.2, 0.1)),
            (pipeline.KALDI, "10 s, CPU", "", (0.4, 0.8, 0.4)),
        ):
            for i, value in enumerate(seconds):
                write.add("seconds", value, "s", stage=stage, kind=kind, workers=workers, clips=16, round=i)
        write.add("error", None, note="it broke", stage="decode", kind="MP3", workers=1, clips=16, round=0)
    return results.read(path, pipeline.COLUMNS)


def test_the_report(tmp_path):
    report = pipeline.text(record(tmp_path / "a.csv", 100.0))
    assert "160 (80 to 160)" in report and "| 0, in the training process" in report
    assert "**3 workers** feed 100.0 clips/s (as asked for)" in report  # one gives 16 / 0.4 = 40
    assert "4.0 times as fast" in report
    assert "- decode, MP3: it broke" in report


@pytest.mark.parametrize(("target", "needed"), [(0.1, 1), (40.0, 1), (40.1, 2), (400.0, 10)])
def test_workers_needed(tmp_path, target, needed):
    rows = pipeline.collect(record(tmp_path / "a.csv", target))
    assert pipeline.workers_needed(rows, target) == needed


def test_a_wrong_fbank_gets_no_number(monkeypatch):
    waveform = torch.randn(2, 8000)
    pipeline.check_fbank(waveform)
    right = pipeline.batched
    monkeypatch.setattr(pipeline, "batched", lambda waveform: right(waveform) + 0.1)
    with pytest.raises(ProviderError, match=r"batched fbank is off by 0\.1"):
        pipeline.check_fbank(waveform)


def test_the_rate_of_a_models_run(tmp_path):
    path = tmp_path / "measurements.csv"
    common = dict.fromkeys(results.COLUMNS, "") | {"device_name": "A machine", "threads": 2}
    with results.Writer(path, common) as write:
        for provider, model, seconds in (
            ("ours", "slow", 4.0),
            ("ours", "fast", 0.5),
            ("plain", "fast", 0.1),
        ):
            write.add("seconds", seconds, model=model, provider=provider, dtype="bf16", batch=8, round=0)
    assert pipeline.measured_rate(path) == (16.0, "fast in bf16 on A machine")


def test_a_run(tmp_path, capsys, monkeypatch):
    from audiomae.data import recordings

    (tmp_path / "sounds").mkdir()
    for path in recordings()[:3]:
        (tmp_path / "sounds" / path.name).symlink_to(path)
    monkeypatch.setattr(pipeline, "FBANK_CLIPS", 2)
    arguments = ["data", "--source", str(tmp_path / "sounds"), "--rounds", "1", "--workers", "0", "1"]
    arguments += ["--batch-size", "2", "--clips-per-second", "5", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    report = capsys.readouterr().out
    assert report.endswith((tmp_path / "out" / "report.md").read_text() + "\n") and "5.0 clips/s" in report
    with pytest.raises(SystemExit) as stop:
        main(["data", "--source", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 1 and "no such file or folder" in capsys.readouterr().err


def as_it_is(tmp_path, manifest):
    return manifest.name


def as_shards(tmp_path, manifest):
    prepare(manifest, tmp_path / "shards", Frontend(), shard_size=2, say=lambda line: None)
    return tmp_path / "shards"


def as_foreign_shard(tmp_path, manifest):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for clip in manifest:
            tar.add(clip.path)
    return tmp_path / "train.tar"


def as_tsv(tmp_path, manifest):
    lines = (f"{clip.path.rpartition('/')[2]}\t8000\n" for clip in manifest)
    (tmp_path / "train.tsv").write_text(f"{tmp_path / 'audio'}\n" + "".join(lines))
    return tmp_path / "train.tsv"


@pytest.mark.parametrize("kind", [as_shards, as_foreign_shard, as_tsv, as_it_is])
def test_every_kind_of_source(tmp_path, kind):
    """A part of it is opened as the source opens it, and keeps its labels: shards have no files of their own."""
    folder(tmp_path / "audio", 5)
    entries = [{"wav": f"audio/clip{i:03d}.wav", "labels": "/m/a"} for i in range(5)]
    (tmp_path / "train.json").write_text(json.dumps({"data": entries}))
    (tmp_path / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/a,A\n")
    whole = open_source(kind(tmp_path, open_source(tmp_path / "train.json")))
    source = pipeline.first_clips(whole, 4)
    assert list(source) == list(whole)[:4] and source.label_names == whole.label_names
    frontend = Frontend(frames=32)
    for stage in [
        *pipeline.stages_of("x", source, frontend),
        *pipeline.loader_stages([source], frontend, 2, [0, 1]),
    ]:
        assert stage.clips == 4
        stage.run()


@pytest.mark.parametrize(
    "option", [("--clips-per-second", "0"), ("--clips-per-second", "nan"), ("--workers", "-1")]
)
def test_wrong_command_lines(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", *option])
    assert stop.value.code == 2 and "expected" in capsys.readouterr().err
