"""Readers of the data sets' own layouts; what is missing, or was unpacked half, is told."""

import re
import shutil
import tarfile
from pathlib import Path

import labelled
import pytest

from audiomae.data import AudioError
from audiomae.finetune import TASKS


def labels_of(source):
    return {Path(clip.path).name: [source.label_names[i] for i in clip.labels] for clip in source}


def paths(source):
    return {clip.path for clip in source}


def disjoint(*sources):
    return len(set().union(*map(paths, sources))) == sum(len(paths(s)) for s in sources)


def test_audioset(tmp_path, caplog):
    root = labelled.audioset(tmp_path / "as", full=True)
    small, full = (TASKS[name].open([str(root)]) for name in ("as20k", "as2m"))
    assert (len(small.train), len(small.test), small.val, small.multi_label) == (8, 5, None, True)
    assert len(full.train) == 24 and small.label_names[1] == "Male speech, man speaking"
    assert disjoint(full.train, full.test)
    found = labels_of(full.train)
    assert found["-bal0000000.wav"] == ["Speech", "Siren"] and found["_bal0000002_30.000_40.000.wav"] == [
        "Bell"
    ]
    assert found["YYbal0000001.wav"] == ["Male speech, man speaking"]
    assert found["-unb0000003_30000.wav"] == ["Speech"]
    assert "recordings of 8 of 9 segments (88.9 %) are here" in caplog.text and "cut off" not in caplog.text


def test_audioset_from_manifests(tmp_path):
    labelled.audioset(tmp_path / "as")
    shutil.copy(tmp_path / "as" / "class_labels_indices.csv", tmp_path)
    files = [str(labelled.sound(tmp_path / f"{i}.wav", i)) for i in range(3)]
    for name, file in zip(("a", "b", "eval"), files, strict=True):
        (tmp_path / f"{name}.json").write_text(f'{{"data": [{{"wav": "{file}", "labels": "/m/09x0r"}}]}}')
    train, test = [str(tmp_path / "a.json"), str(tmp_path / "b.json")], [str(tmp_path / "eval.json")]
    splits = TASKS["as20k"].open(train, test)
    assert (len(splits.train), len(splits.test), len(splits.label_names)) == (2, 1, 4)
    with pytest.raises(AudioError, match="nothing to evaluate on: give --val-data"):
        TASKS["as20k"].open(train)


def test_esc50(tmp_path):
    root = labelled.esc50(tmp_path)
    folds = [TASKS["esc50"].open([str(root)], fold=k) for k in range(1, 6)]
    assert disjoint(*(splits.test for splits in folds)) and all(len(s.train) == 20 for s in folds)
    assert all(disjoint(splits.train, splits.test) and splits.val is None for splits in folds)
    assert labels_of(folds[1].test)["2-1003-A-3.wav"] == ["sound_3"]
    same = TASKS["esc50"].open([str(root / "ESC-50-master")], fold=1)
    assert paths(same.test) == paths(folds[0].test)
    for fold, sentence in ((None, "has folds 1 to 5, and fold None"), (6, "has folds 1 to 5, and fold 6")):
        with pytest.raises(AudioError, match=sentence):
            TASKS["esc50"].open([str(root)], fold=fold)


def test_speech_commands_v2(tmp_path):
    splits = TASKS["spc2"].open([str(labelled.speech_commands(tmp_path, 2))])
    assert [len(splits[s]) for s in ("train", "val", "test")] == [35, 35, 35] and len(
        splits.label_names
    ) == 35
    assert disjoint(splits.train, splits.val, splits.test)
    assert all(Path(p).parent.name == label[0] for p, label in zip(
        (c.path for c in splits.val), labels_of(splits.val).values(), strict=True))  # fmt: skip


