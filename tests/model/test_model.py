"""The models: shapes, what the encoder may see, positions, losses, regularisation, errors, files."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from audiomae_kernels import OPS, _checks, implementations
from torch import nn
from torch.utils import _pytree as pytree

import audiomae
from audiomae import Frontend, Mask, Output, pretrained
from audiomae.config import MODELS, from_dict, model_config, replace
from audiomae.model import Dropout, DropPath, SpectrogramNorm, log_offsets, sincos_2d, sinusoids_1d

pytestmark = pytest.mark.usefixtures("one_thread")

ENCODER = {"width": 32, "heads": 2, "depth": 2, "frames": 64}
DECODER = {"decoder_width": 24, "decoder_heads": 2, "decoder_depth": 2}
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "layer_drop": 0.0}
FAMILIES = [
    "audiomae_base",
    "mae_ast_patch_base",
    "mae_ast_frame_base",
    "ssast_patch_base",
    "ssast_frame_base",
]
PIXELS = 16 * 128  # frames of a time step of 16 x 16 patches, times mel bins


def small(name, **overrides):
    """A tiny model of a family, in evaluation mode and float64."""
    sizes = ENCODER if name.startswith("ssast") else ENCODER | DECODER
    return audiomae.create_model(name, **sizes | overrides).double().eval()


def small_classifier(**overrides):
    return audiomae.create_classifier("audiomae_base", 5, **ENCODER | overrides).double().eval()


def spectrogram(batch=2, frames=64, mel_bins=128):
    return torch.randn(batch, frames, mel_bins, dtype=torch.float64)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture
def meta():
    with torch.device("meta"):
        yield


# -- building and running ------------------------------------------------------------------------------------


@pytest.mark.no_poison
@pytest.mark.parametrize("name", audiomae.list_models())
def test_every_named_model_builds(name, meta):
    model = audiomae.create_model(name)
    assert all(p.is_meta for p in model.parameters())
    assert model.config == MODELS[name]
    assert len(model.encoder.blocks) == model.config.depth
    assert model.num_prefix_tokens == {"audiomae": 1, "mae_ast": 0, "ssast": 2}[model.config.family]
    assert model.config.patch == ((2, 128) if "frame" in name else (16, 16))
    assert from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config


def test_published_names_and_grids():
    assert set(audiomae.list_models()) == {
        *(f"audiomae_{size}" for size in ("small", "base", "large")),
        *(f"mae_ast_{tokens}_base" for tokens in ("patch", "frame")),
        *(f"ssast_{tokens}_{size}" for tokens in ("patch", "frame") for size in ("tiny", "small", "base")),
    }
    base = MODELS["audiomae_base"]
    for patch, stride, grid in (
        ((16, 16), None, (64, 8)),
        ((16, 16), (10, 10), (101, 12)),
        ((32, 16), (16, 16), (63, 8)),
        ((16, 32), (16, 16), (64, 7)),
        ((2, 128), None, (512, 1)),
    ):
        assert replace(base, patch=patch, stride=stride).grid() == grid
    assert base.grid(998) == (62, 8)
    assert model_config("audiomae_base").num_decoder_blocks == 16
    assert replace(base, decoder="global").num_decoder_blocks == 8
    assert replace(base, decoder="hybrid").num_decoder_blocks == 12
    assert (model_config("audiomae_large").depth, model_config("audiomae_large").width) == (24, 1024)


def check_training_step(model, x):
    """Forward and backward: shapes, the weighted sum, and a gradient for every parameter."""
    c = model.config
    model.train()
    out = model(x)
    rows, masked = out.mask.ids_masked.shape
    assert rows == x.shape[0] and out.mask.num_tokens == c.grid(x.shape[-2])[0] * c.grid()[1]
    assert out.pred.shape == (rows, masked, c.patch_values)
    weights = {"reconstruction": c.reconstruction_weight, "info_nce": c.info_nce_weight}
    total = sum(weights[name] * loss for name, loss in out.losses.items())
    close(out.loss, total)
    assert out.loss.dtype == torch.float64 and out.loss.shape == ()
    out.loss.backward()
    without = {
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    }
    assert not without
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_training_step(name):
    still = STILL if name.startswith("mae_ast") else {}
    out = check_training_step(small(name, **still), spectrogram())
    expected = {"reconstruction"} if name == "audiomae_base" else {"reconstruction", "info_nce"}
    assert set(out.losses) == expected


@pytest.mark.parametrize("name", ["audiomae_base", "mae_ast_patch_base", "ssast_patch_base"])
@pytest.mark.parametrize(
    ("patch", "stride"),
    [((16, 16), (10, 10)), ((32, 16), (16, 16)), ((16, 32), (16, 16)), ((2, 128), None)],
    ids=str,
)
def test_patches_and_strides(name, patch, stride):
    still = STILL if name.startswith("mae_ast") else {}
    model = small(name, patch=patch, stride=stride, frames=80, **still)
    check_training_step(model, spectrogram(frames=80))


@pytest.mark.parametrize("decoder", ["window", "hybrid", "global"])
@pytest.mark.parametrize("positions", ["transposed", "grid", "flat", "learned"])
def test_decoders_and_positions(decoder, positions):
    model = small("audiomae_base", decoder=decoder, positions=positions, decoder_depth=3, global_blocks=1)
    local = [hasattr(block.attn, "tau") for block in model.decoder.blocks]
    assert local == {"window": [True] * 3, "hybrid": [True, True, False], "global": [False] * 3}[decoder]
    check_training_step(model, spectrogram())
    shifts = [block.attn.shift for block in model.decoder.blocks if hasattr(block.attn, "tau")]
    assert shifts == [(0, 0), (2, 0), (0, 0)][: len(shifts)]


@pytest.mark.parametrize(
    ("frames", "mel_bins", "grid"), [(992, 128, (62, 8)), (80, 48, (5, 3)), (16, 16, (1, 1))]
)
def test_grids_that_windows_do_not_tile(frames, mel_bins, grid):
    model = small("audiomae_base", frames=frames, mel_bins=mel_bins, mask_ratio=0.5)
    assert model.config.grid() == grid
    x = spectrogram(frames=frames, mel_bins=mel_bins)
    if grid == (1, 1):  # the only token is kept
        out = model(x)
        assert out.pred.shape == (2, 0, 256) and out.loss == 0
    else:
        check_training_step(model, x)


def test_weights_leave_heads_out():
    contrastive = small("audiomae_base", info_nce_weight=1.0, reconstruction_weight=0)
    assert not hasattr(contrastive, "reconstruction_head")
    out = contrastive(spectrogram())
    assert list(out.losses) == ["info_nce"] and out.pred is None and out.pred_info_nce is not None
    assert not hasattr(small("audiomae_base"), "info_nce_head")


def test_encoder_alone():
    model = small("audiomae_base", decoder="none")
    assert not any(name.startswith("decoder") for name in model.state_dict())
    assert model.encode(spectrogram()).shape == (2, 33, 32)
    with pytest.raises(ValueError, match=r"without a decoder: use encode\(\)"):
        model(spectrogram())


def test_rank_four_input_and_precisions():
    for name in FAMILIES:
        model = small(name)
        x, mask = spectrogram(), model.draw_mask(2)
        assert torch.equal(model(x, mask).loss, model(x[:, None], mask).loss)
        # The model's precision is that of its weights, whatever the spectrogram's.
        exact = model(x.float().double(), mask).loss
        assert torch.equal(model(x.float(), mask).pred.double(), model(x.float().double(), mask).pred)
        half = copy.deepcopy(model).bfloat16()(x.float(), mask)
        assert half.loss.dtype == torch.float32 and abs(half.loss.item() / exact.item() - 1) < 0.05
        with torch.autocast("cpu", torch.bfloat16):
            mixed = copy.deepcopy(model).float()(x.float(), mask)
        assert mixed.loss.dtype == torch.float32 and abs(mixed.loss.item() / exact.item() - 1) < 0.05


# -- what the encoder sees -----------------------------------------------------------------------------------


def pixels(model, ids, frames=64):
    """(T, F) bool: the values that any of the tokens `ids` covers."""
    c = model.config
    covered = torch.zeros(frames, c.mel_bins, dtype=torch.bool)
    for token in ids.tolist():
        t, f = divmod(token, c.grid(frames)[1])
        t, f = t * c.step[0], f * c.step[1]
        covered[t : t + c.patch[0], f : f + c.patch[1]] = True
    return covered


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("audiomae_base", {}),
        ("audiomae_base", {"decoder": "global"}),
        ("audiomae_base", {"stride": (10, 10)}),
        ("audiomae_base", {"patch": (32, 16), "stride": (16, 16)}),
        ("mae_ast_patch_base", {"input_norm": "running"}),
        ("mae_ast_frame_base", {"input_norm": "running"}),
        ("ssast_patch_base", {}),
    ],
    ids=str,
)
def test_masked_patches_are_not_seen(name, overrides):
    """Bit for bit: what only masked tokens cover is in the target and nowhere else, NaN included."""
    model = small(name, **overrides)
    x, mask = spectrogram(), model.draw_mask(2)
    hidden = torch.stack([~pixels(model, ids) for ids in mask.ids_keep])
    assert hidden.any()
    changed, poisoned = x.masked_fill(hidden, 3.0), x.masked_fill(hidden, float("nan"))
    for other in (changed, poisoned):
        assert torch.equal(model.encode(other, mask), model.encode(x, mask))
        assert torch.equal(model(other, mask).pred, model(x, mask).pred)
    assert model(changed, mask).loss != model(x, mask).loss
    assert model(poisoned, mask).loss.isnan()


def test_reconstruction_is_that_of_masked_patches():
    """The loss, from the predictions and an unfolded spectrogram (He et al. 2022, normalised patches)."""
    model = small("audiomae_base")
    x = spectrogram()
    out = model(x)
    patches = F.unfold(x[:, None], 16, stride=16).mT  # (B, L, 256)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (out.pred - target[torch.arange(2)[:, None], out.mask.ids_masked]).square()
    close(out.loss, error.mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_order_of_kept_tokens(name):
    """The encoder is equivariant to the order of the kept tokens; the loss does not depend on it."""
    model = small(name)
    x, mask = spectrogram(), model.draw_mask(2)
    order = torch.stack([torch.randperm(mask.ids_keep.shape[1]) for _ in range(2)])
    other = Mask.from_keep(mask.ids_keep.gather(1, order), mask.num_tokens)
    prefix = model.num_prefix_tokens
    a, b = model.encode(x, mask), model.encode(x, other)
    close(b[:, :prefix], a[:, :prefix])
    close(b[:, prefix:], a[:, prefix:].gather(1, order[:, :, None].expand(-1, -1, 32)))
    close(model(x, other).loss, model(x, mask).loss, atol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_encode(name):
    model = small(name)
    c, prefix = model.config, model.num_prefix_tokens
    tokens = c.grid()[0] * c.grid()[1]
    x, mask = spectrogram(), model.draw_mask(2)
    assert model.encode(x).shape == (2, prefix + tokens, 32)
    assert model.encode(x, mask).shape == (2, prefix + mask.ids_keep.shape[1], 32)
    everything = Mask.from_keep(torch.arange(tokens).repeat(2, 1), tokens)
    close(model.encode(x, everything), model.encode(x))
    one, two = model.encode(x, layers=[1, 2])
    assert one.shape == two.shape == (2, prefix + tokens, 32) and not torch.equal(one, two)
    assert torch.equal(model.encoder.norm(two), model.encode(x))
    assert torch.equal(model.encode(x, layers=(2,))[0], two)
    assert torch.equal(model.encode(x, lengths=torch.tensor([64, 30])), model.encode(x))
    for layers in ([0], [3], [1, -1]):
        with pytest.raises(ValueError, match="from 1 to 2"):
            model.encode(x, layers=layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_several_masks_of_a_clip(name):
    """Row i belongs to clip i // m; the loss is the mean of separate runs."""
    model = small(name)
    x, mask = spectrogram(batch=2), model.draw_mask(6)
    together = model(x, mask)
    assert together.pred.shape[0] == 6
    apart = [model(x, Mask(mask.ids_keep[i::3], mask.ids_masked[i::3], mask.num_tokens)) for i in range(3)]
    close(together.loss, torch.stack([out.loss for out in apart]).mean(), atol=1e-10)
    close(together.pred[1::3], apart[1].pred, atol=1e-10)
    close(
        model.encode(x, mask)[2::3],
        model.encode(x, Mask(mask.ids_keep[2::3], mask.ids_masked[2::3], mask.num_tokens)),
    )


