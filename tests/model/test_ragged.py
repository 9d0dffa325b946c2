"""Clips of different lengths in one batch: each gives what it gives alone."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import compare
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree

import audiomae
from audiomae import Mask
from audiomae.masking import STRATEGIES, RaggedMask
from audiomae.model import DropPath, Packed, SpectrogramNorm
from audiomae.ragged import Clips, Rows

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"width": 32, "heads": 2, "depth": 2, "frames": 160, "mel_bins": 64}
DECODER = {"decoder_width": 24, "decoder_heads": 2, "decoder_depth": 4, "global_blocks": 2}
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "layer_drop": 0.0}
MAE_AST = DECODER | STILL | {"input_norm": "running"}
CASES = {
    "window": ("audiomae_base", DECODER | {"bias_dropout": 0.0}),
    "hybrid": ("audiomae_base", DECODER | {"bias_dropout": 0.0, "decoder": "hybrid"}),
    "global": ("audiomae_base", DECODER | {"decoder": "global"}),
    "cross": ("audiomae_base", DECODER | {"decoder": "cross"}),
    "overlap": ("audiomae_base", DECODER | {"bias_dropout": 0.0, "stride": (10, 10)}),
    "learned": ("audiomae_base", DECODER | {"bias_dropout": 0.0, "positions": "learned"}),
    "mae_ast_patch": ("mae_ast_patch_base", MAE_AST),
    "mae_ast_frame": ("mae_ast_frame_base", MAE_AST | {"patch": (2, 64)}),
    "mae_ast_cross": ("mae_ast_patch_base", MAE_AST | {"decoder": "cross"}),
    "ssast_patch": ("ssast_patch_base", {}),
    "ssast_two_passes": ("ssast_patch_base", {"passes": 2}),
}
# One frame, one patch, a patch and a bit, whole windows, half a window more, that length again, all there are.
LENGTHS = [70, 1, 128, 16, 96, 17, 160, 96]


def build(case, **overrides):
    """The model and a twin whose batches are dense: the same weights, no dropout."""
    name, options = CASES[case]
    torch.manual_seed(1)
    model = audiomae.create_model(name, **SIZES | options | {"pad": "exclude"} | overrides).double()
    dense = audiomae.create_model(name, **SIZES | options | overrides).double()
    for (
        name,
        parameter,
    ) in model.named_parameters():  # no zeros, and no weights so small that a mistake drowns
        if parameter.ndim < 2 and not name.endswith("tau"):
            nn.init.normal_(parameter, std=0.1)
    if hasattr(model.spectrogram_norm, "running_mean"):
        model.spectrogram_norm.running_mean.fill_(0.3)
        model.spectrogram_norm.running_var.fill_(2.0)
    dense.load_state_dict(model.state_dict())
    return model, dense


def batch(lengths=LENGTHS, frames=160, padding=0.0):
    x = torch.randn(len(lengths), frames, 64, dtype=torch.float64)
    for clip, n in zip(x, lengths, strict=True):
        clip[n:] = padding
    return x


def alone(model, x, lengths):
    """Each clip by itself, filled up with zeros to whole patches."""
    c = model.config
    for clip, n in zip(x, lengths, strict=True):
        steps = min(max(0, -(-(n - c.patch[0]) // c.step[0])) + 1, c.grid()[0])
        whole = (steps - 1) * c.step[0] + c.patch[0]
        yield F.pad(clip[:n], (0, 0, 0, max(0, whole - n)))[None, :whole]


def row(mask, i):
    """Row i of a ragged mask, for a clip alone."""
    kept, masked = mask.ids_keep[i : i + 1, : mask.kept[i]], mask.ids_masked[i : i + 1, : mask.masked[i]]
    return Mask(kept, masked, mask.tokens[i])


def close(actual, expected, atol=1e-11):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def gradients(model):
    return {f"grad of {name}": p.grad.clone() for name, p in model.named_parameters()}


def step_together(model, x, mask, lengths):
    model.zero_grad()
    out = model(x, mask, lengths)
    out.loss.backward()
    return out, {"loss": out.loss.detach()} | gradients(model)


def step_alone(model, clips, mask, m=1):
    """Clip by clip; the losses are means over all masked tokens of the batch."""
    model.zero_grad()
    outs, loss = [], 0.0
    for i, clip in enumerate(clip for clip in clips for _ in range(m)):
        masks = tuple(row(each, i) for each in mask) if isinstance(mask, tuple) else row(mask, i)
        outs.append(model(clip, masks))
        first = mask[0] if isinstance(mask, tuple) else mask
        loss = loss + outs[-1].loss * first.masked[i] / sum(first.masked)
    loss.backward()
    return outs, {"loss": loss.detach()} | gradients(model)


# -- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_clip_gives_what_it_gives_alone(case):
    """Predictions, losses and every gradient by name; padding holds NaN and is never read."""
    model, dense = build(case)
    x = batch(padding=float("nan"))
    mask = model.draw_mask(len(LENGTHS), 160, lengths=LENGTHS)
    given = (mask, model.draw_mask(len(LENGTHS), lengths=LENGTHS)) if case == "ssast_two_passes" else mask
    out, together = step_together(model.train(), x, given, LENGTHS)
    outs, apart = step_alone(dense.train(), alone(model, x, LENGTHS), given)
    assert set(together) == set(apart) and out.mask is (given[1] if isinstance(given, tuple) else given)
    assert len(set(mask.kept)) > 3 and min(mask.kept) > 0
    for name, expected in apart.items():
        close(together[name], expected, atol=1e-9 * max(1.0, expected.abs().max().item()))
    for key in ("pred", "pred_info_nce"):
        for i, one in enumerate(outs):
            if key in out:
                own = one[key].shape[1]
                close(out[key][i, :own], one[key][0])
                assert not out[key][i, own:].any()


@pytest.mark.parametrize("case", ["window", "hybrid", "global", "cross", "mae_ast_patch", "ssast_patch"])
def test_within_the_error_budget_of_float32(case):
    """Packed, clip by clip, and clip by clip in float64: the error may be twice eager's."""
    model, dense = build(case)
    draws = []
    for _ in range(4):
        x, mask = batch().float(), model.draw_mask(len(LENGTHS), lengths=LENGTHS)
        _, exact = step_alone(dense, list(alone(model, x.double(), LENGTHS)), mask)
        _, eager = step_alone(copy.deepcopy(dense).float(), list(alone(model, x, LENGTHS)), mask)
        _, actual = step_together(copy.deepcopy(model).float(), x, mask, LENGTHS)
        draws.append([relative(result, exact) for result in (actual, eager, exact)])
        for result in (actual, eager):
            assert abs(result["loss"] / exact["loss"] - 1) < 8 * torch.finfo(torch.float32).eps
    compare(*zip(*draws, strict=True))