def test_speech_commands_v1(tmp_path):
    """Twelve classes: the words that are no keywords are one, background noise another; the test is its own archive."""
    labelled.speech_commands(tmp_path, 1)
    splits = TASKS["spc1"].open([str(tmp_path / "speech_commands_v0.01")])
    assert len(splits.label_names) == 12
    counts = dict(zip(splits.label_names, splits.train.label_counts(), strict=True))
    assert counts["_unknown_"] == 20 and counts["_silence_"] == 2 and counts["yes"] == 1
    assert len(splits.val) == 32 and len(splits.test) == 12
    assert all("test_set" in clip.path for clip in splits.test)


def test_voxceleb1(tmp_path):
    splits = TASKS["voxceleb1"].open([str(labelled.voxceleb1(tmp_path))])
    assert [len(splits[s]) for s in ("train", "val", "test")] == [12, 6, 6]
    assert splits.label_names == ("id10001", "id10002", "id10003") and disjoint(
        splits.train, splits.val, splits.test
    )
    assert all(splits.label_names[c.labels[0]] in c.path for c in splits.test)


def test_iemocap(tmp_path):
    """Sessions are folds; excited is happy, frustrated is left out."""
    root = labelled.iemocap(tmp_path)
    splits = TASKS["iemocap"].open([str(root)], fold=3)
    assert splits.label_names == ("neutral", "happy", "angry", "sad")
    assert (
        list(splits.test.label_counts()) == [2, 4, 2, 2] and len(splits.train) == 32 and len(splits.val) == 8
    )
    assert all("Session3" in clip.path for clip in splits.test) and disjoint(
        splits.train, splits.val, splits.test
    )
    assert all(Path(clip.path).is_file() for clip in splits.train)


def test_custom_folders(tmp_path):
    splits = TASKS["custom"].open([str(labelled.class_folders(tmp_path / "plain"))])
    assert [len(splits[s]) for s in ("train", "val", "test")] == [24, 3, 3]
    assert splits.label_names == ("dog", "rain", "saw") and disjoint(splits.train, splits.val, splits.test)
    again = TASKS["custom"].open([str(tmp_path / "plain")])
    assert paths(again.test) == paths(splits.test)  # the choice is the same each time
    for split, clips in (("train", 4), ("validation", 2)):
        labelled.class_folders(tmp_path / "split" / split, clips=clips)
    splits = TASKS["custom"].open([str(tmp_path / "split")])
    assert (len(splits.train), len(splits.val), splits.test) == (12, 6, None)
    with pytest.raises(AudioError, match="there is no test split, only train, val"):
        splits["test"]
    held = TASKS["custom"].open([str(tmp_path / "plain")], [str(tmp_path / "split" / "validation")])
    assert (len(held.train), len(held.val), held.test) == (30, 6, None)


def test_custom_csv(tmp_path):
    splits = TASKS["custom"].open([str(labelled.csv_file(tmp_path / "many"))])
    assert splits.multi_label and [len(splits[s]) for s in ("train", "val", "test")] == [12, 3, 3]
    assert labels_of(splits.train)["1.wav"] == ["k1", "k2"]
    splits = TASKS["custom"].open([str(labelled.csv_file(tmp_path / "one", multi_label=False))])
    assert not splits.multi_label and labels_of(splits.train)["1.wav"] == ["k1"]


def test_custom_folders_that_are_unclear(tmp_path, caplog):
    root = labelled.class_folders(tmp_path / "plain", clips=3)
    labelled.sound(root / "lost.wav", 0)
    assert len(TASKS["custom"].open([str(root)]).train) == 3
    assert "left out 1 recording beside the folders of classes: lost.wav" in caplog.text
    for name in ("train", "test", "old"):
        labelled.class_folders(tmp_path / "split" / name, clips=3)
    with pytest.raises(AudioError, match="holds train, val or test, and old: are these splits or classes"):
        TASKS["custom"].open([str(tmp_path / "split")])


def test_class_folders_of_shards(tmp_path):
    """Of which no clip is a file."""
    root = labelled.class_folders(tmp_path / "data", clips=3)
    for path in sorted((root / "dog").iterdir()):
        with tarfile.open(root / "dog" / "dog.tar", "a") as shard:
            shard.add(path, path.name)
        path.unlink()
    with pytest.raises(AudioError, match="dog: holds shards, and recordings were expected"):
        TASKS["custom"].open([str(root)])