# -- positions -----------------------------------------------------------------------------------------------


def slow_sincos(width, grid, transposed):
    """Token by token: [sin | cos] of the first coordinate, then of the second (published order)."""
    rows = []
    for token in range(grid[0] * grid[1]):
        row = grid[0] if transposed else grid[1]
        codes = []
        for place in (token % row, token // row):
            angles = [place / 10000 ** (i / (width / 4)) for i in range(width // 4)]
            angles = torch.tensor(angles, dtype=torch.float64)
            codes += [*angles.sin().tolist(), *angles.cos().tolist()]
        rows.append(codes)
    return torch.tensor(rows)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("width", "grid"), [(768, (64, 8)), (32, (5, 3)), (64, (62, 8)), (8, (4, 1))])
def test_sincos_2d(width, grid, transposed):
    table = sincos_2d(width, grid, transposed)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, slow_sincos(width, grid, transposed), rtol=0, atol=2e-7)
    assert len(table.unique(dim=0)) == grid[0] * grid[1]


def test_published_quirk_of_the_position_table():
    """Token t * 8 + f of 64 x 8 has the codes of ((t % 8) * 8 + f, t // 8)."""
    table, correct = sincos_2d(768, (64, 8), transposed=True), sincos_2d(768, (64, 8))
    assert not torch.equal(table, correct)
    t, f = 21, 5
    for code, place in ((table[t * 8 + f, :192], (t % 8) * 8 + f), (table[t * 8 + f, 384:576], t // 8)):
        close(code[0].double(), torch.tensor(place, dtype=torch.float64).sin(), atol=1e-6)
    close(correct[t * 8 + f, 0].double(), torch.tensor(f, dtype=torch.float64).sin(), atol=1e-6)
    close(correct[t * 8 + f, 384].double(), torch.tensor(t, dtype=torch.float64).sin(), atol=1e-6)


def test_sinusoids_1d():
    table = sinusoids_1d(16, 50)
    for token in (0, 1, 49):
        for i in range(8):
            angle = torch.tensor(token / 10000 ** (2 * i / 16), dtype=torch.float64)
            close(table[token, 2 * i].double(), angle.sin(), atol=1e-5)
            close(table[token, 2 * i + 1].double(), angle.cos(), atol=1e-5)


def test_cls_row_of_fixed_positions_is_zero():
    table = small("audiomae_base").encoder.positions.table
    assert table.shape == (1, 33, 32) and not table[0, 0].any() and table[0, 1:].any(dim=1).all()


def test_log_offsets():
    offsets = log_offsets((4, 3))
    assert offsets.shape == (12, 12, 2)
    assert not offsets.diagonal().any()
    torch.testing.assert_close(offsets[0, 11], -torch.tensor([4.0, 3.0]).log())
    assert torch.equal(offsets, -offsets.transpose(0, 1))


@pytest.mark.parametrize(
    ("name", "overrides", "first"),
    [
        ("audiomae_base", {}, 0),
        ("audiomae_base", {"positions": "grid"}, 0),
        ("audiomae_base", {"positions": "flat"}, 0),
        ("mae_ast_patch_base", {"input_norm": "running"}, 0),
        ("ssast_patch_base", {}, 1),
    ],
    ids=str,
)
def test_short_clips_use_a_part_of_the_positions(name, overrides, first):
    """Two of four time steps give what they give in a full clip: at its start, or for SSAST at its centre."""
    model = small(name, **overrides)
    x = spectrogram()
    kept = torch.arange(16).repeat(2, 1) + 8 * first
    full = model.encode(x, Mask.from_keep(kept, 32))
    assert torch.equal(model.encode(x[:, 16 * first : 16 * first + 32]), full)


@pytest.mark.parametrize(
    "overrides", [{"input_norm": "running"}, {"prefix_tokens": 1, "input_norm": "none"}], ids=str
)
def test_flat_positions_reach_any_clip(overrides):
    model = small("mae_ast_patch_base", **overrides)
    x = spectrogram(frames=160)
    start = Mask.from_keep(torch.arange(32).repeat(2, 1), 80)
    close(model.encode(x, start), model.encode(x[:, :64]))
    assert model(x).loss.isfinite()


@pytest.mark.parametrize("name", FAMILIES)
def test_short_clips_train(name):
    still = STILL if name.startswith("mae_ast") else {}
    check_training_step(small(name, **still), spectrogram(frames=41))


def test_trailing_frames_are_left_out():
    model = small("audiomae_base")
    x, mask = spectrogram(frames=79), model.draw_mask(2)
    assert torch.equal(model(x, mask).loss, model(x[:, :64], mask).loss)


# -- output --------------------------------------------------------------------------------------------------


def test_output():
    model = small("mae_ast_patch_base")
    out = model(spectrogram())
    assert list(out) == ["loss", "losses", "pred", "mask", "pred_info_nce"]
    assert out[0] is out["loss"] is out.loss and out[-1] is out.pred_info_nce and len(out) == 5
    assert dict(out)["pred"] is out.pred and "mask" in out
    with pytest.raises(AttributeError, match="no 'logits', only loss, losses, pred, mask, pred_info_nce"):
        _ = out.logits
    with pytest.raises(KeyError):
        out["logits"]
    with pytest.raises(IndexError):
        out[5]

    leaves, spec = pytree.tree_flatten(out)
    assert len(leaves) == 7  # loss, two parts, pred, two lists of ids, pred_info_nce
    back = pytree.tree_unflatten(leaves, spec)
    assert type(back) is Output and list(back) == list(out) and back.mask.ids_keep is out.mask.ids_keep
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec

    detached = pytree.tree_map(lambda t: t.detach(), out)
    for twin in (copy.copy(detached), copy.deepcopy(detached), pickle.loads(pickle.dumps(detached))):
        assert type(twin) is Output and list(twin) == list(out)
        assert torch.equal(twin.loss, out.loss) and torch.equal(twin.mask.ids_keep, out.mask.ids_keep)


def test_models_can_be_copied_and_pickled():
    for name in FAMILIES:
        model = small(name)
        x, mask = spectrogram(), model.draw_mask(2)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x, mask).loss, model(x, mask).loss)


# -- regularisation ------------------------------------------------------------------------------------------


def differs_in_training(model):
    x, mask = spectrogram(), model.draw_mask(2)
    model.train()
    losses = {model(x, mask).loss.item() for _ in range(4)}
    model.eval()
    assert len({model(x, mask).loss.item() for _ in range(3)}) == 1
    return len(losses) > 1


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "input_dropout", "layer_drop"])
def test_dropout_in_training_only(rate):
    still = STILL | {"input_norm": "batch"}
    assert not differs_in_training(small("mae_ast_patch_base", **still))
    assert differs_in_training(small("mae_ast_patch_base", **still | {rate: 0.5}))


