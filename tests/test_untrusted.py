"""Weights from anybody: what could harm is refused in words, and nothing in a file is executed."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import zipfile

import pytest
import tiny_audio
import torch
from cli_cases import state_dict
from safetensors.torch import load_file, save_file

import audiomae
from audiomae import hear, pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "width": 32,
    "heads": 2,
    "depth": 2,
    "decoder_width": 32,
    "decoder_heads": 2,
    "decoder_depth": 2,
    "frames": 64,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    audiomae.create_model("audiomae_small", **SMALL).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def refused(source, sentence, **overrides):
    with pytest.raises(ValueError, match=sentence) as caught:
        audiomae.load(source, **overrides)
    assert len(str(caught.value)) < 700
    return str(caught.value)


# -- pickles -------------------------------------------------------------------------------------------------


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, canary, how):
        self.canary, self.how = canary, how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.canary}",)
        if self.how == "eval":
            return eval, (f"open({str(self.canary)!r}, 'w')",)
        return subprocess.Popen, (["touch", str(self.canary)],)


@pytest.mark.parametrize("how", ["system", "eval", "Popen"])
@pytest.mark.parametrize("place", ["args", "model", "key", "bare", "hub"])
def test_pickle_bombs(how, place, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "bomb.pth"
    bomb, state = Bomb(canary, how), state_dict("encoder")
    if place == "bare":  # no file of torch.save at all
        path.write_bytes(pickle.dumps(bomb))
    elif place == "hub":  # a published kind in somebody's repository
        (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_1024_128"}')
        path = tmp_path / "pytorch_model.bin"
        torch.save(state | {"x": bomb}, path)
    else:
        content = {"model": state} | ({"args": bomb} if place == "args" else {})
        if place == "model":
            content["model"] = state | {"x": bomb}
        if place == "key":
            content[(1, bomb)] = 1
        torch.save(content, path)
    refused(tmp_path if place == "hub" else path, "is no checkpoint that can be read")
    assert not canary.exists()


def test_compressed_checkpoints(tmp_path):
    """A few kilobytes may expand to any size."""
    torch.save({"model": state_dict("encoder") | {"zeros": torch.zeros(2**22)}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < (tmp_path / "plain.pth").stat().st_size / 10
    refused(tmp_path / "bomb.pth", "it is compressed")
    audiomae.load(tmp_path / "plain.pth")


# -- safetensors ---------------------------------------------------------------------------------------------


def safetensors(header, data=b"", claimed=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


HUGE = {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
OVERLAP = {
    "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "y": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        safetensors({}, claimed=2**62),  # a huge header
        safetensors({}, claimed=2**63 + 1),
        safetensors({"__metadata__": {"a": "b"}}, claimed=10**8),
        safetensors(b"[" * 100_000),
        safetensors(b"\xff" * 64),
        safetensors(HUGE, b"\0" * 64),
        safetensors(OVERLAP, b"\0" * 8),
        safetensors({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors({"x": {"dtype": "F999", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    ],
    ids=str,
)
def test_headers(folder, tmp_path, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "is no intact safetensors file")
    (tmp_path / "published.safetensors").write_bytes(content)
    refused(tmp_path / "published.safetensors", "is no intact safetensors file")


def change(folder, **tensors):
    state = load_file(folder / "model.safetensors")
    state |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(
        {name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors"
    )


def test_missing_extra_and_misshapen(folder):
    change(folder, encoder__norm__bias=None)
    refused(folder, "encoder.norm.bias is missing")
    change(folder, encoder__norm__bias=torch.ones(3))
    refused(folder, r"encoder.norm.bias has shape \(3,\) instead of \(32,\)")
    change(folder, encoder__norm__bias=torch.ones(32), extra=torch.ones(1))
    refused(folder, "extra is unexpected")
    change(folder, **{f"extra{i}": torch.ones(1) for i in range(100)})
    refused(folder, "and 96 more")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, tmp_path, value):
    change(folder, encoder__norm__bias=torch.full((32,), value))
    refused(folder, "NaN or infinity in 1 tensor, the first is encoder.norm.bias")
    state = state_dict("window")
    state["blocks.1.attn.qkv.weight"][3, 5] = value
    torch.save({"model": state}, tmp_path / "published.pth")
    refused(tmp_path / "published.pth", "NaN or infinity in 1 tensor, the first is encoder.blocks.1.attn.qkv")


# -- configurations ------------------------------------------------------------------------------------------


@pytest.mark.no_poison  # filling memory would ask for it
@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"depth": 10**9}, "blocks, but .* tensors in all"),
        ({"decoder_depth": 10**9}, "blocks, but .* tensors in all"),
        ({"width": 10**12 * 4}, "impossible size"),
        ({"frames": 10**9}, "do not fit the model"),
        ({"frames": 10**9, "positions": "flat"}, "longer than the positions"),
        ({"frames": 10**9, "positions": "learned"}, "do not fit the model"),
        ({"mel_bins": 10**7}, "do not fit the model"),
        ({"decoder_heads": 2**20}, "multiple of"),
        ({"patch": [10**9, 16]}, "does not fit into"),
        ({"width": float("nan")}, "positive integer"),
        ({"mlp_ratio": 1e300}, "impossible size|do not fit"),
        ({"type": "os.system"}, "type must be one of"),
        ({"__class__": "x"}, "has no field"),
        ({"frontend": {"labels": 3}}, "is no model configuration"),
    ],
)
def test_configurations_that_ask_for_too_much(folder, changes, sentence):
    """Refused before anything of that size is made."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused(folder, sentence)