def test_a_split_of_one_class(tmp_path):
    for name, classes in (("train", "ab"), ("val", "a")):
        labelled.class_folders(tmp_path / name, classes=classes, clips=3)
    assert list(TASKS["custom"].open([str(tmp_path)]).val.label_counts()) == [3, 0]


def test_custom_csv_of_rare_labels(tmp_path):
    """Several labels a clip: those that come first only once are held out together. A clip may have none."""
    rows = [f"{i}.wav,{label}" for i, label in enumerate(["a"] * 20 + ["b;a", "c;b", "d", "e", ""])]
    (tmp_path / "labels.csv").write_text("path,labels\n" + "\n".join(rows) + "\n")
    for i in range(25):
        (tmp_path / f"{i}.wav").touch()
    splits = TASKS["custom"].open([str(tmp_path / "labels.csv")])
    assert [len(splits[s]) for s in ("train", "val", "test")] == [19, 3, 3] and splits.drawn
    assert disjoint(splits.train, splits.val, splits.test)


def no_csv(root):
    (root / "ESC-50-master/meta/esc50.csv").unlink()


def no_file(root):
    (root / "ESC-50-master/audio/3-1001-A-1.wav").unlink()


def not_there(root):
    shutil.rmtree(root)


def no_word(root):
    shutil.rmtree(root / "speech_commands_v0.02/visual")


def no_list(root):
    (root / "speech_commands_v0.02/testing_list.txt").unlink()


def no_listed_word(root):
    next((root / "speech_commands_v0.02/zero").glob("*002f_*")).unlink()


def no_listed_word_v1(root):
    next((root / "speech_commands_v0.01/zero").glob("*002f_*")).unlink()


def no_test_set(root):
    shutil.rmtree(root / "speech_commands_test_set_v0.01")


def no_noise(root):
    shutil.rmtree(root / "speech_commands_v0.01/_background_noise_")


def no_split_list(root):
    (root / "iden_split.txt").unlink()


def no_speaker(root):
    shutil.rmtree(root / "wav/id10002")


def bad_split_list(root):
    (root / "iden_split.txt").write_text("one id10001/video000000/00001.wav\n")


def no_session(root):
    shutil.rmtree(root / "IEMOCAP_full_release/Session4")


def no_emotions(root):
    shutil.rmtree(root / "IEMOCAP_full_release/Session2/dialog/EmoEvaluation")


def no_utterances(root):
    shutil.rmtree(root / "IEMOCAP_full_release/Session2/sentences/wav/Ses02F_impro01")
    shutil.rmtree(root / "IEMOCAP_full_release/Session2/sentences/wav/Ses02F_script01")


def no_utterance(root):
    (root / "IEMOCAP_full_release/Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_F004.wav").unlink()


def no_labels(root):
    for file in (root / "IEMOCAP_full_release/Session2/dialog/EmoEvaluation").glob("[!.]*"):
        file.write_text("% nothing")


def no_segments(root):
    (root / "unbalanced_train_segments.csv").unlink()


def no_eval_audio(root):
    shutil.rmtree(root / "audio/eval_segments")


def odd_label(root):
    with (root / "eval_segments.csv").open("a") as file:
        file.write('-eva0000000, 1.000, 2.000, "/m/unheard"\n')


