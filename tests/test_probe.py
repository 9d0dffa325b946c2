"""`audiomae probe`: accuracy of a linear layer and of neighbours on frozen embeddings."""

import json

import numpy as np
import pytest
import soundfile
import torch

from audiomae.probe import LinearProbe, folds, nearest_neighbours, probe

pytestmark = pytest.mark.usefixtures("one_thread")


def blobs(clips=30, classes=3, noise=0.3):
    labels = torch.arange(clips) % classes
    return torch.eye(classes, 8)[labels] + noise * torch.randn(clips, 8), labels


def test_folds_hold_each_class_evenly():
    labels = torch.tensor([0] * 12 + [1] * 5 + [2] * 23)[torch.randperm(40)]
    fold = folds(labels, 5)
    assert (fold.bincount() == 8).all()
    for label in range(3):
        each = fold[labels == label].bincount(minlength=5)
        assert each.max() - each.min() <= 1
    assert torch.equal(fold, folds(labels, 5)) and not torch.equal(fold, folds(labels, 5, seed=1))
    for number in (1, 6):
        with pytest.raises(ValueError, match="the rarest has 5"):
            folds(labels, number)


def test_groups_stay_together():
    """Groups of one to four clips of one class, and some of two classes; folds stay even."""
    random = np.random.RandomState(0)
    rows = [(g % 3, f"{g}") for g in range(60) for _ in range(random.randint(1, 5))]
    rows += [(label, f"both{g}") for g in range(5) for label in (0, 1)]
    random.shuffle(rows)
    labels, groups = torch.tensor([int(label) for label, _ in rows]), [name for _, name in rows]
    fold = folds(labels, 5, groups=groups)
    for name in set(groups):
        assert len({int(f) for f, g in zip(fold, groups, strict=True) if g == name}) == 1
    for label in range(3):
        each = fold[labels == label].bincount(minlength=5)
        assert each.max() - each.min() <= 4
    assert torch.equal(fold, folds(labels, 5, groups=groups))
    assert not torch.equal(fold, folds(labels, 5, seed=1, groups=groups))
    with pytest.raises(ValueError, match="groups of recordings of each class: the rarest has 1"):
        folds(torch.tensor([0, 0, 1, 1]), 2, groups=["a", "a", "b", "c"])


def test_linear_probe_is_logistic_regression():
    """The gradient of its objective is 0 at what it finds, and it does not care for the scale of a feature."""
    features, labels = blobs(noise=1.0)
    model = LinearProbe(features, labels, 3, decay=1e-2)
    weight = model.weight.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model._standardised(features) @ weight, labels)
    (loss + 1e-2 * weight[:-1].square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4
    scaled = LinearProbe(features * 100, labels, 3, decay=1e-2)
    torch.testing.assert_close(scaled.weight, model.weight, rtol=1e-3, atol=1e-3)


def test_neighbours():
    features, labels = torch.eye(4), torch.tensor([0, 1, 1, 2])
    assert nearest_neighbours(features, labels, features, 3, k=1).tolist() == [0, 1, 1, 2]
    # One very near neighbour outweighs nobody: two of class 1 that are as near win.
    query = torch.tensor([[0.9, 1.0, 1.0, 0.0]])
    assert nearest_neighbours(features, labels, query, 3, k=3).tolist() == [1]


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_probe(method):
    easy = probe(*blobs(), method=method)
    assert len(easy) == 5 and np.mean(easy) > 0.9 and easy == probe(*blobs_again(), method=method)
    _, labels = blobs()
    chance = probe(torch.randn(30, 8), labels, method=method)
    assert np.mean(chance) < 0.6
    with pytest.raises(ValueError, match="'linear' or 'knn'"):
        probe(*blobs(), method="forest")


def blobs_again():
    torch.manual_seed(0)
    return blobs()


@pytest.fixture
def folder(tmp_path):
    """Ten tones and ten noises, and a file that is no recording."""
    random = np.random.RandomState(0)
    for kind in ("noise", "tone"):
        (tmp_path / "sounds" / kind).mkdir(parents=True)
        for i in range(10):
            t = np.arange(8000) / 16000
            sound = (
                random.randn(8000) if kind == "noise" else np.sin(2 * np.pi * random.uniform(300, 3000) * t)
            )
            soundfile.write(tmp_path / "sounds" / kind / f"{i}.wav", 0.1 * sound, 16000)
    return tmp_path / "sounds"


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_command(run, checkpoints, folder, method, tmp_path):
    arguments = [
        "probe",
        folder,
        "--model",
        checkpoints["encoder"],
        "--method",
        method,
        "--out",
        tmp_path / "p.json",
    ]
    status, out, err = run(*arguments)
    assert status == 0 and not err
    figures = json.loads((tmp_path / "p.json").read_text())
    assert (
        figures["classes"] == ["noise", "tone"] and figures["clips"] == 20 and figures["largest_class"] == 0.5
    )
    assert figures["accuracy"] >= 0.9 and f"{method}: {figures['accuracy']:.1%}" in out
    assert out.count("fold ") == 5
    assert run(*arguments)[1] == out  # the same again
    (folder / "tone" / "text.wav").write_text("no recording")
    status, out, err = run(*arguments, "--layer", "mean")
    assert status == 1 and "text.wav: cannot be decoded" in err and "of 20 clips in 2 classes" in out
    assert len(json.loads((tmp_path / "p.json").read_text())["left_out"]) == 1


def test_refusals(refused, checkpoints, folder, tmp_path):
    model = ["--model", checkpoints["encoder"]]
    assert "no folder" in refused("probe", tmp_path / "nowhere", *model)
    assert "of which 2 at least were expected" in refused("probe", folder / "tone", *model)
    assert "the rarest has 10" in refused("probe", folder, *model, "--folds", 11)
    assert "does not exist" in refused("probe", folder, *model, "--out", tmp_path / "no" / "p.json")


def test_command_with_groups(run, refused, checkpoints, folder, tmp_path):
    """Two takes of each of five tones and noises; one file cannot be read."""
    for path in list(folder.rglob("*.wav")):
        path.rename(path.with_name(f"{int(path.stem) % 5}-{int(path.stem) // 5}.wav"))
    arguments = [
        "probe",
        folder,
        "--model",
        checkpoints["encoder"],
        "--folds",
        3,
        "--out",
        tmp_path / "p.json",
    ]
    status, out, _ = run(*arguments, "--group", "(.*)-")
    assert status == 0 and out.count("fold ") == 3
    assert json.loads((tmp_path / "p.json").read_text())["group"] == "(.*)-"
    (folder / "tone" / "0-0.wav").write_text("no recording")
    assert run(*arguments, "--group", "(.*)-")[0] == 1
    message = refused(*arguments, "--group", r"[a-z]+")
    assert "groups of recordings of each class: the rarest has 1" in message
    assert "--group 'take' finds nothing in noise/0-0.wav" in refused(*arguments, "--group", "take")
    status, _, err = run(*arguments, "--group", "(")
    assert status == 2 and "'(' is no regular expression" in err
