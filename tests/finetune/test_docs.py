"""The commands of README.md and docs/finetuning.md, and the tables that they are in."""

import json
import re
import shlex
from pathlib import Path

import labelled
import pytest
import torch
from labelled import TINY, run

import audiomae
from audiomae.finetune import RECIPES, TASKS, EvaluateConfig, TuneConfig
from audiomae.train.command import parse

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
README, PAGE = (ROOT / "README.md").read_text(), (ROOT / "docs" / "finetuning.md").read_text()
COMMANDS = re.findall(r"^audiomae ((?:finetune|evaluate) .*)$", README + PAGE, flags=re.MULTILINE)
SHORT = [
    "--steps",
    1,
    "--batch-size",
    4,
    "--accumulate",
    1,
    "--workers",
    0,
    "--precision",
    "fp32",
    "--device",
    "cpu",
]


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """What the reader has: data, a published checkpoint, a run of pre-training."""
    monkeypatch.chdir(tmp_path)
    labelled.esc50(tmp_path)
    labelled.class_folders(tmp_path / "recordings")
    labelled.class_folders(tmp_path / "field", classes=("dog", "saw"), clips=2)
    decoder = {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 1}
    model = audiomae.create_model("audiomae_small", **{**TINY, "mlp_ratio": 4.0, "heads": 1}, **decoder)
    torch.save({"model": audiomae.to_upstream(model)}, "pretrained.pth")
    model.save_pretrained("runs/first/model")


def test_the_commands(user_folder):
    """As they stand there, with fewer and shorter clips."""
    assert len(COMMANDS) >= 5
    for line in dict.fromkeys(COMMANDS):
        words = shlex.split(line)
        kind = TuneConfig if words[0] == "finetune" else EvaluateConfig
        parse(words[1:], kind, words[0], "").check()
        more = [*SHORT, "--frames", 48] if words[0] == "finetune" else SHORT[6:8] + SHORT[10:]
        if "--epochs" in words:
            i = words.index("--epochs")
            del words[i : i + 2]
        assert run(*words, *more) == 0, line
    found = json.loads(Path("runs/esc50/test/metrics.json").read_text())
    assert list(found["folds"]) == list("12345")
    assert Path("runs/mine/test/confusion.png").exists()


def test_the_program(user_folder):
    """Of the section on Python."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    code = code.replace("epochs=30", "steps=1, batch_size=4, workers=0, frames=48, device='cpu'")
    names = {}
    exec(compile(code, "docs/finetuning.md", "exec"), names)
    assert names["folder"] == Path("runs/mine/model") and names["report"].metrics["clips"] == 3


def test_every_task_and_recipe_is_in_the_tables():
    tables = [line for line in PAGE.splitlines() if line.startswith("|")]
    for name in RECIPES:
        assert any(f"`{name}`" in line for line in tables), name
    for name, task in TASKS.items():
        if name == "custom":
            continue
        for text in (README, PAGE):
            rows = [
                line for line in text.splitlines() if re.search(rf"`--task {name}\b", line) and "|" in line
            ]
            assert rows and all(re.search(r"\| (not run|\d[\d.]*) \|", row) for row in rows), name
            assert not task.folds or all("--fold all" in row for row in rows)
    for option in set(re.findall(r"`(--[a-z-]+)", PAGE)):
        names = [
            *TuneConfig.__dataclass_fields__,
            *EvaluateConfig.__dataclass_fields__,
            "help",
            "config",
            "print_config",
        ]
        assert option[2:].replace("-", "_") in names, option


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", PAGE))))
def test_links(link):
    assert (ROOT / "docs" / link).exists()
