"""The models in other people's training loops: the three examples, each at most 40 lines."""

from pathlib import Path

import pytest
import tiny_audio
import torch

import audiomae
from audiomae.data import load_audio

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {"width": 32, "heads": 2, "depth": 1}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes of four clips of half a second."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    for kind in "ab":
        tiny_audio.folder(tmp_path / "sounds" / kind, 4)
    return tmp_path / "sounds"


@pytest.mark.parametrize("name", ["plain_loop", "lightning_module", "huggingface_trainer"])
def test_at_most_forty_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40


def test_plain_loop(folder, tmp_path, capsys):
    audiomae.create_model("audiomae_small", **SMALL, decoder="none").save_pretrained("weights")
    import plain_loop

    model = plain_loop.train(folder, "weights", epochs=2, **SMALL)
    assert capsys.readouterr().out.count("loss ") == 2 and model.config.num_classes == 2
    model.save_pretrained("plain")
    tagger = audiomae.Tagger("plain")
    assert tagger.labels == ("a", "b") and tagger(load_audio(folder / "a/clip000.wav")).shape == (1, 2)


def test_lightning(folder, tmp_path):
    import lightning
    from lightning_module import Pretraining

    module = Pretraining(
        folder,
        batch_size=3,
        workers=0,
        **SMALL,
        decoder_depth=1,
        decoder_width=32,
        decoder_heads=2,
        frames=64,
    )
    before = module.model.encoder.patch_embed.weight.clone()
    trainer = lightning.Trainer(
        max_epochs=2, default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    assert trainer.global_step == 4 and module.sampler.epoch == 2
    assert torch.isfinite(trainer.callback_metrics["reconstruction"])
    assert not torch.equal(module.model.encoder.patch_embed.weight, before)
    module.model.save_pretrained("model")
    assert audiomae.Embedder("model").width == 32
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    again = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(again["model.encoder.patch_embed.weight"], module.model.encoder.patch_embed.weight)


def test_hugging_face(folder, tmp_path):
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "logging_steps": 1,
        "disable_tqdm": True, "save_steps": 2,
    }  # fmt: skip
    from huggingface_trainer import train

    trainer = train(folder, out=tmp_path / "run", settings=settings, **SMALL)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 5 for loss in losses)
    found = trainer.predict(trainer.eval_dataset)
    assert found.predictions.shape == (8, 2) and found.label_ids.tolist() == [0] * 4 + [1] * 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found.metrics["test_loss"])
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert audiomae.Tagger(tmp_path / "run" / "model").labels == ("a", "b")
