"""mAP is scikit-learn's; the report, its files and its picture."""

import csv
import json
import warnings

import numpy as np
import pytest

from audiomae.finetune import average_precision, measure, write_report
from audiomae.finetune.evaluate import table

sklearn = pytest.importorskip("sklearn.metrics")


def reference(scores, positives):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class without positives
        return sklearn.average_precision_score(positives, scores, average=None)


def cases():
    random = np.random.default_rng(0)
    for clips, classes in ((1, 2), (2, 3), (7, 5), (300, 12)):
        targets = random.random((clips, classes)) < 0.3
        yield f"random {clips}", random.standard_normal((clips, classes)), targets
        yield f"ties {clips}", random.integers(0, 3, (clips, classes)).astype(float), targets
    scores = random.standard_normal((20, 3)).astype(np.float32)
    yield "no positives", scores, np.zeros((20, 3), bool)
    yield "all positives", scores, np.ones((20, 3), bool)
    yield "one class without", scores, np.stack([scores[:, 0] > 0, np.zeros(20, bool), scores[:, 2] > 1], 1)
    yield "all equal", np.zeros((20, 3)), scores > 0
    yield "one clip, positive", np.array([[0.5, -1.0]]), np.array([[True, False]])
    yield "perfect", (scores > 0) * 1.0, scores > 0
    yield "inverted", -scores, scores > 0


@pytest.mark.parametrize("name, scores, targets", [pytest.param(*case, id=case[0]) for case in cases()])
def test_map_is_scikit_learns(name, scores, targets):
    expected = reference(scores, targets)
    found = [average_precision(scores[:, c], targets[:, c]) for c in range(scores.shape[1])]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    names = tuple(map(str, range(scores.shape[1])))
    report = measure(scores, targets.astype(np.float32), names, multi_label=True)
    assert report.main == "mAP" and report.value == pytest.approx(expected.mean(), abs=1e-12)


def test_accuracy_and_classes():
    random = np.random.default_rng(1)
    logits, truth = random.standard_normal((50, 4)), random.integers(0, 3, 50)  # nothing is of class 3
    report = measure(logits, np.eye(4)[truth], ("a", "b", "c", "d"), multi_label=False)
    guess = logits.argmax(1)
    assert report.main == "accuracy" and report.value == sklearn.accuracy_score(truth, guess)
    confusion = sklearn.confusion_matrix(truth, guess, labels=range(4)).astype(float)
    np.testing.assert_allclose(report.confusion[:3], confusion[:3] / confusion[:3].sum(1, keepdims=True))
    assert np.isnan(report.confusion[3]).all() and report.metrics["classes_with_clips"] == 3
    precision, recall, _, count = sklearn.precision_recall_fscore_support(
        truth, guess, labels=range(4), zero_division=0
    )
    for c, row in enumerate(report.classes):
        assert (row["precision"], row["recall"], row["clips"]) == pytest.approx(
            (precision[c], recall[c], count[c])
        )


def test_the_report(tmp_path):
    logits = np.array([[2.0, -1.0], [0.5, 1.0], [-3.0, 0.0]])
    report = measure(logits, np.array([[1, 0], [1, 1], [0, 1]]), ("a, with a comma", "b"), multi_label=True)
    write_report(tmp_path / "new" / "folder", report, "title")
    assert json.loads((tmp_path / "new/folder/metrics.json").read_text())["mAP"] == report.value == 1.0
    with (tmp_path / "new/folder/per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["a, with a comma", "b"] and rows[0]["clips"] == "2"
    assert (tmp_path / "new/folder/confusion.png").read_bytes().startswith(b"\x89PNG")
    shares = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(report.confusion[0], shares[:2].mean(0))


def test_without_matplotlib(tmp_path, monkeypatch, caplog):
    """Numbers are written, and what is missing is said."""
    monkeypatch.setattr("audiomae.finetune.metrics.find_spec", lambda name: None)
    write_report(tmp_path, measure(np.eye(2), np.eye(2), ("a", "b"), multi_label=False), "title")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "per_class.csv"]
    assert "no confusion.png, matplotlib is not installed" in caplog.text


def test_classes_without_clips():
    """Count 0, as published; what the others have is told beside it."""
    logits, targets = np.array([[2.0, -1.0, 0.0], [0.5, 1.0, 0.0]]), np.array([[1, 0, 0], [1, 1, 0]])
    report = measure(logits, targets, ("a", "b", "c"), multi_label=True)
    assert report.metrics["mAP"] == pytest.approx(2 / 3) and report.metrics["classes_with_clips"] == 2
    assert report.metrics["mAP_of_classes_with_clips"] == 1.0
    assert "1 of them without a clip here, which count 0: 1.0000 without them" in table({"": report}, "title")
    none = measure(logits, 0 * targets, ("a", "b", "c"), multi_label=True)
    assert none.metrics["mAP_of_classes_with_clips"] == 0.0


@pytest.mark.parametrize(
    "logits, targets, sentence",
    [
        (np.zeros((0, 2)), np.zeros((0, 2)), "and a clip"),
        (np.zeros((3, 2)), np.zeros((2, 2)), "expected two equal shapes"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), "gives NaN or infinity"),
    ],
)
def test_refusals(logits, targets, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure(logits, targets, ("a", "b"), multi_label=True)
