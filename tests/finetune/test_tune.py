"""What a step and a run of fine-tuning are: rates by layer, losses, averaged weights, the weights that are kept."""

import io
import json
import logging
import os
import shutil
import signal
from pathlib import Path

import labelled
import pytest
import torch
import torch.nn.functional as F
from labelled import TINY, run
from pretraining import assert_same_bits, state_of, torchrun

import audiomae
from audiomae.data import Augment, smooth
from audiomae.finetune import TASKS, EvaluateConfig, TuneConfig, Tuner, evaluate, finetune
from audiomae.finetune.loop import layer_of
from audiomae.train import Checkpoints
from audiomae.train.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of three classes, and a CSV with several labels a clip."""
    folder = tmp_path_factory.mktemp("data")
    return {"one": labelled.class_folders(folder / "one"), "many": labelled.csv_file(folder / "many")}


def config(data, out, **settings):
    """A run of 6 steps of 4 clips; an epoch has 6 steps with one label a clip, 3 with several."""
    defaults = {
        "model": "audiomae_small",
        "model_overrides": TINY,
        "task": "custom",
        "frames": 48,
        "steps": 6,
    }
    defaults |= {
        "batch_size": 4,
        "lr": 3e-3,
        "warmup_steps": 1,
        "workers": 0,
        "log_every": 1,
        "device": "cpu",
    }
    if settings.get("pretrained"):
        del defaults["model"], defaults["model_overrides"]
    return TuneConfig(data=[str(data)], out=str(out), **{**defaults, **settings})


def tuner(*arguments, **settings):
    with Processes("cpu") as processes:
        return Tuner(config(*arguments, **settings), processes)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


# -- a step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["audiomae_small", "mae_ast_patch_base", "ssast_patch_tiny"])
def test_rates_by_layer(data, tmp_path, model):
    """Each parameter once: 0.75 per layer from the head down, and what the published recipes do not decay."""
    made = tuner(data["one"], tmp_path / "run", model=model, weight_decay=0.1)
    found = {}
    for group in made.optimizer.param_groups:
        for parameter in group["params"]:
            found[parameter] = (group["lr_scale"], group["weight_decay"])
    named = dict(made.model.named_parameters())
    assert found.keys() == set(named.values())
    scales = {name: found[p][0] for name, p in named.items()}
    assert scales["head.weight"] == scales["fc_norm.bias"] == 1.0
    assert scales["encoder.blocks.1.attn.qkv.weight"] == 0.75
    assert scales["encoder.blocks.0.mlp.fc1.bias"] == 0.75**2
    lowest = {"patch_embed.weight", "patch_embed.bias", "prefix", "positions.table", "input_norm.0.weight"}
    lowest = {"encoder." + name for name in lowest} & scales.keys()
    assert {name for name, scale in scales.items() if scale == 0.75**3} >= lowest
    undecayed = {name for name, p in named.items() if found[p][1] == 0.0}
    whole = {"encoder.prefix", "encoder.positions.table"} & named.keys()
    assert undecayed == {name for name, p in named.items() if p.ndim == 1} | whole
    assert ("encoder.positions.table" in whole) == (model == "ssast_patch_tiny")
    made._restart_interval()
    made.step = 3
    made._step([next(made._batches())])
    for group in made.optimizer.param_groups:
        assert group["lr"] == made.rate * group["lr_scale"] and made.rate > 0


def test_layers_of_a_model_of_twelve_blocks():
    model = audiomae.create_classifier("audiomae_base", 5, depth=12, width=64, heads=2)
    layers = [layer_of(name, model.config) for name, _ in model.named_parameters()]
    assert set(layers) == set(range(14)) and layer_of("encoder.norm.weight", model.config) == 13


LOSSES = {
    ("one", None): lambda logits, labels: F.cross_entropy(logits, labels.argmax(1), label_smoothing=0.1),
    ("one", "bce"): lambda logits, labels: F.binary_cross_entropy_with_logits(logits, smooth(labels, 0.1)),
    ("many", None): lambda logits, labels: F.binary_cross_entropy_with_logits(logits, smooth(labels, 0.1)),
}


@pytest.mark.parametrize("labels, loss", LOSSES)
def test_losses(data, tmp_path, labels, loss):
    made = tuner(data[labels], tmp_path / "run", loss=loss, label_smoothing=0.1)
    batch = next(made._batches())
    inputs = made._inputs(batch, 3, 0, 0)
    found = made._losses(batch, inputs)["loss"]
    logits = made.model(*inputs).logits
    torch.testing.assert_close(found, LOSSES[labels, loss](logits, batch.labels))


def test_several_labels_need_bce(data, tmp_path):
    with pytest.raises(ValueError, match="have several labels: --loss ce takes one each; give --loss bce"):
        finetune(config(data["many"], tmp_path / "run", loss="ce"))


def test_masks_and_augmentation_in_training_only(data, tmp_path):
    made = tuner(
        data["one"], tmp_path / "run", mask_time=0.4, mask_freq=0.25, spec_augment=(20, 20),
        spectrogram_noise="released", augment=Augment(mixup=1.0),
    )  # fmt: skip
    batch = next(made._batches())
    plain, frames = made._spectrogram(batch)
    spectrogram, mask, _ = made._inputs(batch, 3, 0, 0)
    steps, bands = made.model.config.grid()
    assert mask.ids_keep.shape[1] == int(0.6 * steps) * int(0.75 * bands)
    assert not torch.equal(spectrogram, plain)
    assert ((batch.labels > 0) & (batch.labels < 1)).any()
    made.config.spectrogram_noise = None
    masked, _, _ = made._inputs(batch, 3, 0, 0)
    fill = torch.tensor(
        -made.frontend.mean / (2 * made.frontend.std)
    ).item()  # the published 0 before normalising
    assert set(masked[masked != plain].tolist()) == {fill}

    seen = []
    made._spectrogram = lambda batch: seen.append(batch) or (plain[: len(batch)], frames[: len(batch)])
    made._predict(made.val_loader)
    assert seen and all(((batch.labels == 0) | (batch.labels == 1)).all() for batch in seen)


def test_schedule_in_steps(data, tmp_path):
    """SSAST's: halved after the tenth epoch, and every five more."""
    made = tuner(data["one"], tmp_path / "run", schedule="step", steps=600, lr=1.0, step_decay=(0.5, 10, 5))
    assert made._epoch == 6
    rates = {}
    for epoch in (1, 9.5, 10, 14.5, 15, 20, 24.5):
        made.step = round(epoch * 6)
        rates[epoch] = made._rate()
    assert rates == {1: 1.0, 9.5: 1.0, 10: 0.5, 14.5: 0.5, 15: 0.25, 20: 0.125, 24.5: 0.125}


