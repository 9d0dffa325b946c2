"""A run that was stopped, killed, or could not write: it goes on as if nothing had been."""

import errno
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from faults import Killed, fault
from pretraining import MODELS, assert_same_bits, leaves, make_clips, start, state_of, tiny

import audiomae
from audiomae.cli import main
from audiomae.data import recordings
from audiomae.train import Checkpoints, Trainer, TrainingError, pretrain
from audiomae.train import checkpoints as checkpoints_module
from audiomae.train.checkpoints import read_state
from audiomae.train.log import Log
from audiomae.train.loop import STATE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips") / "audio")


@pytest.fixture
def signalled(monkeypatch):
    """Sends this process a signal in the middle of a step."""

    def signalled(step, number):
        whole = Trainer._step

        def interrupted(self, micro):
            if self.step == step:
                os.kill(os.getpid(), number)
            whole(self, micro)

        monkeypatch.setattr(Trainer, "_step", interrupted)

    yield signalled
    monkeypatch.undo()


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return {line["step"]: line["loss"] for line in metrics(out) if "loss" in line}


CASES = {
    "audiomae": {"model": "audiomae_small"},
    "audiomae-bf16": {"model": "audiomae_small", "precision": "bf16"},
    "audiomae-fp16": {"model": "audiomae_small", "precision": "fp16"},
    "mae_ast": {"model": "mae_ast_patch_base", "clip_grad": 1.0, "batch_size": 1, "steps": 7},
    "lengths": {"model": "audiomae_small", "overrides": {"pad": "exclude", "masks_per_clip": 2}},
    "cross": {
        "model": "audiomae_small",
        "overrides": {"decoder": "cross", "decode_ratio": 0.5},
        "picture_every": 4,
    },
    "ssast": {"model": "ssast_patch_tiny", "optimizer": "adam", "schedule": "plateau", "val_every": 2},
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_equals_not_stopped(clips, tmp_path, signalled, capsys, case, number):
    """Weights, optimizer, schedule, random streams and the sampler's position; stopped inside an epoch."""
    if number == signal.SIGUSR1 and case != "audiomae":
        pytest.skip("one is enough")
    settings = dict(CASES[case])
    if settings.get("schedule") == "plateau":
        settings["val_data"] = [str(clips)]
    whole = tiny(clips, tmp_path / "whole", **settings)
    assert pretrain(whole) == tmp_path / "whole" / "model"
    parts = tiny(clips, tmp_path / "parts", **settings, resume=True)
    signalled(4, number)
    assert pretrain(parts) is None
    assert f"asked to end ({number.name}) at step 5" in capsys.readouterr().out
    assert signal.getsignal(number) is signal.SIG_DFL
    assert Checkpoints(tmp_path / "parts" / "checkpoints").latest().step == 5
    signalled(-1, number)
    assert pretrain(parts) == tmp_path / "parts" / "model"
    found, expected = state_of(parts.out, parts.steps), state_of(whole.out, whole.steps)
    assert any(tensor.abs().sum() > 0 for name, tensor in leaves(expected["optimizer"]) if "exp_avg" in name)
    assert_same_bits(found, expected)
    assert losses(parts.out) == losses(whole.out) and len(losses(whole.out)) == whole.steps
    assert len(set(losses(whole.out).values())) == whole.steps
    models = [audiomae.load(Path(out) / "model").state_dict() for out in (parts.out, whole.out)]
    assert_same_bits(*models)


def test_a_signal_before_anything_was_measured(clips, tmp_path, signalled):
    """What is saved then is no candidate for the best."""
    config = tiny(clips, tmp_path / "run", log_every=100, save_every=100)
    signalled(2, signal.SIGTERM)
    assert pretrain(config) is None
    assert [(c.step, c.metric) for c in Checkpoints(tmp_path / "run" / "checkpoints").complete()] == [
        (3, None)
    ]


def test_a_signal_before_the_first_step(clips, tmp_path, monkeypatch, capsys):
    """There is nothing to save: what goes on starts anew."""
    config = tiny(clips, tmp_path / "run", resume=True, steps=1)
    take = Trainer._take

    def interrupted(self, batches):
        os.kill(os.getpid(), signal.SIGTERM)
        return take(self, batches)

    monkeypatch.setattr(Trainer, "_take", interrupted)
    assert pretrain(config) is None
    assert "at step 0: nothing to save" in capsys.readouterr().out
    assert not Checkpoints(tmp_path / "run" / "checkpoints").started()
    monkeypatch.undo()
    assert pretrain(config) is not None


def killed(config, moments, seed):
    """Kill -9 at random moments and go on; the checkpoints are looked at each time."""
    generator = random.Random(seed)
    folder, path = Checkpoints(Path(config.out) / "checkpoints"), Path(config.out) / "metrics.jsonl"
    for moment in range(moments):
        began = folder.latest()
        reach = (began.step if began else 0) + generator.randint(1, 2 * config.save_every)
        process = start(config)
        while process.is_alive() and (not path.exists() or f'"step": {reach},' not in path.read_text()):
            time.sleep(0.002)
        time.sleep(generator.random() * 0.05)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"moment {moment}"
        made = max((json.loads(line)["step"] for line in path.read_text().splitlines()[:-1]), default=0)
        assert all(checkpoint.damage() is None for checkpoint in folder.complete())
        saved = folder.latest()
        assert made - (saved.step if saved else 0) <= config.save_every
        if saved:
            assert state_of(config.out, saved.step)["step"] == saved.step
    process = start(config)
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.parametrize("moments", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(clips, tmp_path, moments):
    settings = {"steps": 8 * moments, "save_every": 4, "accumulate": 1}
    config = tiny(clips, tmp_path / "killed", **settings, resume=True)
    killed(config, moments, seed=moments)
    whole = tiny(clips, tmp_path / "whole", **settings)
    pretrain(whole)
    assert_same_bits(state_of(config.out, config.steps), state_of(whole.out, whole.steps))
    assert losses(config.out) == losses(whole.out)
    names = [path.name for path in (tmp_path / "killed").rglob("*")]
    assert not [name for name in names if name.endswith((".partial", ".removed"))]


def test_command_and_a_signal_to_the_whole_group(clips, tmp_path):
    """As schedulers do it: workers that decode get the signal too."""
    settings = json.dumps(tiny(clips, "x").model_overrides)
    command = [sys.executable, "-m", "audiomae", "pretrain", "--data", clips, "--model", "audiomae_small"]
    command += ["--model-overrides", settings, "--steps", "100000", "--batch-size", "2", "--workers", "2"]
    command += ["--log-every", "1", "--out", tmp_path / "run", "--picture-every", "0"]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    path = tmp_path / "run" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit and not (path.exists() and path.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "asked to end (SIGTERM)" in out and "Traceback" not in out
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest().step >= 1
    assert not (tmp_path / "run" / "model").exists()


def test_the_command_in_the_readme(clips, tmp_path, monkeypatch, capsys):
    """As it stands there but for the model's size, on the recordings that come along."""
    root = Path(__file__).parents[2]
    (line,) = re.findall(r"^audiomae (pretrain .*)$", (root / "README.md").read_text(), flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.replace("audiomae/recordings", str(recordings()[0].parent)))
    assert main([*words, "--model-overrides", json.dumps(MODELS["audiomae_small"])]) == 0
    assert "step 20/20" in capsys.readouterr().out
    run = tmp_path / "runs" / "first"
    assert Checkpoints(run / "checkpoints").latest().step == 20 and metrics(run)[-1]["step"] == 20
    assert [path.name for path in (run / "pictures").iterdir()] == ["step-00000020.png"]
    assert audiomae.load(run / "model").config.frames == 64 and (run / "config.yaml").exists()


# -- what cannot be written ----------------------------------------------------------------------------------


@contextmanager
def small_disk(folder, options):
    """A file system of its own in memory."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(clips, tmp_path):
    with small_disk(tmp_path / "disk", "size=2m") as disk:
        config = tiny(clips, disk / "run", overrides={"width": 64})
        with pytest.raises(
            OSError, match=r"No space left on device; the last complete one is .*step-00000003"
        ):
            pretrain(config)
        last = Checkpoints(disk / "run" / "checkpoints").latest()
        assert last.step == 3 and last.damage() is None
        names = [path.name for path in (disk / "run" / "checkpoints").iterdir()]
        assert names == ["step-00000003"]


def test_a_folder_that_becomes_read_only(clips, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "size=20m") as disk:
        config, whole = tiny(clips, disk / "run"), Trainer._step

        def read_only(self, micro):
            if self.step == 5:  # lines of metrics stay possible: their file is open
                self.log.close()
                self.log.active, self.log._file, self.log._board = False, None, None
                subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            whole(self, micro)

        monkeypatch.setattr(Trainer, "_step", read_only)
        with pytest.raises(OSError, match=r"Read-only file system; the last complete one is .*step-00000003"):
            pretrain(config)
        assert Checkpoints(disk / "run" / "checkpoints").latest().step == 3
        monkeypatch.undo()
        with pytest.raises(ValueError, match="cannot be written: Read-only file system"):
            pretrain(tiny(clips, disk / "run", resume=True))


def test_a_write_that_fails_half_way(clips, tmp_path, monkeypatch):
    """The same where nothing can be mounted."""
    save = torch.save

    def full(state, file):
        if state["step"] == 6:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(checkpoints_module.torch, "save", full)
    with pytest.raises(
        OSError, match=r"step-00000006 could not be written: No space left.*step-00000003\. Make"
    ):
        pretrain(tiny(clips, tmp_path / "run"))
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest().step == 3
    pretrain(tiny(clips, tmp_path / "run", resume=True))
    pretrain(tiny(clips, tmp_path / "whole"))
    assert_same_bits(state_of(tmp_path / "run", 8), state_of(tmp_path / "whole", 8))


def test_a_line_that_cannot_be_written(tmp_path):
    """Closing the file tries again, and must not hide the sentence."""
    log = Log(tmp_path, 0, 8)
    log._file.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115 -- the log closes it
    said = "full cannot be written: No space left on device; go on with --resume"
    with pytest.raises(OSError, match=said), closing(log):
        log.metrics(1, loss=1.0)


def test_tensorboard_on_a_full_disk(tmp_path):
    """It writes in a thread of its own, and hands the error to whoever comes next."""
    pytest.importorskip("torch.utils.tensorboard")
    log = Log(tmp_path, 0, 8)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log._board.flush = log._board.close = full
    said = "tensorboard cannot be written: No space left on device; go on with --resume"
    with pytest.raises(OSError, match=said), closing(log):
        log.metrics(1, loss=1.0)


def test_a_picture_that_cannot_be_written(clips, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pictures").touch()
    with pytest.raises(OSError, match=r"pictures.* cannot be written: File exists; go on with --resume"):
        pretrain(tiny(clips, tmp_path / "run", picture_every=4))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_disk_that_is_full_when_the_model_is_written(clips, tmp_path, number):
    """All steps are made: the next process has the model to write, and no more."""
    with (
        fault(tmp_path / "run" / "model", "full", number),
        pytest.raises(OSError, match="is complete: make") as no,
    ):
        pretrain(tiny(clips, tmp_path / "run", steps=1))
    assert "Errno" not in str(no.value) and "model could not be written: No space left on device" in str(
        no.value
    )
    assert pretrain(tiny(clips, tmp_path / "run", steps=1, resume=True)) == tmp_path / "run" / "model"
    assert audiomae.load(tmp_path / "run").record.metrics
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith("model.")]


def test_a_folder_that_cannot_be_made(clips, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out .* cannot be written: Not a directory"):
        pretrain(tiny(clips, tmp_path / "file" / "run"))


@pytest.mark.parametrize("kind", ["killed", "full", "read-only"])
def test_a_fault_at_every_operation_of_a_save(tmp_path, kind):
    """Files, syncs, renames, the marker, the removal of the older one; then the next process goes on."""
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        saved(Checkpoints(folder, keep=1), 1, 2, metric=1.0)
        error = None
        try:
            with fault(folder, kind, number) as happened:
                saved(Checkpoints(folder, keep=1), 3, metric=0.0)
        except (OSError, Killed) as caught:
            error = caught
        assert (error is not None) == happened.reached, number
        later = Checkpoints(folder, keep=1)
        found = later.latest()
        assert found.step in (2, 3) and torch.equal(read_state(found.path / STATE)["x"], torch.ones(99))
        if isinstance(error, OSError):
            assert f"; the last complete one is {found.path}" in str(error) and "Make room or" in str(error)
            assert ("could not be written" in str(error)) == (found.step == 2)
        assert [checkpoint.path for checkpoint in later.complete()][:1] == [found.path]
        saved(later, 3, 4, metric=-1.0)
        assert [path.name for path in folder.iterdir()] == ["step-00000004"], number
        if error is None:
            break
    assert number > (8 if kind == "full" else 12), "too few operations were seen"


# -- damage --------------------------------------------------------------------------------------------------


def truncated(path):
    os.truncate(path / "state.pt", (path / "state.pt").stat().st_size // 2)


def bit_flipped(path):
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def without_marker(path):
    (path / "complete.json").unlink()


def half_a_marker(path):
    os.truncate(path / "complete.json", 20)


def without_file(path):
    (path / "state.pt").unlink()


def half_written(path):
    without_marker(path)
    path.rename(path.with_name(path.name + ".partial"))


DAMAGES = [truncated, bit_flipped, without_marker, half_a_marker, without_file, half_written]


def saved(folder, *steps, metric=None):
    for step in steps:
        folder.save(
            step,
            lambda path: checkpoints_module.write_state(path / "state.pt", {"x": torch.ones(99)}),
            metric,
        )


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_passed_over(tmp_path, caplog, damage):
    folder = Checkpoints(tmp_path, keep=5)
    saved(folder, 1, 2, 3)
    damage(tmp_path / "step-00000003")
    with caplog.at_level(logging.WARNING, "audiomae.train"):
        assert folder.latest().step == 2
    (record,) = caplog.records
    assert "step-00000003" in record.getMessage() and "is passed over: " in record.getMessage()
    damage(tmp_path / "step-00000002")
    damage(tmp_path / "step-00000001")
    assert folder.latest() is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_push_no_good_one_out(tmp_path, caplog, damage):
    """The last two that are kept are the last two good ones; what is damaged goes, and a warning says why."""
    saved(Checkpoints(tmp_path, keep=9), 1, 2, 3, 4)
    for step in (3, 4):
        damage(tmp_path / f"step-0000000{step}")
    folder = Checkpoints(tmp_path, keep=2)
    assert folder.latest().step == 2
    saved(folder, 5)
    assert [checkpoint.step for checkpoint in folder.complete()] == [5, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000005"]
    saved(folder, 6)
    assert [checkpoint.step for checkpoint in folder.complete()] == [6, 5]
    if damage in (truncated, without_file):  # told by sizes: in the run that wrote them, too
        damage(tmp_path / "step-00000006")
        caplog.clear()
        saved(folder, 7)
        assert [checkpoint.step for checkpoint in folder.complete()] == [7, 5]
        assert "step-00000006 is removed: state.pt " in caplog.text


def test_a_passed_over_checkpoint_that_is_written_anew_counts(tmp_path):
    folder = Checkpoints(tmp_path, keep=2)
    saved(folder, 1, 2)
    bit_flipped(tmp_path / "step-00000002")
    assert folder.latest().step == 1
    saved(folder, 2)
    assert [checkpoint.step for checkpoint in folder.complete()] == [2, 1] and folder.latest().step == 2


def test_nothing_is_removed_for_a_checkpoint_that_is_not_there(tmp_path, monkeypatch):
    """A file system that says yes to everything."""
    folder = Checkpoints(tmp_path, keep=1)
    saved(folder, 1)
    rename = Path.rename

    def lossy(path, target):
        rename(path, target)
        if Path(target).name == "step-00000002":
            truncated(Path(target))

    monkeypatch.setattr(Path, "rename", lossy)
    with pytest.raises(OSError, match=r"step-00000002 could not be written.*last complete one is .*00000001"):
        saved(folder, 2)
    assert folder.latest().step == 1


@pytest.mark.parametrize("damage", [truncated, bit_flipped])
def test_the_best_checkpoint_is_an_intact_one(tmp_path, caplog, damage):
    folder = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        saved(folder, step, metric=float(step))
    damage(tmp_path / "step-00000001")
    assert folder.best().step == 2 and folder.best().damage() is None
    assert damage is truncated or "step-00000001 is passed over: state.pt " in caplog.text


def test_nothing_but_damaged_checkpoints(clips, tmp_path):
    """A run that has come far does not start anew in silence."""
    config = tiny(clips, tmp_path / "run", steps=1)
    pretrain(config)
    bit_flipped(tmp_path / "run" / "checkpoints" / "step-00000001")
    with pytest.raises(ValueError, match="is intact: choose another --out"):
        pretrain(tiny(clips, tmp_path / "run", steps=1, resume=True))
    with pytest.raises(ValueError, match="holds a run already"):
        pretrain(config)
    assert [line["step"] for line in metrics(config.out)] == [1]
    without_marker(
        tmp_path / "run" / "checkpoints" / "step-00000001"
    )  # as if it had been killed while saving
    assert pretrain(tiny(clips, tmp_path / "run", steps=1, resume=True))


def test_resume_behind_a_damaged_checkpoint(clips, tmp_path, caplog):
    config = tiny(clips, tmp_path / "run", steps=9)
    pretrain(config)
    expected = state_of(config.out, 9)
    bit_flipped(tmp_path / "run" / "checkpoints" / "step-00000009")
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"step": 9, "lo')  # and a line cut short
    pretrain(tiny(clips, tmp_path / "run", steps=9, resume=True))
    assert "step-00000009 is passed over" in caplog.text
    assert_same_bits(state_of(config.out, 9), expected)
    assert [line["step"] for line in metrics(config.out)] == list(range(1, 10))


def test_the_last_and_the_best_are_kept(tmp_path):
    folder = Checkpoints(tmp_path, keep=2)
    for step, metric in enumerate((5.0, 1.0, 3.0, 4.0, 2.0), start=1):
        folder.save(step, lambda path: (path / "x").write_text("x"), metric)
    assert [checkpoint.step for checkpoint in folder.complete()] == [5, 4, 2]
    assert folder.best().step == 2 and folder.latest().step == 5


def test_a_validation_loss_that_is_nan_is_not_the_best(tmp_path):
    folder = Checkpoints(tmp_path, keep=1)
    for step, metric in enumerate((5.0, 6.0, math.nan), start=1):
        saved(folder, step, metric=metric)
    assert [checkpoint.step for checkpoint in folder.complete()] == [3, 1] and folder.best().step == 1


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"step": Evil()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoints_module.read_state(tmp_path / "state.pt")
    assert not (tmp_path / "made").exists()


# -- refusals ------------------------------------------------------------------------------------------------


def test_nan_stops_the_run(clips, tmp_path):
    """It tells the steps; what was saved before stays and is finite."""
    config = tiny(clips, tmp_path / "run", lr=1e20, warmup_steps=4, save_every=1)
    with pytest.raises(
        TrainingError, match=r"(loss|gradient norm) is (nan|inf) in steps .*Lower the learning rate"
    ):
        pretrain(config)
    last = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert all(tensor.isfinite().all() for tensor in state_of(config.out, last.step)["model"].values())
    assert metrics(config.out)[-1]["loss"] is None or metrics(config.out)[-1]["grad_norm"] is None


def test_a_signal_does_not_save_nan(clips, tmp_path, signalled):
    """Between two lines, before anybody has looked at the loss."""
    config = tiny(clips, tmp_path / "run", lr=1e20, warmup_steps=1, save_every=100, log_every=100, steps=30)
    signalled(20, signal.SIGTERM)
    with pytest.raises(TrainingError, match=r"nothing was saved yet\. Lower the learning rate"):
        pretrain(config)
    assert next(Checkpoints(tmp_path / "run" / "checkpoints").complete(), None) is None


def test_a_run_is_not_written_over(clips, tmp_path):
    pretrain(tiny(clips, tmp_path / "run", steps=1))
    with pytest.raises(ValueError, match="holds a run already: go on with it with --resume"):
        pretrain(tiny(clips, tmp_path / "run", steps=1))


def test_resume_with_other_settings(clips, tmp_path, capsys):
    """They hold from then on, the optimizer's too, and the run says which they are."""
    pretrain(tiny(clips, tmp_path / "run", steps=2, save_every=1, weight_decay=0.0))
    changed = {"weight_decay": 0.5, "betas": (0.5, 0.6), "lr": 1e-2, "batch_size": 1}
    capsys.readouterr()
    pretrain(tiny(clips, tmp_path / "run", steps=4, save_every=1, resume=True, **changed))
    out = capsys.readouterr().out
    for told in (
        "steps 2 -> 4",
        "weight_decay 0.0 -> 0.5",
        "betas [0.9, 0.95] -> [0.5, 0.6]",
        "lr 0.001 -> 0.01",
    ):
        assert told in out, out
    groups = state_of(tmp_path / "run", 4)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert all(tuple(group["betas"]) == (0.5, 0.6) for group in groups)
    with pytest.raises(ValueError, match=r"step-00000004 is beyond step 3, .*give more --steps"):
        pretrain(tiny(clips, tmp_path / "run", steps=3, resume=True))
    record = audiomae.load(tmp_path / "run").record
    assert record.metrics["training loss"] == losses(tmp_path / "run")[4]
    pretrain(tiny(clips, tmp_path / "run", steps=4, save_every=1, resume=True, **changed))
    assert "settings that were changed" not in capsys.readouterr().out
    assert audiomae.load(tmp_path / "run").record == record  # a job that is started once more than needed


def test_resume_with_other_data_or_another_model(clips, tmp_path):
    pretrain(tiny(clips, tmp_path / "run", steps=1))
    other = make_clips(tmp_path / "other", count=5)
    with pytest.raises(ValueError, match="saved with clips per source"):
        pretrain(tiny(other, tmp_path / "run", steps=2, resume=True))
    with pytest.raises(ValueError, match="do not fit the model"):
        pretrain(tiny(clips, tmp_path / "run", steps=2, resume=True, overrides={"width": 64}))
    assert (
        "width: 64" not in (tmp_path / "run" / "config.yaml").read_text()
    )  # what goes on is still described