REFUSED = [
    ("esc50", labelled.esc50, no_csv, r"meta/esc50.csv is missing. ESC-50 is a folder ESC-50-master with meta"),
    ("esc50", labelled.esc50, no_file, r"1 of 25 recordings that meta/esc50.csv lists.*3-1001-A-1.wav.*to its end"),
    ("esc50", labelled.esc50, not_there, r"there is no such folder. ESC-50 is"),
    ("spc2", 2, no_word, r"visual is missing. Speech Commands v2 is a folder speech_commands_v0.02"),
    ("spc2", 2, no_list, r"testing_list.txt is missing"),
    ("spc2", 2, no_listed_word, r"1 of 35 recordings that testing_list.txt lists are missing"),
    ("spc1", 1, no_listed_word_v1, r"1 of 30 recordings that testing_list.txt lists are missing"),
    ("spc1", 1, no_test_set, r"speech_commands_test_set_v0.01, .* is missing. Speech Commands v1 is .*and beside it"),
    ("spc1", 1, no_noise, r"_background_noise_ is missing"),
    ("voxceleb1", labelled.voxceleb1, no_split_list, r"iden_split.txt is missing. VoxCeleb1 is a folder with"),
    ("voxceleb1", labelled.voxceleb1, no_speaker, r"8 of 24 recordings that iden_split.txt lists are missing"),
    ("voxceleb1", labelled.voxceleb1, bad_split_list, r"expected lines such as '1 id10006"),
    ("iemocap", labelled.iemocap, no_session, r"Session4/sentences/wav, Session4/dialog/EmoEvaluation is missing"),
    ("iemocap", labelled.iemocap, no_emotions, r"Session2/dialog/EmoEvaluation is missing. IEMOCAP is the folder"),
    ("iemocap", labelled.iemocap, no_utterances, r"10 of 50 recordings .*EmoEvaluation lists .*are .*_F000.wav, "),
    ("iemocap", labelled.iemocap, no_utterance, r"1 of 50 recordings that dialog/EmoEvaluation lists are missing"),
    ("iemocap", labelled.iemocap, no_labels, r"Session2: holds no labelled utterances"),
    ("as2m", lambda root: labelled.audioset(root, full=True), no_segments, r"unbalanced_train_segments.csv is missing"),
    ("as20k", labelled.audioset, no_eval_audio, r"none of the eval segments' recordings are here. AudioSet is"),
    ("as20k", labelled.audioset, odd_label, r"eval_segments.csv, line 10: the label '/m/unheard' is not in"),
]  # fmt: skip


@pytest.mark.parametrize(
    "task, build, damage, sentence", REFUSED, ids=[f"{r[0]}-{r[2].__name__}" for r in REFUSED]
)
def test_half_a_data_set(tmp_path, task, build, damage, sentence):
    root = tmp_path / "data"
    labelled.speech_commands(root, build) if isinstance(build, int) else build(root)
    damage(root)
    with pytest.raises(AudioError, match=sentence):
        TASKS[task].open([str(root)], fold=2 if TASKS[task].folds else None)


FEWER = {
    "esc50": (labelled.esc50, "ESC-50 has: 25 of 2,000 for five folds"),
    "spc2": (lambda root: labelled.speech_commands(root, 2), "35 of 84,843 for training, 35 of 9,981 for validation"),
    "spc1": (lambda root: labelled.speech_commands(root, 1), "30 of 51,088 for training, .*12 of 3,081 for testing"),
    "voxceleb1": (labelled.voxceleb1, "12 of 138,361 for train, 6 of 6,904 for dev, 6 of 8,251 for test"),
    "iemocap": (labelled.iemocap, "50 of 5,531 for four emotions"),
}  # fmt: skip


@pytest.mark.parametrize("task", FEWER)
def test_fewer_than_published(tmp_path, caplog, task):
    """No refusal: who tries things out has a part. What the list does not name is missed in no other way."""
    build, numbers = FEWER[task]
    TASKS[task].open([str(build(tmp_path / "data"))], fold=2 if TASKS[task].folds else None)
    (text,) = (r.getMessage() for r in caplog.records if "fewer recordings than" in r.getMessage())
    assert re.search(numbers, text) and text.endswith("was it unpacked to its end?")


def test_a_list_of_segments_that_was_cut_off(tmp_path, caplog):
    root = labelled.audioset(tmp_path / "as")
    path = root / "eval_segments.csv"
    path.write_text(path.read_text().replace("num_segs=5", "num_segs=20371"))
    TASKS["as20k"].open([str(root)])
    assert "lists 6 segments, and its first lines say 20371: it was cut off" in caplog.text


