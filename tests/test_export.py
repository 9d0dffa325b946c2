"""Exported encoders and classifiers give what `Embedder` and `Tagger` give, on clips of every length."""

import importlib.util
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import audiomae
from audiomae import config as configs
from audiomae.embedding import stretched
from audiomae.export import Exportable, export
from audiomae.pretrained import reconfigured

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]

SMALL = {"width": 32, "heads": 2, "depth": 1, "frames": 256}
CASES = {
    "audiomae": ("audiomae_small", {"decoder": "none"}),
    "mae_ast_patch": ("mae_ast_patch_base", {"decoder": "none"}),
    "mae_ast_frame": ("mae_ast_frame_base", {"decoder": "none"}),
    "ssast_patch": ("ssast_patch_tiny", {}),
    "overlap": ("audiomae_small", {"decoder": "none", "stride": (10, 10)}),
    "overlap260": ("audiomae_small", {"decoder": "none", "stride": (10, 10), "frames": 260}),
}


def build(case):
    if case.startswith("classifier"):
        model = audiomae.create_classifier(
            "audiomae_small", 5, **SMALL, pad=case.partition("_")[2] or "attend"
        )
        torch.nn.init.normal_(model.head.weight)
        model.config.frontend = audiomae.Frontend.named("esc50", frames=256, labels=tuple("abcde"))
        return model.eval()
    name, options = CASES[case]
    model = audiomae.create_model(name, **SMALL | options).eval()
    if hasattr(model.spectrogram_norm, "running_mean"):
        model.spectrogram_norm.running_mean.fill_(0.3)
        model.spectrogram_norm.running_var.fill_(2.0)
    return model


@torch.no_grad()
def reference(model, x):
    """As `embed` and `tag` read clips of this length."""
    if not isinstance(model, audiomae.Classifier):
        return reconfigured(model, pad="exclude").encode(x, lengths=[x.shape[1]] * len(x))
    tagger = audiomae.Tagger(model)
    filled = tagger._filled(list(x), tagger.model)
    return tagger.model(filled, lengths=[x.shape[1]] * len(x)).logits


def runner(path):
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = onnxruntime.InferenceSession(path)
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert given.name == "spectrogram" and output.name in ("tokens", "logits")
    assert given.shape == ["batch", "frames", 128] and output.shape[0] == "batch"
    return lambda x: torch.from_numpy(session.run(None, {"spectrogram": x.numpy()})[0])


@pytest.fixture
def no_torchvision(monkeypatch, caplog):
    """Nothing is said of it: torch.onnx warns four times that ops are left out which nothing here has."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name)
    )
    yield
    assert not [record for record in caplog.get_records("call") if "torchvision" in record.getMessage()]


def compare(model, run, lengths, atol=1e-4):
    for frames in lengths:
        for batch in (1, 3):
            x = torch.randn(batch, frames, 128)
            torch.testing.assert_close(run(x), reference(model, x), rtol=0, atol=atol)


def lengths(case):
    """A frame and a bit more, whole patches and partial ones, all positions."""
    return (3, 4, 5, 99, 255, 256) if case == "mae_ast_frame" else (1, 15, 16, 17, 100, 240, 241, 255, 256)


@pytest.mark.parametrize(
    "case, suffix",
    [("audiomae", ".onnx"), ("classifier", ".onnx"), ("audiomae", ".pt2"), ("classifier", ".pt2")]
    + [
        pytest.param(case, s, marks=pytest.mark.slow)
        for case in [*CASES, "classifier_exclude"]
        if case != "audiomae"
        for s in (".onnx", ".pt2")
    ],
)
def test_short_exact_and_long_clips(case, suffix, tmp_path, no_torchvision):
    """A longer one in chunks, as `Embedder` cuts and joins it, the last of them partial."""
    model = build(case)
    path = export(model, tmp_path / f"model{suffix}")
    assert carried(path).frontend == model.config.frontend
    run = runner(path)
    compare(model, run, (*lengths(case), model.config.frames))
    with pytest.raises(Exception):  # noqa: B017 - onnxruntime's and torch's own
        run(torch.randn(1, model.config.frames + 32, 128))
    spectrogram = torch.randn(603, 128)
    if case.startswith("classifier"):
        long = audiomae.Tagger(model)
        chunked = audiomae.Tagger(model)
        chunked._filled = lambda rows, model: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        chunked.batch_size = 1
        chunked.model.forward = lambda x, lengths: audiomae.Output(logits=run(x))
        torch.testing.assert_close(chunked.tag([spectrogram]), long.tag([spectrogram]), rtol=0, atol=1e-4)
    else:
        long = audiomae.Embedder(model, level="frame")
        chunked = audiomae.Embedder(model, level="frame")
        chunked.model.encode = lambda x, lengths: run(x)
        for one, other in zip(chunked.embed([spectrogram]), long.embed([spectrogram]), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_interpolated_positions_reach_longer_clips(tmp_path):
    model = build("audiomae")
    run = runner(export(model, tmp_path / "model.pt2", frames=600))
    longer = stretched(model, 600)
    compare(longer, run, (16, 250, 600))
    x = torch.randn(1, 600, 128)
    expected = audiomae.Embedder(longer, level="frame").embed([x[0]])[0]
    actual = run(x)[0, 1:].unflatten(0, (-1, 8)).mean(dim=1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [*CASES, "classifier", "classifier_exclude"])
def test_the_exportable_model_is_the_model(case):
    """Before any export, and without changing the model given."""
    model = build(case).train()
    module = Exportable(model)
    assert model.training and model.config.impl is None
    compare(model.eval(), module, lengths(case), atol=1e-5)


def test_a_front_end_longer_than_the_positions(tmp_path):
    model = build("classifier")
    model.config.frontend = audiomae.Frontend.named("esc50")
    with pytest.raises(ValueError, match="fills clips up to 512 frames, but the model's positions reach 256"):
        export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def carried(path):
    """The configuration that goes along."""
    if path.suffix == ".onnx":
        onnx.checker.check_model(path)
        text = {p.key: p.value for p in onnx.load(path).metadata_props}["audiomae"]
    else:
        extra = {"config.json": ""}
        torch.export.load(path, extra_files=extra)
        text = extra["config.json"]
    return configs.from_dict(json.loads(text))


def test_command(run, refused, checkpoints, tmp_path):
    out = tmp_path / "model.pt2"
    status, printed, _ = run("export", "--model", checkpoints["finetuned"], "--out", out, "--frames", 96)
    assert status == 0 and printed.startswith(f"wrote {out}: classifier, ")
    assert runner(out)(torch.zeros(1, 96, 128)).shape == (1, 5)
    model = ["--model", checkpoints["encoder"]]
    status, _, err = run("export", *model, "--out", tmp_path / "model.bin")
    assert status == 2 and "model.bin: the suffix says the format, and should be .onnx or .pt2" in err
    assert "reach already" in refused("export", *model, "--out", out, "--frames", 32)
    assert "does not exist" in refused("export", *model, "--out", tmp_path / "no" / "m.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2"]
    assert np.isfinite(runner(out)(torch.zeros(2, 50, 128)).numpy()).all()
