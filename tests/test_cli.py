"""The command line: what it prints, what it writes, and that a user's mistake is one sentence, never a traceback."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audiomae_kernels import OPS, _native

import audiomae
from audiomae.cli import main
from audiomae.data import load_batch, recordings

SMALL = {"width": 64, "depth": 2, "heads": 1, "mlp_ratio": 2.0}
DECODER = {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 16}
MAE_AST = {**SMALL, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 1}
SOUNDS = [
    path for path in recordings() if path.stem.endswith(("shutter", "message", "complete"))
]  # 0.3 to 1.1 s

pytestmark = pytest.mark.usefixtures("one_thread")


def state_dict(kind):
    torch.manual_seed(0)
    if kind == "finetuned":
        model = audiomae.create_classifier("audiomae_small", 5, frames=64, **SMALL)
    else:
        name, fields = {
            "window": ("audiomae_small", {**SMALL, **DECODER, "frames": 64}),
            "global": ("audiomae_small", {**SMALL, **DECODER, "frames": 64, "decoder": "global"}),
            "encoder": ("audiomae_small", {**SMALL, "frames": 64, "decoder": "none"}),
            "ssast_patch": ("ssast_patch_tiny", {**SMALL, "frames": 64}),
            "ssast_frame": ("ssast_frame_tiny", {**SMALL, "frames": 64}),
            "mae_ast": ("mae_ast_patch_base", MAE_AST),
        }[kind]
        model = audiomae.create_model(name, **fields)
    state = audiomae.to_upstream(model)
    return {n: t[:, :300] if n.endswith("_sine_pos_embed.pe") else t for n, t in state.items()}


KINDS = {
    "window": ([], "Audio-MAE ", "loss "),
    "global": (["--raw-target"], "Audio-MAE ", "loss "),
    "encoder": ([], "Audio-MAE encoder ", "embedding "),
    "finetuned": ([], "Audio-MAE fine-tuned ", "logits "),
    "ssast_patch": ([], "SSAST ", "loss "),
    "ssast_frame": ([], "SSAST ", "loss "),
    "mae_ast": (["--tokens", "patch"], "MAE-AST ", "info_nce"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """kind -> a published file of that kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    files = {kind: folder / f"{kind}.pth" for kind in KINDS}
    for kind, path in files.items():
        torch.save({"model": state_dict(kind), "epoch": 3}, path)
    return files


