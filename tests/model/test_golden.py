"""The published implementations' numbers: losses, outputs and every gradient norm (tests/golden/README.md)."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_values import (
    arr,
    fill_weights,
    gradient_errors,
    is_fixed,
    keep_smallest,
    load_golden,
    permutations,
    ssast_ids,
    uni,
)

import audiomae
from audiomae.model import sincos_2d, sinusoids_1d
from audiomae.upstream import encode_tensors

DTYPES = [torch.float64, torch.float32]
RTOL = {torch.float64: 1e-6, torch.float32: 1e-4}
GRAD_RTOL = {torch.float64: 1e-5, torch.float32: 1e-3}


def fixed_tensor(name, shape):
    """What upstream initialises itself, by the formulas of the papers."""
    if name in ("pos_embed", "decoder_pos_embed"):
        table = sincos_2d(shape[2], (64, 8), transposed=True)
        return torch.cat([torch.zeros(1, shape[2]), table])[None].double()
    if name.endswith("_sine_pos_embed.pe"):
        return sinusoids_1d(shape[2], shape[1])[None].double()
    if name.startswith("batch_norm."):
        value = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}[name.split(".")[1]]
        return torch.full(shape, value, dtype=torch.int64 if "num" in name else torch.float64)
    return torch.tensor({"p_input_fdim": 8, "p_input_tdim": 64}[name])


@functools.lru_cache(maxsize=1)  # drawing 10^8 numbers takes seconds; the tests of one file follow each other
def _weights(name):
    golden = load_golden(name)
    state = fill_weights(golden.shapes, golden.seed)
    return state | {n: fixed_tensor(n, shape) for n, shape in golden.shapes.items() if is_fixed(n)}


def state_dict(golden, dtype=torch.float64):
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in _weights(golden.name).items()}


def close(actual, expected, rtol):
    """Relative to the largest expected value: small entries carry the error of large ones."""
    expected = torch.as_tensor(np.asarray(expected)).double()
    actual = actual.detach().double()
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item() / expected.abs().max().item()
    assert error <= rtol, f"relative error {error:.3g}, allowed {rtol:.3g}"


def masked_rows(mask, step):
    """Which of the golden file's every `step`-th tokens are masked, and where they stand in `ids_masked`."""
    dense = mask.dense()[:, ::step]
    place = torch.zeros_like(mask.dense(), dtype=torch.int64).scatter(
        1, mask.ids_masked, torch.arange(mask.ids_masked.shape[1]).expand_as(mask.ids_masked)
    )[:, ::step]
    return [(b, i, place[b, i].item()) for b, i in dense.nonzero().tolist()]


