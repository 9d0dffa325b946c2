"""Shards: written so that half of one never counts, readable by the webdataset library, read at random."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from tiny_audio import folder, write

from audiomae import Frontend
from audiomae.cli import main
from audiomae.data import AudioError, Clip, ClipDataset, Source, load_audio, open_source, pack, prepare
from audiomae.data.shards import open_member

webdataset = pytest.importorskip("webdataset")

pytestmark = pytest.mark.usefixtures("one_thread")

FRONTEND = Frontend(frames=32, mean=-4.0, std=4.0)


def quiet(line):
    pass


def files(path):
    return sorted(entry.name for entry in path.iterdir())


@pytest.fixture
def source(tmp_path):
    """Seven labelled recordings of different lengths."""
    paths = [write(tmp_path / "audio" / f"{i}.wav", 4000 + 777 * i, seed=i) for i in range(7)]
    return Source("test", [Clip(str(p), (i % 2, 2)) for i, p in enumerate(paths)], ("even", "odd", "all"))


def test_what_is_written(source, tmp_path):
    out = tmp_path / "shards"
    manifest = prepare(source, out, FRONTEND, shard_size=3, say=quiet)
    names = [f"shard-00000{i}" for i in range(3)]
    assert files(out) == ["manifest.json", *sorted(f"{n}{s}" for n in names for s in (".index.json", ".tar"))]
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["clips"] == 7 and manifest["labels"] == ["even", "odd", "all"] and not manifest["skipped"]
    assert manifest["seconds"] == pytest.approx(sum(4000 + 777 * i for i in range(7)) / 16000)
    for shard in manifest["shards"]:
        content = (out / shard["file"]).read_bytes()
        assert len(content) == shard["bytes"] and hashlib.sha256(content).hexdigest() == shard["sha256"]

    shards = open_source(out)
    assert len(shards) == 7 and shards.label_names == source.label_names
    for i in range(7):
        clip = shards[i]
        assert clip.path == f"{out / names[i // 3]}.tar::{i:09d}.wav"
        assert clip.labels == source[i].labels and (clip.samples, clip.sample_rate) == (4000 + 777 * i, 16000)
        with shards.file(i) as file, open(source[i].path, "rb") as original:
            assert file.read() == original.read()


def test_the_webdataset_library_reads_them(source, tmp_path):
    prepare(source, tmp_path / "shards", FRONTEND, shard_size=4, say=quiet)
    pattern = str(tmp_path / "shards" / "shard-{000000..000001}.tar")
    found = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [json.loads(sample["json"])["source"] for sample in found] == [clip.path for clip in source]
    assert [sample["wav"] for sample in found] == [open(clip.path, "rb").read() for clip in source]  # noqa: SIM115
    assert list(open_source(pattern)) == list(open_source(tmp_path / "shards" / "*.tar"))
    assert open_source(pattern).label_names == source.label_names


def test_mean_and_std(source, tmp_path):
    """Of what training sees: crops of the front end's length one after another, without padding."""
    manifest = prepare(source, tmp_path / "shards", FRONTEND, shard_size=3, say=quiet)
    size, raw = 400 + 31 * 160, Frontend()
    waves = [load_audio(clip.path) for clip in source]
    crops = [wave[i : i + size] for wave in waves for i in range(0, len(wave), size)]
    values = torch.cat([raw(crop).flatten() for crop in crops if len(crop) >= 400]).double()
    assert manifest["mean"] == pytest.approx(values.mean().item(), rel=1e-9)
    assert manifest["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-9)
    assert manifest["frontend"]["mean"] is None


def test_flac(source, tmp_path):
    long = write(tmp_path / "44100.wav", 50000, 44100)
    prepare(Source("test", [Clip(str(long))]), tmp_path / "shards", FRONTEND, flac=True, say=quiet)
    shards = open_source(tmp_path / "shards")
    assert shards[0].sample_rate == 16000 and shards[0].path.endswith(".flac")
    with shards.file(0) as file:
        stored = pack.open_audio(file, "x")
        with stored as reader:
            assert reader.sample_rate == 16000
            wave = reader.read(0, reader.samples)[:, 0]
    torch.testing.assert_close(wave, load_audio(long), rtol=0, atol=2**-15)


def test_a_data_set_of_shards_is_that_of_the_files(source, tmp_path):
    prepare(source, tmp_path / "shards", FRONTEND, shard_size=3, say=quiet)
    files, shards = (ClipDataset([s], FRONTEND, seed=1) for s in (source, open_source(tmp_path / "shards")))
    for i in range(7):
        one, two = files[4, i], shards[4, i]
        assert torch.equal(one.waveform, two.waveform) and torch.equal(one.labels, two.labels)
        assert not two.failures


def test_every_clip_is_packed_or_named(tmp_path):
    """Whatever its name ends with: shards name it by what it is, and what they have no name for is left out."""
    formats = {
        "none": "WAV",
        "odd.sound": "FLAC",
        "a.json": "WAVEX",
        "b.cls": "OGG",
        "c.WAV": "WAV",
        "d.sph": "NIST",
    }
    clips = [Clip(str(write(tmp_path / name, format=kind))) for name, kind in formats.items()]
    source = Source("test", clips)
    manifest = prepare(source, tmp_path / "shards", FRONTEND, say=quiet)
    shards = open_source(tmp_path / "shards")
    assert manifest["clips"] == len(shards) == 5
    assert [clip.path.rpartition(".")[2] for clip in shards] == ["wav", "flac", "wav", "ogg", "wav"]
    assert not ClipDataset([shards], FRONTEND)[0, 1].failures
    (said,) = manifest["skipped"]
    assert said.startswith(f"{clips[5].path}: ") and ".sph" in said and "FLAC" in said
    library = webdataset.WebDataset(str(tmp_path / "shards" / "shard-000000.tar"), shardshuffle=False)
    assert [json.loads(sample["json"])["source"] for sample in library] == [clip.path for clip in clips[:5]]
    whole = prepare(source, tmp_path / "flac", FRONTEND, flac=True, say=quiet)
    assert whole["clips"] == len(open_source(tmp_path / "flac")) == 6


def test_several_workers_write_the_same(source, tmp_path):
    one = prepare(source, tmp_path / "one", FRONTEND, shard_size=2, say=quiet)
    two = prepare(source, tmp_path / "two", FRONTEND, shard_size=2, workers=2, say=quiet)
    assert one == two and files(tmp_path / "one") == files(tmp_path / "two")


# -- interruption --------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(source, tmp_path, monkeypatch):
    out, packed = tmp_path / "shards", []

    def interrupt(job, number, clip, original=pack._pack):
        packed.append(number)
        if len(packed) == 5:
            raise KeyboardInterrupt
        return original(job, number, clip)

    with monkeypatch.context() as patch:
        patch.setattr(pack, "_pack", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out, FRONTEND, shard_size=3, say=quiet)
    assert files(out) == ["shard-000000.index.json", "shard-000000.tar"]
    with pytest.raises(AudioError, match="has not finished; run it again"):
        open_source(out)
    (out / "shard-000001.tar.part").write_bytes(b"half")  # what a kill leaves
    (out / "shard-000002.tar").write_bytes(b"a shard without its index")

    first, said = (out / "shard-000000.tar").stat().st_mtime_ns, []
    manifest = prepare(source, out, FRONTEND, shard_size=3, say=said.append)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first and "1 of 3" in said[0]
    assert manifest == prepare(source, tmp_path / "whole", FRONTEND, shard_size=3, say=quiet)
    assert files(out) == files(tmp_path / "whole")


def test_killed_at_any_moment(tmp_path):
    clips, out = folder(tmp_path / "audio", 12, 3000), tmp_path / "shards"
    command = [
        sys.executable,
        "-m",
        "audiomae",
        "prepare",
        str(clips),
        "--out",
        str(out),
        "--shard-size",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    started.stdout.readline()  # one shard is there
    time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    source = open_source(clips)
    manifest = prepare(source, out, Frontend.named("audioset"), shard_size=2, say=quiet)
    whole = prepare(source, tmp_path / "whole", Frontend.named("audioset"), shard_size=2, say=quiet)
    assert manifest == whole and files(out) == files(tmp_path / "whole")


def test_a_damaged_shard_is_written_again(source, tmp_path):
    out = tmp_path / "shards"
    manifest = prepare(source, out, FRONTEND, shard_size=3, say=quiet)
    tar = out / "shard-000001.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    assert prepare(source, out, FRONTEND, shard_size=3, say=quiet) == manifest
    assert tar.read_bytes() == content


def test_other_data_or_settings_are_refused(source, tmp_path):
    out = tmp_path / "shards"
    prepare(source, out, FRONTEND, shard_size=3, say=quiet)
    fewer = Source("test", list(source)[:6], source.label_names)
    for changed, frontend, options in (
        (fewer, FRONTEND, {"shard_size": 3}),
        (source, FRONTEND, {"shard_size": 4}),
        (source, Frontend(frames=64), {"shard_size": 3}),
        (source, FRONTEND, {"shard_size": 3, "flac": True}),
    ):
        with pytest.raises(AudioError, match="holds shards of another source, of other settings"):
            prepare(changed, out, frontend, say=quiet, **options)


def test_a_full_disk(source, tmp_path, monkeypatch):
    out, write = tmp_path / "shards", webdataset.TarWriter.write

    def full(self, sample):
        if sample["__key__"] == "000000004":
            raise OSError(28, "No space left on device")
        return write(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(webdataset.TarWriter, "write", full)
        with pytest.raises(
            OSError, match=r"shard-000001.tar cannot be written: No space left on device; the shards"
        ):
            prepare(source, out, FRONTEND, shard_size=3, say=quiet)
    assert files(out) == ["shard-000000.index.json", "shard-000000.tar"]
    assert prepare(source, out, FRONTEND, shard_size=3, say=quiet)["clips"] == 7


# -- shards of others ----------------------------------------------------------------------------------------


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_foreign_shards(tmp_path):
    wave = write(tmp_path / "a.wav").read_bytes()
    out = tmp_path / "shards"
    tar(
        out / "0.tar",
        {
            "x/a.wav": wave,
            "x/a.cls": b"3",
            "x/b.txt": b"-",
            "x/b.flac": wave,
            "x/b.json": b'{"labels": [0, 1]}',
        },
    )
    tar(out / "1.tar", {"x/a.wav": wave, "x/a.json": b'{"labels": "/m/b"}'})
    source = open_source(out)
    assert [clip.labels for clip in source] == [(3,), (0, 1), ()]
    assert source.label_names == ("0", "1", "2", "3")
    with source.file(1) as file:
        assert file.read() == wave
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/a,A\n1,/m/b,B\n2,/m/c,C\n3,/m/d,D\n")
    named = open_source(out, tmp_path / "labels.csv")
    assert [clip.labels for clip in named] == [(3,), (0, 1), (1,)] and named.label_names == (
        "A",
        "B",
        "C",
        "D",
    )


def test_recordings_beside_tar_files(source, tmp_path):
    """Recordings make a folder of recordings; shards beside them are no stray archives, and are asked about."""
    clips = folder(tmp_path / "clips", 2)
    tar(clips / "notes.tar", {"notes.txt": b"-"})
    (clips / "broken.tar").write_bytes(b"no tar file")
    (clips / "manifest.json").write_text('{"of": "another program"}')
    assert [type(open_source(clips)), len(open_source(clips))] == [Source, 2]

    wave = (clips / "clip000.wav").read_bytes()
    shard = tar(clips / "deep" / "shard.tar", {"readme.txt": b"-", "a.wav": wave})
    assert len(open_source(clips)) == 2
    shard.rename(clips / "shard.tar")
    with pytest.raises(
        AudioError, match=r"clips: holds recordings \(.*clip000.wav\) and shards \(shard.tar\)"
    ):
        open_source(clips)
    assert len(open_source(clips / "shard.tar")) == len(open_source(clips / "shard*.tar")) == 1

    prepare(source, tmp_path / "ours", FRONTEND, say=quiet)
    write(tmp_path / "ours" / "deep" / "more.flac")
    with pytest.raises(
        AudioError, match=r"ours: holds recordings \(.*more.flac\) and shards \(shard-000000.tar\)"
    ):
        open_source(tmp_path / "ours")
    assert len(open_source(tmp_path / "ours" / "*.tar")) == 7

    (tmp_path / "others").mkdir()
    shard = (clips / "shard.tar").rename(tmp_path / "others" / "shard.tar")
    (tmp_path / "others" / "._shard.tar").write_bytes(b"what another system leaves")
    assert len(open_source(tmp_path / "others")) == 1


def test_empty_and_damaged_shards(source, tmp_path, caplog):
    out = tmp_path / "shards"
    tar(out / "0.tar", {})
    with pytest.raises(AudioError, match=r"there is no audio in 1 shard$"):
        open_source(out)
    tar(out / "1.tar", {"a.wav": write(tmp_path / "a.wav", 8000).read_bytes()})
    caplog.clear()
    assert len(open_source(out)) == 1
    assert "0.tar: holds no audio" in caplog.text
    content = (out / "1.tar").read_bytes()
    for bad in (content[:5000], b"", b"no tar file" * 100):
        (out / "2.tar").write_bytes(bad)
        with pytest.raises(AudioError, match=r"2\.tar: is (no plain tar file|cut short)"):
            open_source(out)
    (out / "2.tar").unlink()

    prepare(source, tmp_path / "ours", FRONTEND, shard_size=3, say=quiet)
    shard = tmp_path / "ours" / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(AudioError, match=r"shard-000001.tar: has \d+ bytes, but manifest.json states"):
        open_source(tmp_path / "ours")
    for one in (shard, tmp_path / "ours" / "*.tar"):  # a pattern knows no manifest
        with pytest.raises(AudioError, match=r"shard-000001.tar: has \d+ bytes, but its index states"):
            open_source(one)
    shard.unlink()
    with pytest.raises(AudioError, match="no such shard"):
        open_source(tmp_path / "ours")


def test_a_shard_that_vanishes_is_a_failure_of_its_clips(source, tmp_path):
    prepare(source, tmp_path / "shards", FRONTEND, shard_size=6, say=quiet)
    data = ClipDataset([open_source(tmp_path / "shards")], FRONTEND)
    (tmp_path / "shards" / "shard-000001.tar").unlink()
    sample = data[0, 6]
    assert "shard-000001.tar::000000006.wav: cannot be read: No such file" in sample.failures[0]


def test_a_member_is_a_file_of_its_own(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    with open_member(tmp_path / "file", 2, 5) as file:
        assert file.read() == b"23456" and file.read(1) == b""
        assert file.seek(-2, io.SEEK_END) == 3 and file.read(10) == b"56"
        file.seek(1)
        file.seek(1, io.SEEK_CUR)
        assert file.tell() == 2 and file.read(2) == b"45"


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    folder(tmp_path / "audio", 3)
    (tmp_path / "audio" / "bad.wav").write_bytes(b"")
    arguments = ["prepare", str(tmp_path / "audio"), "--out", str(tmp_path / "shards"), "--shard-size", "2"]
    assert main([*arguments, "--model", "mae_ast_patch_base"]) == 0
    out, err = capsys.readouterr()
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert f"mean {manifest['mean']:.7f}, std {manifest['std']:.7f}" in out
    assert "3 clips, 1.5 s, in 2 shards; 1 recording left out" in out
    assert err == f"left out: {tmp_path / 'audio' / 'bad.wav'}: cannot be decoded: the file is empty\n"
    assert manifest["frontend"]["window"] == "povey"
    assert main([*arguments, "--frontend", "esc50"]) == 1
    assert capsys.readouterr().err.startswith("audiomae prepare: ")
