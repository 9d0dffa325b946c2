"""Recipes are the published settings; mistakes on the command line are one sentence, before anything is loaded."""

import json

import labelled
import pytest
import yaml
from cli_cases import MAE_AST
from labelled import TINY, run

import audiomae
from audiomae.finetune import RECIPES, TASKS, EvaluateConfig, TuneConfig
from audiomae.finetune.command import run_finetune
from audiomae.train.command import parse

#: Global batch, base rate or rate, epochs or steps, warm-up epochs, SpecAugment, mixup, noise, loss, masks.
AUDIOMAE = {
    "as20k": (32, 1e-3, 60, 4, (192, 48), 0.5, None, "bce", 0.3),
    "as20k_released": (32, 1e-3, 60, 4, (192, 48), 0.5, None, "bce", 0.2),
    "as2m": (512, 2e-4, 100, 20, (192, 48), 0.5, None, "bce", 0.3),
    "as2m_released": (256, 2e-4, 100, 10, (192, 48), 0.5, None, "bce", 0.2),
    "esc50": (64, 1e-3, 60, 4, (96, 24), 0.0, None, "ce", 0.3),
    "esc50_released": (64, 1e-3, 60, 4, (96, 24), 0.0, None, "ce", 0.0),
    "spc2": (256, 1e-3, 60, 4, (48, 48), 0.5, 20, "bce", 0.3),
    "spc2_released": (256, 1e-3, 60, 4, (48, 48), 0.5, "released", "bce", 0.0),
    "spc1": (256, 1e-3, 10, 1, (48, 48), 0.5, 20, "bce", 0.3),
    "spc1_released": (256, 1e-3, 10, 1, (48, 48), 0.5, "released", "bce", 0.0),
    "voxceleb1": (64, 1e-3, 60, 4, (192, 48), 0.0, 20, "ce", 0.3),
    "voxceleb1_released": (64, 1e-3, 60, 4, (192, 48), 0.0, "released", "ce", 0.0),
}


def of(name):
    return TuneConfig.from_dict({**TuneConfig.of_recipe(name), "data": ["x"], "out": "y", "pretrained": "z"})


@pytest.mark.parametrize("name", AUDIOMAE)
def test_audiomae(name):
    batch, rate, epochs, warmup, spec_augment, mixup, noise, loss, masks = AUDIOMAE[name]
    c = of(f"audiomae.{name}")
    assert c.batch_size * c.accumulate == batch and (c.base_lr, c.lr) == (rate, None)
    assert (c.epochs, c.warmup_epochs, c.schedule, c.min_lr) == (epochs, warmup, "cosine", 1e-6)
    assert (c.spec_augment, c.augment.mixup, c.spectrogram_noise, c.loss) == (
        spec_augment,
        mixup,
        noise,
        loss,
    )
    assert (c.mask_time, c.mask_freq, c.layer_decay, c.drop_path) == (masks, masks, 0.75, 0.1)
    released = name.endswith("_released")
    assert (c.optimizer, c.betas) == ("adamw", (0.9, 0.999) if released else (0.9, 0.95))
    assert c.weight_decay == (5e-4 if released and name.startswith("as2") else 1e-4)
    assert (c.augment.upstream_roll_mag, c.augment.roll, c.augment.gain) == (released, not released, 0.0)
    drawn = (True, released, 200_000) if name.startswith("as2m") else (False, False, None)
    assert (c.balanced, c.replacement, c.epoch_clips) == drawn
    assert c.repeat_classes == (0.5 if name.startswith("spc1") else None)


@pytest.mark.parametrize("name", ["as20k", "esc50", "spc2"])
def test_ssast_and_mae_ast_after_it(name):
    rate, epochs, batch, spec_augment, mixup, noise, loss, decay = {
        "as20k": (5e-5, 25, 12, (192, 48), 0.5, None, "bce", (0.5, 10, 5)),
        "esc50": (1e-4, 50, 48, (96, 24), 0.0, "released", "ce", (0.85, 6, 1)),
        "spc2": (2.5e-4, 30, 128, (48, 48), 0.6, "released", "bce", (0.85, 6, 1)),
    }[name]
    c, other = of(f"ssast.{name}"), of(f"mae_ast.{name}")
    assert (c.lr, c.epochs, c.batch_size, c.spec_augment, c.loss) == (rate, epochs, batch, spec_augment, loss)
    assert (c.augment.mixup, c.spectrogram_noise, c.schedule, c.step_decay) == (mixup, noise, "step", decay)
    assert c.average_from == (6 if name == "as20k" else None)
    assert c.model_overrides == {"stride": [10, 10]} and other.model_overrides == {}
    assert {**c.to_dict(), "model_overrides": {}, "recipe": ""} == {**other.to_dict(), "recipe": ""}


