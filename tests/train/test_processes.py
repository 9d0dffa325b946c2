"""Two processes: gradients of the joined batch, and runs that are stopped and resumed."""

import shutil

import pytest
import soundfile
import torch
from pretraining import (
    assert_same_bits,
    gradients,
    make_clips,
    run,
    save_with_faults,
    state_of,
    tiny,
    torchrun,
    write_gradients,
)

import audiomae
from audiomae.train import Checkpoints, Trainer, pretrain
from audiomae.train.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")

# Dropout is drawn by each process for itself.
NO_DROPOUT = {
    "audiomae_small": {"bias_dropout": 0.0},
    "ssast_patch_tiny": {},
    "mae_ast_patch_base": {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "layer_drop": 0.0},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """13: what fills no batch is left out, on however many ranks."""
    return make_clips(tmp_path_factory.mktemp("clips") / "audio", count=13)


def assert_close(found, expected, what):
    """Sums in another order: each of n = 1e5 float32 terms at most, whose rounding adds up like a random walk.

    Some gradients are 0 but for rounding (a constant added to all logits of a softmax changes nothing): these are
    compared on the scale of a hundredth of the whole gradient.
    """
    floor = torch.stack([gradient.norm() for gradient in expected.values()]).norm() / 100
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / torch.maximum(gradient.norm(), floor)
        assert error < 1e5**0.5 * 2**-24, f"{what}: {name} differs by {error:.1e}"


def settings(model, **more):
    return {"model": model, "overrides": NO_DROPOUT[model], "accumulate": 1, "batch_size": 2, **more}


#: Two clips in each of two processes.
TWO = {
    "DDP": settings("audiomae_small"),
    "FSDP2": settings("audiomae_small", fsdp=True),
    "DDP, two micro-batches": settings("audiomae_small", accumulate=2),
    "FSDP2, two micro-batches": settings("audiomae_small", accumulate=2, fsdp=True),
    "SSAST, DDP": settings("ssast_patch_tiny"),
    "SSAST, FSDP2": settings("ssast_patch_tiny", fsdp=True),
    "MAE-AST, DDP": settings("mae_ast_patch_base"),
}


@pytest.fixture(scope="module")
def two_processes(clips, tmp_path_factory):
    """The gradients of two processes."""
    folder = tmp_path_factory.mktemp("gradients")
    configs = {name: tiny(clips, folder / "run", **given) for name, given in TWO.items()}
    torchrun(write_gradients, 2, configs, folder / "gradients.pt")
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize("case", [name for name in TWO if "MAE-AST" not in name])
def test_gradients_are_those_of_the_joined_batch(two_processes, clips, tmp_path, case):
    """The same clips and masks in one process, two clips more in each micro-batch."""
    with Processes("cpu") as processes:
        joined = gradients(tiny(clips, tmp_path, **TWO[case] | {"batch_size": 4, "fsdp": False}), processes)
    assert all(gradient.abs().sum() > 0 for gradient in joined.values())
    assert_close(two_processes[case], joined, case)


def test_batch_statistics_are_taken_per_process(two_processes, clips, tmp_path):
    """MAE-AST's input norm, as published: so two processes are two micro-batches, not the joined batch."""
    with Processes("cpu") as processes:
        trainer = Trainer(tiny(clips, tmp_path, **TWO["MAE-AST, DDP"] | {"batch_size": 4}), processes)
        spectrogram, mask, _ = trainer._inputs(next(trainer._batches()), 3, 0, 0)
        for rows in (slice(0, 2), slice(2, 4)):
            part = audiomae.Mask(mask.ids_keep[rows], mask.ids_masked[rows], mask.num_tokens)
            (trainer.model(spectrogram[rows], part).loss / 2).backward()
        expected = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert_close(two_processes["MAE-AST, DDP"], expected, "DDP")


@pytest.mark.parametrize("model", ["audiomae_small", "ssast_patch_tiny"])
def test_clips_of_their_own_lengths(tmp_path, model):
    """Micro-batches weigh by their masked tokens, as all clips together would in one batch."""
    clips = make_clips(tmp_path / "clips", count=4)
    for i in range(2):
        samples, rate = soundfile.read(clips / f"{i:02}.wav")
        soundfile.write(clips / f"{i:02}.wav", samples[: 4000 + 1000 * i], rate)
    overrides = NO_DROPOUT[model] | {"pad": "exclude"} | ({"passes": 1} if "ssast" in model else {})
    config = tiny(clips, tmp_path / "run", model=model, overrides=overrides, batch_size=2, accumulate=2)
    with Processes("cpu") as processes:
        found = gradients(config, processes)
        trainer = Trainer(config, processes)
        batches = trainer._batches()
        inputs = [trainer._inputs(next(batches), 3, 0, i) for i in range(2)]
        spectrogram = torch.cat([spectrogram for spectrogram, _, _ in inputs])
        rows = [(row[:kept], kept + masked) for _, mask, _ in inputs
                for row, kept, masked in zip(mask.ids_keep, mask.kept, mask.masked, strict=True)]  # fmt: skip
        assert len({tokens for _, tokens in rows}) > 1
        mask = audiomae.Mask.from_keep(*map(list, zip(*rows, strict=True)))
        trainer.model(spectrogram, mask, [n for _, _, frames in inputs for n in frames]).loss.backward()
        expected = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert_close(found, expected, model)


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_stopped_and_resumed(clips, tmp_path, fsdp):
    """Bit for bit; the model that comes out is whole, and one process can read it."""
    settings = {"accumulate": 1, "fsdp": fsdp, "val_data": [str(clips)], "val_every": 5, "steps": 5}
    if fsdp:  # whose running statistics differ between the processes
        settings["model"] = "mae_ast_patch_base"
    torchrun(run, 2, tiny(clips, tmp_path / "whole", **settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    folder = Checkpoints(tmp_path / "parts" / "checkpoints")
    for checkpoint in list(folder.complete())[:-1]:
        shutil.rmtree(checkpoint.path)
    assert folder.latest().step == 3
    torchrun(run, 2, tiny(clips, tmp_path / "parts", **settings, resume=True))
    models = [audiomae.load(tmp_path / name / "model").state_dict() for name in ("parts", "whole")]
    assert_same_bits(*models)
    if fsdp:
        with pytest.raises(ValueError, match="was not written without --fsdp: add it"):
            pretrain(tiny(clips, tmp_path / "parts", accumulate=2, resume=True))
    else:  # the sampler's position is one of clips, not of processes
        assert len(state_of(tmp_path / "parts", 5)["random"]) == 2
        pretrain(tiny(clips, tmp_path / "parts", batch_size=4, accumulate=1, steps=6, resume=True))
        assert Checkpoints(tmp_path / "parts" / "checkpoints").latest().step == 6


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_fails_under_fsdp2(clips, tmp_path, every):
    """At one operation after another of the first process: an error in both, and the earlier checkpoint stays."""
    config = tiny(clips, tmp_path / "run", fsdp=True, accumulate=1, steps=2)
    torchrun(save_with_faults, 2, config, ["full", "read-only"], every)
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest().step == 1


def test_more_ranks_than_clips(clips, tmp_path, monkeypatch):
    with Processes("cpu") as processes:
        monkeypatch.setattr(processes, "world_size", 14)
        with pytest.raises(ValueError, match="13 clips for 14 processes; expected at least one each"):
            Trainer(tiny(clips, tmp_path / "run"), processes)
        monkeypatch.setattr(processes, "world_size", 8)
        with pytest.raises(ValueError, match="does not fill one batch of 2 in 8 processes"):
            Trainer(tiny(clips, tmp_path / "run"), processes)


def test_fsdp_needs_torchrun(clips, tmp_path):
    with pytest.raises(ValueError, match="start the command under torchrun"):
        pretrain(tiny(clips, tmp_path / "run", fsdp=True))
