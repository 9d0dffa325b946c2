"""Folders and manifests: what is recognised, and what is refused with a sentence."""

import json
import os
import pickle

import pytest
from tiny_audio import folder, write

from audiomae.data import AudioError, Clip, Source, labelled_folder, load_audio, open_source

LABELS = 'index,mid,display_name\n0,/m/a,"Dog, barking"\n2,/m/c,Cat\n1,/m/b,Rain\n'


def test_a_folder(tmp_path):
    folder(tmp_path, 2)
    write(tmp_path / "deep" / "er" / "x.FLAC", format="FLAC")
    (tmp_path / "clip.m4a").write_bytes(b"")  # containers count; whether they can be read shows later
    for other in ("notes.txt", "._clip000.wav", "deep/.hidden.wav"):
        (tmp_path / other).write_text("no audio")
    source = open_source(tmp_path)
    assert source.name == str(tmp_path) and source.label_names == ()
    paths = [tmp_path / name for name in ("clip.m4a", "clip000.wav", "clip001.wav", "deep/er/x.FLAC")]
    assert list(source) == [Clip(str(path)) for path in paths]
    assert open_source(str(tmp_path))[-1] == source[3]
    assert list(pickle.loads(pickle.dumps(source))) == list(source)
    with pytest.raises(IndexError, match="no clip 4 of 4"):
        source[4]


def test_links_are_followed_once(tmp_path):
    folder(tmp_path / "elsewhere", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    assert len(open_source(tmp_path / "data")) == 2


def test_names_that_are_no_unicode(tmp_path):
    os.rename(write(tmp_path / "plain.wav"), bytes(tmp_path) + b"/\xc3\xa4 \xff.wav")
    (clip,) = open_source(tmp_path)
    assert os.fsencode(clip.path).endswith(b"/\xc3\xa4 \xff.wav")
    assert load_audio(clip.path).shape == (16000,)


def test_an_ast_manifest(tmp_path):
    manifest, labels = tmp_path / "train.json", tmp_path / "labels.csv"
    entries = [
        {"wav": "/data/a.wav", "labels": "/m/c,/m/a"},
        {"wav": "sub/b.wav", "labels": "/m/b"},
        {"wav": "c.wav"},
    ]
    manifest.write_text(json.dumps({"data": entries}))
    labels.write_text(LABELS)
    source = open_source(manifest, labels)
    assert source.label_names == ("Dog, barking", "Rain", "Cat")
    assert list(source) == [
        Clip("/data/a.wav", (2, 0)),
        Clip(str(tmp_path / "sub/b.wav"), (1,)),
        Clip(str(tmp_path / "c.wav")),
    ]
    unlabelled = open_source(manifest)
    assert unlabelled.label_names == () and unlabelled[0].labels == ()
    labels.rename(tmp_path / "class_labels_indices.csv")
    assert list(open_source(manifest)) == list(source)


def test_an_mae_ast_manifest(tmp_path):
    folder(tmp_path / "audio", 2)
    (tmp_path / "train.tsv").write_text(
        f"{tmp_path / 'audio'}\nclip000.wav\t8000\nname with\ttab.wav\t12\n\n"
    )
    assert list(open_source(tmp_path / "train.tsv")) == [
        Clip(str(tmp_path / "audio/clip000.wav"), samples=8000),
        Clip(str(tmp_path / "audio/name with\ttab.wav"), samples=12),
    ]
    (tmp_path / "train.tsv").write_text("audio\nclip000.wav\t8000\n")
    assert open_source(tmp_path / "train.tsv")[0].path == str(tmp_path / "audio/clip000.wav")


REFUSED = {
    "nothing": ("no such file or folder", lambda path: path / "missing"),
    "a url": ("only local sources", lambda path: "https://example.org/a.tar"),
    "a pipe": ("only local sources", lambda path: "pipe:cat a.tar"),
    "an empty folder": ("holds no audio files", lambda path: path),
    "a file": ("no source", lambda path: written(path / "a.txt", "x")),
    "broken json": ("no valid JSON", lambda path: written(path / "a.json", "{")),
    "another json": ("expected", lambda path: written(path / "a.json", "[1]")),
    "an empty manifest": ("holds no clips", lambda path: written(path / "a.json", '{"data": []}')),
    "an entry": ("entry 0", lambda path: written(path / "a.json", '{"data": [{"path": "x"}]}')),
    "an empty tsv": ("root folder", lambda path: written(path / "a.tsv", "")),
    "no root": ("root folder", lambda path: written(path / "a.tsv", "a.wav\t12\n")),
    "another root": ("does not exist", lambda path: written(path / "a.tsv", "/nowhere\na.wav\t12\n")),
    "a line": ("line 2", lambda path: written(path / "a.tsv", f"{path}\na.wav 12\n")),
    "a length": ("line 2", lambda path: written(path / "a.tsv", f"{path}\na.wav\t-2\n")),
    "no text": ("UTF-8", lambda path: written(path / "a.tsv", b"\xff\xff")),
    "no shards": (r"there is no .*train-0\.tar", lambda path: path / "train-{0..3}.tar"),
    "no match": (r"there is no", lambda path: path / "*.tar"),
}


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    said, make = REFUSED[case]
    spec = make(tmp_path)
    with pytest.raises(AudioError, match=said) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "columns index, mid and display_name"),
        ("index,mid,display_name\n", "columns index, mid and display_name"),
        ("index,mid,display_name\nx,/m/a,A\n", "not a whole number"),
        ("index,mid,display_name\n1,/m/a,A\n", "not 0 to 0"),
        ("index,mid,display_name\n0,/m/a,A\n", "'/m/z' is not in the label CSV"),
    ],
)
def test_label_files_refused(tmp_path, content, said):
    manifest = written(tmp_path / "a.json", json.dumps({"data": [{"wav": "a.wav", "labels": "/m/z"}]}))
    with pytest.raises(AudioError, match=said):
        open_source(manifest, written(tmp_path / "labels.csv", content))