def test_bias_dropout():
    """As published, the window's position bias is random in training."""
    assert differs_in_training(small("audiomae_base"))
    assert not differs_in_training(small("audiomae_base", bias_dropout=0.0))
    assert MODELS["audiomae_base"].bias_dropout == 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 1 - 1e-6])
def test_dropout(p, dtype):
    """Values are kept or dropped independently, at the rate asked for, in the same places for the gradient."""
    layer, x = Dropout(p).train(), torch.ones(3, 7, 11 * 997, dtype=dtype, requires_grad=True)
    limit = min(round(p * 2**16), 2**16 - 1)
    torch.manual_seed(0)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad, y) and y.dtype == dtype
    scale = torch.tensor(2**16 / (2**16 - limit), dtype=dtype).item()
    assert set(y.unique().tolist()) <= {0.0, scale}
    kept, n = (y != 0).double(), y.numel()
    share = 1 - limit / 2**16
    deviation = (share * (1 - share) / n) ** 0.5
    assert abs(kept.mean().item() - share) < 5 * deviation
    for distance in (1, 2, 4):  # neighbours share a random word
        both = (kept.flatten()[:-distance] * kept.flatten()[distance:]).mean().item()
        assert abs(both - share**2) < 5 * (share**2 * (1 - share**2) / n) ** 0.5 + 2 * share * 5 * deviation
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)
    assert not torch.equal(layer(x), y) or share < 1e-4
    assert layer.eval()(x) is x