@pytest.mark.parametrize(
    "name, rate, batch, accumulate, steps",
    [("spc1", 1e-5, 512, 1, 10_000), ("voxceleb1", 1e-4, 4, 4, 60_000), ("iemocap", 1e-4, 6, 5, 3_000)],
)
def test_mae_ast_in_superb(name, rate, batch, accumulate, steps):
    c = of(f"mae_ast.{name}")
    assert (c.lr, c.batch_size, c.accumulate, c.steps, c.epochs) == (rate, batch, accumulate, steps, None)
    assert (c.optimizer, c.layer_decay, c.loss, c.schedule) == ("adam", 1.0, "ce", "constant")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid(name):
    c = of(name)
    c.fold = "1" if TASKS[c.task].folds else None
    c.check()
    assert TuneConfig.from_dict(yaml.safe_load(yaml.safe_dump(c.to_dict()))) == c


@pytest.mark.parametrize("task", [name for name in TASKS if name != "custom"])
def test_a_task_brings_its_recipe(task):
    c = parse(
        ["--task", task, "--data", "x", "--out", "y", "--lr", "0.5", "--steps", "7", "--pretrained", "p"]
        + ["--fold", "1"] * bool(TASKS[task].folds),
        TuneConfig,
        "finetune",
        "",
    )
    assert c.recipe == ("mae_ast.iemocap" if task == "iemocap" else f"audiomae.{task}")
    assert (c.lr, c.base_lr, c.steps, c.epochs) == (0.5, None, 7, None)
    assert c.batch_size == RECIPES[c.recipe]["batch_size"]


def test_classes_are_balanced_in_one_way():
    """The command line's takes the place of the recipe's."""
    words = ["--data", "x", "--out", "y", "--pretrained", "p", "--task"]
    c = parse([*words, "spc1", "--balanced", "--replacement"], TuneConfig, "finetune", "")
    assert (c.balanced, c.replacement, c.repeat_classes) == (True, True, None)
    c = parse([*words, "as2m", "--repeat-classes", "0.5"], TuneConfig, "finetune", "")
    assert (c.balanced, c.epoch_clips, c.repeat_classes) == (False, None, 0.5)


def test_weights_are_averaged_in_one_way():
    words = ["--data", "x", "--out", "y", "--pretrained", "p", "--task", "as20k", "--recipe", "ssast.as20k"]
    c = parse([*words, "--ema", "0.9"], TuneConfig, "finetune", "")
    assert (c.ema, c.average_from) == (0.9, None)


def test_tasks_that_are_none_in_python():
    for check in (
        TuneConfig(task="esc51", data=["x"], out="y", pretrained="z", steps=1).check,
        EvaluateConfig(model="x", task="esc51").check,
    ):
        with pytest.raises(ValueError, match="there is no task 'esc51'; did you mean esc50"):
            check()


def test_defaults_recipe_file_and_command_line(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "task: spc2\nrecipe: ssast.spc2\nbatch_size: 7\nspec_augment: [3, 4]\nlabel_smoothing: 0.2\n"
        "data: [x]\nout: y\npretrained: p\nmodel_overrides: {patch: [8, 8]}\n"
    )
    words = [
        "--config",
        str(file),
        "--spectrogram-noise",
        "null",
        "--label-smoothing",
        "0.3",
        "--mask-time",
        "0.1",
        "--loss",
        "ce",
    ]
    c = parse(words, TuneConfig, "finetune", "")
    assert (c.task, c.batch_size, c.spec_augment, c.label_smoothing) == ("spc2", 7, (3, 4), 0.3)
    assert (c.mask_time, c.loss, c.lr, c.average_from) == (0.1, "ce", 2.5e-4, None)
    assert c.model_overrides == {"stride": [10, 10], "patch": [8, 8]} and c.spectrogram_noise is None
    with pytest.raises(SystemExit) as stop:
        parse([*words, "--print-config"], TuneConfig, "finetune", "")
    assert stop.value.code == 0
    file.write_text(capsys.readouterr().out)
    assert parse(["--config", str(file)], TuneConfig, "finetune", "") == c
    evaluation = parse(["--model", "m", "--fold", "all", "--split", "val"], EvaluateConfig, "evaluate", "")
    assert evaluation == EvaluateConfig(model="m", fold="all", split="val")


GOOD = ["--task", "custom", "--data", "x", "--out", "y", "--steps", "1", "--model", "audiomae_small"]
MISTAKES = [
    (["--task", "esc50"], "has folds 1 to 5: give --fold with one of them, or --fold all"),
    (["--fold", "1"], "custom data has no folds: leave --fold out"),
    (["--mask-time", "1"], "--mask-time is 1.0, but a share in"),
    (["--label-smoothing", "-0.1"], "--label-smoothing is -0.1, but a share in"),
    (["--layer-decay", "0"], "--layer-decay is 0.0, but a factor"),
    (["--spec-augment", "[-1, 4]"], "--spec-augment is (-1, 4), but two widths"),
    (["--step-decay", "[0.5, 1, 0]"], "--step-decay is (0.5, 1.0, 0.0), but a factor"),
    (["--ema", "1"], "--ema is 1.0, but a decay in"),
    (["--ema", "0.9", "--average-from", "3"], "give one of them"),
    (["--ema", "0.9", "--fsdp"], "averages of the weights are not kept under --fsdp"),
    (["--repeat-classes", "2"], "--repeat-classes is 2.0, but a share in"),
    (["--repeat-classes", "0.5", "--balanced"], "balance classes in two ways: give one of them"),
    (
        ["--spectrogram-noise", ".inf"],
        "--spectrogram-noise is inf, but a ratio in decibels, released or null",
    ),
    (["--epoch-clips", "5"], "say how --balanced draws clips: add it"),
    (["--frames", "0"], "--frames is 0, but a whole number of at least 1"),
    (["--batch-size", "0"], "--batch-size is 0, but a whole number of at least 1"),
    (["--pretrained", "audiomae_small"], "names an untrained model: give it as --model"),
    (["--recipe", "audiomae.esc5"], "there is no recipe 'audiomae.esc5'; did you mean"),
    ([], "x: is neither a folder nor a CSV file. Custom data are a folder with a folder of recordings"),
]