def test_schedule_in_epochs_of_broken_steps(data, tmp_path):
    """6 batches in steps of 4: an epoch is one and a half steps, not two."""
    settings = {"schedule": "step", "steps": 600, "lr": 1.0, "step_decay": (0.5, 10, 5), "accumulate": 4}
    made = tuner(data["one"], tmp_path / "run", **settings)
    rates = []
    for step in (14, 15, 22, 23, 30):
        made.step = step
        rates.append(made._rate())
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.125]


def test_plateau_does_not_follow_the_test_split(tmp_path):
    root = labelled.esc50(tmp_path / "esc")
    with pytest.raises(ValueError, match="ESC-50 has none: it would follow the test split"):
        finetune(config(root, tmp_path / "run", task="esc50", fold="1", schedule="plateau"))
    assert not (tmp_path / "run").exists()


# -- averaged weights, and those that are kept ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_averages(data, tmp_path, monkeypatch, kind):
    """Of the weights after each step (from the first on), or at the ends of epochs; they become the model."""
    seen = []
    step = Tuner._step

    def noted(self, micro):
        step(self, micro)
        seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})

    monkeypatch.setattr(Tuner, "_step", noted)
    settings = {"ema": 0.5} if kind == "ema" else {"average_from": 2}
    folder = finetune(config(data["many"], tmp_path / "run", steps=9, select="last", **settings))
    saved = audiomae.load(folder).state_dict()
    for name in seen[0]:
        if kind == "ema":
            expected = seen[0][name]
            for weights in seen[1:]:
                expected = 0.5 * expected + 0.5 * weights[name]
        else:  # after epochs 2 and 3, of 3 steps each
            expected = (seen[5][name] + seen[8][name]) / 2
        torch.testing.assert_close(saved[name], expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(saved["head.weight"], seen[-1]["head.weight"])


FULL = {
    "augment": Augment(gain=6.0, roll=True, mixup=0.5),
    "mask_time": 0.3,
    "mask_freq": 0.3,
    "spec_augment": (9, 9),
}
FULL |= {"spectrogram_noise": 20.0, "label_smoothing": 0.1}
RESUMED = {
    "ema": {"ema": 0.9, **FULL},
    "mean": {"average_from": 1, "schedule": "step", **FULL},
    "plateau-fp16": {"schedule": "plateau", "precision": "fp16", "val_every": 1},
    "balanced": {"balanced": True, "replacement": True, "accumulate": 2, "precision": "bf16"},
}


@pytest.mark.parametrize("case", RESUMED)
def test_stopped_and_resumed_equals_not_stopped(data, tmp_path, monkeypatch, case):
    """Bit for bit, with all that has a state or is drawn."""
    whole = config(data["many"], tmp_path / "whole", **RESUMED[case])
    finetune(whole)
    parts = config(data["many"], tmp_path / "parts", **RESUMED[case], resume=True)
    step = Tuner._step
    stop = {}

    def interrupted(self, micro):
        step(self, micro)
        if self.step == 3 and not stop:
            stop["now"] = True
            self.stop.requested = "SIGTERM"

    train = Tuner.train
    monkeypatch.setattr(Tuner, "train", lambda self, stop: setattr(self, "stop", stop) or train(self, stop))
    monkeypatch.setattr(Tuner, "_step", interrupted)
    assert finetune(parts) is None and Checkpoints(tmp_path / "parts/checkpoints").latest().step == 4
    assert finetune(parts) == tmp_path / "parts" / "model"
    assert_same_bits(state_of(parts.out, 6), state_of(whole.out, 6))
    assert_same_bits(*(audiomae.load(Path(c.out) / "model").state_dict() for c in (parts, whole)))


def test_what_a_short_run_cannot_do_is_told(data, tmp_path, caplog, capsys):
    """A recipe's warm-up and average in fewer steps than they take."""
    finetune(config(data["one"], tmp_path / "run", steps=1, warmup_steps=None, warmup_epochs=4.0, ema=0.999))
    assert (
        "the warm-up, 24 steps, is no shorter than the run: the rate never reaches 0.003"
        in capsys.readouterr().out
    )
    assert "--ema 0.999 averages over some 1000 steps, and the run has 1" in caplog.text


def test_an_average_that_never_comes(data, tmp_path):
    with pytest.raises(ValueError, match="--average-from 3 is never reached: the run ends in epoch 2"):
        finetune(config(data["many"], tmp_path / "run", average_from=3))
    assert not (tmp_path / "run").exists()


def test_resume_with_another_average(data, tmp_path):
    finetune(config(data["one"], tmp_path / "run", steps=1))
    with pytest.raises(ValueError, match="holds a run without averaged weights: go on with the same --ema"):
        finetune(config(data["one"], tmp_path / "run", steps=2, ema=0.9, resume=True))


@pytest.mark.parametrize("select, kept", [(None, 2), ("best", 2), ("last", 4)])
def test_the_best_by_the_metric_on_the_validation_split(data, tmp_path, monkeypatch, select, kept):
    """Accuracy, the higher the better; the test split is not looked at before the end."""
    accuracies = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.9 - 1e-9}
    measured = Tuner._validate

    def validate(self):
        assert [len(self.val_loader.dataset.sources[0]), self.report] == [3, None]
        measured(self)
        self.metric = -accuracies[self.step]

    monkeypatch.setattr(Tuner, "_validate", validate)
    run_ = config(data["one"], tmp_path / "run", steps=4, val_every=1, select=select, keep=4)
    weights = audiomae.load(finetune(run_)).state_dict()
    assert Checkpoints(tmp_path / "run" / "checkpoints").best().step == 2
    assert_same_bits(weights, state_of(run_.out, kept)["model"])