def relative(result, exact):
    """All gradients in one, each relative to its largest value: the error of a single small one is a matter of luck.

    Without those that are 0 but for rounding: what is added to all scores of a softmax changes nothing.
    """
    scale = {name: grad.abs().max() for name, grad in exact.items() if name != "loss"}
    names = [name for name, size in scale.items() if size > 1e-9 * max(scale.values())]
    assert len(names) > 0.9 * len(scale)
    return {
        "gradients": torch.cat(
            [(result[name] / scale[name].to(result[name].dtype)).flatten() for name in names]
        )
    }


@pytest.mark.parametrize("case", CASES)
def test_encode(case):
    model, dense = build(case)
    model.eval(), dense.eval()
    x, prefix = batch(padding=float("nan")), model.num_prefix_tokens
    mask = model.draw_mask(len(LENGTHS), lengths=LENGTHS)
    everything, masked = model.encode(x, lengths=LENGTHS), model.encode(x, mask, lengths=LENGTHS)
    layers = model.encode(x, mask, torch.tensor(LENGTHS), layers=[1, 2])
    tokens = model.clips(LENGTHS).tokens
    assert everything.shape == (len(LENGTHS), prefix + max(tokens), 32)
    assert masked.shape == layers[0].shape == (len(LENGTHS), prefix + max(mask.kept), 32)
    for i, clip in enumerate(alone(model, x, LENGTHS)):
        own, kept = prefix + tokens[i], prefix + mask.kept[i]
        close(everything[i, :own], dense.encode(clip)[0])
        close(masked[i, :kept], dense.encode(clip, row(mask, i))[0])
        close(layers[0][i, :kept], dense.encode(clip, row(mask, i), layers=[1])[0][0])
        assert not everything[i, own:].any() and not masked[i, kept:].any() and not layers[1][i, kept:].any()


@pytest.mark.parametrize("case", ["window", "cross", "mae_ast_patch", "ssast_patch"])
def test_several_masks_of_a_clip(case):
    model, dense = build(case, masks_per_clip=3)
    lengths = [70, 160, 16]
    x = batch(lengths)
    mask = model.draw_mask(3, lengths=lengths)
    assert len(mask.kept) == 9 and mask.tokens[::3] == mask.tokens[2::3] == model.clips(lengths).tokens
    out, together = step_together(model, x, mask, lengths)
    outs, apart = step_alone(dense, alone(model, x, lengths), mask, m=3)
    for name, expected in apart.items():
        close(together[name], expected, atol=1e-9 * max(1.0, expected.abs().max().item()))
    for i, one in enumerate(outs):
        close(out.pred[i, : one.pred.shape[1]], one.pred[0])


