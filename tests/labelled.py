"""Tiny data sets in the layouts of the real ones: real recordings, real label files, classes that sound different."""

import csv
import json
import wave
from pathlib import Path

import numpy as np
import yaml

from audiomae.cli import main
from audiomae.finetune import datasets

RATE = 16_000
TINY = {"width": 64, "depth": 2, "heads": 2, "mlp_ratio": 2.0}


def sound(path, kind, seed=0, seconds=0.3):
    """A tone in noise whose pitch is the class's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng((kind, seed))
    t = np.arange(int(seconds * RATE)) / RATE
    pitch = 200 * 1.37 ** (kind % 12) * random.uniform(0.97, 1.03)
    samples = 0.3 * np.sin(2 * np.pi * pitch * t) + 0.02 * random.standard_normal(len(t))
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


MIDS = ("/m/09x0r", "/m/05zppz", "/t/dd00003", "/m/02zsn")


def audioset(root, full=False, clips=8):
    """Google's lists; recordings in the names that three common downloaders give, one of each list is missing."""
    root.mkdir(parents=True)
    names = ("Speech", "Male speech, man speaking", "Bell", "Siren")
    with (root / "class_labels_indices.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("index", "mid", "display_name"))
        rows.writerows((i, mid, name) for i, (mid, name) in enumerate(zip(MIDS, names, strict=True)))
    lists = {"balanced_train_segments": clips, "eval_segments": 5}
    lists |= {"unbalanced_train_segments": 2 * clips} if full else {}
    for split, count in lists.items():
        lines = ["# Segments csv created Sun Mar  5 10:54:31 2017", f"# num_ytids={count}, num_segs={count}"]
        lines.append("# YTID, start_seconds, end_seconds, positive_labels")
        for i in range(count + 1):
            youtube = f"{'-Y_'[i % 3]}{split[:3]}{i:07d}"
            labels = (MIDS[i % 3], MIDS[3]) if i % 4 == 0 else (MIDS[i % 3],)
            lines.append(f'{youtube}, 30.000, 40.000, "{",".join(labels)}"')
            name = (
                f"{youtube}.wav",
                f"Y{youtube}.wav",
                f"{youtube}_30.000_40.000.wav",
                f"{youtube}_30000.wav",
            )[i % 4]
            if i < count:
                sound(root / "audio" / split / name, i % 3, i)
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def esc50(root, classes=5):
    root = root / "ESC-50-master"
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for target in range(classes):
            name = f"{fold}-{1000 + target}-A-{target}.wav"
            sound(root / "audio" / name, target, fold)
            rows.append(f"{name},{fold},{target},sound_{target},False,{1000 + target},A")
    (root / "meta").mkdir()
    (root / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    return root.parent


def speech_commands(root, version):
    root = root / f"speech_commands_v0.0{version}"
    words = {1: datasets.WORDS_V1, 2: datasets.WORDS_V2}[version]
    lists = {"validation_list.txt": [], "testing_list.txt": []}
    for i, word in enumerate(words):
        for take, name in enumerate((None, *lists)):
            file = f"{word}/{i:04x}00{take}f_nohash_0.wav"
            sound(root / file, i, take, 0.15)
            if name:
                lists[name].append(file)
    for name, files in lists.items():
        (root / name).write_text("\n".join(files) + "\n")
    for i, noise in enumerate(("pink_noise", "running_tap")):
        sound(root / "_background_noise_" / f"{noise}.wav", 20, i, 1.5)
    (root / "LICENSE").write_text("Creative Commons BY 4.0")
    if version == 1:
        tests = root.parent / "speech_commands_test_set_v0.01"
        for i, label in enumerate((*datasets.KEYWORDS, "_silence_", "_unknown_")):
            sound(tests / label / f"{i:04x}_nohash_0.wav", i, 9, 0.15)
    return root.parent


def voxceleb1(root):
    lines = []
    for speaker in range(3):
        for video in range(4):
            for take in range(1, 3):
                name = f"id1000{speaker + 1}/video{video:06}/{take:05}.wav"
                sound(root / "wav" / name, speaker, 10 * video + take)
                lines.append(f"{(1, 1, 2, 3)[video]} {name}")
    (root / "iden_split.txt").write_text("\n".join(lines) + "\n")
    return root


def iemocap(root):
    root = root / "IEMOCAP_full_release"
    emotions = ("neu", "hap", "ang", "sad", "exc", "fru")
    for session in range(1, 6):
        for kind in ("impro", "script"):
            dialog = f"Ses0{session}F_{kind}01"
            lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
            for i, emotion in enumerate(emotions):
                name = f"{dialog}_F{i:03}"
                place = root / f"Session{session}"
                sound(place / "sentences" / "wav" / dialog / f"{name}.wav", i, session)
                lines.append(f"[{i}.2901 - {i}.8200]\t{name}\t{emotion}\t[2.5000, 2.5000, 2.5000]")
                lines.append("C-E2:\tNeutral;\t()")
            labels = place / "dialog" / "EmoEvaluation" / f"{dialog}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text("\n".join(lines) + "\n")
            labels.with_name(f"._{labels.name}").write_bytes(b"\x00\x05\x16\x07\xb0\xff")  # as in the release
    return root


def class_folders(root, classes=("dog", "rain", "saw"), clips=10):
    for i, name in enumerate(classes):
        for take in range(clips):
            sound(root / name / f"{take}.wav", 3 * i, take)
    return root


def csv_file(root, multi_label=True):
    rows = ["path,labels,split" if multi_label else "path,label,split"]
    for i in range(18):
        sound(root / "clips" / f"{i}.wav", i % 3, i)
        labels = f"k{i % 3}" + (f";k{(i + 1) % 3}" if multi_label and i % 2 else "")
        rows.append(f"clips/{i}.wav,{labels},{('train', 'train', 'train', 'train', 'val', 'test')[i // 3]}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root / "labels.csv"


def small(data, out, *more, model="audiomae_small", overrides=TINY, steps=4):
    """The words of a tiny run on a CPU."""
    words = ["finetune", "--data", data, "--out", out, "--steps", steps, "--batch-size", 4, "--accumulate", 1]
    words += ["--workers", 0, "--device", "cpu", "--precision", "fp32", "--warmup-steps", 1, "--log-every", 1]
    if model:
        words += ["--model", model]
    if overrides:
        words += ["--model-overrides", json.dumps(overrides)]
    return [str(word) for word in (*words, *more)]


def run(*words):
    return main([str(word) for word in words])


def settings_of(out):
    return yaml.safe_load((Path(out) / "config.yaml").read_text())