def test_stopped_between_validations(data, tmp_path, monkeypatch):
    """What was saved there was not measured, and does not become the model."""
    settings = {"steps": 6, "val_every": 2, "save_every": 2, "select": "best", "lr": 1e-2}
    measured, step = Tuner._validate, Tuner._step

    def validate(self):
        measured(self)
        self.metric = -{2: 0.9, 4: 0.5, 6: 0.7}[self.step]

    def interrupted(self, micro):
        step(self, micro)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tuner, "_validate", validate)
    finetune(config(data["one"], tmp_path / "whole", **settings))
    monkeypatch.setattr(Tuner, "_step", interrupted)
    assert finetune(config(data["one"], tmp_path / "parts", **settings)) is None
    finetune(config(data["one"], tmp_path / "parts", **settings, resume=True))
    assert_same_bits(*(audiomae.load(tmp_path / name / "model").state_dict() for name in ("parts", "whole")))


def test_without_a_validation_split_the_last_weights_are_kept(data, tmp_path):
    data = labelled.esc50(tmp_path / "esc")
    settings = {"task": "esc50", "fold": "1", "steps": 3, "val_every": 1, "keep": 3}
    folder = finetune(config(data, tmp_path / "run", **settings))
    assert_same_bits(audiomae.load(folder).state_dict(), state_of(tmp_path / "run", 3)["model"])
    assert audiomae.load(folder).record.settings["loss"] == "ce"  # the default, resolved: `tag` goes by it
    assert all("val_accuracy" in line for line in metrics(tmp_path / "run") if "loss" not in line)


