"""What a run makes of its recordings, what it shows, and the recipes by name."""

import json
import logging
import math
import multiprocessing
import os
import pty
import signal
import threading
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
from pretraining import MODELS, make_clips, run_and_note, tiny, torchrun
from tiny_audio import DAMAGE, damaged

from audiomae.cli import main
from audiomae.train import RECIPES, Trainer, TrainingError, pretrain
from audiomae.train.loop import MIN_SAMPLES, _cut_to_shortest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips") / "audio")


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


# -- recordings ----------------------------------------------------------------------------------------------


def test_recordings_that_cannot_be_used(tmp_path, caplog):
    """Each is named once and replaced; the metrics count the clips."""
    # Longer than a crop of 64 frames: what a truncated file still has is not enough.
    bad = [damaged(kind, tmp_path / kind / "bad.wav") for kind in DAMAGE]
    good = sorted(make_clips(tmp_path / "good", count=len(bad)).iterdir())
    (tmp_path / "all.tsv").write_text(
        f"{tmp_path}\n" + "".join(f"{path.relative_to(tmp_path)}\t12800\n" for path in (*bad, *good))
    )
    # An epoch of twelve steps, and then another.
    config = tiny(tmp_path / "all.tsv", tmp_path / "run", overrides={"frames": 272}, accumulate=1, steps=24)
    with caplog.at_level(logging.WARNING, "audiomae.data"):
        assert pretrain(config) is not None
    said = [record.getMessage() for record in caplog.records if record.name == "audiomae.data"]
    assert [sum(str(path) in line for line in said) for path in bad] == [1] * len(bad)
    lines = metrics(config.out)
    assert 2 * len(bad) <= lines[-1]["failures"] and lines[11]["failures"] >= len(bad)
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_named_once_by_all_processes_and_runs(tmp_path, caplog):
    """One of two processes names what either has met; a run that goes on knows what was said, and counts on."""
    clips = make_clips(tmp_path / "audio", count=6)
    bad = [damaged("empty", clips / f"bad{i}.wav") for i in range(6)]
    config = tiny(clips, tmp_path / "run", accumulate=1, batch_size=2, steps=6, log_every=2)
    torchrun(run_and_note, 2, config, tmp_path / "said")
    said = [(tmp_path / f"said.{rank}").read_text().splitlines() for rank in range(2)]
    kept = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert not said[1] and len(said[0]) == len(kept) == len({row["recording"] for row in kept}) == len(bad)
    assert all(f"{path}: cannot be decoded: the file is empty" in "".join(said[0]) for path in bad)
    before = metrics(config.out)[-1]["failures"]
    assert before > len(bad)  # in two epochs both met some of them

    with (tmp_path / "run" / "failures.jsonl").open("a") as file:
        file.write('{"recording": "half a li')  # of a process that was killed
    new = damaged("nan", clips / "05.wav")
    more = tiny(clips, tmp_path / "run", accumulate=1, batch_size=4, steps=12, log_every=2, resume=True)
    with caplog.at_level(logging.WARNING, "audiomae.data"):
        pretrain(more)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "audiomae.data"]
    assert line.startswith(f"{new}: has NaN")
    kept = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert len(kept) == len(bad) + 1 and kept[-1]["recording"] == str(new) and "NaN" in kept[-1]["said"]
    counts = [line["failures"] for line in metrics(config.out)]
    assert counts[3] == before < counts[4] and counts == sorted(counts)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_damaged_recordings(tmp_path, capsys, workers):
    for i in range(4):
        damaged("empty", tmp_path / "bad" / f"{i}.wav")
    overrides = json.dumps(MODELS["audiomae_small"])
    command = [
        "pretrain",
        "--data",
        str(tmp_path / "bad"),
        "--out",
        str(tmp_path / "run"),
        "--workers",
        str(workers),
    ]
    command += [
        "--model",
        "audiomae_small",
        "--model-overrides",
        overrides,
        "--steps",
        "3",
        "--batch-size",
        "2",
    ]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert err.startswith("audiomae pretrain: none of 4 recordings of") and err.count("\n") == 1
    assert str(tmp_path / "bad") in err and not (tmp_path / "run").exists()


