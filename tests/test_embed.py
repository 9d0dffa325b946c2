"""Embeddings and labels of recordings: `audiomae embed`, `audiomae tag`, and what they are made of."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import tiny_audio
import torch
import torch.nn.functional as F
from cli_cases import KINDS, SOUNDS, files_below, state_dict

import audiomae
from audiomae.data import load_audio, recordings
from audiomae.pretrained import Record

pytestmark = pytest.mark.usefixtures("one_thread")


# -- embed ---------------------------------------------------------------------------------------------------


def embeddings(path):
    with np.load(path) as file:
        return file["embeddings"], [Path(name) for name in file["files"]]


@pytest.mark.parametrize("kind", ["window", "finetuned", "ssast_frame", "mae_ast"])
@pytest.mark.parametrize("pad", ["exclude", "attend"])
def test_embed_is_the_mean_of_encode(run, checkpoints, kind, pad, tmp_path):
    """Of a clip's own tokens, or of all that a published model sees; two clips are longer than its 64 frames."""
    flags = KINDS[kind][0]
    out = tmp_path / "e.npz"
    status, printed, err = run(
        *(
            "embed",
            *SOUNDS,
            "--model",
            checkpoints[kind],
            "--out",
            out,
            "--batch-size",
            2,
            "--pad",
            pad,
            *flags,
        )
    )
    assert status == 0 and not err
    rows, files = embeddings(out)
    assert files == SOUNDS and rows.shape == (len(SOUNDS), 64) and rows.dtype == np.float32
    assert f"wrote {out}: embeddings {rows.shape}" in printed and all(str(file) in printed for file in SOUNDS)

    model = audiomae.load(checkpoints[kind], **({"tokens": "patch"} if flags else {})).eval()
    c = model.config
    short = SOUNDS[2]  # the only one that needs no chunks
    waveform = load_audio(short)
    frames = c.frontend.num_frames(len(waveform))
    if pad == "attend" and kind != "mae_ast":
        spectrogram = c.frontend(waveform)[None]
    else:
        whole = dataclasses.replace(c.frontend, frames=None)(waveform)
        steps, _ = c.grid_of_filled(frames)
        spectrogram = F.pad(whole, (0, 0, 0, (steps - 1) * c.step[0] + c.patch[0] - frames))[None]
    expected = model.encode(spectrogram)[0, model.num_prefix_tokens :].mean(dim=0).detach()
    torch.testing.assert_close(torch.from_numpy(rows[2]), expected, rtol=1e-4, atol=1e-5)
    assert len(np.unique(rows.round(3), axis=0)) == len(rows)  # and each clip has its own


@pytest.mark.parametrize("kind", ["window", "mae_ast"])
@pytest.mark.parametrize("level", ["clip", "frame"])
def test_a_clip_alone_is_the_clip_in_a_batch(run, checkpoints, kind, level, tmp_path):
    arguments = ["--level", level, "--model", checkpoints[kind], "--out", tmp_path / "e.npz", *KINDS[kind][0]]
    run("embed", *SOUNDS, *arguments)
    together, _ = embeddings(tmp_path / "e.npz")
    alone = []
    for file in SOUNDS:
        run("embed", file, *arguments)
        alone.append(embeddings(tmp_path / "e.npz")[0])
    np.testing.assert_allclose(np.concatenate(alone), together, rtol=1e-4, atol=1e-5)


def test_embed_writes_to_the_given_name(run, checkpoints, tmp_path):
    status, printed, _ = run(
        "embed", SOUNDS[0], "--model", checkpoints["encoder"], "--out", tmp_path / "vectors"
    )
    assert (
        status == 0 and files_below(tmp_path) == ["vectors"] and f"wrote {tmp_path / 'vectors'}:" in printed
    )
    assert embeddings(tmp_path / "vectors")[0].shape == (1, 64)