@pytest.mark.parametrize("masked", [False, True])
def test_classifier(masked):
    fields = SIZES | ({"mask_time": 0.5, "mask_frequency": 0.3} if masked else {})
    model = audiomae.create_classifier("audiomae_base", 5, **fields, pad="exclude").double()
    dense = audiomae.create_classifier("audiomae_base", 5, **fields).double()
    nn.init.normal_(model.head.weight)
    dense.load_state_dict(model.state_dict())
    x, labels = batch(padding=float("nan")), torch.arange(len(LENGTHS)) % 5
    model.train(), dense.eval()
    out = model(x, lengths=LENGTHS, labels=labels)
    assert ("mask" in out) == masked
    for i, clip in enumerate(alone(model, x, LENGTHS)):
        close(out.logits[i], dense(clip, row(out.mask, i) if masked else None).logits[0])
    close(out.loss, F.cross_entropy(out.logits, labels))
    out.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_equal_lengths_are_a_dense_batch():
    """And a dense mask serves them."""
    model, dense = build("window")
    x, mask = batch([96] * 3), Mask.random(3, 24, 0.75)
    out = model(x, mask, lengths=[96] * 3)
    close(out.pred, dense(x[:, :96], mask).pred)
    assert out.mask is mask
    close(model(x[:, :96], mask).pred, out.pred)  # without lengths every frame counts


def test_attend_is_published():
    """Lengths change nothing where padding is attended."""
    _, dense = build("window")
    x, mask = batch(), Mask.random(len(LENGTHS), 40, 0.75)
    assert dense.config.pad == "attend" and dense.clips(LENGTHS) is None
    assert torch.equal(dense(x, mask, LENGTHS).loss, dense(x, mask).loss)
    assert type(dense.draw_mask(len(LENGTHS), lengths=LENGTHS)) is Mask


def test_frames_beyond_the_last_position_are_left_out():
    """Patches that overlap do not reach the end of a full clip: no more positions are asked for than there are."""
    model, dense = build("overlap", frames=164)
    x, mask = batch([164], frames=164), Mask.random(1, 75, 0.75)
    assert model.clips([164]).grids == (model.config.grid(),) == ((15, 5),)
    close(model(x, mask, [164]).pred, dense(x, mask).pred)


def test_a_batch_with_nothing_masked():
    model, _ = build("mae_ast_patch")
    out = model(batch([5, 9]), RaggedMask.everything([4, 4]), [5, 9])
    assert out.loss == 0 and out.pred.shape == (2, 0, 256)


def test_lengths_in_any_form():
    model, _ = build("window")
    x, mask = batch([70, 16]), model.draw_mask(2, lengths=[70, 16])
    losses = [model(x, mask, form([70, 16])).loss for form in (list, tuple, torch.tensor, np.array)]
    assert all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.parametrize("case", ["window", "global", "cross", "mae_ast_patch", "ssast_patch"])
def test_half_precision(case):
    """Autocast, and weights in bfloat16."""
    model, _ = build(case)
    x, mask = batch(), model.draw_mask(len(LENGTHS), lengths=LENGTHS)
    exact = model(x, mask, LENGTHS).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = copy.deepcopy(model).float()(x.float(), mask, LENGTHS)
    half = copy.deepcopy(model).bfloat16()(x.float(), mask, LENGTHS)
    for out in (mixed, half):
        out.loss.backward()
        assert out.loss.dtype == torch.float32 and abs(out.loss.item() / exact - 1) < 0.05


@pytest.mark.parametrize("case", ["window", "global", "cross", "mae_ast_patch"])
def test_recomputation_changes_nothing(case):
    results = []
    for recompute in ("none", "activations", "blocks"):
        model, _ = build(case, recompute=recompute)
        torch.manual_seed(3)
        _, result = step_together(model, batch(), None, LENGTHS)
        results.append(result)
    for result in results[1:]:
        for name, expected in results[0].items():
            close(result[name], expected)


# -- statistics and regularisation ---------------------------------------------------------------------------