@pytest.mark.parametrize("given", ["3", "null", "[1]", '{"/m/a": 1}'])
def test_labels_that_are_no_mids(tmp_path, given):
    manifest = written(tmp_path / "a.json", f'{{"data": [{{"wav": "a.wav", "labels": {given}}}]}}')
    with pytest.raises(AudioError, match=r"a\.json, entry 0: the labels are .*, but mids were expected"):
        open_source(manifest, written(tmp_path / "labels.csv", LABELS))
    assert open_source(manifest)[0].labels == ()  # nobody asked for them


def test_labels_where_there_are_none(tmp_path):
    labels = written(tmp_path / "labels.csv", LABELS)
    folder(tmp_path / "audio", 1)
    with pytest.raises(AudioError, match="has no labels"):
        open_source(tmp_path / "audio", labels)
    with pytest.raises(ValueError, match="labels reach from 0 to 3, but there are 2 label names"):
        Source("test", [Clip("a.wav", (0, 3))], ("a", "b"))


def test_labelled_folder(tmp_path):
    for path in ("b/one.wav", "a/deep/two.wav", "a/one.wav", ".hidden/x.wav"):
        write(tmp_path / path, 800)
    source = labelled_folder(tmp_path)
    assert source.label_names == ("a", "b") and [clip.labels for clip in source] == [(0,), (0,), (1,)]
    assert [clip.path for clip in source] == [
        str(tmp_path / path) for path in ("a/deep/two.wav", "a/one.wav", "b/one.wav")
    ]
    with pytest.raises(AudioError, match="each class, of which 2 at least"):
        labelled_folder(tmp_path / "a")
    with pytest.raises(AudioError, match="there is no folder"):
        labelled_folder(tmp_path / "no")
    (tmp_path / "c").mkdir()
    with pytest.raises(AudioError, match="c: holds no audio files"):
        labelled_folder(tmp_path)