@pytest.mark.parametrize("missing", [1, 2])
def test_a_few_listed_recordings_are_missing(tmp_path, caplog, missing):
    """One in a hundred is left out and told; more are half an archive."""
    rows = [f"{i}.wav,{'ab'[i % 2]},{('train', 'test')[i > 80]}" for i in range(100)]
    (tmp_path / "labels.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    for i in range(missing, 100):
        (tmp_path / f"{i}.wav").touch()
    if missing == 2:
        with pytest.raises(AudioError, match=r"2 of 100 recordings .* the first are .*/0.wav, .*/1.wav\. "):
            TASKS["custom"].open([str(tmp_path / "labels.csv")])
        return
    splits = TASKS["custom"].open([str(tmp_path / "labels.csv")])
    assert (len(splits.train), len(splits.test)) == (80, 19)
    assert (
        "1 of 100 recordings" in caplog.text and "they are left out, and results are not quite" in caplog.text
    )


def test_a_class_with_nothing_to_train_on(tmp_path, caplog):
    path = labelled.csv_file(tmp_path)
    path.write_text(path.read_text().replace("k0,test", "k0;late,test"))
    assert TASKS["custom"].open([str(path)]).label_names == ("k0", "k1", "k2", "late")
    assert "no recording to train on for 1 of 4 classes: late" in caplog.text


CSVS = {
    "path,split\na.wav,train\n": "has no column label or labels",
    "label,split\nx,train\n": "expected a CSV file with the columns path",
    "path,label,split\na.wav,x,train\nb.wav,y,later\n": r"line 3: split is 'later'; expected train, val or test",
    "path,label,split\na.wav,,train\n": "line 2: the label is empty",
    "path,label,split\na.wav,x,train\nb.wav,x,val\n": "has 1 class, and two at least",
    "path,label,split\na.wav,x,train\nb.wav,y,val\n": r"2 of 2 recordings that .*labels.csv lists are missing",
    "path,label\na.wav,x\nb.wav,y\n": "the class 'x' has 1 clip, too few",
    "path,label,split\na.wav,x,train\n./a.wav,x,test\n": r"./a.wav is there twice \(x in train and x in test\)",
    "path,label\na.wav,x\na.wav,y\n": r"a.wav is there twice \(x and y\): .*several labels go into one row",
    "path,label\na.wav,x\na.wav,x\n": "a.wav is there twice",
    "path,label,split\na.wav,x\n": "line 2: split is None; expected train",
    "path,label\n": "and rows",
}


@pytest.mark.parametrize("text", CSVS)
def test_a_csv_that_is_wrong(tmp_path, text):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(AudioError, match=CSVS[text]):
        TASKS["custom"].open([str(tmp_path / "labels.csv")])


def test_what_a_task_does_not_take(tmp_path):
    root, sounds = (labelled.class_folders(tmp_path / name, clips=3) for name in ("a", "sounds/a"))
    (tmp_path / "empty").mkdir()
    for data, val_data, fold, sentence in (
        ([str(root)] * 2, [], None, "--data was given several times"),
        ([str(root)], [], 1, "has no folds: leave --fold out"),
        ([str(root)], [str(tmp_path / "c"), str(tmp_path / "d")], None, "--val-data was given several times"),
        (
            [str(root)],
            [f"{root}/../a"],
            None,
            "is both --data and --val-data: what is trained on says nothing",
        ),
        ([str(sounds.parent)], [str(sounds)], None, r"is there twice \(a in train and dog in val\)"),
        ([str(tmp_path / "b")], [], None, "neither a folder nor a CSV file"),
        ([str(tmp_path / "empty")], [], None, "holds no folders, one for each class"),
    ):
        with pytest.raises(AudioError, match=sentence):
            TASKS["custom"].open(data, val_data, fold)
    with pytest.raises(AudioError, match="is both --data and --val-data"):
        TASKS["as20k"].open(["train.json"], ["train.json"])
    with pytest.raises(AudioError, match="is one folder, which has its own splits"):
        TASKS["esc50"].open([str(root)], [str(root)], 1)
