"""Weights where people look for them: folders, the hub, model cards, and names with weights."""

import dataclasses
import json

import pytest
import torch
from cli_cases import MAE_AST, SMALL, state_dict
from pretraining import make_clips, tiny

import audiomae
from audiomae import pretrained
from audiomae.pretrained import Record
from audiomae.train import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")

DECODER = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 16}
TINY = {**SMALL, **DECODER, "frames": 64}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in a folder: owner/name -> what was pushed."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, **options):
            pass

        def create_repo(self, repo_id, **options):
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **options):
            for file in folder_path.iterdir():
                (root / repo_id / file.name).write_bytes(file.read_bytes())
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr(pretrained, "snapshot_download", lambda repo_id, **options: str(root / repo_id))
    return root


def test_push_and_load(hub):
    model = audiomae.create_classifier("audiomae_small", 3, frames=64, **SMALL).eval()
    model.config.frontend = dataclasses.replace(model.config.frontend, labels=("dog", "cat", "rain"))
    settings = {"steps": 100, "augment": {"mixup": 0.5}}
    model.record = Record("audiomae_base.esc50", settings, {"accuracy": 0.91234, "clips": 400})
    assert model.push_to_hub("owner/name") == "https://hub/owner/name"
    card = (hub / "owner/name/README.md").read_text()
    assert card.startswith("---\n") and "library_name: audiomae" in card and "masked-autoencoder" in card
    for line in (
        "# Classifier, audiomae",
        "3 labels: dog, cat, rain",
        "Recipe `audiomae_base.esc50`.",
        "| steps | 100 |",
        "| accuracy | 0.9123 |",
        "| clips | 400 |",
        "2 blocks of width 64 with 1 head",
    ):
        assert line in card, line
    for load in (audiomae.load, audiomae.Classifier.from_pretrained):
        again = load("owner/name")
        assert again.record == model.record and again.config == model.config
        x = torch.randn(1, 64, 128)
        assert torch.equal(again.eval()(x).logits, model(x).logits)
    assert audiomae.Tagger("owner/name").labels == ("dog", "cat", "rain")
    assert audiomae.Embedder("owner/name").width == 64
    with pytest.raises(ValueError, match="holds a Classifier, not a MaskedAutoencoder"):
        audiomae.MaskedAutoencoder.from_pretrained("owner/name")


def test_a_card_without_a_record_says_so(tmp_path):
    audiomae.create_model("audiomae_small", **TINY).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "How these weights were trained is not recorded." in card and "## Metrics" not in card
    assert not (tmp_path / "record.json").exists() and audiomae.load(tmp_path).record is None


def test_a_record_does_not_outlive_its_model(tmp_path):
    model = audiomae.create_model("audiomae_small", **TINY)
    model.record = Record(None, {}, {})
    model.save_pretrained(tmp_path)
    assert "No published recipe." in (tmp_path / "README.md").read_text()
    audiomae.create_model("audiomae_small", **TINY).save_pretrained(tmp_path)
    assert audiomae.load(tmp_path).record is None


@pytest.mark.parametrize("validated", [False, True])
def test_training_leaves_a_record(tmp_path, validated):
    data = make_clips(tmp_path / "clips", count=4)
    settings = {"val_data": [str(data)]} if validated else {}
    folder = pretrain(tiny(data, tmp_path / "run", steps=1, **settings))
    record = audiomae.load(folder).record
    name = "validation loss" if validated else "training loss"
    assert list(record.metrics) == [name] and 0 < record.metrics[name] < 10
    assert record.recipe is None and record.settings["batch_size"] == 2
    assert not any(
        str(tmp_path) in str(value) for value in record.settings.values()
    )  # paths are nobody's business
    card = (folder / "README.md").read_text()
    assert f"| {name} | {record.metrics[name]:.4f} |" in card and "| lr | 0.001 |" in card