def test_batch_statistics_are_those_of_valid_frames():
    model, dense = build("mae_ast_patch", input_norm="batch")
    x = batch(padding=float("nan"))
    norm, expected = model.spectrogram_norm.train(), nn.BatchNorm2d(1, affine=False).double().train()
    expected.load_state_dict(norm.state_dict())
    clips = model.clips(LENGTHS)
    valid = clips.valid(x)
    assert valid.shape == (sum(LENGTHS), 64)
    normalised = expected(valid[None, None])
    close(clips.valid(norm(x.nan_to_num(7.0), valid)), 0.5 * normalised[0, 0])
    for name, buffer in expected.named_buffers():
        close(getattr(norm, name), buffer)
    # The same statistics, the same result: those of the batch, given to clips alone.
    mask = model.draw_mask(len(LENGTHS), lengths=LENGTHS)
    running = SpectrogramNorm("running").double()
    running.running_mean.fill_(valid.mean()), running.running_var.fill_(valid.var(correction=0))
    dense.spectrogram_norm = running
    out = model.eval()(x, mask, LENGTHS)
    for i, clip in enumerate(alone(model, x, LENGTHS)):
        close(out.pred[i, : mask.masked[i]], dense.eval()(clip, row(mask, i)).pred[0], atol=1e-10)


def test_drop_path_is_drawn_for_each_clip():
    lengths = [3, 1, 7, 2] * 50
    layer, packed = DropPath(0.25).train(), Packed.of(lengths)
    clips = layer(torch.ones(sum(lengths), 3), packed).split(lengths)
    kept = [clip.unique().tolist() for clip in clips]
    assert all(len(values) == 1 for values in kept)
    dropped = sum(values == [0.0] for values in kept)
    assert abs(dropped / 200 - 0.25) < 5 * (0.25 * 0.75 / 200) ** 0.5
    model = audiomae.create_classifier("audiomae_base", 5, **SIZES, pad="exclude", drop_path=0.9).train()
    x = batch().float()
    prefix_only = model.encode(x, lengths=LENGTHS, layers=[1, 2])
    unchanged = (prefix_only[0] == prefix_only[1]).flatten(1).all(dim=1)
    assert unchanged.any()  # both branches of the second block dropped: p = 0.81 for each clip


# -- masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_each_clips_share(strategy):
    grids = [(4, 4), (10, 4), (4, 4), (7, 4)]
    mask = Mask.draw(strategy, 4, grids, 0.6, torch.Generator().manual_seed(3))
    again = Mask.draw(strategy, 4, grids, 0.6, torch.Generator().manual_seed(3))
    assert type(mask) is RaggedMask and mask.num_tokens == 40 and mask.tokens == (16, 40, 16, 28)
    assert torch.equal(mask.ids_keep, again.ids_keep)
    dense = mask.dense()
    for i, grid in enumerate(grids):
        tokens, one = grid[0] * grid[1], row(mask, i)
        both = torch.cat([one.ids_keep, one.ids_masked], dim=1).sort().values
        assert torch.equal(both, torch.arange(tokens)[None])
        assert (mask.ids_keep[i, mask.kept[i] :] == -1).all()
        assert (mask.ids_masked[i, mask.masked[i] :] == -1).all()
        assert torch.equal(dense[i, :tokens], one.dense()[0]) and not dense[i, tokens:].any()
        if strategy != "spans_upstream":  # which keeps what it happens to mark
            assert mask.kept[i] == Mask.draw(strategy, 1, grid, 0.6).ids_keep.shape[1]
    with pytest.raises(ValueError, match="a mask for 3 clips needs as many grids, got 4"):
        Mask.draw(strategy, 3, grids, 0.6)


def test_given_ragged_masks():
    mask = Mask.from_keep([torch.tensor([3, 0]), torch.tensor([1])], [5, 2])
    assert mask.kept == (2, 1) and mask.masked == (3, 1) and mask.tokens == (5, 2)
    assert mask.ids_keep.tolist() == [[3, 0], [1, -1]] and mask.ids_masked.tolist() == [
        [1, 2, 4],
        [0, -1, -1],
    ]
    leaves, spec = pytree.tree_flatten(mask)
    back = pytree.tree_unflatten(leaves, spec)
    assert type(back) is RaggedMask and (back.kept, back.masked, back.tokens) == (
        mask.kept,
        mask.masked,
        (5, 2),
    )
    moved = mask.to("meta")
    assert moved.ids_masked.is_meta and moved.kept == mask.kept
    for ids, tokens, error, message in (
        ([torch.tensor([5])], [5], ValueError, r"must lie in \[0, 5\)"),
        ([torch.tensor([0, 0])], [5], ValueError, "keeps one twice"),
        ([torch.tensor([0])], [5, 5], ValueError, "got 2 for 1 clip$"),
        ([], [], ValueError, "got 0 for 0 clips"),
        (torch.tensor([[0]]), [5], TypeError, "must be a sequence of int64 tensors"),
        ([[0]], [5], TypeError, "must be a sequence of int64 tensors"),
    ):
        with pytest.raises(error, match=message):
            Mask.from_keep(ids, tokens)