def test_dropout_of_nothing_and_of_all():
    x = torch.ones(5)
    assert torch.equal(Dropout(0.0).train()(x), x) and not Dropout(1.0).train()(x).any()
    assert Dropout(0.5).train()(torch.ones(0, 4)).shape == (0, 4)


def test_drop_path():
    layer, x = DropPath(0.25).train(), torch.ones(4000, 2, 3)
    y = layer(x)
    assert torch.equal(y, y[:, :1, :1].expand_as(y))  # a clip is kept or left out
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((y[:, 0, 0] > 0).float().mean().item() - 0.75) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    assert layer.eval()(x) is x


def test_drop_path_rises_and_joins_dropout():
    model = small_classifier(depth=3, drop_path=0.2, dropout=0.5).train()
    rates = [[m.rate for m in block.modules() if isinstance(m, DropPath)] for block in model.encoder.blocks]
    assert rates == [[], [0.1], [0.2]]
    for block in model.encoder.blocks:  # none of them loses its dropout
        assert [m.p for m in block.modules() if isinstance(m, nn.Dropout)] == [0.5]
    assert differs_between_calls(model) and not differs_between_calls(model.eval())


def differs_between_calls(model):
    x = spectrogram()
    return not torch.equal(model.encode(x), model.encode(x))


def test_layer_drop():
    """Each block is left out with its rate; a block left out gives no gradient but zeros."""
    still = STILL | {"layer_drop": 0.4, "depth": 1}
    model = small("mae_ast_patch_base", **still, input_norm="none").train()
    x, mask = spectrogram(1), model.draw_mask(1)
    model.eval()
    kept = model.encode(x, mask)
    model.train()
    count, runs = 0, 150
    for _ in range(runs):
        encoded = model.encode(x, mask)
        left_out = not torch.equal(encoded, kept)
        count += left_out
    assert abs(count / runs - 0.4) < 5 * (0.4 * 0.6 / runs) ** 0.5
    for _ in range(20):
        model.zero_grad()
        encoded = model.encode(x, mask)
        encoded.sum().backward()
        used = any(p.grad.any() for p in model.encoder.blocks.parameters())
        assert all(p.grad is not None for p in model.encoder.blocks.parameters())
        assert used == torch.equal(encoded, kept)


# -- input normalisation -------------------------------------------------------------------------------------


def test_spectrogram_norm_is_batch_norm_halved():
    x = 3 * spectrogram(3) - 5
    ours, theirs = SpectrogramNorm("auto").double().train(), nn.BatchNorm2d(1, affine=False).double().train()
    for _ in range(3):
        close(ours(x), 0.5 * theirs(x[:, None])[:, 0])
    for name, buffer in theirs.named_buffers():
        close(getattr(ours, name), buffer)
    assert ours.num_batches_tracked == 3
    ours.eval(), theirs.eval()
    close(ours(x), 0.5 * theirs(x[:, None])[:, 0])
    joint = ours.train()(x)
    close(joint, 0.5 * (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", ["batch", "running", "auto"])
def test_input_norm_modes(mode, training):
    norm = SpectrogramNorm(mode).double().train(training)
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)
    x = spectrogram()
    of_batch = mode == "batch" or (mode == "auto" and training)
    mean, var = (x.mean(), x.var(correction=0)) if of_batch else (1.0, 4.0)
    close(norm(x), 0.5 * (x - mean) / (var + norm.eps) ** 0.5)
    updated = norm.running_mean.item() != 1.0
    assert updated == (of_batch and training) and norm.num_batches_tracked == updated


@pytest.mark.parametrize("name", ["mae_ast_patch_base", "ssast_patch_base", "audiomae_base"])
def test_targets_are_of_the_normalised_spectrogram(name):
    model, plain = small(name, input_norm="batch"), small(name, input_norm="none")
    plain.load_state_dict(model.state_dict(), strict=False)
    x, mask = 4 * spectrogram() + 1, model.draw_mask(2)
    normalised = 0.5 * (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    close(model(x, mask).loss, plain(normalised, mask).loss, atol=1e-9)
    close(model.encode(x, mask), plain.encode(normalised, mask), atol=1e-9)


# -- SSAST ---------------------------------------------------------------------------------------------------


def test_ssast_passes():
    one = small("ssast_patch_base")
    two = audiomae.create_model("ssast_patch_base", **ENCODER, passes=2).double().eval()
    two.load_state_dict(one.state_dict())
    x, a, b = spectrogram(), one.draw_mask(2), one.draw_mask(2)
    close(two(x, a).loss, one(x, a).loss)
    pair = two(x, (a, b))
    close(pair.losses["info_nce"], one(x, a).losses["info_nce"])
    close(pair.losses["reconstruction"], one(x, b).losses["reconstruction"])
    close(pair.loss, 10 * pair.losses["reconstruction"] + pair.losses["info_nce"])
    assert pair.mask is b and torch.equal(pair.pred, one(x, b).pred)
    assert two(x).loss.isfinite()
    with pytest.raises(ValueError, match="passes=1 takes 1 masks, got 2"):
        one(x, (a, b))
    with pytest.raises(ValueError, match="passes=2 takes 2 masks, got 3"):
        two(x, (a, b, a))


def test_ssast_losses():
    """From the predictions: raw patches as targets, softmax over the predictions for each target."""
    model = small("ssast_patch_base")
    x = spectrogram()
    out = model(x)
    target = F.unfold(x[:, None], 16, stride=16).mT[torch.arange(2)[:, None], out.mask.ids_masked]
    close(out.losses["reconstruction"], (out.pred - target).square().mean())
    scores = target @ out.pred_info_nce.mT
    close(out.losses["info_nce"], -scores.log_softmax(-1).diagonal(dim1=1, dim2=2).mean(), atol=1e-10)


def test_mae_ast_losses():
    """Softmax over the targets for each prediction."""
    model = small("mae_ast_patch_base", input_norm="none")
    x = spectrogram()
    out = model(x)
    target = F.unfold(x[:, None], 16, stride=16).mT[torch.arange(2)[:, None], out.mask.ids_masked]
    close(out.losses["reconstruction"], (out.pred - target).square().mean())
    scores = out.pred_info_nce @ target.mT
    close(out.losses["info_nce"], -scores.log_softmax(-1).diagonal(dim1=1, dim2=2).mean(), atol=1e-10)
    close(out.loss, 10 * out.losses["reconstruction"] + out.losses["info_nce"])


def test_ssast_without_prefix():
    check_training_step(small("ssast_patch_base", prefix_tokens=0), spectrogram())


# -- classifier ----------------------------------------------------------------------------------------------


@pytest.mark.no_poison
def test_published_number_of_trainable_parameters(meta):
    model = audiomae.create_classifier("audiomae_base", num_classes=527, frames=1024)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 85_659_407


def test_classifier_pools_patch_tokens():
    model, x = small_classifier(), spectrogram()
    nn.init.normal_(model.head.weight)
    tokens = model.encode(x)[:, 1:]
    out = model(x)
    assert list(out) == ["logits"] and out.logits.shape == (2, 5)
    close(out.logits, model.head(model.fc_norm(tokens.mean(dim=1))))


def test_classifier_labels():
    model, x = small_classifier(), spectrogram()
    nn.init.normal_(model.head.weight)
    numbers = torch.tensor([1, 4])
    several = torch.rand(2, 5)
    out = model(x, labels=numbers)
    assert list(out) == ["loss", "logits"]
    close(out.loss, -out.logits.log_softmax(-1)[[0, 1], numbers].mean())
    p, y = out.logits.sigmoid(), several.double()
    close(model(x, labels=several).loss, -(y * p.log() + (1 - y) * (1 - p).log()).mean())
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    half = copy.deepcopy(model).bfloat16()
    assert half(x, labels=numbers).loss.dtype == torch.float32


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(2),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros(2, 4),
    ],
    ids=lambda t: f"{t.dtype} {tuple(t.shape)}",
)
def test_classifier_refuses_labels(labels):
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\).*or float of shape \(2, 5\)"):
        small_classifier()(spectrogram(), labels=labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1, 5]), r"takes class labels from 0 to 4, got \[5\]"),
        (torch.tensor([-100, -1]), r"takes class labels from 0 to 4, got \[-100, -1\]"),
        (torch.full((2, 5), 1.5), r"takes targets from 0 to 1, got \[1.5, 1.5, 1.5, 1.5, 1.5\]"),
        (torch.tensor([[0, 1, 0, 0, float("nan")]] * 2), r"takes targets from 0 to 1, got \[nan, nan\]"),
        (torch.tensor([1, 2], device="meta"), r"labels are on meta, the spectrogram on cpu: move them"),
    ],
    ids=["high", "negative", "targets", "nan", "device"],
)
def test_classifier_refuses_label_values(labels, message, monkeypatch):
    model = small_classifier()
    monkeypatch.setattr(model, "encode", None)  # refused before any work
    with pytest.raises(ValueError, match=message):
        model(spectrogram(), labels=labels)
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        model(spectrogram(), labels=[1, 2])


