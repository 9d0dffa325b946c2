"""Every snippet and every command of the README runs as it stands there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import audiomae
from audiomae import cli
from audiomae.data import recordings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if not language for line in code.splitlines()]


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    """A folder with what the README's user has: a published checkpoint and a recording."""
    monkeypatch.chdir(tmp_path)
    small = {"width": 64, "depth": 1, "heads": 1, "decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2}
    model = audiomae.create_model("audiomae_base", **small)
    torch.save({"model": audiomae.to_upstream(model), "epoch": 32}, "pretrained.pth")
    shutil.copy(recordings()[-1], "clip.flac")


def test_the_readme_has_snippets_and_commands():
    assert len(SNIPPETS) >= 4 and len(COMMANDS) >= 6


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number):
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("audiomae ")])
def test_command(line, capsys):
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_target_exists(line):
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_link(link):
    assert (ROOT / link).exists()