# -- where it starts from, and where it leads ----------------------------------------------------------------


def pretrained(folder, name, **overrides):
    torch.manual_seed(5)
    decoder = (
        {} if name.startswith("ssast") else {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 1}
    )
    model = audiomae.create_model(name, **TINY, **decoder, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["audiomae_small", "mae_ast_patch_base", "ssast_patch_tiny"])
def test_pretrained_weights(data, tmp_path, name):
    """The encoder is that of the weights, whatever its size; a fine-tuned one can be fine-tuned on other classes."""
    source = pretrained(tmp_path / "weights", name)
    weights = source.encoder.state_dict()
    made = tuner(data["one"], tmp_path / "x", pretrained=str(tmp_path / "weights"), model_overrides={})
    for key, value in made.model.encoder.state_dict().items():
        if key != "positions.table":
            assert torch.equal(value, weights[key]), key
    assert made.model.config.family == source.config.family and made.model.config.drop_path == 0.1
    folder = finetune(
        config(data["one"], tmp_path / "run", pretrained=str(tmp_path / "weights"), model_overrides={})
    )
    model = audiomae.load(folder)
    assert model.config.frontend.labels == ("dog", "rain", "saw") and model.config.frames == 48
    again = finetune(
        config(data["many"], tmp_path / "more", pretrained=str(folder), steps=1, model_overrides={})
    )
    assert audiomae.load(again).config.frontend.labels == ("k0", "k1", "k2")


