"""The command line: what it prints, what it writes, and that a user's mistake is one sentence, never a traceback."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from audiomae_kernels import FRONT_END, OPS, _native
from cli_cases import KINDS, SOUNDS, files_below, state_dict

import audiomae
from audiomae import cli, options

pytestmark = pytest.mark.usefixtures("one_thread")


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
        ("embed", "a.wav", "--model", "m", "--out", "e.csv"),
        ("export", "--model", "m", "--out", "m.pt"),
        ("convert", "a.pth"),
        ("verify", "a.pth", "--tokens", "word"),
        ("verify", "a.pth", "--stride", "10"),
        ("verify", "a.pth", "--num-heads", "-1"),
    ],
)
def test_wrong_command_lines(run, arguments):
    status, out, err = run(*arguments)
    assert status == 2 and not out and "usage: audiomae" in err


def test_interrupted(run, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("audiomae.cli._doctor", interrupted)
    assert run("doctor") == (130, "", "\naudiomae doctor: interrupted\n")
    monkeypatch.setitem(cli._TRAINING, "pretrain", (interrupted, ""))
    status, _, err = run("pretrain", "--resume")
    assert status == 130 and "interrupted; --resume goes on from its last checkpoint" in err


def test_doctor(run):
    status, out, err = run("doctor")
    assert status == 0 and not err
    lines = out.splitlines()
    for package in ("python", "torch", "torchaudio", "numpy"):
        assert any(line.split()[0] == package for line in lines if line.strip())
    for op in (*FRONT_END, *OPS):
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
    # The last one is the backend of the models' attention.
    assert served == ["no native library, see above"] * (len(FRONT_END) + len(OPS) + 1)


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
    for layout in ("transposed", "unknown, used as it is"):
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
        assert "NaN or infinity in 1 tensor" in message and "encoder.blocks.1.mlp.fc2.weight" in message


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
        "missing.pth": ([], "lacks 1 tensor: decoder_pred.bias"),
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


# -- names, folders, folders of runs -------------------------------------------------------------------------

NAME = "ssast_frame_tiny"


@pytest.fixture
def small_models(monkeypatch):
    """Named models are made small: what counts here is that they are made."""
    create = options.create_model
    monkeypatch.setattr(
        options, "create_model", lambda name, **given: create(name, depth=1, frames=64, **given)
    )


@pytest.mark.usefixtures("small_models")
def test_every_command_takes_a_name(run, refused, tmp_path):
    """And says that its weights are random."""
    sound, out = SOUNDS[0], tmp_path / "out"
    for words in (
        ("verify", NAME),
        ("embed", sound, "--model", NAME, "--out", f"{out}.npz"),
        ("reconstruct", sound, "--model", NAME, "--out", f"{out}.png"),
        ("export", "--model", NAME, "--out", f"{out}.pt2"),
    ):
        status, _, err = run(*words)
        assert status == 0 and err.startswith(f"{NAME} has random weights: "), words
    status, _, err = run("tag", sound, "--model", NAME)
    assert status == 1 and "which has no classes" in err
    assert "leave out what describes a file" in refused("verify", NAME, "--num-heads", "3", status=2)


@pytest.mark.usefixtures("small_models")
def test_a_name_and_a_folder_of_that_name(run, checkpoints, tmp_path, monkeypatch):
    """The name is the name wherever a command is started; ./name and a Path are the folder."""
    monkeypatch.chdir(tmp_path)
    assert run("convert", checkpoints["encoder"], NAME)[0] == 0
    folder = torch.load(checkpoints["encoder"])["model"]["norm.weight"].numel()
    for source, width in ((NAME, 192), (f"./{NAME}", folder)):
        status, out, err = run("verify", source)
        assert status == 0 and f"({width} wide" in out, source
        assert (f"; ./{NAME} names what is here" in err) == (source == NAME)
    assert audiomae.Embedder(Path(NAME)).width == folder != audiomae.Embedder(NAME, depth=1).width
    assert audiomae.load(NAME).config.width == folder  # which takes no names


def test_the_folder_of_a_run_is_its_model(run, refused, checkpoints, tmp_path):
    mine = tmp_path / "mine"
    (mine / "checkpoints").mkdir(parents=True)
    assert "has not come to its end, and has no model yet: go on with it" in refused("verify", mine)
    assert run("convert", checkpoints["finetuned"], mine / "model")[0] == 0
    verified = [run("verify", path) for path in (mine, mine / "model")]
    assert verified[0] == verified[1] and verified[0][0] == 0
    tagged = [run("tag", SOUNDS[0], "--model", path)[1] for path in (mine, mine / "model")]
    assert tagged[0] == tagged[1]
    for words in (
        ("embed", SOUNDS[0], "--model", mine, "--out", tmp_path / "e.npz"),
        ("export", "--model", mine, "--out", tmp_path / "m.pt2"),
        ("convert", mine, tmp_path / "back.pth"),
    ):
        assert run(*words)[0] == 0, words
    assert type(audiomae.Classifier.from_pretrained(mine)) is audiomae.Classifier
    assert audiomae.create_classifier(None, 3, frames=None, pretrained=mine).config.num_classes == 3
    (tmp_path / "folds" / "fold-1").mkdir(parents=True)
    assert "name one, such as" in refused("verify", tmp_path / "folds")


# -- what cannot be written ----------------------------------------------------------------------------------


def test_a_place_that_takes_no_file(refused, checkpoints, tmp_path):
    """Told before anything is loaded, in one sentence."""
    place = Path("/proc")  # even root cannot write there
    model = ["--model", tmp_path / "no-such-model.pth"]
    (tmp_path / "model").mkdir()
    for words in (
        ("embed", SOUNDS[0], *model, "--out", place / "e.npz"),
        ("reconstruct", SOUNDS[0], *model, "--out", place / "p.png"),
        ("export", *model, "--out", place / "m.onnx"),
        ("probe", tmp_path, *model, "--out", place / "r.json"),
        ("convert", tmp_path / "model", place / "m.pth"),
    ):
        message = refused(*words)
        assert f"{words[-1]} cannot be written: " in message and "Errno" not in message, message
    train = ("--model", NAME, "--steps", 1, "--batch-size", 1, "--workers", 0)
    for words in (
        ("prepare", SOUNDS[0].parent, "--out", place / "no"),
        ("convert", checkpoints["encoder"], place / "no"),
        ("pretrain", "--data", SOUNDS[0].parent, *train, "--out", place / "no"),
    ):
        message = refused(*words)
        assert "/proc/no" in message and "Errno" not in message, message


# -- the hub -------------------------------------------------------------------------------------------------


def test_a_hub_id_out_of_reach(refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("verify", "owner/no-such-model")