def test_classifier_labels_are_looked_at_without_waiting(monkeypatch):
    model, x = small_classifier().to("meta"), spectrogram().to("meta")  # like a GPU: values are out of reach
    labels = torch.tensor([1, 5], device="meta")
    assert model(x, labels=labels).loss.is_meta
    asserted = []
    monkeypatch.setattr(_checks, "ASSERTS", True)
    monkeypatch.setattr(torch, "_assert_async", lambda fits, message: asserted.append(message))
    assert model(x, labels=labels).loss.is_meta
    assert "the classifier takes class labels from 0 to 4" in asserted


@pytest.mark.parametrize("several", [False, True])
def test_classifier_labels_of_several_masks(several):
    model, x = small_classifier(), spectrogram()
    mask = Mask.random(4, 32, 0.5)  # two of each clip
    labels = torch.rand(4, 5) if several else torch.tensor([1, 1, 4, 4])
    assert model(x, mask, labels=labels).loss.isfinite()
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(4,\)"):
        model(x, mask, labels=labels[:2])


@pytest.mark.parametrize(
    ("masks", "kept"),
    [
        ({"mask_time": 0.5}, 2 * 8),
        ({"mask_frequency": 0.3}, 4 * 5),
        ({"mask_time": 0.5, "mask_frequency": 0.3}, 10),
    ],
    ids=str,
)
def test_classifier_masks_in_training_only(masks, kept):
    model, x = small_classifier(**masks), spectrogram()
    assert "mask" not in model(x)
    model.train()
    out = model(x)
    assert out.mask.ids_keep.shape == (2, kept)
    assert model(x[:, :32]).mask.num_tokens == 16
    own = Mask.random(2, 32, 0.5)
    assert model(x, own).mask is own and torch.equal(model.eval()(x, own).logits, model(x, own).logits)
    assert "mask" not in small_classifier().train()(x)


def test_classifier_defaults():
    """The right grid when nothing is pre-trained, no pre-training dropout, SSAST's norm before pooling."""
    assert small_classifier().config.positions == "grid"
    config = audiomae.create_classifier("mae_ast_patch_base", 3, **ENCODER).config
    assert {name: getattr(config, name) for name in STILL} == STILL and config.drop_path == 0
    assert not config.final_norm and config.frontend.frames == 64
    assert audiomae.create_classifier("ssast_patch_base", 3, **ENCODER).config.final_norm
    labels = ("dog", "rain")
    model = audiomae.create_classifier(
        "audiomae_base", 2, **ENCODER, frontend=Frontend.named("esc50", labels=labels)
    )
    assert model.config.frontend.labels == labels
    with pytest.raises(
        ValueError, match="ClassifierConfig has no field 'mask_times'; did you mean mask_time"
    ):
        small_classifier(mask_times=0.2)


@pytest.mark.parametrize("name", ["audiomae_base", "mae_ast_patch_base", "ssast_patch_base"])
def test_classifier_from_pretrained(name, tmp_path):
    source = small(name)
    if hasattr(source.spectrogram_norm, "running_mean"):
        source.spectrogram_norm.running_mean.fill_(0.3)
    source.save_pretrained(tmp_path)
    sizes = {key: ENCODER[key] for key in ("width", "heads", "depth")}
    model = audiomae.create_classifier(name, 5, frames=32, pretrained=tmp_path, **sizes).double().eval()
    x = spectrogram(frames=32)
    assert model.config.positions == source.config.positions and model.config.frames == 32
    # Same blocks, positions and prefix: the same hidden states. The final norm is no part of most classifiers.
    (ours,), (theirs,) = model.encode(x, layers=[2]), source.encode(x, layers=[2])
    close(ours, theirs, atol=1e-6)  # stored in float64, fine-tuned from float32
    assert not model.head.bias.any() and (model.fc_norm.weight == 1).all()