def test_ssast_with_overlapping_patches(data, tmp_path):
    """Learned positions are interpolated, as published."""
    source = pretrained(tmp_path / "weights", "ssast_patch_tiny", frames=96)
    made = tuner(
        data["one"], tmp_path / "x", pretrained=str(tmp_path / "weights"), frames=96,
        model_overrides={"stride": (10, 10)},
    )  # fmt: skip
    positions, table = made.model.encoder.positions, source.encoder.positions.table
    assert positions.grid == (9, 12) and source.encoder.positions.grid == (6, 8)
    planes = table[0, 2:].T.reshape(1, 64, 6, 8)
    expected = F.interpolate(planes, size=(9, 12), mode="bilinear").reshape(64, -1).T
    torch.testing.assert_close(positions.table[0, 2:], expected)
    assert torch.equal(positions.table[0, :2], table[0, :2])


def test_a_published_fine_tuned_checkpoint(tmp_path, capsys):
    """Its names carry no labels and no length: the task's are taken."""
    root = labelled.audioset(tmp_path / "as")
    classifier = audiomae.create_classifier(
        "audiomae_base", 4, depth=2, width=128, heads=2, positions="transposed"
    )
    torch.nn.init.normal_(classifier.head.weight)
    torch.save({"model": audiomae.to_upstream(classifier)}, tmp_path / "finetuned.pth")
    classifier.save_pretrained(tmp_path / "ours")
    words = ("evaluate", "--task", "as20k", "--data", root, "--workers", 0, "--device", "cpu", "--model")
    assert run(*words, tmp_path / "finetuned.pth", "--out", tmp_path / "a") == 0
    assert run(*words, tmp_path / "ours", "--out", tmp_path / "b") == 0
    found, expected = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    assert found == pytest.approx(expected, abs=1e-6) and 0 < found["mAP"] < 1
    assert run(*words, pretrained_path(tmp_path)) == 1
    assert "has no classes yet: fine-tune it first" in capsys.readouterr().err
    assert run("evaluate", "--model", tmp_path / "ours") == 1
    assert "there is no --task" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(*words, tmp_path / "ours", "--out", tmp_path / "file" / "x") == 1
    assert "cannot be written: Not a directory; choose another folder" in capsys.readouterr().err
    esc = labelled.esc50(tmp_path / "esc")
    assert run("evaluate", "--model", tmp_path / "ours", "--task", "esc50", "--data", esc, "--fold", 1) == 1
    assert "tells 4 classes apart" in capsys.readouterr().err


def pretrained_path(tmp_path):
    pretrained(tmp_path / "weights", "audiomae_small")
    return tmp_path / "weights"


def test_a_clip_that_cannot_be_read_is_left_out(data, tmp_path, caplog):
    """Another clip must not be measured in its place."""
    root = tmp_path / "data"
    shutil.copytree(data["many"].parent, root)
    finetune(config(root / "labels.csv", tmp_path / "run", steps=1))
    (root / "clips" / "16.wav").write_bytes(b"")
    caplog.clear()
    found = evaluate(EvaluateConfig(model=str(tmp_path / "run"), workers=0, device="cpu"))[""]
    assert found.metrics["clips"] == 2
    assert "left out 1 clip that could not be read" in caplog.text
    assert "16.wav: " in caplog.text and "takes its place" not in caplog.text


def test_another_model_in_the_folder_of_a_run(data, tmp_path):
    """Is not the run's, whose model is called that."""
    finetune(config(data["one"], tmp_path / "run", steps=1))
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "run" / "other")
    shutil.copy(tmp_path / "run" / "model" / "model.safetensors", tmp_path / "run" / "other.safetensors")
    for name in ("other", "other.safetensors"):
        with pytest.raises(ValueError, match="there is no --task"):
            evaluate(EvaluateConfig(model=str(tmp_path / "run" / name), workers=0, device="cpu"))
    assert evaluate(EvaluateConfig(model=str(tmp_path / "run" / "model"), workers=0, device="cpu"))