def test_packing():
    """Rows lie in the order of their length, and come back in their own."""
    config = audiomae.config.model_config("audiomae_base", **SIZES)
    clips = Clips.of([70, 16, 33], config, 10)
    assert clips.grids == ((5, 4), (1, 4), (3, 4)) and clips.spans == (80, 16, 48)
    mask = Mask.from_keep([torch.tensor(ids) for ids in ([7, 2], [0], [11, 1, 5])], clips.tokens)
    rows = Rows(clips, mask)
    assert rows.order == [1, 2, 0] and rows.grids == [(1, 4), (3, 4), (5, 4)]
    assert rows.ids_keep.tolist() == [[0, 4 + 11, 4 + 1, 4 + 5, 16 + 7, 16 + 2]]
    assert rows.patches_keep.tolist() == [[20, 24 + 11, 24 + 1, 24 + 5, 7, 2]]
    assert rows.unpack(torch.arange(1, 7), rows.kept).tolist() == [[5, 6, 0], [1, 0, 0], [2, 3, 4]]
    x = batch([70, 16, 33])
    joined = clips.join(x)
    assert joined.shape == (1, 144, 64) and torch.equal(joined[0, 80:96], x[1, :16])
    assert not joined[0, 70:80].any() and not joined[0, 96 + 33 :].any()


# -- errors --------------------------------------------------------------------------------------------------


def test_wrong_lengths_and_masks():
    model, dense = build("window")
    x = batch([70, 16])
    mask = model.draw_mask(2, lengths=[70, 16])
    with pytest.raises(
        ValueError, match=r"lengths must lie between 1 and the 160 frames given, got \[0, 16\]"
    ):
        model(x, lengths=[0, 16])
    with pytest.raises(ValueError, match="a mask for 3 clips needs as many lengths, got 2"):
        model.draw_mask(3, lengths=[70, 16])
    with pytest.raises(ValueError, match=r"lengths are on meta.*pass a list or a tensor on the CPU"):
        model.clips(torch.tensor([70, 16], device="meta"))
    with pytest.raises(
        ValueError, match=r"clips of \[20, 4\] tokens, but clips of \[16, 16\] frames have \[4, 4\]"
    ):
        model(x, mask, [16, 16])
    with pytest.raises(ValueError, match=r"clips of \[40, 40\] tokens.*draw_mask\(batch, lengths=...\)"):
        model(x, Mask.random(2, 40, 0.5), [70, 16])
    with pytest.raises(ValueError, match="clips of different lengths, which takes lengths"):
        dense(x, mask, [70, 16])
    with pytest.raises(ValueError, match="pad must be one of 'attend', 'exclude', got 'pack'"):
        audiomae.create_model("audiomae_base", pad="pack")


# -- tracing -------------------------------------------------------------------------------------------------


@pytest.mark.no_poison
@pytest.mark.parametrize("case", ["window", "cross", "mae_ast_patch", "ssast_patch"])
def test_steps_wait_for_nothing(case, monkeypatch):
    """Forward and backward on fake tensors: with lengths on the host, no value of a tensor is looked at."""
    monkeypatch.setattr(nn.init, "trunc_normal_", nn.init.normal_)  # which looks at what it drew
    name, options = CASES[case]
    with FakeTensorMode():
        model = audiomae.create_model(name, **SIZES | options, pad="exclude").train()
        out = model(torch.randn(len(LENGTHS), 160, 64), lengths=LENGTHS)
        out.loss.backward()
        with pytest.raises(DataDependentOutputException):
            model(torch.randn(2, 160, 64), lengths=torch.tensor([16, 32]))
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.no_poison
def test_one_graph_for_each_set_of_lengths():
    torch.compiler.reset()
    model, _ = build("window", decoder_depth=2)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager", dynamic=False)
    for lengths in ([70, 1, 160], [70, 16, 150]):
        x, losses = batch(lengths), []
        for each in (model, compiled):
            torch.manual_seed(5)
            losses.append(each(x, None, lengths).loss)
            losses[-1].backward()
        close(*losses, atol=1e-10)
    with pytest.raises(Exception, match="lengths must be a list"):
        compiled(x, None, torch.tensor(lengths))
