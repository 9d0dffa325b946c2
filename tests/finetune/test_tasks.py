"""Every task on a tiny data set in the real one's layout: fine-tuned, evaluated, interrupted, resumed, evaluated."""

import csv
import json
import os
import shutil
import signal

import labelled
import pytest
from labelled import run, settings_of, small
from pretraining import assert_same_bits, state_of

import audiomae
from audiomae.finetune import RECIPES, TASKS, Tuner
from audiomae.train import Checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

#: task: (builder, words, clips of the test split, labels)
CASES = {
    "as20k": (labelled.audioset, [], 5, 4),
    "as2m": (lambda root: labelled.audioset(root, full=True), ["--epoch-clips", "12"], 5, 4),
    "esc50": (labelled.esc50, ["--fold", "2"], 5, 5),
    "spc2": (lambda root: labelled.speech_commands(root, 2), [], 35, 35),
    "spc1": (lambda root: labelled.speech_commands(root, 1), [], 12, 12),
    "voxceleb1": (labelled.voxceleb1, [], 6, 3),
    "iemocap": (labelled.iemocap, ["--fold", "5"], 10, 4),
    "custom": (labelled.class_folders, [], 3, 3),
    "custom-csv": (labelled.csv_file, [], 3, 3),
}
MODELS = {"audiomae": "audiomae_small", "mae_ast": "mae_ast_patch_base", "ssast": "ssast_patch_tiny"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> the data set, written once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = CASES[name][0](tmp_path_factory.mktemp(name) / "data")
        return made[name]

    return folder


@pytest.fixture
def signalled(monkeypatch):
    """Sends this process SIGTERM in the middle of a step; -1 no more."""
    whole = Tuner._step

    def signalled(step):

        def interrupted(self, micro):
            if self.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            whole(self, micro)

        monkeypatch.setattr(Tuner, "_step", interrupted)

    yield signalled
    monkeypatch.undo()


#: What they have of their own, other recipes have too.
VARIANTS = [f"audiomae.{task}_released" for task in ("esc50", "spc2", "spc1", "voxceleb1")]


@pytest.mark.parametrize(
    "recipe",
    [*(name for name in RECIPES if name not in VARIANTS), "custom", "custom-csv"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def test_tune_evaluate_interrupt_resume_evaluate(folders, tmp_path, signalled, capsys, recipe):
    """Each published recipe, but for the steps, the batch and the size of the model."""
    case = RECIPES[recipe]["task"] if recipe in RECIPES else recipe
    _, words, clips, classes = CASES[case]
    name, task = case, case.split("-")[0]
    words = ["--task", task, "--frames", "48", *words]
    if recipe in RECIPES:
        words += ["--recipe", recipe, "--model", MODELS[recipe.split(".")[0]]]
    if recipe.endswith("st.as20k"):
        words += ["--average-from", "1"]
    if recipe.startswith("ssast"):
        words += ["--model-overrides", json.dumps(labelled.TINY | {"stride": [10, 10]})]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*small(folders(name), whole, *words)) == 0
    capsys.readouterr()
    metrics = json.loads((whole / "test" / "metrics.json").read_text())
    assert (metrics["clips"], metrics["classes"]) == (clips, classes)

    signalled(1)
    assert run(*small(folders(name), parts, *words, "--resume")) == 0
    assert "asked to end (SIGTERM) at step 2" in capsys.readouterr().out
    assert not (parts / "model").exists() and Checkpoints(parts / "checkpoints").latest().step == 2
    assert run("evaluate", "--model", parts) == 1
    assert "has not come to its end" in capsys.readouterr().err
    signalled(-1)
    assert run(*small(folders(name), parts, *words, "--resume")) == 0
    assert_same_bits(state_of(parts, 4), state_of(whole, 4))
    models = [audiomae.load(out / "model") for out in (parts, whole)]
    assert_same_bits(*(model.state_dict() for model in models))
    assert len(models[0].config.frontend.labels) == classes

    shutil.rmtree(parts / "test")
    for out in (parts, parts / "model"):
        assert run("evaluate", "--model", out, "--workers", 0, "--device", "cpu", "--batch-size", 3) == 0
    assert TASKS[task].title in capsys.readouterr().out
    again = json.loads((parts / "test" / "metrics.json").read_text())
    assert again == pytest.approx(metrics, abs=1e-6)
    with (parts / "test" / "per_class.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == list(models[0].config.frontend.labels)
    assert (parts / "test" / "confusion.png").stat().st_size > 1000


def test_all_folds(folders, tmp_path, capsys, caplog, signalled):
    """A run for each, their mean; one that was interrupted goes on."""
    out = tmp_path / "run"
    words = small(
        folders("esc50"), out, "--task", "esc50", "--frames", 48, "--fold", "all", "--resume", steps=2
    )
    signalled(1)
    assert run(*words) == 0 and not (out / "test").exists()
    signalled(-1)
    caplog.clear()
    assert run(*words) == 0
    assert caplog.text.count("25 of 2,000 for five folds") == 1  # and not for each fold
    found = json.loads((out / "test" / "metrics.json").read_text())
    assert list(found["folds"]) == list("12345") and found["metric"] == "accuracy"
    assert found["mean"] == pytest.approx(sum(found["folds"].values()) / 5)
    assert settings_of(out / "fold-3")["fold"] == "3"
    capsys.readouterr()
    assert (
        run("evaluate", "--model", out, "--workers", 0, "--device", "cpu", "--out", tmp_path / "again") == 0
    )
    assert "mean    accuracy" in capsys.readouterr().out
    assert json.loads((tmp_path / "again" / "metrics.json").read_text()) == found
    assert (tmp_path / "again" / "fold-4" / "per_class.csv").exists()
    assert run("evaluate", "--model", out, "--fold", 2, "--workers", 0, "--device", "cpu") == 0
    assert "fold 2" in capsys.readouterr().out
    assert json.loads((out / "test" / "metrics.json").read_text()) == found  # those of all folds stay
    assert (out / "fold-2" / "test" / "per_class.csv").exists()
    assert run("evaluate", "--model", out / "fold-1", "--fold", 2) == 1
    assert "was trained with fold 1 left out" in capsys.readouterr().err
    (out / "fold-3").rename(tmp_path / "elsewhere")
    assert run("evaluate", "--model", out) == 1
    assert "has no fold 3 yet, and the mean is of 5" in capsys.readouterr().err
    assert run("evaluate", "--model", out / "fold-1", "--fold", "all") == 1
    assert "needs the folder of a run of all folds" in capsys.readouterr().err