def test_classifier_refuses_other_weights(tmp_path):
    small("audiomae_base", input_norm="batch").float().save_pretrained(tmp_path)
    sizes = {key: ENCODER[key] for key in ("width", "heads", "depth")}
    for changed, message in (
        ({"width": 48}, "width=32, but the wanted model has 48"),
        ({"frames": 128}, "reach 64 frames, which is less than frames=128"),
        ({"frames": 64, "stride": (10, 10)}, r"8 frequency bands.*stride=\(10, 10\) gives 12"),
    ):
        with pytest.raises(ValueError, match=message):
            audiomae.create_classifier(
                "audiomae_base", 5, pretrained=tmp_path, **{"frames": 64} | sizes | changed
            )
    with pytest.raises(ValueError, match="have family='audiomae', but the wanted model has 'ssast'"):
        audiomae.create_classifier("ssast_patch_base", 5, pretrained=tmp_path)


def test_no_weight_decay():
    for model in (small("audiomae_base"), small_classifier()):
        names, parameters = model.no_weight_decay(), dict(model.named_parameters())
        assert names == {
            name for name, p in parameters.items() if name.endswith(("bias", "tau")) or "norm" in name
        }
        assert all(parameters[name].ndim <= 1 for name in names)
        assert "encoder.prefix" not in names and "decoder.mask_token" not in names
    assert (
        small("mae_ast_patch_base").no_weight_decay() == small("ssast_patch_base").no_weight_decay() == set()
    )


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["audiomae_base", "mae_ast_patch_base", "ssast_patch_base", "classifier"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((128,), r"must be \(B, T, 128\) or \(B, 1, T, 128\), got \(128,\)"),
        ((64, 128), r"got \(64, 128\)"),
        ((2, 2, 64, 128), r"got \(2, 2, 64, 128\)"),
        ((2, 64, 80), "takes 128 mel bins in the last dimension"),
        ((2, 15, 128), r"at least 16 frames \(one patch\), got 15"),
        ((0, 64, 128), "the batch is empty"),
    ],
    ids=str,
)
def test_wrong_spectrograms(name, shape, message):
    model = small_classifier(mask_time=0.5).train() if name == "classifier" else small(name)
    x = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        model(x)
    with pytest.raises(ValueError, match=message):
        model.encode(x)


@pytest.mark.parametrize("name", ["audiomae_base", "ssast_patch_base", "classifier"])
def test_clip_longer_than_the_positions(name):
    model = small_classifier(mask_time=0.5).train() if name == "classifier" else small(name)
    with pytest.raises(
        ValueError, match="80 frames is longer than the model's positions, which reach 64 frames"
    ):
        model(spectrogram(frames=80))


def test_clip_longer_than_all_positions():
    x = torch.zeros(1, dtype=torch.float64).expand(1, 2 * 48000 + 2, 128)
    with pytest.raises(ValueError, match="reach 48000 tokens"):
        small("mae_ast_frame_base").encode(x)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.bool, torch.complex64])
def test_spectrogram_must_be_float(dtype):
    with pytest.raises(ValueError, match=f"must be a float tensor, got {dtype}"):
        small("audiomae_base")(torch.zeros(2, 64, 128, dtype=dtype))


@pytest.mark.parametrize("lengths", [torch.tensor([64]), torch.tensor([64.0, 30.0]), [64, 30, 2]], ids=str)
def test_wrong_lengths(lengths):
    with pytest.raises(ValueError, match="lengths must hold one integer for each of 2 clips"):
        small("audiomae_base")(spectrogram(), lengths=lengths)


@pytest.mark.parametrize("name", ["audiomae_base", "ssast_patch_base", "classifier"])
def test_wrong_masks(name):
    model, x = (small_classifier() if name == "classifier" else small(name)), spectrogram()
    for mask, message in (
        (Mask.random(2, 48, 0.5), "the mask is for 48 tokens, but clips of 64 frames have 4 x 8 = 32"),
        (Mask.random(3, 32, 0.5), "the mask has 3 rows, which is no multiple of the batch of 2"),
        (Mask.random(1, 32, 0.5), "the mask has 1 row, "),
        (
            Mask.random(2, 32, 0.5, device="meta"),
            r"the mask is on meta, the spectrogram on cpu.*mask.to\(device\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, mask)
        with pytest.raises(ValueError, match=message):
            model.encode(x, mask)
    for not_a_mask in (torch.arange(4).repeat(2, 1), torch.zeros(2, 32, dtype=torch.bool), 0.5):
        with pytest.raises(TypeError, match="must be an audiomae"):
            model(x, not_a_mask)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"no model 'audiomae_bas'; did you mean audiomae_base"):
        audiomae.create_model("audiomae_bas")
    with pytest.raises(ValueError, match=r"see audiomae.list_models\(\)"):
        audiomae.create_model("xyz")
    with pytest.raises(ValueError, match="MAEConfig has no field 'mask_rato'; did you mean mask_ratio"):
        audiomae.create_model("audiomae_base", mask_rato=0.5)
    with pytest.raises(ValueError, match="SSASTConfig has no field 'decoder'"):
        audiomae.create_model("ssast_patch_base", decoder="window")
    with pytest.raises(ValueError, match="no model 'nothing'"):
        audiomae.create_classifier("nothing", 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mask_ratio": 1.0}, "mask ratio must lie between 0 and 1"),
        ({"mask_ratio": 0}, "mask ratio must lie between 0 and 1"),
        ({"mask_ratio": "0.8"}, "takes one ratio, got '0.8'"),
        ({"mask_ratio": (0.5, 0.5)}, "takes one ratio, got"),
        ({"masking": "time_frequency", "mask_ratio": (0.1, 0.2, 0.3)}, "one ratio or a pair"),
        ({"masking": "randm"}, "unknown masking strategy 'randm'"),
        ({"decoder": "local"}, "decoder must be one of 'window', 'hybrid', 'global', 'cross', 'none', got"),
        ({"positions": "rope"}, "positions must be one of"),
        ({"norm": "mid"}, "norm must be one of 'pre', 'post'"),
        ({"input_norm": "layer"}, "input_norm must be one of"),
        ({"impl": "cuda"}, "impl must be one of None, 'reference', 'native', 'triton', got 'cuda'"),
        ({"patch": 16}, "patch must be a pair .* of integers of at least 1, got 16"),
        ({"patch": (16, 0)}, "patch must be a pair"),
        ({"stride": (16.0, 16)}, "stride must be a pair"),
        ({"stride": ()}, "stride must be a pair"),
        ({"window": (4,)}, "window must be a pair"),
        ({"window_shift": (2,)}, "window_shift must be a pair .* at least 0"),
        ({"window_shift": (-1, 0)}, "window_shift must be a pair"),
        ({"window_shift": (4, 0)}, r"window_shift must lie inside the window \(4, 4\), got \(4, 0\)"),
        ({"width": 770}, "width must be a multiple of 4 and of heads=12, got 770"),
        ({"heads": 0}, "heads must be a positive integer, got 0"),
        ({"depth": -1}, "depth must be a positive integer, got -1"),
        ({"frames": 1024.5}, "frames must be a positive integer, got 1024.5"),
        ({"frames": 8}, "does not fit into 8 frames x 128 mel bins"),
        ({"patch": (16, 160)}, "does not fit into 1024 frames x 128 mel bins"),
        ({"mel_bins": "128"}, "mel_bins must be a positive integer, got '128'"),
        ({"mlp_ratio": 0}, "mlp_ratio must be positive, got 0"),
        ({"norm_eps": -1e-6}, "norm_eps must be positive"),
        ({"prefix_tokens": 3}, "prefix_tokens must be one of 0, 1, 2, got 3"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"drop_path": -0.1}, r"drop_path must lie in \[0, 1\)"),
        ({"layer_drop": "a"}, r"layer_drop must lie in \[0, 1\), got 'a'"),
        ({"bias_dropout": float("nan")}, "bias_dropout must lie in"),
        ({"decoder_width": 100}, "decoder_width must be a multiple of 4 and of decoder_heads=16, got 100"),
        ({"decoder_heads": 0}, "decoder_heads must be a positive integer"),
        ({"decoder_depth": 0}, "decoder_depth must be a positive integer, got 0"),
        ({"decoder": "hybrid", "global_blocks": 12}, "global_blocks=12 of 12"),
        ({"reconstruction_weight": 0}, "one of them not 0, got 0 and 0.0"),
        ({"reconstruction_weight": -1, "info_nce_weight": 1}, "must not be negative"),
    ],
    ids=str,
)
def test_bad_configurations(overrides, message):
    with pytest.raises(ValueError, match=message):
        audiomae.create_model("audiomae_base", **overrides)