def test_recordings_that_were_added_since(tmp_path):
    """Evaluation goes by the splits that the run noted: dealt out anew, some that were trained on would be tested."""
    root = labelled.class_folders(tmp_path / "data", clips=12)
    finetune(config(root, tmp_path / "run", steps=1))
    before = (tmp_path / "run/splits.csv").read_text()
    for i in range(12, 24):
        labelled.sound(root / "dog" / f"{i}.wav", 0, i)
    assert len(TASKS["custom"].open([str(root)]).test) == 4
    settings = {"model": str(tmp_path / "run"), "workers": 0, "device": "cpu"}
    for data in ([], [str(root)]):
        assert evaluate(EvaluateConfig(**settings, data=data))[""].metrics["clips"] == 3
    assert (tmp_path / "run/splits.csv").read_text() == before
    new = labelled.class_folders(tmp_path / "new", classes=("dog", "saw"), clips=2)
    report = evaluate(EvaluateConfig(**settings, val_data=[str(new)], split="val"))[""]
    assert (report.metrics["clips"], report.metrics["classes"], report.metrics["classes_with_clips"]) == (
        4,
        3,
        2,
    )


def test_a_run_goes_on_with_the_splits_it_noted(tmp_path):
    """Though recordings were added since, or one took another's place."""
    root = labelled.class_folders(tmp_path / "data", clips=12)
    finetune(config(root, tmp_path / "run", steps=1))
    before = (tmp_path / "run/splits.csv").read_text()
    for i in range(12, 24):
        labelled.sound(root / "dog" / f"{i}.wav", 0, i)
    finetune(config(root, tmp_path / "run", steps=2, resume=True))
    assert (tmp_path / "run/splits.csv").read_text() == before
    other = labelled.class_folders(tmp_path / "other", clips=24)
    with pytest.raises(ValueError, match="Resume with the same data and settings"):
        finetune(config(other, tmp_path / "run", steps=3, resume=True))
    assert (tmp_path / "run/splits.csv").read_text() == before


def test_names_of_any_kind_are_noted(tmp_path):
    """Files may be called anything, and classes anything in UTF-8."""
    root = labelled.class_folders(tmp_path / "data", classes=("dog", ' big, "saw" '), clips=6)
    for i, name in enumerate((b"caf\xe9.wav", b' one,"two\n.wav')):
        os.rename(root / "dog" / f"{i}.wav", os.fsencode(root / "dog") + b"/" + name)
    finetune(config(root, tmp_path / "run", steps=1))
    finetune(config(root, tmp_path / "run", steps=2, resume=True))
    report = evaluate(EvaluateConfig(model=str(tmp_path / "run"), split="train", workers=0, device="cpu"))[""]
    assert report.metrics["clips"] == 8
    assert audiomae.load(tmp_path / "run").config.frontend.labels == ('big, "saw"', "dog")
    os.rename(root / "dog", os.fsencode(root) + b"/\xe9")
    with pytest.raises(ValueError, match="is not in UTF-8: rename it"):
        finetune(config(root, tmp_path / "other", steps=1))
    (tmp_path / "labels.csv").write_bytes(b"path,label\na.wav,caf\xe9\n")
    with pytest.raises(ValueError, match="csv: cannot be read"):
        finetune(config(tmp_path / "labels.csv", tmp_path / "other", steps=1))


# -- many processes ------------------------------------------------------------------------------------------


def one_of_two(monkeypatch, rank):
    """What a process finds before it first speaks to the other one."""
    monkeypatch.setattr("audiomae.train.loop.distribute", lambda model, *_: model)
    processes = Processes("cpu")
    processes.rank, processes.world_size = rank, 2
    return processes


