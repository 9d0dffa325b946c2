"""Options that make pre-training faster and are not the published models: what they decode, and that they say so."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import audiomae
from audiomae import Mask

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"width": 32, "heads": 2, "depth": 3, "frames": 160, "mel_bins": 64}
DECODER = {"decoder_width": 24, "decoder_heads": 2, "decoder_depth": 2, "bias_dropout": 0.0}
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "layer_drop": 0.0}
CROSS = {
    "audiomae_base": DECODER | {"decoder": "cross"},
    "mae_ast_patch_base": DECODER | STILL | {"decoder": "cross", "input_norm": "running"},
}


def build(name="audiomae_base", **overrides):
    torch.manual_seed(1)
    model = audiomae.create_model(name, **SIZES | overrides).double()
    for name, parameter in model.named_parameters():  # no zeros: every part of the model counts
        if parameter.ndim < 2 and not name.endswith("tau"):
            nn.init.normal_(parameter, std=0.1)
    return model


def twin(model, name="audiomae_base", **overrides):
    """The same weights in a model of another configuration."""
    other = audiomae.create_model(name, **SIZES | overrides).double()
    other.load_state_dict(model.state_dict())
    return other.eval()


def spectrogram(batch=2, frames=160):
    return torch.randn(batch, frames, 64, dtype=torch.float64)


def close(actual, expected, atol=1e-11):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def pick(pred, mask, ids):
    """Predictions (R, M, V) of all masked tokens -> those of `ids` (R, M')."""
    places = (mask.ids_masked[:, None, :] == ids[:, :, None]).to(torch.uint8).argmax(dim=2)
    return pred.gather(1, places[:, :, None].expand(-1, -1, pred.shape[2]))


def mean_square(pred, x, ids, normalize):
    """Of the tokens whose id is not -1, from an unfolded spectrogram."""
    patches = nn.functional.unfold(x[:, None], 16, stride=16).mT[
        torch.arange(len(ids))[:, None], ids.clamp(min=0)
    ]
    if normalize:
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (pred - patches).square()[ids >= 0].mean()


def assert_every_parameter_learns(model, loss):
    loss.backward()
    without = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert not without


# -- cross ---------------------------------------------------------------------------------------------------


def slow_cross(model, x, mask):
    """Fu et al. 2024, section 3, token by token."""
    c, d = model.config, model.decoder
    features = list(model.encode(x, mask, layers=range(1, c.depth + 1)))
    features[-1] = model.encode(x, mask)
    positions = d.positions.table[0, 1:]
    rows = []
    for r, ids in enumerate(mask.ids_masked):
        decoded = []
        for token in ids:
            y = d.mask_token[0, 0] + positions[token]
            for j, block in enumerate(d.blocks):
                memory = d.memory_norms[j](sum(w * f[r] for w, f in zip(d.mix[j], features, strict=True)))
                k, v = block.attn.kv(memory).chunk(2, dim=1)
                q = block.attn.q(block.norm1(y))
                heads = []
                for h in range(2):
                    part = slice(12 * h, 12 * h + 12)
                    weights = (k[:, part] @ q[part] / 12**0.5).softmax(0)
                    heads.append(weights @ v[:, part])
                y = y + block.attn.proj(torch.cat(heads))
                y = y + block.mlp(block.norm2(y))
            decoded.append(d.norm(y))
        rows.append(torch.stack(decoded))
    return model.reconstruction_head(torch.stack(rows))


def test_cross_decoder_is_the_papers():
    model, x = build(**CROSS["audiomae_base"]).eval(), spectrogram()
    mask = model.draw_mask(2)
    out = model(x, mask)
    close(out.pred, slow_cross(model, x, mask))
    close(out.loss, mean_square(out.pred, x, mask.ids_masked, normalize=True))
    assert list(out) == ["loss", "losses", "pred", "mask"] and out.mask is mask
    assert not any(isinstance(m, audiomae.model.GlobalAttention) for m in model.decoder.modules())


def test_inter_block_weights_are_drawn_with_variance_of_one_over_depth():
    mix = audiomae.create_model("audiomae_small", decoder="cross", decoder_depth=200).decoder.mix
    assert mix.shape == (200, 12) and abs(mix.std().item() * 12**0.5 - 1) < 5 / (2 * mix.numel()) ** 0.5


@pytest.mark.parametrize("name", CROSS)
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_cross_trains(name, ratio):
    model = build(name, **CROSS[name], decode_ratio=ratio).train()
    assert_every_parameter_learns(model, model(spectrogram()).loss)


@pytest.mark.parametrize("name", CROSS)
def test_a_share_of_the_masked_tokens(name):
    """Decoded tokens know nothing of each other: predictions are those of the full decoder."""
    some = build(name, **CROSS[name], decode_ratio=0.3).eval()
    full, x = twin(some, name, **CROSS[name]), spectrogram()
    mask = some.draw_mask(2)
    out, all_ = some(x, mask), full(x, mask)
    masked = mask.ids_masked.shape[1]
    assert out.mask is mask and out.ids_decoded.shape == (2, int(0.3 * masked)) and "ids_decoded" not in all_
    assert (out.ids_decoded.diff(dim=1) > 0).all() and mask.dense().gather(1, out.ids_decoded).all()
    close(out.pred, pick(all_.pred, mask, out.ids_decoded))
    close(
        out.losses["reconstruction"],
        mean_square(out.pred, some.normalise(x, None), out.ids_decoded, some.config.normalize_target),
    )
    assert not torch.equal(out.ids_decoded[0], out.ids_decoded[1])
    drawn = torch.cat([some(x, mask).ids_decoded[0] for _ in range(60)]).unique()
    assert torch.equal(drawn, mask.ids_masked[0])  # a token is never drawn with probability 0.7 ** 60


def test_one_masked_token_is_decoded_and_none_is_none():
    model, x = build(**CROSS["audiomae_base"], decode_ratio=0.01).eval(), spectrogram()
    assert model(x).ids_decoded.shape == (2, 1)
    out = model(x, Mask.from_keep(torch.arange(40).repeat(2, 1), 40))
    assert out.ids_decoded.shape == (2, 0) and out.loss == 0


@pytest.mark.parametrize("name", CROSS)
def test_a_share_of_ragged_clips(name):
    lengths = [70, 1, 160]
    some = build(name, **CROSS[name], decode_ratio=0.3, pad="exclude").eval()
    full, x = twin(some, name, **CROSS[name], pad="exclude"), spectrogram(3)
    mask = some.draw_mask(3, lengths=lengths)
    out, all_ = some(x, mask, lengths), full(x, mask, lengths)
    assert out.mask is mask and out.pred.shape[:2] == out.ids_decoded.shape
    counts = (out.ids_decoded >= 0).sum(dim=1).tolist()
    assert counts == [max(1, int(0.3 * n)) for n in mask.masked]
    for i, n in enumerate(counts):
        own = Mask(mask.ids_keep[i : i + 1], mask.ids_masked[i : i + 1], 0)
        close(out.pred[i : i + 1, :n], pick(all_.pred[i : i + 1], own, out.ids_decoded[i : i + 1, :n]))
        assert not out.pred[i, n:].any() and (out.ids_decoded[i, n:] == -1).all()


# -- windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_a_share_of_the_windows(depth):
    """As in the full decoder, but for the tokens next to the span's ends, whose shifted windows differ."""
    options = DECODER | {"decoder_depth": depth, "frames": 512}
    some, x = build(**options, decode_ratio=0.5).eval(), spectrogram(3, 512)
    full, mask = twin(some, **options), some.draw_mask(3)
    span = some.decoder.draw_span(mask, (32, 4))
    assert span.grid == (16, 4) and (span.ids[:, 0] % 16 == 0).all()
    out, all_ = some(x, mask), full(x, mask)
    assert out.mask is mask and out.ids_decoded.shape == (3, 64) == out.pred.shape[:2]
    close(out.loss, mean_square(out.pred, x, out.ids_decoded, normalize=True))
    equal = ((out.pred - pick(all_.pred, mask, out.ids_decoded)).abs() < 1e-11).all(dim=2)
    for ids, same, pred in zip(out.ids_decoded, equal, out.pred, strict=True):
        n = int((ids >= 0).sum())
        assert (ids[:n].diff() > 0).all() and (ids[n:] == -1).all() and not pred[n:].any()
        steps = ids[:n] // 4 - ids[0] // 4 // 4 * 4
        assert steps.min() >= 0 and steps.max() < 16
        inside = (steps >= 2) & (steps < 14) if depth == 2 else torch.ones_like(steps, dtype=torch.bool)
        assert same[:n][inside].all() and inside.any()
        assert depth == 1 or not same[:n][~inside].all()


def test_where_spans_begin():
    """Everywhere on the grid of windows, and at the end where windows do not tile the clip."""
    model = build(**DECODER, decode_ratio=0.4)
    spans = model.decoder.draw_span(model.draw_mask(400), (10, 4))
    assert spans.grid == (4, 4)
    assert (spans.ids[:, 0] // 4).unique().tolist() == [0, 4, 6]
    assert torch.equal(spans.ids - spans.ids[:, :1], torch.arange(16).expand(400, -1))
    short = model.decoder.draw_span(Mask.random(2, 12, 0.5), (3, 4))
    assert short.grid == (3, 4) and torch.equal(short.ids, torch.arange(12).expand(2, -1))


def test_a_share_of_the_windows_trains():
    model = build(**DECODER, decode_ratio=0.4, masks_per_clip=2).train()
    out = model(spectrogram(3))
    assert out.ids_decoded.shape == (6, 16)
    assert_every_parameter_learns(model, out.loss)


def test_clips_without_a_masked_token_in_their_windows():
    model, x = build(**DECODER, decode_ratio=0.4).eval(), spectrogram()
    out = model(x, Mask.from_keep(torch.arange(40).repeat(2, 1), 40))
    assert out.loss == 0 and out.pred.shape == (2, 0, 256)
    keep = torch.arange(39).repeat(2, 1)  # only the last token is masked, which few spans hold
    outs = [model(x, Mask.from_keep(keep, 40)) for _ in range(20)]
    assert all(out.loss.isfinite() for out in outs) and any(out.loss == 0 for out in outs)


# -- several masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["audiomae_base", "mae_ast_patch_base", "ssast_patch_base"])
def test_masks_per_clip(name):
    """Three masks of each clip in one call: the mean of three calls, gradients too."""
    options = {} if name.startswith("ssast") else DECODER
    options = options | (STILL | {"input_norm": "running"} if name.startswith("mae_ast") else {})
    model, x = build(name, **options, masks_per_clip=3).train(), spectrogram()
    mask = model.draw_mask(2)
    assert mask.ids_keep.shape[0] == 6 and not torch.equal(mask.ids_keep[0], mask.ids_keep[1])
    assert model(x).pred.shape[0] == 6
    model.zero_grad()
    out = model(x, mask)
    out.loss.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for i in range(3):
        one = model(x, Mask(mask.ids_keep[i::3], mask.ids_masked[i::3], mask.num_tokens))
        close(out.pred[i::3], one.pred, atol=1e-10)
        (one.loss / 3).backward()
    for n, p in model.named_parameters():
        close(together[n], p.grad, atol=1e-10 * max(1.0, p.grad.abs().max().item()))


# -- said in the open ----------------------------------------------------------------------------------------


def test_published_code_is_not_claimed():
    cross, windows = build(**CROSS["audiomae_base"]), build(**DECODER, decode_ratio=0.5)
    with pytest.raises(ValueError, match='no published form of a audiomae with decoder="cross"'):
        audiomae.to_upstream(cross)
    with pytest.raises(
        ValueError, match=r"trained with decode_ratio=0\.5, which is not how the published one"
    ):
        audiomae.to_upstream(windows)
    # Published weights can be trained on in this way.
    published = audiomae.to_upstream(twin(windows, **DECODER))
    assert audiomae.from_upstream(published, heads=2, decode_ratio=0.5).config.decode_ratio == 0.5
    assert audiomae.to_upstream(build(**DECODER, masks_per_clip=2))


def test_saved_and_loaded(tmp_path):
    model, x = build(**CROSS["audiomae_base"], decode_ratio=0.5).eval(), spectrogram()
    model.save_pretrained(tmp_path)
    other = audiomae.load(tmp_path).eval()
    assert other.config == model.config
    torch.manual_seed(0)
    out = model(x)
    torch.manual_seed(0)
    assert torch.equal(other(x).loss, out.loss)
    sizes = {key: SIZES[key] for key in ("width", "heads", "depth", "mel_bins")}
    clf = audiomae.create_classifier("audiomae_base", 3, frames=160, pretrained=tmp_path, **sizes)
    close(
        clf.double().encode(x, layers=[2])[0], model.encode(x, layers=[2])[0], atol=1e-5
    )  # by way of float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode_ratio": 0.0}, r"decode_ratio must lie in \(0, 1\], got 0.0"),
        ({"decode_ratio": 1.5}, r"decode_ratio must lie in \(0, 1\], got 1.5"),
        ({"decode_ratio": "half"}, r"decode_ratio must lie in \(0, 1\], got 'half'"),
        ({"decode_ratio": 0.5, "decoder": "global"}, 'needs decoder="cross" or "window": in a \'global\''),
        ({"decode_ratio": 0.5, "decoder": "hybrid"}, "every token attends to every other"),
        ({"decode_ratio": 0.5, "info_nce_weight": 1.0}, "does not go with info_nce_weight=1.0"),
        ({"decode_ratio": 0.5, "pad": "exclude"}, "does not go with pad='exclude'"),
        ({"masks_per_clip": 0}, "masks_per_clip must be a positive integer, got 0"),
        ({"masks_per_clip": 2, "masking": "random_shared"}, "draws one mask for the whole batch"),
    ],
    ids=str,
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        audiomae.create_model("audiomae_base", **options)


# -- tracing -------------------------------------------------------------------------------------------------

TRACED = {
    "cross": ("audiomae_base", CROSS["audiomae_base"] | {"decode_ratio": 0.5}),
    "mae_ast_cross": ("mae_ast_patch_base", CROSS["mae_ast_patch_base"]),
    "windows": ("audiomae_base", DECODER | {"decode_ratio": 0.5, "masks_per_clip": 2}),
}


@pytest.mark.no_poison
@pytest.mark.parametrize("case", TRACED)
def test_steps_wait_for_nothing(case, monkeypatch):
    """Forward, backward and AdamW on fake tensors, which have no values to look at."""
    monkeypatch.setattr(nn.init, "trunc_normal_", nn.init.normal_)  # which looks at what it drew
    name, options = TRACED[case]
    with FakeTensorMode():
        model = audiomae.create_model(name, **SIZES | options).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.randn(2, 160, 64)).loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.no_poison
@pytest.mark.parametrize("case", TRACED)
def test_one_graph(case):
    torch.compiler.reset()
    name, options = TRACED[case]
    model = build(name, **options).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x, losses = spectrogram(), []
    for each in (model, compiled):
        torch.manual_seed(5)
        losses.append(each(x).loss)
        losses[-1].backward()
    close(*losses, atol=1e-10)
