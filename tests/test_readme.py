"""Every snippet and every command of the README and of the pages in docs/ runs as it stands there."""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny_audio
import torch

import audiomae
import bench.__main__
from audiomae import cli, config
from audiomae.data import recordings
from audiomae.train import TrainConfig
from audiomae.train.command import parse

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
# Run with data sets in the layouts of the real ones: tests/finetune/test_docs.py.
ELSEWHERE = {"docs/finetuning.md"}

TINY = {"width": 64, "depth": 2, "heads": 1, "mlp_ratio": 1.0}
DECODER = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2}
# What a page's data sets and machines are in a test.
HERE = {
    "/data/audioset": "recordings",
    "/fast/audioset": "shards",
    "/data/librispeech.tsv": "recordings",
    "--workers 8": "--workers 1",
    "workers=8": "workers=0",
    "--layer 6": "--layer 2",
    "'(.*)-'": "'(.*)[.]'",
    "batch_size=64": "batch_size=4",
    '"cuda"': '"cpu"',
    "steps=20, batch_size=4": "steps=1, batch_size=2, workers=0, model_overrides=SIZES",
}


def here(text):
    for there, replacement in HERE.items():
        text = text.replace(there, replacement)
    return text


def blocks(page):
    return re.findall(r"^```(\w*)\n(.*?)^```", TEXTS[page], flags=re.DOTALL | re.MULTILINE)


def lines(start):
    """(page, command) of all code blocks; a backslash joins lines."""
    found = []
    for page in PAGES:
        for language, code in blocks(page):
            if language in ("", "bash") and page not in ELSEWHERE:
                joined = re.sub(r"\\\n\s*", "", code).splitlines()
                found += [(page, line) for line in joined if re.match(start, line)]
    return list(dict.fromkeys(found))


def named(cases):
    return [pytest.param(*case, id="-".join(str(part)[:60] for part in case)) for case in cases]


LOOPS = "audiomae (pretrain|finetune|evaluate)"
COMMANDS = [(page, line) for page, line in lines("audiomae ") if not re.match(LOOPS, line)]
TRAINING = [line for page, line in lines(r"(torchrun .*)?(-m )?audiomae pretrain")]
TEXTS["kernels/README.md"] = (ROOT / "kernels/README.md").read_text()
SNIPPETS = [
    (page, i)
    for page in [*PAGES, "kernels/README.md"]
    if page not in ELSEWHERE
    for i, (language, _) in enumerate(blocks(page))
    if language == "python"
]


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    """What the reader has: published checkpoints, a classifier, recordings. `audiomae_base` is a small one here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        config.MODELS, "audiomae_base", config.model_config("audiomae_base", **TINY, **DECODER)
    )
    model = audiomae.create_model("audiomae_base")
    torch.save({"model": audiomae.to_upstream(model), "epoch": 32}, "pretrained.pth")
    for folder in ("audiomae_as2m", "runs/first/model"):
        model.save_pretrained(folder)
    classifier = audiomae.create_classifier("audiomae_base", 3)
    torch.save({"model": audiomae.to_upstream(classifier)}, "finetuned.pth")
    names = ("dog", "cat", "rain")
    classifier.config.frontend = dataclasses.replace(classifier.config.frontend, labels=names)
    classifier.save_pretrained("classifier")
    rows = [f"{i},/m/{i},{name}\n" for i, name in enumerate(names)]
    Path("class_labels_indices.csv").write_text("index,mid,display_name\n" + "".join(rows))
    shutil.copy(recordings()[-1], "clip.flac")
    Path("audiomae").symlink_to(ROOT / "audiomae")
    tiny_audio.folder(tmp_path / "recordings", 4)
    for kind in ("bark", "meow"):
        tiny_audio.folder(tmp_path / "sounds" / kind, 5)


def test_there_is_something_to_run():
    assert len(SNIPPETS) >= 10 and len(COMMANDS) >= 20 and len(TRAINING) >= 2
    known = r"audiomae |make |python |torchrun |pip |#|export|srun|\s"
    unknown = [line for _, line in lines(r"\w") if not re.match(known, line)]
    assert not unknown, f"nobody runs these: {unknown}"


@pytest.mark.parametrize("page, number", named(SNIPPETS))
def test_snippet(page, number):
    code = here(blocks(page)[number][1])
    exec(compile(code, f"{page}, block {number}", "exec"), {"SIZES": TINY | DECODER})


@pytest.mark.parametrize("page, line", named(COMMANDS))
def test_command(page, line, capsys):
    assert cli.main(shlex.split(here(line), comments=True)[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", TRAINING)
def test_training_command(line):
    """Its settings are good ones; the README's own is run by tests/train/test_resume.py."""
    arguments = shlex.split(line.partition("pretrain ")[2], comments=True)
    parse(arguments, TrainConfig, "pretrain", "").check()


@pytest.mark.parametrize("page, line", named(lines("python -m bench .*--help")))
def test_bench_command(page, line, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.__main__.main(shlex.split(line)[3:])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out


BENCH = re.findall(
    r"(?<![\w.])python -m bench (models|kernels|data)\b([^`#\n]*)",
    TEXTS["README.md"] + (ROOT / "bench/README.md").read_text(),
)


@pytest.mark.parametrize("level, options", BENCH)
def test_bench_command_line(level, options):
    """Its words are known ones; the suite's own tests run them."""
    bench.__main__._parser().parse_args([level, *shlex.split(options)])


@pytest.mark.parametrize("line", [line for _, line in lines("make ")])
def test_make_target_exists(line):
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


LINKS = [(page, link) for page in PAGES for link in sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXTS[page])))]


@pytest.mark.parametrize("page, link", named(LINKS))
def test_link(page, link):
    assert ((ROOT / page).parent / link).exists()


def test_every_page_is_linked():
    assert all(page in TEXTS["README.md"] for page in PAGES[1:])