def test_a_test_split_with_fewer_clips_than_processes(tmp_path, monkeypatch):
    """Is refused before the first step, and not after the last."""
    path = labelled.csv_file(tmp_path)
    path.write_text(path.read_text().replace(",test", ",train", 2))
    with pytest.raises(ValueError, match="an epoch has 1 clip for 2 processes"):
        Tuner(config(path, tmp_path / "run"), one_of_two(monkeypatch, 0))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_warns_of_the_data_for_all(tmp_path, monkeypatch, caplog, rank):
    root = labelled.class_folders(tmp_path / "data")
    labelled.sound(root / "lost.wav", 0)
    Tuner(config(root, tmp_path / "run"), one_of_two(monkeypatch, rank))
    assert ("left out 1 recording beside the folders of classes" in caplog.text) == (rank == 0)


SPLITS = {"test": (2, 5), "train": (5, 23), "val": (4, 3)}  # batch size of a process, clips


def _evaluate(rank, model, out):
    said = io.StringIO()
    logging.getLogger("audiomae").addHandler(handler := logging.StreamHandler(said))
    for split, (batch_size, _) in SPLITS.items():
        settings = {
            "split": split,
            "batch_size": batch_size,
            "workers": 0,
            "device": "cpu",
            "out": str(out / split),
        }
        report = evaluate(EvaluateConfig(model=str(model), **settings))[""]
        (out / f"{split}-{rank}.json").write_text(json.dumps([report.metrics, report.classes]))
    logging.getLogger("audiomae").removeHandler(handler)
    assert said.getvalue().count("lost.wav") == (len(SPLITS) if rank == 0 else 0)


def test_two_processes_evaluate_as_one(tmp_path):
    """Each clip once, whatever is left over: 5 clips in batches of 2, 23 in batches of 5, fewer than a batch."""
    root, ones, twos = tmp_path / "data", tmp_path / "one", tmp_path / "two"
    for name, clips in (("train", (12, 11)), ("test", (3, 2)), ("val", (2, 1))):
        for label, count in zip("ab", clips, strict=True):
            for i in range(count):
                labelled.sound(root / name / label / f"{i}.wav", ord(label), i)
    labelled.sound(root / "test" / "lost.wav", 0)
    finetune(config(root, tmp_path / "run", steps=2, lr=1e-2))
    ones.mkdir(), twos.mkdir()
    _evaluate(0, tmp_path / "run", ones)
    torchrun(_evaluate, 2, tmp_path / "run", twos)
    for split, (_, clips) in SPLITS.items():
        one = json.loads((ones / f"{split}-0.json").read_text())
        assert one[0]["clips"] == clips
        for rank in range(2):
            assert json.loads((twos / f"{split}-{rank}.json").read_text()) == one
        assert (twos / split / "per_class.csv").read_text() == (ones / split / "per_class.csv").read_text()


def _finetune(rank, *runs):
    for run_ in runs:
        finetune(run_)


# Adam's first steps divide gradients by their own size, and so magnify their rounding: not with this eps.
JOINED = {"drop_path": 0.0, "schedule": "constant", "optimizer": "adam", "eps": 1e-3}


def assert_same_run(one, two):
    weights = [audiomae.load(folder / "model").state_dict() for folder in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    found = [json.loads((folder / "test" / "metrics.json").read_text()) for folder in (one, two)]
    assert found[0] == pytest.approx(found[1])


def test_two_processes_train_as_one(data, tmp_path):
    """The joined batch's gradients; validated, and resumed as well."""
    settings = {**JOINED, "mask_time": 0.3, "mask_freq": 0.3, "val_every": 2}
    finetune(config(data["one"], tmp_path / "one", **settings))
    settings |= {"batch_size": 2, "resume": True}
    torchrun(
        _finetune, 2, *(config(data["one"], tmp_path / "two", **settings, steps=steps) for steps in (3, 6))
    )
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_fsdp(data, tmp_path):
    finetune(config(data["one"], tmp_path / "one", **JOINED))
    settings = {**JOINED, "batch_size": 2, "fsdp": True, "select": "best", "val_every": 6}
    torchrun(_finetune, 2, config(data["one"], tmp_path / "shards", **settings))
    assert_same_run(tmp_path / "one", tmp_path / "shards")