def test_embed_with_weights_of_mixed_types(run, tmp_path):
    """fp16 layers beside an fp32 table cannot meet in one product: everything is computed in fp32."""
    state = {n: t if n == "pos_embed" else t.half() for n, t in state_dict("encoder").items()}
    torch.save(state, tmp_path / "half.pth")
    assert run("embed", SOUNDS[0], "--model", tmp_path / "half.pth", "--out", tmp_path / "e.npz")[0] == 0
    assert np.isfinite(embeddings(tmp_path / "e.npz")[0]).all()
    status, out, _ = run("verify", tmp_path / "half.pth")
    assert status == 0 and "finite" in out


def test_embed_with_a_converted_folder(run, checkpoints, tmp_path):
    assert run("convert", checkpoints["window"], tmp_path / "model")[0] == 0
    for i, model in enumerate((checkpoints["window"], tmp_path / "model")):
        assert run("embed", *SOUNDS[:2], "--model", model, "--out", tmp_path / f"{i}.npz")[0] == 0
    np.testing.assert_array_equal(embeddings(tmp_path / "0.npz")[0], embeddings(tmp_path / "1.npz")[0])


def test_a_name_has_random_weights_and_says_so(run, tmp_path):
    status, _, err = run("embed", SOUNDS[0], "--model", "ssast_frame_tiny", "--out", tmp_path / "e.npz")
    assert status == 0 and err == "ssast_frame_tiny has random weights: a baseline, not an embedding\n"
    assert embeddings(tmp_path / "e.npz")[0].shape == (1, 192)


def broken_audio(tmp_path):
    (tmp_path / "text.wav").write_text("no audio\n" * 50)
    (tmp_path / "zero.flac").touch()
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "cut.flac").write_bytes(recordings()[-1].read_bytes()[:100])
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(tmp_path / "short.wav", np.zeros(399, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    return [
        "text.wav",
        "zero.flac",
        "folder.wav",
        "cut.flac",
        "empty.wav",
        "short.wav",
        "nan.wav",
        "missing.wav",
    ]


@pytest.mark.parametrize("out", ["e.npz", "e.parquet"])
def test_unusable_audio_is_named_and_left_out(run, checkpoints, out, tmp_path):
    bad = [tmp_path / name for name in broken_audio(tmp_path) if name not in ("missing.wav", "folder.wav")]
    out = tmp_path / out
    arguments = ["--model", checkpoints["encoder"], "--out", out, "--batch-size", 3]
    status, printed, err = run("embed", SOUNDS[2], *bad, SOUNDS[0], *arguments)
    assert status == 1 and f"wrote {out}: embeddings (2, 64)" in printed
    lines = err.splitlines()
    assert len(lines) == len(bad) + 1 and lines[-1].endswith(
        f"left out {len(bad)} of {len(bad) + 2} recordings"
    )
    assert all(f"audiomae embed: {file}: " in line for file, line in zip(bad, lines, strict=False))
    content = np.load(out) if out.suffix == ".npz" else pq.read_table(out).to_pydict()
    names = content["files" if out.suffix == ".npz" else "file"]
    assert [str(name) for name in names] == [str(SOUNDS[2]), str(SOUNDS[0])]
    before = out.read_bytes()
    status, printed, err = run("embed", *bad, *arguments)
    assert status == 1 and "none of 6 recordings could be used" in err
    assert out.read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_a_clip_of_one_frame(run, checkpoints, tmp_path):
    """It is filled up to a patch."""
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, np.random.randn(400) / 9, 16000)
    for kind in ("encoder", "mae_ast"):
        arguments = ["--model", checkpoints[kind], "--out", tmp_path / "e.npz", *KINDS[kind][0]]
        assert run("embed", clip, "--level", "frame", *arguments)[0] == 0
        assert embeddings(tmp_path / "e.npz")[0].shape == (1, 64)


@pytest.mark.parametrize("layer", ["last", "1", "mean"])
def test_frames_and_layers(run, checkpoints, layer, tmp_path):
    """npz and Parquet hold the same; the mean over a clip's steps is its embedding."""
    arguments = ["embed", *SOUNDS, "--model", checkpoints["window"], "--layer", layer]
    for name in ("e.npz", "e.parquet"):
        assert run(*arguments, "--level", "frame", "--out", tmp_path / name)[0] == 0
    assert run(*arguments, "--out", tmp_path / "clip.npz")[0] == 0
    content, table = np.load(tmp_path / "e.npz"), pq.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["file", "time", "embedding"]
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), content["embeddings"])
    np.testing.assert_array_equal(table["time"].to_numpy(), content["times"])
    assert table["file"].to_pylist() == list(np.repeat(content["files"], content["steps"]))
    ends = content["steps"].cumsum()
    assert np.allclose(content["times"][: ends[0]], 87.5 + 160.0 * np.arange(ends[0]))
    means = [rows.mean(axis=0) for rows in np.split(content["embeddings"], ends[:-1])]
    np.testing.assert_allclose(embeddings(tmp_path / "clip.npz")[0], means, rtol=1e-4, atol=1e-5)
    seconds = [soundfile.info(file).duration for file in SOUNDS]
    assert [abs(160 * n - 1000 * s) < 160 for n, s in zip(content["steps"], seconds, strict=True)] == [
        True
    ] * 3