def test_bad_configurations_of_the_others():
    with pytest.raises(ValueError, match="passes must be one of 1, 2, got 3"):
        audiomae.create_model("ssast_patch_base", passes=3)
    with pytest.raises(ValueError, match="one of them not 0"):
        audiomae.create_model("ssast_patch_base", info_nce_weight=0, reconstruction_weight=0)
    with pytest.raises(ValueError, match="num_classes must be a positive integer, got 0"):
        audiomae.create_classifier("audiomae_base", 0)
    with pytest.raises(ValueError, match=r"mask_time must lie in \[0, 1\)"):
        audiomae.create_classifier("audiomae_base", 3, mask_time=1.0)


def test_lists_are_pairs():
    assert model_config("audiomae_base", patch=[32, 16], stride=[16, 16]).step == (16, 16)


@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
def test_nan_is_reported_on_request(kind):
    """AUDIOMAE_CHECK=1 stops at a spectrogram with NaN; without it the loss is NaN (see above)."""
    program = f"""
import torch, audiomae
sizes = dict(width=32, heads=2, depth=1, frames=32)
if {kind == "classifier"}:
    model = audiomae.create_classifier("audiomae_base", 3, **sizes)
    options = dict(labels=torch.zeros(1, 3))
else:
    model = audiomae.create_model("audiomae_base", **sizes, decoder_width=32, decoder_heads=2, decoder_depth=1)
    options = dict()
x = torch.zeros(1, 32, 128)
print("finite", model(x, **options).loss.isfinite().item())
x[0, 5, 7] = float("nan")
model(x, **options)
"""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"AUDIOMAE_CHECK": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "finite True" in done.stdout, done.stderr
    assert done.returncode != 0 and "the loss is NaN" in done.stderr


# -- files ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(pretrained, "snapshot_download", refuse)


def assert_same(model, other):
    assert type(other) is type(model) and other.config == model.config
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype and torch.equal(theirs[name], tensor), name
    other.train(model.training)
    x = spectrogram().to(next(model.parameters()).dtype)
    if isinstance(model, audiomae.Classifier):
        assert torch.equal(other(x).logits, model(x).logits)
    else:
        mask = model.draw_mask(2)
        assert torch.equal(other(x, mask).loss, model(x, mask).loss)


MAKERS = {name: (lambda name=name: small(name)) for name in FAMILIES} | {"classifier": small_classifier}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_save_and_load(name, dtype, tmp_path):
    model = MAKERS[name]()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    model.to(dtype)
    model.config = replace(model.config, frontend=Frontend.named("esc50", labels=tuple("abcde")))
    model.save_pretrained(tmp_path / "made" / "here")
    assert_same(model, audiomae.load(tmp_path / "made" / "here"))
    assert_same(model, type(model).from_pretrained(str(tmp_path / "made" / "here")))
    written = json.loads((tmp_path / "made" / "here" / "config.json").read_text())
    assert written["frontend"]["labels"] == list("abcde") and written["type"] == type(model.config).__name__


def test_flat_positions_are_not_stored(tmp_path):
    small("mae_ast_patch_base").save_pretrained(tmp_path)
    assert audiomae.load(tmp_path, frames=96).config.frames == 96  # a formula has any length


def test_load_overrides(tmp_path):
    small("audiomae_base").save_pretrained(tmp_path)
    assert audiomae.load(tmp_path, mask_ratio=0.5).config.mask_ratio == 0.5
    assert audiomae.MaskedAutoencoder.from_pretrained(tmp_path, mask_ratio=0.5).config.mask_ratio == 0.5
    with pytest.raises(ValueError, match="MAEConfig has no field 'mask_rate'; did you mean mask_ratio"):
        audiomae.load(tmp_path, mask_rate=0.5)
    with pytest.raises(ValueError, match="holds a MaskedAutoencoder, not a SSAST"):
        audiomae.SSAST.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["mae_ast_patch_base", "ssast_patch_base"])
def test_upstream_extras_are_stored(name, tmp_path):
    """What a published checkpoint holds besides the weights survives, though two of its tensors may be one."""
    sizes = {"width": 64, "heads": 1, "depth": 1}
    if name.startswith("mae_ast"):
        sizes |= {"decoder_width": 64, "decoder_heads": 1, "decoder_depth": 1}
    state = audiomae.to_upstream(audiomae.create_model(name, **sizes))
    state = {f"module.{key}": tensor for key, tensor in state.items()} | {"module.note": torch.arange(3)}
    tokens = {"tokens": "patch"} if name.startswith("mae_ast") else {}
    audiomae.from_upstream(state, **tokens).save_pretrained(tmp_path)
    back = audiomae.to_upstream(audiomae.load(tmp_path))
    assert set(back) == set(state)
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key

    # A model of another origin in the same folder takes nothing of it along.
    small("audiomae_base").save_pretrained(tmp_path)
    assert audiomae.load(tmp_path).upstream is None


@pytest.fixture
def folder(tmp_path):
    small("audiomae_base").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}: it is no folder that save_pretrained wrote"):
        audiomae.load(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(folder, share):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"model\.safetensors is no intact safetensors file"):
        audiomae.load(folder)


