"""Reconstructions: what is seen stays, what is masked is the prediction, un-normalised."""

import matplotlib.image
import pytest
import torch
from audiomae_kernels import patch_gather
from cli_cases import KINDS, SOUNDS
from pretraining import MODELS

import audiomae
from audiomae import Mask
from audiomae.data import load_audio, recordings
from audiomae.train import draw_reconstruction, reconstruct

pytestmark = pytest.mark.usefixtures("one_thread")


def covered(mask, config, frames):
    """(B, T, F) bool: places that only masked patches reach, place by place."""
    seen, hidden = (torch.zeros(len(mask.ids_keep), frames, config.mel_bins, dtype=torch.bool) for _ in "ab")
    bands = config.grid(frames)[1]
    for ids, places in ((mask.ids_keep, seen), (mask.ids_masked, hidden)):
        for clip, row in enumerate(ids.tolist()):
            for token in row:
                t, f = token // bands * config.step[0], token % bands * config.step[1]
                places[clip, t : t + config.patch[0], f : f + config.patch[1]] = True
    return hidden & ~seen


@pytest.mark.parametrize("stride", [None, (10, 10)])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_seen_stays(name, stride):
    if stride and name == "ssast_patch_tiny":
        pytest.skip("cluster masks are for patches side by side")
    overrides = (
        {"stride": stride, "positions": "grid"} if stride and name == "audiomae_small" else {"stride": stride}
    )
    model = audiomae.create_model(name, **MODELS[name], **overrides).eval()
    frames = 70 if model.config.positions == "flat" else 64  # the last frames may fill no patch
    spectrogram = torch.randn(2, frames, 128)
    mask = model.draw_mask(2, frames)
    original, masked, reconstruction = reconstruct(model, spectrogram, mask)
    hidden = covered(mask, model.config, frames)
    assert torch.equal(masked.isnan(), hidden) and 0.1 < hidden.float().mean() < 0.9
    assert torch.equal(reconstruction[~hidden], original[~hidden]) and torch.equal(
        masked[~hidden], original[~hidden]
    )
    assert reconstruction.isfinite().all() and (reconstruction != original)[hidden].float().mean() > 0.99


@pytest.mark.parametrize("name", MODELS)
def test_a_perfect_prediction_gives_the_original(name):
    model = audiomae.create_model(name, **MODELS[name]).eval()
    spectrogram = torch.randn(2, 64, 128) * 3 + 1
    whole = model.forward

    def perfect(spectrogram, mask):
        out = whole(spectrogram, mask)
        target = patch_gather(model.spectrogram_norm(spectrogram), out.mask.ids_masked, patch=(16, 16))
        if name == "audiomae_small":
            target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
        out["pred"] = target
        return out

    model.forward = perfect
    original, _, reconstruction = reconstruct(model, spectrogram)
    torch.testing.assert_close(reconstruction, original, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decoder", ["window", "cross"])
def test_what_is_not_decoded_stays_hidden(decoder):
    fields = MODELS["audiomae_small"] | {
        "decoder": decoder,
        "decode_ratio": 0.5,
        "masks_per_clip": 3,
        "frames": 256,
    }
    model = audiomae.create_model("audiomae_small", **fields).eval()
    spectrogram = torch.randn(2, 256, 128)
    original, masked, reconstruction = reconstruct(model, spectrogram)
    assert masked.shape == (2, 256, 128) and torch.equal(original, spectrogram)
    hidden, left = masked.isnan(), reconstruction.isnan()
    assert left.any() and (hidden & ~left).any() and not (left & ~hidden).any()


def test_drawing(tmp_path):
    model = audiomae.create_model("audiomae_small", **MODELS["audiomae_small"]).eval()
    images = reconstruct(model, torch.randn(3, 64, 128), Mask.random(3, 32, 0.8))
    draw_reconstruction(tmp_path / "picture.png", *images, title="step 3")
    pixels = matplotlib.image.imread(tmp_path / "picture.png")
    assert pixels.shape[:2] == (700, 1650) and len(pixels.reshape(-1, pixels.shape[2])[::97]) > 100


def test_nothing_to_see():
    model = audiomae.create_model(
        "audiomae_small", **MODELS["audiomae_small"], reconstruction_weight=0.0, info_nce_weight=1.0
    )
    with pytest.raises(ValueError, match="no reconstruction loss"):
        reconstruct(model, torch.randn(1, 64, 128))


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["window", "global", "mae_ast", "ssast_frame"])
def test_reconstruct_command(run, checkpoints, kind, tmp_path):
    out = tmp_path / "picture.png"
    flags = KINDS[kind][0]
    arguments = ["reconstruct", SOUNDS[0], "--model", checkpoints[kind], "--out", out, *flags]
    status, printed, _ = run(*arguments)
    assert status == 0 and f"wrote {out}" in printed and "mean squared error" in printed
    assert matplotlib.image.imread(out).shape[:2] == (700, 550)
    pixels = out.read_bytes()
    assert run(*arguments)[1] == printed and out.read_bytes() == pixels  # the same mask
    assert run(*arguments, "--seed", 1)[1] != printed


def test_reconstruct_with_a_masking_by_name(run, refused, checkpoints, tmp_path):
    out = tmp_path / "picture.png"
    arguments = ["reconstruct", SOUNDS[0], "--model", checkpoints["window"], "--out", out]
    printed = run(*arguments, "--masking", "time", "--mask-ratio", 0.5)[1]
    assert "time, 16 of 32 patches masked" in printed and f"{SOUNDS[0]}: 0.64 s from 0 s" in printed
    printed = run(*arguments, "--masking", "time_frequency", "--mask-ratio", 0.5, 0.25)[1]
    assert "time_frequency, 20 of 32 patches masked" in printed
    seconds = (load_audio(SOUNDS[0]).shape[0] // 160 - 60) // 16 * 0.16
    assert f"{seconds:.2f} s from 0.6 s on" in run(*arguments, "--start", 0.6)[1]
    assert "masks none" in refused("reconstruct", SOUNDS[2], *arguments[2:], "--masking", "time")
    assert "takes one ratio" in refused(*arguments, "--masking", "time", "--mask-ratio", 0.5, 0.25)
    assert "both excluded" in refused(*arguments, "--mask-ratio", 1.0)
    message = refused(*arguments, "--start", 9)
    assert f"--start 9 must lie between 0 and 0.69, where the last patch of {SOUNDS[0]} begins" in message
    (bell,) = (path for path in recordings() if path.stem == "sound-bell")
    message = refused("reconstruct", bell, *arguments[2:])
    assert f"{bell} is too short: it has 12 frames of 10 ms, and this model sees 16 at least" in message
    status, _, err = run(*arguments[:-1], tmp_path / "pic.xyz")
    assert status == 2 and "pic.xyz: the suffix says the format, and should be .png" in err
    assert "no file" in refused("reconstruct", tmp_path / "no.wav", *arguments[2:])
    arguments[3] = checkpoints["finetuned"]
    assert "without a decoder" in refused(*arguments)
    arguments[3] = checkpoints["encoder"]
    assert "without a decoder" in refused(*arguments)


def test_reconstruct_says_what_it_leaves_out(run, checkpoints, tmp_path):
    status, _, err = run(
        "reconstruct", SOUNDS[0], "--model", checkpoints["window"], "--out", tmp_path / "picture.png"
    )
    assert status == 0 and "64 of its" in err and "frames are shown" in err