def test_layers_differ(run, refused, checkpoints, tmp_path):
    rows = []
    for layer in ("last", "1", "2", "mean"):
        out = tmp_path / f"{layer}.npz"
        assert (
            run("embed", SOUNDS[2], "--model", checkpoints["window"], "--layer", layer, "--out", out)[0] == 0
        )
        rows.append(embeddings(out)[0])
    np.testing.assert_allclose((rows[1] + rows[2]) / 2, rows[3], rtol=1e-4, atol=1e-5)
    assert len(np.unique(np.concatenate(rows).round(3), axis=0)) == 4
    arguments = ["--model", checkpoints["window"], "--out", tmp_path / "e.npz"]
    message = refused("embed", SOUNDS[2], "--layer", "3", *arguments)
    assert "a block's number from 1 to 2, got 3" in message and not (tmp_path / "e.npz").exists()


def test_folders(run, checkpoints, tmp_path):
    tiny_audio.folder(tmp_path / "sounds", 3)
    (tmp_path / "sounds" / "notes.txt").write_text("no recording")
    out = tmp_path / "e.npz"
    assert (
        run("embed", tmp_path / "sounds", SOUNDS[0], "--model", checkpoints["encoder"], "--out", out)[0] == 0
    )
    names = [tmp_path / "sounds" / f"clip{i:03}.wav" for i in range(3)]
    assert embeddings(out)[1] == [*names, SOUNDS[0]]


@pytest.mark.parametrize("name", ["e.npz", "e.parquet"])
def test_only_our_own_files_are_written_over(run, refused, checkpoints, name, tmp_path):
    arguments = ["embed", SOUNDS[2], "--model", checkpoints["encoder"], "--out", tmp_path / name]
    for _ in range(2):
        assert run(*arguments)[0] == 0
    (tmp_path / name).write_text("a diary")
    assert f"{tmp_path / name} exists already and holds no embeddings" in refused(*arguments)
    assert (tmp_path / name).read_text() == "a diary"
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    assert "exists already" in refused(*arguments[:-1], tmp_path / "other.npz")


def test_embed_refuses_before_work(refused, checkpoints, monkeypatch, tmp_path):
    """A bad --out, --device or file name is told before anything is loaded."""

    def load(*arguments, **overrides):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("audiomae.options.load", load)
    monkeypatch.setattr("audiomae.options.create_model", load)
    model = ["--model", checkpoints["encoder"]]
    assert f"{tmp_path / 'no'} of --out" in refused(
        "embed", SOUNDS[0], *model, "--out", tmp_path / "no" / "e.npz"
    )
    assert f"{tmp_path} is a folder" in refused("embed", SOUNDS[0], *model, "--out", tmp_path)
    out = ["--out", tmp_path / "e.npz"]
    assert str(tmp_path / "no.wav") in refused("embed", *SOUNDS, tmp_path / "no.wav", *model, *out)
    for device in ("gpu", "meta") + (() if torch.cuda.is_available() else ("cuda",)):
        assert f"--device {device} cannot be used" in refused(
            "embed", SOUNDS[0], *model, *out, "--device", device
        )
    message = refused("embed", SOUNDS[0], "--model", "audiomae_small", "--num-heads", 3, *out, status=2)
    assert "audiomae_small" in message
    assert files_below(tmp_path) == []