def test_a_killed_worker_ends_the_run(clips, tmp_path, monkeypatch):
    whole = Trainer._step

    def interrupted(self, micro):
        if self.step == 4:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        whole(self, micro)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(tiny(clips, tmp_path / "run", workers=1, steps=1000, save_every=3))
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "complete.json").exists()


def test_workers_end_with_the_run(clips, tmp_path):
    """Whoever holds on to the error: they ignore SIGTERM, and Python would wait for them when it ends."""
    before = set(multiprocessing.active_children())
    settings = {"workers": 1, "val_data": [str(clips)], "val_every": 1}
    with pytest.raises(TrainingError) as held:
        pretrain(tiny(clips, tmp_path / "run", lr=1e20, warmup_steps=4, **settings))
    assert set(multiprocessing.active_children()) <= before and held.traceback


def test_batches_cut_to_the_shortest_clip():
    """MAE-AST's collation: a random part of the longer clips, nothing filled up; below two seconds zeros."""
    lengths = torch.tensor([50_000, 40_000, 45_000])
    waveform = torch.stack([torch.arange(50_000.0).where(torch.arange(50_000) < n, -1) for n in lengths])
    firsts = set()
    for seed in range(20):
        cut, new = _cut_to_shortest(waveform, lengths, torch.tensor([seed * 7919 + i for i in range(3)]))
        assert cut.shape == (3, 40_000) and new.tolist() == [40_000] * 3
        assert (cut.diff() == 1).all() and (cut[:, -1] < lengths).all() and cut[1, 0] == 0
        firsts.add(tuple(cut[:, 0].tolist()))
    assert len(firsts) == 20
    cut, _ = _cut_to_shortest(waveform, lengths, None)  # validation
    assert torch.equal(cut, waveform[:, :40_000])
    cut, new = _cut_to_shortest(waveform[:, :20_000], torch.tensor([20_000, 9_000, 20_000]), None)
    assert cut.shape == (3, MIN_SAMPLES) and new.tolist() == [20_000, 9_000, 20_000]
    assert not cut[:, 20_000:].any()


# -- recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs(clips, tmp_path, name):
    """From its name, with a small model and few steps."""
    overrides = {"width": 32, "depth": 2, "heads": 2}
    if not name.startswith("ssast"):
        overrides |= {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2}
    command = ["pretrain", "--recipe", name, "--data", str(clips), "--val-data", str(clips), "--workers", "0"]
    command += ["--model-overrides", json.dumps(overrides)]
    command += ["--steps", "3", "--warmup-steps", "1", "--batch-size", "2", "--log-every", "1"]
    assert main([*command, "--out", str(tmp_path), "--picture-every", "0"]) == 0
    lines = metrics(tmp_path)
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == 3 and all(math.isfinite(line["loss"]) for line in trained)
    assert trained[0]["lr"] == 0 < trained[1]["lr"] and any("val_loss" in line for line in lines)


# -- a terminal ----------------------------------------------------------------------------------------------


@pytest.fixture
def plain_environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def terminal():
    """Standard output is a terminal inside; what was written to it stands in the list afterwards."""
    reader, writer = pty.openpty()
    written, shown = bytearray(), []

    def read():
        try:
            while block := os.read(reader, 4096):
                written.extend(block)
        except OSError:  # how Linux tells that the other end is closed
            pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        with os.fdopen(writer, "w") as stdout, redirect_stdout(stdout):
            yield shown
    finally:
        thread.join(10)
        os.close(reader)
        shown.append(written.decode())


HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.mark.usefixtures("plain_environment")
def test_a_progress_bar_on_a_terminal(clips, tmp_path):
    with terminal() as shown:
        pretrain(tiny(clips, tmp_path / "run"))
    (text,) = shown
    assert "8/8" in text and "clips/s" in text and "loss" in text and "━" in text
    assert "wrote /" in text and "step 8/8  loss" not in text
    assert text.count(HIDE) == text.count(SHOW) == 1 and text.index(HIDE) < text.index(SHOW)


@pytest.mark.usefixtures("plain_environment")
def test_the_cursor_comes_back_after_an_error(clips, tmp_path):
    with terminal() as shown, pytest.raises(TrainingError):
        pretrain(tiny(clips, tmp_path / "run", lr=1e20, warmup_steps=4))
    assert shown[0].count(HIDE) == shown[0].count(SHOW) == 1 and shown[0].index(HIDE) < shown[0].index(SHOW)