def check_gradients(model, golden, rtol):
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    errors = gradient_errors(encode_tensors(model.config, grads), golden, rtol)
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("decoder", ["norm", "global"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_audiomae_pretraining(decoder, dtype):
    golden = load_golden(f"audiomae_pretrain_base_{decoder}")
    model = audiomae.from_upstream(
        state_dict(golden, dtype), normalize_target=decoder == "norm", positions="transposed"
    ).eval()
    assert model.config.decoder == {"norm": "window", "global": "global"}[decoder]
    spectrogram = arr((2, 1, 1024, 128), 1).to(dtype)
    mask = audiomae.Mask.from_keep(keep_smallest(uni((2, 512), 2), 102), 512)
    assert torch.equal(mask.dense(), torch.as_tensor(golden["mask"]).bool())

    latent = model.encode(spectrogram, mask)
    close(latent[:, ::5, ::31], golden["latent"], RTOL[dtype])
    out = model(spectrogram, mask)
    close(out.loss, golden["loss"], RTOL[dtype])
    rows = masked_rows(mask, 13)
    assert len(rows) > 40
    close(
        torch.stack([out.pred[b, k, ::17] for b, _, k in rows]),
        np.stack([golden["pred"][b, i] for b, i, _ in rows]),
        RTOL[dtype],
    )
    out.loss.backward()
    check_gradients(model, golden, GRAD_RTOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_audiomae_finetuning(dtype):
    golden = load_golden("audiomae_finetune_as")
    state = state_dict(golden, dtype)
    state["pos_embed"] = torch.cat([torch.zeros(1, 768), sincos_2d(768, (64, 8))])[None].to(dtype)
    model = audiomae.from_upstream(state).eval()
    assert model.config.positions == "grid"
    spectrogram = arr((2, 1, 1024, 128), 1).to(dtype)
    times, bands = keep_smallest(uni((2, 64), 2), 44), keep_smallest(uni((2, 8), 3), 5)
    mask = audiomae.Mask.from_keep((times[:, :, None] * 8 + bands[:, None]).flatten(1), 512)
    labels = torch.zeros(2, 527, dtype=dtype)
    labels[0, 3] = labels[1, 7] = labels[1, 11] = 1

    close(model(spectrogram).logits, golden["logits_full"], RTOL[dtype])
    out = model(spectrogram, mask, labels=labels)
    close(out.logits, golden["logits_masked"], RTOL[dtype])
    close(out.loss, golden["loss"], RTOL[dtype])
    out.loss.backward()
    check_gradients(model, golden, GRAD_RTOL[dtype])


@pytest.mark.parametrize(
    ("dtype", "passes"),
    [(torch.float64, 1), (torch.float32, 1), pytest.param(torch.float32, 2, marks=pytest.mark.slow)],
)
def test_ssast(dtype, passes):
    golden = load_golden("ssast_patch_base")
    model = audiomae.from_upstream(state_dict(golden, dtype), passes=passes).eval()
    spectrogram = arr((2, 1024, 128), 1).to(dtype)
    order = permutations(2)
    assert torch.equal(order[:, :400], torch.as_tensor(golden["mask_ids"]).long())
    mask = audiomae.Mask.from_keep(ssast_ids(order[:, 400:]), 512)

    out = model(spectrogram, mask)
    rtol = max(RTOL[dtype], 1e-5)  # upstream rounds these losses to float32
    close(out.losses["info_nce"], golden["nce"], rtol)
    close(out.losses["reconstruction"], golden["mse"], rtol)
    close(out.loss, golden["nce"] + 10 * golden["mse"], rtol)
    target = F.unfold(spectrogram[:, None], 16, stride=16).transpose(1, 2)
    target = target[torch.arange(2)[:, None], mask.ids_masked]
    # Upstream's accuracy: softmax over a target's predictions, then the best *target* of each prediction.
    share = (target @ out.pred_info_nce.transpose(1, 2)).softmax(dim=2)
    close((share.argmax(dim=1) == torch.arange(400)).double().mean(), golden["acc"], 1e-6)
    out.loss.backward()
    check_gradients(model, golden, max(GRAD_RTOL[dtype], 1e-4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mae_ast(dtype):
    golden = load_golden("maeast_patch")
    model = audiomae.from_upstream(state_dict(golden, dtype), tokens="patch", input_norm="batch").eval()
    spectrogram = arr((2, 1024, 128), 1).to(dtype)
    order = permutations(2)
    assert torch.equal(order, torch.as_tensor(golden["perm"]).long())
    mask = audiomae.Mask.from_keep(order[:, :128], 512)

    out = model(spectrogram, mask)
    close(out.pred[:, ::13, ::17], golden["recon"], RTOL[dtype])
    close(out.pred_info_nce[:, ::13, ::17], golden["cls"], RTOL[dtype])
    close(out.losses["reconstruction"], golden["loss_recon"], RTOL[dtype])
    close(out.losses["info_nce"], golden["loss_info_nce"], RTOL[dtype])
    close(out.loss, 10 * golden["loss_recon"] + golden["loss_info_nce"], RTOL[dtype])
    out.loss.backward()
    check_gradients(model, golden, GRAD_RTOL[dtype])


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("audiomae_pretrain_base_norm", ""),
        ("audiomae_pretrain_base_global", "module."),
        ("audiomae_finetune_as", ""),
        ("ssast_patch_base", "module."),
        ("maeast_patch", ""),
    ],
)
def test_round_trip(name, prefix):
    """Key by key and bit by bit, tensors that a model has no use for included."""
    golden = load_golden(name)
    state = {prefix + n: t for n, t in state_dict(golden, torch.float32).items()}
    state |= {prefix + "encoder_emb.weight": torch.randn(3, 2), prefix + "note": torch.tensor(7)}
    tokens = {"tokens": "patch"} if name.startswith("maeast") else {}
    back = audiomae.to_upstream(audiomae.from_upstream(state, **tokens))
    assert set(back) == set(state)
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype and back[key].shape == tensor.shape, key
        assert torch.equal(back[key], tensor), key