def test_published_kinds_on_the_hub(hub):
    """A repository of somebody else's: timm's configuration beside timm's names, in either format."""
    repo = hub / "owner/vit"
    repo.mkdir(parents=True)
    (repo / "config.json").write_text(json.dumps({"architecture": "vit_small", "num_classes": 0}))
    state = state_dict("encoder")
    torch.save(state, repo / "pytorch_model.bin")
    model = audiomae.load("owner/vit")
    assert model.upstream.kind == "Audio-MAE encoder" and torch.equal(
        model.encoder.norm.weight, state["norm.weight"]
    )
    assert (
        audiomae.create_model("audiomae_small", "owner/vit", decoder="none", **SMALL, frames=64).config.depth
        == 2
    )
    (repo / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        audiomae.load("owner/vit")


# -- names with weights --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    audiomae.create_model("audiomae_small", **TINY, mask_ratio=0.5).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_create_model_with_weights(folder, checkpoints):
    stored = audiomae.load(folder)
    model = audiomae.create_model("audiomae_small", folder, **TINY, masking="time", pad="exclude")
    assert model.config.masking == "time" and model.config.pad == "exclude"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stored.parameters(), strict=True))
    published = audiomae.create_model("audiomae_small", pretrained=checkpoints["window"], **TINY)
    assert published.upstream.kind == "Audio-MAE"
    frames = {
        n: v for n, v in MAE_AST.items() if n not in ("decoder_width", "decoder_depth", "decoder_heads")
    }
    mae_ast = audiomae.create_model(
        "mae_ast_patch_base",
        checkpoints["mae_ast"],
        **frames,
        decoder_width=64,
        decoder_depth=1,
        decoder_heads=1,
    )
    assert mae_ast.config.patch == (16, 16) and mae_ast.upstream.kind == "MAE-AST"
    sizes = {k: frames[k] for k in ("width", "depth", "heads")}
    assert audiomae.create_classifier("mae_ast_patch_base", 3, pretrained=checkpoints["mae_ast"], **sizes)


def test_an_encoder_alone(folder):
    whole = audiomae.load(folder).eval()
    alone = audiomae.create_model("audiomae_small", folder, **TINY, decoder="none").eval()
    x = torch.randn(1, 64, 128)
    assert torch.equal(alone.encode(x), whole.encode(x)) and not hasattr(alone, "decoder")


def test_weights_of_another_model(folder, checkpoints, tmp_path):
    with pytest.raises(ValueError, match="have width=64, but the wanted model has 768"):
        audiomae.create_model("audiomae_base", folder)
    with pytest.raises(ValueError, match=r"holds a Classifier, which is no audiomae_small"):
        audiomae.create_model("audiomae_small", checkpoints["finetuned"], **SMALL, frames=64)
    with pytest.raises(ValueError, match="has no field"):
        audiomae.create_model("audiomae_small", folder, colour="red")
    with pytest.raises(FileNotFoundError):
        audiomae.create_model("audiomae_small", tmp_path / "nowhere.pth")


def test_from_pretrained_reads_published_files_too(checkpoints):
    model = audiomae.MaskedAutoencoder.from_pretrained(checkpoints["window"])
    assert model.config == audiomae.load(checkpoints["window"]).config and model.upstream.kind == "Audio-MAE"
    with pytest.raises(ValueError, match="holds a Classifier, not a MaskedAutoencoder"):
        audiomae.MaskedAutoencoder.from_pretrained(checkpoints["finetuned"])


def test_saved_files_are_as_readable_as_any(tmp_path):
    """Where a umask lets colleagues read, they can read the weights too."""
    audiomae.from_upstream(state_dict("mae_ast"), tokens="patch").save_pretrained(tmp_path)
    (tmp_path / "any").touch()
    modes = {file.name: oct(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert {pretrained.WEIGHTS, pretrained.EXTRAS} <= modes.keys()
    assert set(modes.values()) == {modes["any"]}, modes