def test_buffers_that_no_file_holds(folder, monkeypatch):
    """What a configuration alone brings: the table of flat positions, the offsets of a window."""
    monkeypatch.setattr(pretrained, "MOST_BUFFERED", 100)
    refused(folder, "512 values beside its weights")


@pytest.mark.parametrize("name", ["config.json", "record.json"])
def test_json(folder, name):
    for text in ("[" * 100_000, "{", '"text"', "[1]", '{"type": {}}', '{"recipe": "x", "colour": 3}'):
        if name == "record.json" and text == '{"type": {}}':
            continue
        (folder / name).write_text(text)
        refused(folder, "is no model configuration|is no record|matches no known model")


@pytest.mark.parametrize(
    "content",
    [{"recipe": 3}, {"settings": None}, {"settings": "loss"}, {"metrics": {"mAP": "high"}}, {"metrics": [1]}],
    ids=str,
)
def test_records_of_another_kind(folder, content):
    """Commands and model cards go by them."""
    (folder / "record.json").write_text(json.dumps(content))
    refused(folder, "is no record of a training run")


def test_huge_json(folder, monkeypatch):
    monkeypatch.setattr(pretrained, "MOST_JSON", 100)
    refused(folder, "bytes, more than any model's")


# -- every way in --------------------------------------------------------------------------------------------


def bombs(good, place):
    """Files and folders that would run a command, or that are none of ours."""
    bomb = Bomb(place / "canary", "system")
    state = state_dict("encoder")
    torch.save({"model": state | {"x": bomb}}, place / "new.pt")
    torch.save({"model": state | {"x": bomb}}, place / "old.pth", _use_new_zipfile_serialization=False)
    (place / "bare.bin").write_bytes(pickle.dumps(bomb))
    torch.save({"model": {n: t[:, :3] if t.ndim > 1 else t for n, t in state.items()}}, place / "shapes.pth")
    for name in ("pickled", "linked", "coded", "other"):
        shutil.copytree(good, place / name)
    torch.save({"model": state | {"x": bomb}}, place / "pickled/model.safetensors")
    (place / "linked/model.safetensors").unlink()
    (place / "linked/model.safetensors").symlink_to("/dev/zero")
    settings = json.loads((good / "config.json").read_text())
    (place / "coded/code.py").write_text(f"open({str(place / 'canary')!r}, 'w')")
    (place / "coded/config.json").write_text(json.dumps(settings | {"auto_map": {"AutoModel": "code.Model"}}))
    (place / "other/config.json").write_text('{"architectures": ["BertModel"], "hidden_size": 768}')
    return sorted(path for path in place.iterdir() if path.name != "canary")


def test_every_way_in_refuses_them(good, tmp_path, run):
    """In words that name the file, with nothing executed and nothing written."""
    place = tmp_path / "place"
    place.mkdir()
    tiny_audio.folder(tmp_path / "sounds/a", 3)
    tiny_audio.folder(tmp_path / "sounds/b", 3)
    calls = [
        audiomae.load,
        audiomae.Embedder,
        hear.load_model,
        type(audiomae.load(good)).from_pretrained,
        lambda path: audiomae.create_model("audiomae_small", pretrained=path, **SMALL),
        lambda path: audiomae.create_classifier(None, 2, frames=64, pretrained=path),
    ]
    sounds, run_folder = tmp_path / "sounds", tmp_path / "run"
    commands = [
        ["embed", sounds, "--out", tmp_path / "e.npz", "--model"],
        ["tag", sounds, "--model"],
        ["finetune", "--task=custom", "--data", sounds, "--out", run_folder, "--steps=1", "--pretrained"],
    ]
    for path in bombs(good, place):
        for call in calls:
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                call(str(path))
            assert str(path) in str(caught.value)
        for command in commands:
            status, out, err = run(*command, path)
            assert status == 1 and str(path) in err and not out, (command[0], path.name, err)
    assert not (place / "canary").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place", "sounds"]
    with pytest.raises(FileNotFoundError, match="no file or folder /nowhere/model"):
        type(audiomae.load(good)).from_pretrained("/nowhere/model.pt")