def test_broken_extras(folder):
    from safetensors.torch import save_file

    (folder / "upstream.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"upstream\.safetensors is no intact safetensors file"):
        audiomae.load(folder)
    save_file({"a": torch.zeros(1)}, folder / "upstream.safetensors")
    with pytest.raises(ValueError, match="does not say which published checkpoint it belongs to"):
        audiomae.load(folder)


def rewrite(folder, **changes):
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(data))


def test_weights_of_another_model(folder):
    rewrite(folder, width=48)
    with pytest.raises(
        ValueError,
        match=r"do not fit the model: encoder.prefix has shape \(1, 1, 32\) instead of \(1, 1, 48\); .* more",
    ):
        audiomae.load(folder)
    rewrite(folder, width=32, depth=3)
    with pytest.raises(ValueError, match=r"encoder.blocks.2.norm1.weight is missing; .* and 7 more"):
        audiomae.load(folder)
    rewrite(folder, depth=1)
    with pytest.raises(ValueError, match=r"encoder.blocks.1.attn.proj.bias is unexpected; .* and 7 more"):
        audiomae.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no model configuration"),
        ("{", "is no model configuration"),
        ("[1]", "must be a mapping"),
        ("\udcff", "is no model configuration"),
        ("{}", "type must be one of MAEConfig, SSASTConfig, ClassifierConfig, got None"),
        ('{"type": "Bert"}', "got 'Bert'"),
        ('{"type": "MAEConfig"}', "family"),
        (
            '{"type": "MAEConfig", "family": "audiomae", "widht": 3}',
            "MAEConfig has no field 'widht'; did you mean width",
        ),
        ('{"type": "MAEConfig", "family": "audiomae", "width": "x"}', "width must be a positive integer"),
        ('{"type": "MAEConfig", "family": "audiomae", "frontend": {"window": "x"}}', "unknown window 'x'"),
        ('{"type": "MAEConfig", "family": "audiomae", "frontend": 3}', "is no model configuration"),
    ],
    ids=str,
)
def test_broken_configuration(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        audiomae.load(folder)
    assert f"{folder / 'config.json'} is no model configuration" in str(caught.value)


def test_paths_that_do_not_exist():
    for source in (
        "no/such/path.pth",
        "such/path.pth",
        "/no/such/folder",
        Path("no/such/folder"),
    ):
        with pytest.raises(FileNotFoundError, match=r"no file or folder .*a hub id looks like owner/name"):
            audiomae.load(source)
    with pytest.raises(FileNotFoundError, match="did you mean audiomae_base"):
        audiomae.load("audiomae_bas")
    with pytest.raises(FileNotFoundError, match="audiomae_base names an untrained model"):
        audiomae.load("audiomae_base")


@pytest.mark.parametrize("hub_id", ["owner/name", "owner/name-v1.0", "owner/vit_base.audiomae_as2m"])
def test_hub_ids(folder, monkeypatch, hub_id):
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    assert audiomae.load(hub_id, mask_ratio=0.5).config.mask_ratio == 0.5
    names = ["config.json", "model.safetensors", "upstream.safetensors", "record.json", "pytorch_model.bin"]
    assert asked == [(hub_id, names)]


def test_the_front_end_follows_the_length_of_the_model():
    assert audiomae.create_model("audiomae_base", **ENCODER | DECODER).config.frontend.frames == 64
    assert small("mae_ast_patch_base").config.frontend.frames is None
    kept = Frontend.named("esc50")
    assert small("audiomae_base", frontend=kept).config.frontend is kept
    model = small("audiomae_base", frames=96)
    assert model(model.config.frontend(torch.randn(1, 8000).double())).loss.isfinite()


def test_overlapping_patches_have_positions_on_the_right_grid():
    assert model_config("audiomae_base").positions == "transposed"
    assert model_config("audiomae_base", stride=(10, 10)).positions == "grid"
    assert model_config("audiomae_base", stride=(10, 10), positions="transposed").positions == "transposed"


def test_a_trainer_may_note_things_in_the_configuration():
    """Hugging Face's Trainer sets `model.config.use_cache`, logs the configuration and collects predictions."""
    model = small("audiomae_base")
    model.config.use_cache = False
    assert json.loads(model.config.to_json_string()) == json.loads(json.dumps(model.config.to_dict()))
    out = model(spectrogram())
    predictions = [out[name] for name in out if name not in model.config.keys_to_ignore_at_inference]
    assert all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(predictions))
    assert not any(isinstance(value, Mask) for value in predictions)


def test_input_dropout_is_part_of_masking():
    model = small("mae_ast_patch_base", **STILL | {"input_dropout": 0.5}, input_norm="batch").train()
    x, mask = spectrogram(), Mask.random(2, 32, 0.5)
    assert torch.equal(model.encode(x), model.encode(x))
    assert not torch.equal(model.encode(x, mask), model.encode(x, mask))


def test_layer_drop_covers_the_decoder():
    model = small("mae_ast_patch_base", **STILL | {"layer_drop": 0.999999}, input_norm="batch").train()
    x, mask = spectrogram(), Mask.random(2, 32, 0.5)
    loss = model(x, mask).loss
    loss.backward()
    for blocks in (model.encoder.blocks, model.decoder.blocks):
        assert all(p.grad is not None and not p.grad.any() for p in blocks.parameters())


@pytest.mark.parametrize("lengths", [[0, 64], [64, 65], torch.tensor([5000, -5])])
def test_lengths_out_of_range(lengths):
    with pytest.raises(ValueError, match="between 1 and the 64 frames given"):
        small("audiomae_base").encode(spectrogram(), lengths=lengths)


def test_what_is_no_tensor_or_no_list_of_layers():
    model = small("audiomae_base")
    with pytest.raises(TypeError, match="must be a tensor, got ndarray"):
        model(spectrogram().numpy())
    with pytest.raises(ValueError, match="sequence of block numbers from 1 to 2, got 2"):
        model.encode(spectrogram(), layers=2)
    with pytest.raises(TypeError, match="num_tokens must be an integer, got float"):
        Mask.from_keep(torch.zeros(1, 1, dtype=torch.int64), 4.0)


def test_an_implementation_that_does_not_exist_is_refused_when_the_model_is_built():
    for impl in ("native", "triton"):
        device = {"native": "cpu", "triton": "cuda"}[impl]
        ops = [op for op in OPS if (op, impl) != ("attention", "triton")]  # SDPA stands in for it
        missing = [
            op for op in ops for s in implementations(op, device) if s.name == impl and not s.available
        ]
        if missing:
            with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run"):
                small("mae_ast_patch_base", impl=impl, decoder="hybrid", decoder_depth=2, global_blocks=1)


def test_labels_and_classes_must_agree():
    with pytest.raises(ValueError, match="names 2 labels, but num_classes is 5"):
        small_classifier(frontend=Frontend.named("esc50", frames=64, labels=("dog", "rain")))
    with pytest.raises(ValueError, match="set mask_time or mask_frequency"):
        small_classifier().draw_mask(2)
