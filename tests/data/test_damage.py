"""Recordings that cannot be used: named once, replaced, counted; many in a row, or a killed worker, are errors."""

import logging
import os
import pickle
import re
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from tiny_audio import DAMAGE, damaged, folder, ten_hours, write

from audiomae import Frontend
from audiomae.data import (
    AudioError,
    Augment,
    ClipDataset,
    ClipSampler,
    FailureLog,
    Source,
    audio,
    collate,
    make_loader,
    open_source,
    prepare,
)
from audiomae.data.sources import Clip

pytestmark = pytest.mark.usefixtures("one_thread")

FRONTEND = Frontend(frames=32, mean=-4.0, std=4.0)


@pytest.fixture(params=DAMAGE)
def case(request, tmp_path):
    """(the damaged file, what is said of it, a source of it and three good ones)."""
    bad = damaged(request.param, tmp_path / "bad.wav")
    good = [write(tmp_path / f"{i}.wav", 40000, seed=i) for i in range(3)]
    source = Source("test", [Clip(str(bad)), *(Clip(str(path)) for path in good)])
    return bad, DAMAGE[request.param], source


def test_named_replaced_and_counted(case, caplog):
    bad, said, source = case
    # Half of the truncated ones is there: crops at their ends are asked for.
    data = ClipDataset([source], Frontend(frames=245), random_crop=False)
    batch = collate([data[0, 0], data[0, 1]])
    assert len(batch.failures) == 1 and batch.failures[0].startswith(f"{bad}: ")
    assert re.search(said, batch.failures[0])
    assert batch.indices.tolist() == [0, 1] and batch.waveform[0].any()
    log = FailureLog()
    with caplog.at_level(logging.WARNING, "audiomae.data"):
        for epoch in range(3):
            log.add(pickle.loads(pickle.dumps(data[epoch, 0].failures)))
    assert log.total == 3 and log.files == {str(bad)}
    assert len(caplog.records) == 1 and str(bad) in caplog.text


def test_replacements_depend_on_seed_and_key_alone(case):
    _, _, source = case
    frontend = Frontend(frames=245)
    one, two = ClipDataset([source], frontend, seed=3), ClipDataset([source], frontend, seed=3)
    two[5, 2]  # what came before does not matter
    for epoch in range(4):
        assert torch.equal(one[epoch, 0].waveform, two[epoch, 0].waveform)
    waves = [one[epoch, 0].waveform for epoch in range(12)]
    assert any(not torch.equal(waves[0], wave) for wave in waves[1:])


def test_left_out_of_shards(case, tmp_path):
    bad, _, source = case
    manifest = prepare(source, tmp_path / "shards", FRONTEND, say=lambda line: None)
    assert manifest["clips"] == 3
    assert len(manifest["skipped"]) == 1 and manifest["skipped"][0].startswith(f"{bad}: ")


def test_ten_hours_are_one_clip_like_any_other(tmp_path, monkeypatch):
    """Only a crop of them is ever in memory, whatever has to be resampled."""
    asked, read = [], audio._Soundfile.read
    monkeypatch.setattr(audio._Soundfile, "read", lambda *given: asked.append(given[2]) or read(*given))
    source = Source("test", [Clip(str(ten_hours(tmp_path / "long.wav")))])
    start = time.perf_counter()
    for frontend in (FRONTEND, Frontend.named("mae_ast")):
        for epoch in range(5):
            sample = ClipDataset([source], frontend)[epoch, 0]
            expected = 250_000 if frontend.frames is None else 400 + 31 * 160
            assert not sample.failures and len(sample.waveform) == expected
            assert sample.waveform.untyped_storage().nbytes() < 2 * 4 * expected
            assert asked.pop() < expected and not asked  # 8 kHz: half of it, and the filter's margins
    assert time.perf_counter() - start < 5


def test_many_in_a_row_stop_the_run(tmp_path):
    files = [damaged("empty", tmp_path / f"{i}.wav") for i in range(5)]
    bad = Source("bad", [Clip(str(path)) for path in files])
    good = Source("good", [Clip(str(write(tmp_path / "good.wav")))])
    data = ClipDataset([good, bad], FRONTEND)
    assert not data[0, 0].failures
    for workers in (0, 1):
        loader = make_loader(data, ClipSampler([good, bad], batch_size=6), workers)
        with pytest.raises(AudioError, match=r"none of 5 recordings of bad can be read; the first: .*empty"):
            next(iter(loader))
    many = Source("many", [Clip(str(tmp_path / f"{i}.wav")) for i in range(5, 200)])
    with pytest.raises(
        AudioError, match=r"100 recordings of many in a row could not be read; the first: .*no such"
    ):
        ClipDataset([many], FRONTEND)[0, 0]
    with pytest.raises(AudioError, match="none of 5 recordings can be read"):
        prepare(bad, tmp_path / "shards", FRONTEND, say=lambda line: None)
    many = Source("many", [Clip(str(files[0]))] * 100)
    with pytest.raises(AudioError, match="100 recordings in a row"):
        prepare(many, tmp_path / "other", FRONTEND, say=lambda line: None)


def test_a_partner_of_mixup_may_be_damaged(tmp_path):
    paths = [write(tmp_path / "good.wav"), damaged("empty", tmp_path / "bad.wav")]
    data = ClipDataset([Source("test", [Clip(str(p)) for p in paths])], FRONTEND, augment=Augment(mixup=1.0))
    found = [len(data[epoch, 0].failures) for epoch in range(20)]
    assert 0 in found and max(found) >= 1


def test_a_killed_worker_is_an_error_and_no_hang(tmp_path):
    """In a process of its own, which has to end by itself; the loop is busy with a step, or waits for data."""
    folder(tmp_path / "clips", 64, 1000)
    code = f"""
        import multiprocessing, os, signal, time
        from audiomae import Frontend
        from audiomae.data import ClipDataset, ClipSampler, make_loader, open_source

        def train(busy):
            sources = [open_source({str(tmp_path / "clips")!r})]
            loader = make_loader(ClipDataset(sources, Frontend(frames=4)), ClipSampler(sources, batch_size=1), 2)
            before, batches = set(multiprocessing.active_children()), iter(loader)
            next(batches)
            os.kill((set(multiprocessing.active_children()) - before).pop().pid, signal.SIGKILL)
            for _ in range(10):
                for _ in batches:
                    time.sleep(busy)
                batches = iter(loader)
        for busy in (0.05, 0.0):
            try:
                train(busy)
            except RuntimeError as error:
                print(error)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = r"DataLoader worker \(pid \d+\) is killed by signal: Killed|was killed"
    assert [bool(re.search(said, line)) for line in done.stdout.splitlines()] == [True, True], done.stdout


def test_unreadable_subfolders_are_named(tmp_path, caplog):
    folder(tmp_path / "good", 2)
    (tmp_path / "link").symlink_to(tmp_path)  # a loop
    with caplog.at_level(logging.WARNING, "audiomae.data"):
        assert len(open_source(tmp_path)) == 2
