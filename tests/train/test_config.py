"""Settings: recipes, files and the command line; what is wrong is refused before anything is loaded."""

import dataclasses
import itertools
import math
import sys

import pytest
import yaml
from pretraining import make_clips, tiny

import audiomae.train
from audiomae import create_model
from audiomae.cli import main
from audiomae.data import Augment
from audiomae.train import RECIPES, TrainConfig, pretrain
from audiomae.train.command import parse
from audiomae.train.loop import Plateau, schedule

pytestmark = pytest.mark.usefixtures("one_thread")

NEEDED = ["--model", "audiomae_small", "--data", "x", "--out", "y", "--steps", "5"]


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        parse([*arguments, "--print-config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_config_round_trip(capsys, tmp_path):
    arguments = [
        *NEEDED,
        "--data",
        "z",
        "--data-weight",
        "1",
        "--data-weight",
        "0.5",
        "--betas",
        "[0.8, 0.9]",
    ]
    arguments += [
        "--augment.gain",
        "6",
        "--model-overrides",
        "{frames: 64, patch: [8, 8]}",
        "--clip-grad",
        "3",
    ]
    config = parse(arguments)
    assert config.data == ["x", "z"] and config.data_weight == [1.0, 0.5] and config.betas == (0.8, 0.9)
    assert config.augment == Augment(gain=6.0) and config.model_overrides == {"frames": 64, "patch": [8, 8]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(printed(capsys, *arguments)))
    assert parse(["--config", str(tmp_path / "run.yaml")]) == config
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    other = parse(
        [
            "--config",
            str(tmp_path / "run.yaml"),
            "--data",
            "w",
            "--data",
            "v",
            "--batch-size",
            "3",
            "--resume",
        ]
    )
    changed = {
        f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(other, f.name)
    }
    assert changed == {"data", "batch_size", "resume"} and other.data == ["w", "v"]


def test_the_configuration_beside_the_checkpoints(tmp_path):
    config = tiny(make_clips(tmp_path / "clips"), tmp_path / "run", steps=1, augment=Augment(noise=(10, 20)))
    pretrain(config)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert TrainConfig.from_dict(written) == config
    again = parse(["--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")])
    assert dataclasses.replace(again, out=config.out) == config


def test_defaults_recipe_file_and_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("recipe: mae_ast_patch_base.as_ls\nbatch_size: 7\nclip_grad: 2.5\ndata: [x]\nout: y\n")
    config = parse(["--clip-grad", "4", "--config", str(file)])  # the line's order says nothing
    assert (config.clip_grad, config.batch_size, config.weight_decay, config.keep) == (4.0, 7, 0.01, 3)
    # One of two that exclude each other replaces the recipe's.
    config = parse(["--config", str(file), "--base-lr", "1e-3", "--epochs", "2"])
    assert (config.lr, config.base_lr, config.steps, config.epochs) == (None, 1e-3, None, 2.0)
    other = tmp_path / "other.yaml"
    other.write_text("batch_size: 8\nkeep: 1\nresume: true\n")
    config = parse(["--config", str(file), "--config", str(other), "--keep", "2", "--no-resume"])
    assert (config.batch_size, config.clip_grad, config.keep, config.resume) == (8, 2.5, 2, False)


def test_the_command_line_replaces_the_other_way_of_saying_it(tmp_path):
    """What a file says with one of two that exclude each other; both on one level are refused."""
    file = tmp_path / "run.yaml"
    pairs = [("epochs", "steps"), ("lr", "base_lr"), ("warmup_epochs", "warmup_steps")]
    for one, other in (*pairs, *(pair[::-1] for pair in pairs)):
        file.write_text(f"{one}: 2\n" + ("steps: 3\n" if "s" not in one[-2:] else ""))
        words = [*NEEDED[:6], "--config", str(file), f"--{other.replace('_', '-')}", "4"]
        words += ["--steps", "5"] if "warmup" in one else []
        config = parse(words)
        assert (getattr(config, one), getattr(config, other)) == (None, 4)


def test_fields_of_a_recipe_that_are_not_given_stay(tmp_path):
    """Of the model's configuration and of the augmentation."""
    words = ["--recipe", "ssast_patch_base.as_ls", "--data", "x", "--val-data", "z", "--out", "y"]
    more = ["--model-overrides", "{frames: 64, dropout: 1e-1}", "--model-overrides", "{frames: 32}"]
    assert parse([*words, *more]).model_overrides == {"passes": 2, "frames": 32, "dropout": 0.1}
    more += ["--model-overrides.frames", "48", "--model-overrides.patch", "[8, 8]"]
    assert parse([*words, *more]).model_overrides == {
        "passes": 2, "frames": 48, "dropout": 0.1, "patch": [8, 8],
    }  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text("model_overrides: {frames: 64, mask_ratio: 5e-1}\naugment: {noise: [10, 20]}\n")
    config = parse([*words, "--config", str(file), "--model-overrides", "{frames: 32, passes: 1}"])
    assert config.model_overrides == {"passes": 1, "frames": 32, "mask_ratio": 0.5}
    words = ["--recipe", "audiomae_base.as2m", "--data", "x", "--out", "y", "--config", str(file)]
    assert parse(words).augment == Augment(upstream_roll_mag=True, noise=(10, 20))
    assert RECIPES["audiomae_base.as2m"]["augment"] == Augment(upstream_roll_mag=True)
    # The paper's gain and roll replace the released code's, which would leave them out.
    assert parse([*words, "--augment.gain", "6"]).augment == Augment(gain=6, noise=(10, 20))
    file.write_text("augment: {gain: 6, roll: true}\n")
    released = [*words, "--augment.upstream_roll_mag", "true"]
    assert parse(released).augment == Augment(upstream_roll_mag=True)


#: From the specification of the published systems.
PUBLISHED = {
    "audiomae_base.as2m": {"betas": (0.9, 0.95), "weight_decay": 1e-4, "base_lr": 2e-4, "epochs": 33}
    | {"warmup_epochs": 3, "min_lr": 0, "schedule": "cosine", "precision": "fp16", "clip_grad": None}
    | {"batch_size": 8, "optimizer": "adamw", "augment": Augment(upstream_roll_mag=True)},
    "mae_ast_patch_base.as_ls": {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01, "lr": 1e-4}
    | {"schedule": "linear", "warmup_steps": 32000, "clip_grad": 10, "precision": "fp16", "seed": 1337},
    "ssast_patch_base.as_ls": {"betas": (0.95, 0.999), "weight_decay": 5e-7, "lr": 1e-4, "batch_size": 24}
    | {"epochs": 10, "warmup_steps": 1000, "val_every": 4000, "precision": "fp32", "optimizer": "adam"},
}
PUBLISHED["mae_ast_frame_base.as_ls"] = PUBLISHED["mae_ast_patch_base.as_ls"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_settings(name):
    config = parse(["--recipe", name, "--data", "a", "--data", "b", "--val-data", "c", "--out", "o"])
    config.check()
    for setting, value in PUBLISHED[name].items():
        assert getattr(config, setting) == value, setting
    assert config.model == name.split(".")[0]
    if name.startswith("audiomae"):
        assert config.learning_rate(processes=64) == pytest.approx(4e-4)
        batches = 4000
        assert (config.total_steps(batches), config.warmup(batches)) == (33 * batches, 3 * batches)
    model = create_model(config.model, depth=1, **config.model_overrides).config
    ratio = {"audiomae": 0.8, "mae_ast": 0.75, "ssast": 400 / 512}[model.family]
    assert model.mask_ratio == ratio and getattr(model, "passes", 2) == 2


def test_schedules():
    """Per step; the warm-up begins at 0 and reaches the highest rate, half a cosine ends at the lowest."""
    rates = [schedule("cosine", step, 33, 3, 1.0, 0.1) for step in range(34)]
    assert (
        rates[:4] == [0, 1 / 3, 2 / 3, 1]
        and rates[18] == pytest.approx(0.55)
        and rates[33] == pytest.approx(0.1)
    )
    assert all(one > other for one, other in itertools.pairwise(rates[3:]))
    linear = [schedule("linear", step, 10, 2, 1.0, 0.0) for step in range(11)]
    assert linear[2:] == pytest.approx([1 - i / 8 for i in range(9)])
    assert schedule("constant", 9, 10, 2, 1.0, 0.0) == 1
    plateau = Plateau()
    for loss in (3.0, 2.0, 2.0, 2.0, 2.0, 1.9, 1.9, 1.9):
        plateau.update(loss)
    assert (plateau.factor, plateau.best, plateau.bad) == (0.5, 1.9, 2)
    plateau.update(math.nan)
    assert plateau.factor == 0.25


def test_help_describes_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch-size", "two"], "--batch-size is 'two', but a whole number was expected"),
        (["--steps=two"], "--steps is 'two', but a whole number was expected"),
        (["--lr", "fast"], "--lr is 'fast', but a number was expected"),
        (["--precision", "fp8"], "one of fp32, bf16, fp16 was expected; did you mean fp32"),
        (["--recipe", "audiomae_base.as3m"], "did you mean audiomae_base.as2m"),
        (["--data-weight", "much"], "--data-weight is 'much', but a number was expected"),
        (["--betas", "3"], "--betas is '3', but a list such as [1, 2] was expected"),
        (["--model-overrides", "{a: "], "but a mapping such as {name: value} was expected"),
        (["--step", "3"], "there is no option --step; did you mean --steps"),
        (["--sing"], "there is no option --sing"),
        (["stray"], "'stray' belongs to no option"),
        (["--keep"], "--keep: expected one argument"),
        (["--augment.loud", "1"], "there is no option --augment.loud; did you mean --augment."),
        (["--augment.gain", "x"], "--augment.gain is 'x', but a number was expected"),
        (["--augment.gain", "-1"], "decibels of at least 0 were expected"),
        (["--augment.gain", "3", "--augment.upstream_roll_mag", "true"], "give one or the other"),
        (["--conf", "x.yaml"], "there is no option --conf; did you mean --config"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read: No such file"),
        (["--epochs", "2"], "--steps and --epochs say the same in two ways: give one"),
        (["--batch-size", "0"], "--batch-size is 0, but a whole number of at least 1"),
    ],
)
def test_wrong_command_lines(run, arguments, sentence):
    """One sentence, and exit status 2."""
    status, out, err = run("pretrain", *NEEDED, *arguments)
    assert status == 2 and not out and sentence in err
    assert err.startswith("audiomae pretrain: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("batch_sise: 4", "there is no setting 'batch_sise'; did you mean batch_size?"),
        ("batch_size: 4.5", "batch_size is '4.5', but a whole number was expected"),
        ("augment: {volume: 3}", "there is no setting 'augment.volume'; did you mean augment."),
        ("augment: 3", "augment is 3, but a mapping"),
        ("data: x", "data is 'x', but a list was expected"),
        ("resume: maybe", "resume is 'maybe', but true or false was expected"),
        ("steps: 3\nepochs: 2", "--steps and --epochs say the same in two ways"),
        ("a: [b", "is no YAML file"),
        ("", "it should hold settings"),
        ("- steps", "it should hold settings"),
    ],
)
def test_wrong_files(run, tmp_path, content, sentence):
    (tmp_path / "run.yaml").write_text(content + "\n")
    status, out, err = run("pretrain", "--config", tmp_path / "run.yaml")
    assert status == 2 and not out and sentence in err and ("run.yaml" in err or "two ways" in err)
    assert err.startswith("audiomae pretrain: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": None}, "no --model"),
        ({"data": []}, "no --data"),
        ({"out": None}, "no --out"),
        ({"steps": None}, "--steps or --epochs"),
        ({"epochs": 2.0}, "--steps and --epochs"),
        ({"lr": 1e-3, "base_lr": 1e-3}, "--lr and --base-lr"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"save_every": 0}, "--save-every is 0"),
        ({"lr": math.nan}, "--lr is nan"),
        ({"betas": (0.9, 1.0)}, "--betas"),
        ({"data_weight": [1.0, 2.0]}, "1 --data and 2 --data-weight"),
        ({"mean": -4.0}, "--mean and --std"),
        ({"schedule": "plateau"}, "give --val-data"),
    ],
)
def test_refused_before_work(settings, sentence):
    config = TrainConfig(**{"model": "audiomae_small", "data": ["x"], "out": "y", "steps": 5, **settings})
    with pytest.raises(ValueError, match=sentence):
        config.check()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data": ["nowhere"]}, "nowhere: no such file or folder"),
        ({"model": "audiomae_bse"}, "audiomae_bse"),
        ({"model_overrides": {"decoder": "none"}}, "without a decoder"),
        ({"model_overrides": {"dept": 1}}, "no field 'dept'; did you mean depth"),
        ({"device": "gpu"}, "--device gpu cannot be used"),
        ({"batch_size": 13}, "does not fill one batch of 13"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, settings, sentence):
    clips = make_clips(tmp_path / "clips")
    settings = dict(settings)
    overrides = settings.pop("model_overrides", None)
    data = settings.pop("data", None)
    name = settings.pop("model", None)
    config = tiny(clips, tmp_path / "run", overrides=overrides, **settings)
    config = dataclasses.replace(config, data=data or config.data, model=name or config.model)
    with pytest.raises((ValueError, OSError), match=sentence):
        pretrain(config)
    assert not (tmp_path / "run").exists()


def test_without_the_training_extra(monkeypatch, capsys):
    """One sentence, and the other commands work."""
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "audiomae.train.command")
    monkeypatch.delattr(audiomae.train, "command")
    assert main(["pretrain", "--steps", "3"]) == 1
    err = capsys.readouterr().err
    assert "pip install 'audiomae[train]'" in err and err.count("\n") == 1
    with pytest.raises(SystemExit, match="0"):
        main(["embed", "--help"])