@pytest.mark.parametrize("words, sentence", MISTAKES, ids=[" ".join(m[0]) or "no data" for m in MISTAKES])
def test_mistakes(tmp_path, monkeypatch, run, words, sentence):
    """Status 2 for what the words alone say, 1 for what the disk says."""
    monkeypatch.chdir(tmp_path)
    status, _, error = run("finetune", *GOOD, *words)
    assert status == (2 if words else 1)
    assert error.startswith("audiomae finetune: ") and sentence in error and "Traceback" not in error
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    "words", [["--task", "esc51"], ["--loss", "mse"], ["--fold", "6"], ["--mask-tim", "0.1"]]
)
def test_words_that_are_none(words, capsys):
    with pytest.raises(SystemExit) as stop:
        run_finetune([*GOOD, *words])
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_what_is_missing(tmp_path, run):
    for left_out, sentence in (
        ("--task", "there is no --task: name a task"),
        ("--model", "nothing to fine-tune"),
    ):
        i = GOOD.index(left_out)
        status, _, error = run("finetune", *GOOD[:i], *GOOD[i + 2 :])
        assert status == 2 and sentence in error
    status, _, error = run("evaluate")
    assert status == 2 and "there is no --model" in error
    nothing = tmp_path / "nothing"
    status, _, error = run("evaluate", "--model", nothing, "--task", "custom", "--data", tmp_path)
    assert status == 1 and "there is no file or folder" in error


def test_evaluate_of_a_run_of_pre_training(run, tmp_path):
    """It has come to its end, and has no classes."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    audiomae.create_model("audiomae_small", **TINY).save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("model: audiomae_small\nsteps: 3\npicture_every: 0\n")
    words = ["--task", "custom", "--data", labelled.class_folders(tmp_path / "x")]
    status, _, error = run("evaluate", "--model", tmp_path / "run", *words)
    assert status == 1 and "which has no classes yet: fine-tune it first" in error


def test_a_model_that_the_weights_are_not(run, checkpoints, tmp_path):
    """--model beside --pretrained is what the weights must be."""
    words = ["--task", "custom", "--data", labelled.class_folders(tmp_path / "x"), "--out", tmp_path / "y"]
    words += ["--steps", 1, "--pretrained", checkpoints["ssast_patch"], "--model", "audiomae_small"]
    status, _, error = run("finetune", *words)
    assert status == 1 and "have family='ssast', but the wanted model has 'audiomae'" in error
    assert error.count("\n") == 1 and not (tmp_path / "y").exists()


def test_published_weights_of_mae_ast(run, checkpoints, tmp_path):
    """Their tensors do not say which model it is: --model does."""
    words = ["--task", "custom", "--data", labelled.class_folders(tmp_path / "x"), "--out", tmp_path / "y"]
    words += ["--steps", 1, "--batch-size", 4, "--frames", 48, "--workers", 0, "--device", "cpu"]
    words += ["--pretrained", checkpoints["mae_ast"]]
    status, _, error = run("finetune", *words)
    assert status == 1 and "to finetune: --model mae_ast_patch_base or mae_ast_frame_base" in error
    sizes = json.dumps({name: MAE_AST[name] for name in ("width", "depth", "heads")})
    status, _, error = run("finetune", *words, "--model", "mae_ast_patch_base", "--model-overrides", sizes)
    assert status == 0, error
    record = audiomae.load(tmp_path / "y").record
    assert record.settings["pretrained"] == checkpoints["mae_ast"].name
    assert str(tmp_path.parent) not in (tmp_path / "y/model/README.md").read_text()


def test_a_run_is_not_written_over(tmp_path, capsys):
    words = [
        "--task",
        "custom",
        "--data",
        labelled.class_folders(tmp_path / "x"),
        "--out",
        tmp_path / "y",
        "--steps",
        1,
    ]
    words += [
        "--model",
        "audiomae_small",
        "--model-overrides",
        json.dumps(TINY),
        "--frames",
        48,
        "--workers",
        0,
    ]
    assert run("finetune", *words, "--batch-size", 4) == 0
    assert run("finetune", *words, "--batch-size", 4) == 1
    assert "holds a run already: go on with it with --resume" in capsys.readouterr().err
