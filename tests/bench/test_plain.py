"""The frozen baselines against the published implementations' golden values."""

import pytest
import torch
from golden_values import (
    arr,
    fill_weights,
    gradient_errors,
    keep_smallest,
    load_golden,
    permutations,
    ssast_ids,
    uni,
)

from bench import plain

SSAST_UNUSED = {"p_input_fdim", "p_input_tdim", "v.head.weight", "v.head.bias", "v.head_dist.weight"}
SSAST_UNUSED |= {"v.head_dist.bias"}
MAE_AST_UNUSED = {"encoder_mask_emb", "layer_norm.weight", "layer_norm.bias"}


def filled(model, golden, unused=(), dtype=torch.float32):
    """`model` with the golden weights; every upstream tensor must have a place or be known as unused."""
    weights = fill_weights(golden.shapes, golden.seed)
    result = model.load_state_dict(weights, strict=False)
    assert set(result.unexpected_keys) == {key for key in unused if key in weights}
    assert not set(result.missing_keys) & set(weights)
    assert not {key for key in result.missing_keys if key in dict(model.named_parameters())}
    return model.to(dtype)


def check(model, golden, ids_keep, expected, dtype=torch.float32, rtol=1e-4, grad_rtol=1e-3):
    out = model(arr((2, 1024, 128), 1, golden.seed).to(dtype), ids_keep)
    for name, value in expected.items():
        assert getattr(out, name).item() == pytest.approx(float(value), rel=rtol), name
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert not gradient_errors(gradients, golden, grad_rtol)


GLOBAL = {"decoder": "global", "decoder_depth": 8, "normalize_target": False}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("audiomae_pretrain_base_norm", {}),
        pytest.param("audiomae_pretrain_base_global", GLOBAL, marks=pytest.mark.slow),
    ],
)
def test_audiomae(name, options):
    golden = load_golden(name)
    ids_keep = keep_smallest(uni((2, 512), 2, golden.seed), 102)
    check(filled(plain.AudioMAE(**options), golden), golden, ids_keep, {"loss": golden["loss"]})


def test_mae_ast():
    golden = load_golden("maeast_patch")
    ids_keep = permutations(2, seed=golden.seed)[:, :128]
    model = filled(plain.MAEAST(), golden, MAE_AST_UNUSED)
    recon, nce = golden["loss_recon"], golden["loss_info_nce"]
    check(model, golden, ids_keep, {"reconstruction": recon, "info_nce": nce, "loss": 10 * recon + nce})


@pytest.mark.parametrize("passes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ssast(passes):
    golden = load_golden("ssast_patch_base")
    ids_keep = ssast_ids(permutations(2, seed=golden.seed)[:, 400:])
    model = filled(plain.SSAST(passes=passes), golden, SSAST_UNUSED)
    mse, nce = golden["mse"], golden["nce"]
    check(model, golden, ids_keep, {"reconstruction": mse, "info_nce": nce, "loss": 10 * mse + nce})