@pytest.fixture
def run(capsys):
    """Runs a command; returns its exit status, output and error output."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse, on --help and on a wrong command line
            status = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "\x1b" not in err
        return status, out, err

    return run


@pytest.fixture
def refused(run):
    """Runs a command that must fail with one sentence about its cause; returns the sentence."""

    def refused(*arguments):
        status, _, err = run(*arguments)
        assert status == 1
        assert err.startswith(f"audiomae {arguments[0]}: ") and err.count("\n") == 1 and len(err) < 400, err
        return err

    return refused


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- the program ---------------------------------------------------------------------------------------------


def test_module_help():
    """In a process of its own, as a user starts it."""
    done = subprocess.run([sys.executable, "-m", "audiomae", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    for command in ("doctor", "embed", "convert", "verify"):
        assert command in done.stdout


def test_version(run):
    assert run("--version") == (0, f"audiomae {version('audiomae')}\n", "")


def test_a_reader_that_has_seen_enough():
    doctor = subprocess.Popen(
        [sys.executable, "-m", "audiomae", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    doctor.stdout.close()
    assert not doctor.communicate()[1]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("sing",),
        ("embed",),
        ("embed", "a.wav"),
        ("embed", "a.wav", "--model", "m", "--batch-size", "0"),
        ("embed", "a.wav", "--model", "m", "--batch-size", "²"),
        ("convert", "a.pth"),
        ("verify", "a.pth", "--tokens", "word"),
        ("verify", "a.pth", "--stride", "10"),
        ("verify", "a.pth", "--num-heads", "-1"),
    ],
)
def test_wrong_command_lines(run, arguments):
    status, out, err = run(*arguments)
    assert status == 2 and not out and "usage: audiomae" in err


def test_doctor(run):
    status, out, err = run("doctor")
    assert status == 0 and not err
    lines = out.splitlines()
    for package in ("python", "torch", "torchaudio", "numpy"):
        assert any(line.split()[0] == package for line in lines if line.strip())
    for op in OPS:
        served = [line for line in lines if op in line.split()]
        assert {"reference", "native", "triton"} <= {word for line in served for word in line.split()}
        assert sum(line.lstrip().startswith("*") for line in served) == 1 + torch.cuda.is_available()
        assert all(line.endswith(" available") for line in served if line.lstrip().startswith("*"))
    for tier, chosen, _ in _native.cpu_tiers():
        assert any(line.split()[: 1 + chosen] == ["*"] * chosen + [tier] for line in lines if line.strip())
    if not _native.available():
        assert out.count(_native.why_not()) == 1


def doctor(**environment):
    command = [sys.executable, "-m", "audiomae", "doctor"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


TIERS = {name: reason for name, _, reason in _native.cpu_tiers()}
REFUSED = {"nonsense": "is not a tier of this build, which has portable"}
REFUSED |= {name: "cannot run on this machine: it lacks" for name in TIERS if "lacks" in TIERS[name]}


@pytest.mark.skipif(not TIERS, reason=_native.why_not() or "loaded")
@pytest.mark.parametrize("tier", REFUSED)
def test_doctor_and_a_tier_that_cannot_be_had(tier):
    done = doctor(AUDIOMAE_CPU_TIER=tier)
    assert done.returncode == 1 and not done.stderr
    assert done.stdout.count(f"AUDIOMAE_CPU_TIER={tier} {REFUSED[tier]}") == 1
    served = [
        line.partition(" native ")[2].strip() for line in done.stdout.splitlines() if " native  " in line
    ]
    assert served == ["no native library, see above"] * (
        len(OPS) + 1
    )  # and the backend of the models' attention


def test_doctor_and_a_library_that_is_none(tmp_path):
    (tmp_path / "notes.txt").write_text("no library\n")
    done = doctor(AUDIOMAE_NATIVE_LIBRARY=str(tmp_path / "notes.txt"))
    assert done.returncode == 1 and not done.stderr
    assert done.stdout.count("notes.txt is not a library that this package built: name a native library") == 1


def test_columns_of_doctor_line_up(run, monkeypatch):
    tiers = [("portable", False, "one"), ("avx512_bf16", True, "two")]
    monkeypatch.setattr(_native, "cpu_tiers", lambda: tiers)
    lines = run("doctor")[1].splitlines()
    assert len({line.index(word) for _, _, word in tiers for line in lines if line.endswith(f" {word}")}) == 1


# -- embed ---------------------------------------------------------------------------------------------------


def embeddings(path):
    with np.load(path) as file:
        return file["embeddings"], [Path(name) for name in file["files"]]


@pytest.mark.parametrize("kind", ["window", "finetuned", "ssast_frame", "mae_ast"])
def test_embed_is_the_mean_of_encode(run, checkpoints, kind, tmp_path):
    flags = KINDS[kind][0]
    out = tmp_path / "e.npz"
    status, printed, err = run(
        "embed", *SOUNDS, "--model", checkpoints[kind], "--out", out, "--batch-size", 2, *flags
    )
    assert status == 0
    cut = [] if kind == "mae_ast" else SOUNDS[:2]  # 64 frames are 0.65 s
    notes = err.splitlines()
    assert len(notes) == len(cut)
    assert all(
        note.startswith(f"{file}: embedded up to frame 64") for file, note in zip(cut, notes, strict=True)
    )
    rows, files = embeddings(out)
    assert files == SOUNDS and rows.shape == (len(SOUNDS), 64) and rows.dtype == np.float32
    assert f"wrote {out}: embeddings {rows.shape}" in printed and all(str(file) in printed for file in SOUNDS)

    model = audiomae.load(checkpoints[kind], **({"tokens": "patch"} if flags else {})).eval()
    for file, row in zip(SOUNDS, rows, strict=True):
        alone = model.encode(model.config.frontend(*load_batch([file], model.config.frontend)))
        expected = alone[0, model.num_prefix_tokens :].mean(dim=0).detach()
        torch.testing.assert_close(torch.from_numpy(row), expected, rtol=1e-4, atol=1e-5)
    assert len(np.unique(rows.round(3), axis=0)) == len(rows)  # and each clip has its own


@pytest.mark.parametrize("kind", ["window", "mae_ast"])
def test_a_clip_alone_is_the_clip_in_a_batch(run, checkpoints, kind, tmp_path):
    arguments = ["--model", checkpoints[kind], "--out", tmp_path / "e.npz", *KINDS[kind][0]]
    run("embed", *SOUNDS, *arguments)
    together, _ = embeddings(tmp_path / "e.npz")
    for file, row in zip(SOUNDS, together, strict=True):
        run("embed", file, *arguments)
        np.testing.assert_allclose(embeddings(tmp_path / "e.npz")[0][0], row, rtol=1e-4, atol=1e-5)


def test_embed_writes_to_the_given_name(run, checkpoints, tmp_path):
    status, printed, _ = run(
        "embed", SOUNDS[0], "--model", checkpoints["encoder"], "--out", tmp_path / "vectors"
    )
    assert (
        status == 0 and files_below(tmp_path) == ["vectors"] and f"wrote {tmp_path / 'vectors'}:" in printed
    )
    assert embeddings(tmp_path / "vectors")[0].shape == (1, 64)


def test_embed_with_weights_of_mixed_types(run, tmp_path):
    """fp16 layers beside an fp32 table cannot meet in one product: everything is computed in fp32."""
    state = {n: t if n == "pos_embed" else t.half() for n, t in state_dict("encoder").items()}
    torch.save(state, tmp_path / "half.pth")
    assert run("embed", SOUNDS[0], "--model", tmp_path / "half.pth", "--out", tmp_path / "e.npz")[0] == 0
    assert np.isfinite(embeddings(tmp_path / "e.npz")[0]).all()
    status, out, _ = run("verify", tmp_path / "half.pth")
    assert status == 0 and "finite" in out


def test_embed_with_a_converted_folder(run, checkpoints, tmp_path):
    assert run("convert", checkpoints["window"], tmp_path / "model")[0] == 0
    for i, model in enumerate((checkpoints["window"], tmp_path / "model")):
        assert run("embed", *SOUNDS[:2], "--model", model, "--out", tmp_path / f"{i}.npz")[0] == 0
    np.testing.assert_array_equal(embeddings(tmp_path / "0.npz")[0], embeddings(tmp_path / "1.npz")[0])


def test_a_name_has_random_weights_and_says_so(run, tmp_path):
    status, _, err = run("embed", SOUNDS[0], "--model", "ssast_frame_tiny", "--out", tmp_path / "e.npz")
    assert status == 0 and err == "ssast_frame_tiny has random weights: a baseline, not an embedding\n"
    assert embeddings(tmp_path / "e.npz")[0].shape == (1, 192)


def broken_audio(tmp_path):
    (tmp_path / "text.wav").write_text("no audio\n" * 50)
    (tmp_path / "zero.flac").touch()
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "cut.flac").write_bytes(recordings()[-1].read_bytes()[:100])
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(tmp_path / "short.wav", np.zeros(399, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    return [
        "text.wav",
        "zero.flac",
        "folder.wav",
        "cut.flac",
        "empty.wav",
        "short.wav",
        "nan.wav",
        "missing.wav",
    ]


@pytest.mark.parametrize("kind", ["encoder", "mae_ast"])
def test_unusable_audio_is_named(refused, checkpoints, kind, tmp_path):
    for name in broken_audio(tmp_path):
        bad, out = tmp_path / name, tmp_path / "e.npz"
        files = [SOUNDS[2], bad, SOUNDS[0]]
        message = refused("embed", *files, "--model", checkpoints[kind], "--out", out, *KINDS[kind][0])
        assert str(bad) in message and not out.exists()


def test_a_clip_of_one_frame(run, refused, checkpoints, tmp_path):
    """Padding makes up the rest for Audio-MAE; MAE-AST, which pads nothing, needs one patch."""
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, np.random.randn(400) / 9, 16000)
    out = ["--out", tmp_path / "e.npz"]
    assert run("embed", clip, "--model", checkpoints["encoder"], *out)[0] == 0
    message = refused("embed", clip, "--model", checkpoints["mae_ast"], "--tokens", "patch", *out)
    assert str(clip) in message and "needs 175 ms" in message  # 16 frames


def test_embed_refuses_before_work(refused, checkpoints, monkeypatch, tmp_path):
    """A bad --out, --device or file name is told before anything is loaded."""

    def load(*arguments, **overrides):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("audiomae.cli.load", load)
    monkeypatch.setattr("audiomae.cli.create_model", load)
    model = ["--model", checkpoints["encoder"]]
    assert f"{tmp_path / 'no'} of --out" in refused(
        "embed", SOUNDS[0], *model, "--out", tmp_path / "no" / "e.npz"
    )
    assert f"{tmp_path} is a folder" in refused("embed", SOUNDS[0], *model, "--out", tmp_path)
    out = ["--out", tmp_path / "e.npz"]
    assert str(tmp_path / "no.wav") in refused("embed", *SOUNDS, tmp_path / "no.wav", *model, *out)
    for device in ("gpu", "meta") + (() if torch.cuda.is_available() else ("cuda",)):
        assert f"--device {device} cannot be used" in refused(
            "embed", SOUNDS[0], *model, *out, "--device", device
        )
    message = refused("embed", SOUNDS[0], "--model", "audiomae_small", "--num-heads", 3, *out)
    assert "audiomae_small" in message
    assert files_below(tmp_path) == []


def test_a_misspelt_model_name(refused, tmp_path):
    assert "audiomae_bse" in refused(
        "embed", SOUNDS[0], "--model", "audiomae_bse", "--out", tmp_path / "e.npz"
    )


# -- convert and verify --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_verify_and_convert(run, checkpoints, kind, tmp_path):
    flags, family, trial = KINDS[kind]
    status, published, err = run("verify", checkpoints[kind], *flags)
    assert status == 0 and not err
    lines = {line.split("  ")[0].strip(): line for line in published.splitlines()}
    assert f" {family}(64 wide, 2 blocks" in lines["family"]
    assert (
        trial in published
        and "weights           finite" in published
        and "speech-vm-options.flac" in published
    )
    assert "missing keys      none" in published

    status, out, err = run("convert", checkpoints[kind], tmp_path / "model", *flags)
    assert status == 0 and not err and family.strip() in out and f"wrote {tmp_path / 'model'}" in out
    status, converted, err = run("verify", tmp_path / "model")
    assert status == 0 and not err
    assert converted == published
    state = torch.load(checkpoints[kind])["model"]
    status, out, err = run("convert", tmp_path / "model", tmp_path / "back.pth")
    assert status == 0 and not err and f"{len(state)} tensors" in out
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["back.pth"]
    back = torch.load(tmp_path / "back.pth")["model"]
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)


def test_verify_tells_position_layouts_and_unused_tensors(run, tmp_path):
    state = state_dict("encoder") | {"encoder_emb.weight": torch.ones(2)}
    for layout in ("transposed", "unknown"):
        torch.save(state, tmp_path / "c.pth")
        out = run("verify", tmp_path / "c.pth")[1]
        assert f"position layout   {layout}\n" in out and "unexpected keys   encoder_emb.weight\n" in out
        state["pos_embed"] = torch.randn(1, 33, 64)


def test_verify_refuses_nan(refused, run, tmp_path):
    for value in (torch.nan, torch.inf):
        state = state_dict("window")
        state["blocks.1.mlp.fc2.weight"][3, 5] = value
        torch.save(state, tmp_path / "nan.pth")
        message = refused("verify", tmp_path / "nan.pth")
        assert "1 tensors hold NaN or infinity" in message and "encoder.blocks.1.mlp.fc2.weight" in message


def test_verify_refuses_a_model_that_overflows(refused, tmp_path):
    state = state_dict("encoder")
    state["norm.weight"] = torch.full((64,), 3e38)
    torch.save(state, tmp_path / "loud.pth")
    assert "gives NaN or infinity on the recording" in refused("verify", tmp_path / "loud.pth")


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def refused_inputs(folder):
    """name -> (flags, what the sentence says)."""
    (folder / "text.pth").write_text("no checkpoint\n" * 20)
    (folder / "empty.pt").touch()
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    torch.save({"model": state_dict("window"), "args": Payload(folder / "canary")}, folder / "evil.pth")
    torch.save({"layer1.weight": torch.ones(3, 3)}, folder / "resnet.pth")
    torch.save(state_dict("mae_ast"), folder / "mae_ast.pt")
    whole = state_dict("window")
    torch.save({n: t for n, t in whole.items() if n != "decoder_pred.bias"}, folder / "missing.pth")
    torch.save(whole | {"decoder_pred.bias": torch.ones(3)}, folder / "shape.pth")
    data = (folder / "shape.pth").read_bytes()
    (folder / "cut.pth").write_bytes(data[: len(data) // 2])
    return {
        "nothing.pth": ([], "no file"),
        "text.pth": ([], "damaged, or not a file of torch.save"),
        "empty.pt": ([], "damaged, or not"),
        "cut.pth": ([], "damaged, or not"),
        "model.safetensors": ([], "no intact safetensors file"),
        "evil.pth": ([], "it holds posix.system" if os.name == "posix" else "it holds nt.system"),
        "resnet.pth": ([], "layer1.weight"),
        "mae_ast.pt": ([], 'tokens="patch" or tokens="frame"'),
        "missing.pth": ([], "1 tensors are missing: decoder_pred.bias"),
        "shape.pth": ([], "decoder_pred.bias (3,)"),
    } | {
        "shape.pth ": (["--num-heads", "3"], "heads=3"),
        "missing.pth ": (["--tokens", "frame"], "Audio-MAE"),
    }


def test_refused_checkpoints_leave_nothing_behind(refused, tmp_path):
    cases = refused_inputs(tmp_path)
    before = files_below(tmp_path)
    for name, (flags, says) in cases.items():
        path = tmp_path / name.strip()
        for command in (["verify", path], ["convert", path, tmp_path / "out" / "model"]):
            message = refused(*command, *flags)
            assert says in message, message
        message = refused("embed", SOUNDS[0], "--model", path, "--out", tmp_path / "e.npz", *flags)
        assert says in message
    assert files_below(tmp_path) == before  # no folder, no embeddings, no canary


def test_refused_folders(run, refused, checkpoints, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("verify", tmp_path / "empty")
    run("convert", checkpoints["encoder"], tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    assert "config.json is no model configuration" in refused("verify", tmp_path / "model")
    assert "no config.json" in refused("convert", tmp_path / "empty", tmp_path / "out.pth")
    assert "OUT is a .pth file" in refused("convert", tmp_path / "empty", tmp_path / "out")
    nowhere = tmp_path / "nowhere" / "out.pth"
    message = f"the folder {nowhere.parent} of OUT does not exist: make it first"
    assert message in refused("convert", tmp_path / "model", nowhere) and not nowhere.parent.exists()
    assert "config.json says all of the model" in refused("verify", tmp_path / "model", "--tokens", "patch")
    blocked = tmp_path / "file"
    blocked.write_text("here already")
    refused("convert", checkpoints["encoder"], blocked)
    assert blocked.read_text() == "here already" and not (tmp_path / "out").exists()


def test_convert_writes_over_nothing_unless_forced(run, refused, checkpoints, tmp_path):
    folder, file = tmp_path / "model", tmp_path / "back.pth"
    folder.mkdir()  # empty: there is nothing to lose
    assert run("convert", checkpoints["encoder"], folder)[0] == 0
    assert run("convert", folder, file)[0] == 0
    weights, published = (folder / "model.safetensors").read_bytes(), file.read_bytes()
    message = refused("convert", checkpoints["finetuned"], folder)
    assert f"the folder {folder} is not empty: choose another, or add --force" in message
    assert f"{file} exists already: choose another name, or add --force" in refused("convert", folder, file)
    assert (folder / "model.safetensors").read_bytes() == weights and file.read_bytes() == published
    assert run("convert", checkpoints["finetuned"], folder, "--force")[0] == 0
    assert run("convert", folder, file, "--force")[0] == 0
    assert (folder / "model.safetensors").read_bytes() != weights and file.read_bytes() != published


def test_names_are_no_checkpoints(refused):
    assert "there is no file or folder nowhere/at/all" in refused("verify", "nowhere/at/all")
    assert "audiomae_base names an untrained model" in refused("verify", "audiomae_base")


def test_a_hub_id_out_of_reach(refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("verify", "owner/no-such-model")