def test_a_misspelt_model_name(refused, tmp_path):
    assert "audiomae_bse" in refused(
        "embed", SOUNDS[0], "--model", "audiomae_bse", "--out", tmp_path / "e.npz"
    )


# -- tag -----------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path):
    """A folder with a classifier of five named labels."""
    model = audiomae.create_classifier("audiomae_small", 5, frames=64, width=64, depth=2, heads=1)
    torch.nn.init.normal_(model.head.weight)
    names = ("Speech", "Meow", "Rain", "Bark", "Silence")
    model.config.frontend = dataclasses.replace(model.config.frontend, labels=names)
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_tag_prints_the_top_labels(run, labelled, scores):
    status, out, err = run("tag", *SOUNDS, "--model", labelled, "--top", 2, "--scores", scores)
    assert status == 0 and not err
    lines = out.splitlines()
    assert lines[::3] == [str(file) for file in SOUNDS]
    tagger = audiomae.Tagger(labelled, scores=scores)
    expected = tagger([load_audio(file) for file in SOUNDS])
    assert tagger.labels[1] == "Meow" and expected.shape == (3, 5)
    for i, row in enumerate(expected):
        values, numbers = row.topk(2)
        shown = [line.split() for line in lines[3 * i + 1 : 3 * i + 3]]
        assert [name for _, name in shown] == [tagger.labels[n] for n in numbers]
        np.testing.assert_allclose([float(value) for value, _ in shown], values, atol=1e-3)


@pytest.mark.parametrize(("loss", "scores"), [("ce", "softmax"), ("bce", "sigmoid"), (None, "sigmoid")])
def test_scores_follow_the_loss_that_a_classifier_was_tuned_with(labelled, loss, scores):
    model = audiomae.load(labelled)
    if loss is not None:
        model.record = Record(None, {"loss": loss}, {})
        model.save_pretrained(labelled)
    assert audiomae.Tagger(labelled).scores == scores


def test_tag_without_names_prints_numbers(run, checkpoints, tmp_path):
    status, out, err = run("tag", SOUNDS[0], tmp_path / "no.wav", "--model", checkpoints["finetuned"])
    assert status == 1 and f"no file or folder {tmp_path / 'no.wav'}" in err and not out
    (tmp_path / "text.wav").write_text("no recording")
    status, out, err = run("tag", SOUNDS[0], tmp_path / "text.wav", "--model", checkpoints["finetuned"])
    assert (
        status == 1 and "without names of its labels" in err and f"{tmp_path / 'text.wav'}: cannot be" in err
    )
    assert sorted(line.split()[1] for line in out.splitlines()[1:]) == list("01234")


def test_labels_travel_with_the_weights(run, refused, checkpoints, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("index,mid,display_name\n" + "".join(f'{i},/m/{i},"Label, {i}"\n' for i in range(5)))
    convert = ["convert", checkpoints["finetuned"], tmp_path / "model", "--labels", table]
    assert run(*convert)[0] == 0
    assert "Label, 3" in run("tag", SOUNDS[0], "--model", tmp_path / "model")[1]
    table.write_text("index,mid,display_name\n0,/m/0,One\n")
    assert "names 1 label, but the model has 5 classes" in refused(*convert, "--force")
    convert[1] = checkpoints["window"]
    assert "the model has no classes" in refused(*convert, "--force")


def test_tag_refuses_what_is_no_classifier(refused, checkpoints):
    assert "which has no classes" in refused("tag", SOUNDS[0], "--model", checkpoints["window"])


def test_another_suffix_is_refused(run, labelled, tmp_path):
    status, _, err = run("embed", SOUNDS[0], "--model", labelled, "--out", tmp_path / "e.csv")
    assert status == 2 and "should be .npz or .parquet" in err and not (tmp_path / "e.csv").exists()
