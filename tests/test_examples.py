"""The programs in examples/, at a size of seconds."""

import csv
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import matplotlib.image
import pytest
import torch

import audiomae
from audiomae.train.command import parse

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_for_slurm(tmp_path):
    """With stand-ins for SLURM's commands and for torchrun; what it starts is a command line of this version."""
    tools = {
        "scontrol": "printf 'node7\\nnode8\\n'",
        "srun": 'shift; exec "$@"',
        "torchrun": "printf '%s\\n' \"$@\"",
    }
    for name, does in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "99"}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", EXAMPLES / "slurm.sh"], env=environment, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert words[words.index("--rdzv-endpoint") + 1] == "node7:29500" and "99" in words and not done.stderr
    config = parse(words[words.index("pretrain") + 1 :])
    config.check()
    assert config.resume and config.recipe == "audiomae_base.as2m"


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs an example's main() with arguments, twelve classes of two clips each, into tmp_path."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def call(module, *arguments):
        common = ("--clips", "2", "--steps", "1", "--seeds", "1", "--out", str(tmp_path))
        monkeypatch.setattr(sys, "argv", [module.__name__, *common, *arguments])
        module.main()

    return call


def test_learning(call, tmp_path, capsys):
    import learning

    call(learning)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["chance"] == 1 / 12 and [len(results[name]) for name in ("random", "pre-trained")] == [
        1,
        1,
    ]
    assert "| pre-trained |" in capsys.readouterr().out
    assert matplotlib.image.imread(tmp_path / "learning.png").shape[2] == 4


def test_finetuning(call, tmp_path, monkeypatch, capsys):
    """From both starts; what was trained already is not trained again, unless with other settings."""
    import finetuning

    tuned, whole = [], finetuning.finetune
    monkeypatch.setattr(finetuning, "finetune", lambda config: tuned.append(config) or whole(config))
    for steps, runs in ((0, 2), (0, 2), (1, 4)):
        call(finetuning, "--tune-steps", str(steps))
        assert len(tuned) == runs
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(results[name]) for name in ("random", "pre-trained")] == [1, 1]
    assert "| pre-trained     |" in capsys.readouterr().out


def test_ablations(call, tmp_path, monkeypatch, capsys):
    """Rows and what they are compared with; the same command goes on, and other settings are refused."""
    import ablations

    trained, whole = [], ablations.pretrain_on
    monkeypatch.setattr(ablations, "pretrain_on", lambda *given: trained.append(given) or whole(*given))
    call(ablations, "--only", "InfoNCE")
    path = tmp_path / "ablations.csv"
    path.write_text(path.read_text() + "loss,reconstruction and Inf")  # as a killed process leaves it
    capsys.readouterr()
    call(ablations, "--only", "loss")
    assert len(trained) == 3 and not (tmp_path / "run").exists()
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == [
        "not trained",
        "as it is",
        "InfoNCE",
        "reconstruction and InfoNCE",
    ]
    assert all(float(line["gflop"]) > 0.1 and float(line["seconds"]) > 0 for line in lines[1:])
    assert capsys.readouterr().out.count("\n| ") == 2 + len(lines)
    assert (tmp_path / "ablations.png").exists() and "| as it is " in (tmp_path / "ablations.md").read_text()
    with pytest.raises(SystemExit, match="holds rows of 1 steps"):
        call(ablations, "--steps", "2")
    with pytest.raises(SystemExit, match="there is no question and no row 'moon'"):
        call(ablations, "--only", "moon")


def test_every_row_of_the_ablations_is_a_model(call):
    import ablations
    from learning import FRAMES, MODEL

    work = {}
    for _, row, fields in ablations.chosen([])[1:]:
        model = audiomae.create_model("audiomae_small", **MODEL | fields)
        mask = model.draw_mask(2, FRAMES, torch.Generator().manual_seed(0))
        work[row] = len(mask.ids_keep), mask.num_tokens, mask.ids_masked.shape[1] / mask.num_tokens
    assert work["as it is"] == (2, 64, 0.75) == work["time and frequency"] == work["clusters"]
    assert work["4 masks per clip"][0] == 8 and work["frames, 2 x 128"][1] == 64


def test_flops_are_those_of_the_cost_model(call):
    """The counter sees the same products as the benchmark's model of them, which has nothing for the mask tokens."""
    import ablations
    from learning import FRAMES, MODEL

    from bench.flops import cost

    model = audiomae.create_model("audiomae_small", **MODEL)
    expected = 3 * cost(model.config, 16, FRAMES).flops / 1e9
    # No gradient for the spectrogram: one of the three products of the embedding is not computed.
    assert ablations.gflop(MODEL, FRAMES) == pytest.approx(expected, rel=0.03)


def test_recordings_of_different_lengths(call, tmp_path, monkeypatch):
    """One's own: more of them than are read at a time."""
    import learning
    import soundfile

    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(40):
            soundfile.write(tmp_path / label / f"{i}.wav", torch.randn(8000 + 400 * i).numpy() / 4, 16000)
    found = learning.prepare(types.SimpleNamespace(data=tmp_path))
    assert found.inputs.shape == (80, learning.FRAMES, 128) and found.inputs.isfinite().all()
    assert abs(found.inputs[:, :40].mean()) < 0.5 and len(found.paths) == 80
