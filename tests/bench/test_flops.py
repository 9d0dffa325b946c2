"""The cost model against the figures derived in the papers' terms (GFLOP of one clip's forward pass)."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import audiomae
from audiomae import Mask
from audiomae.config import DECODERS, model_config
from audiomae.pretrained import build as build_model
from bench import plain
from bench.data import visible_tokens
from bench.flops import cost
from bench.registry import MODELS, Case, Point, cases


def gflops(name, part, kept, **overrides):
    return cost(model_config(name, **overrides), kept, 1024).parts[part].flops / 1e9


def test_published_sizes():
    assert gflops("ssast_patch_base", "encoder", 112) == pytest.approx(97.1, abs=0.06)
    assert gflops("ssast_patch_base", "encoder", 112, passes=2) == pytest.approx(2 * 97.1, abs=0.12)
    mae_ast = gflops("mae_ast_patch_base", "encoder", 128) + gflops("mae_ast_patch_base", "decoder", 128)
    assert mae_ast == pytest.approx(38.5, abs=0.06)
    assert gflops("audiomae_base", "encoder", 102) == pytest.approx(17.9, abs=0.06)
    assert gflops("audiomae_base", "decoder", 102) == pytest.approx(51.8, abs=0.06)
    assert gflops("audiomae_base", "decoder", 102, decoder="global") == pytest.approx(30.1, abs=0.06)


def test_kept_tokens_are_the_published_ones():
    kept = {
        case.model: case.kept for case in cases(["audiomae_base", "mae_ast_patch_base"], ["fp32"], Point(1))
    }
    assert kept == {"audiomae_base": 102, "mae_ast_patch_base": 128}
    assert Case("ssast_patch_base", "plain", "fp32", 1).kept == 112


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_cross_decoder_against_a_count_of_what_runs(ratio):
    sizes = {"width": 64, "heads": 2, "depth": 3, "decoder_width": 32, "decoder_heads": 2, "decoder_depth": 2}
    model = audiomae.create_model(
        "audiomae_base", **sizes, decoder="cross", decode_ratio=ratio, frames=128, impl="reference"
    )
    mask = model.draw_mask(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 128, 128), mask)
    expected = cost(model.config, mask.ids_keep.shape[1], 128)
    assert counter.get_total_flops() == pytest.approx(expected.flops, rel=1e-9)


def test_a_share_of_the_windows_has_no_cost_model():
    with pytest.raises(ValueError, match="the cost model knows no share of the windows"):
        cost(model_config("audiomae_base", decode_ratio=0.5), 102, 1024)


def test_against_a_count_of_what_runs():
    """SSAST's baseline runs what the cost model says, and embeds the masked tokens too."""
    case = Case("ssast_patch_tiny", "plain", "fp32", 1, frames=128)
    config = case.config()
    model = plain.SSAST(frames=128, width=config.width, depth=config.depth, heads=config.heads)
    # the counter knows attention by its products, not by the CPU's fused kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 128, 128), visible_tokens(1, 64, case.kept))
    masked = case.num_tokens - case.kept
    extra = 2 * masked * 256 * config.width  # masked tokens are embedded, then replaced
    logits = 2 * masked * masked * 256  # InfoNCE is no part of the cost model
    assert counter.get_total_flops() == pytest.approx(case.cost().flops + extra + logits, rel=1e-9)


def counted(case, function):
    """Matrix products of a forward pass, as PyTorch's counter sees them."""
    torch.manual_seed(0)
    model = build_model(case.config()).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        function(model, torch.randn(1, case.frames, 128))
    return counter.get_total_flops()


SMALL = {"width": 64, "depth": 2, "heads": 2}
DECODER = {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 3}


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name.startswith("audiomae_base") or "frame_base" in name]
)
def test_encoders_against_a_count(name):
    """Embeddings of every token, frame tokens and patches: the cost model is what runs."""
    sizes = SMALL | ({} if name.startswith("ssast") else DECODER | {"global_blocks": 1})
    case = Case(
        name, "ours", "fp32", 1, frames=128, mode="embeddings", overrides=sizes | {"impl": "reference"}
    )
    flops = counted(case, lambda model, x: model.encode(x))
    assert flops == pytest.approx(case.cost().flops, rel=1e-9)


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d in ("global", "cross")])
def test_decoders_against_a_count(decoder):
    """The library's step computes what `least` counts. Window attention is an op, whose inside the counter misses."""
    sizes = SMALL | DECODER | {"decoder": decoder, "impl": "reference"}
    case = Case("audiomae_base", "ours", "fp32", 1, frames=128, mode="inference", overrides=sizes)
    mask = Mask.from_keep(visible_tokens(1, case.num_tokens, case.kept), case.num_tokens)
    flops = counted(case, lambda model, x: model(x, mask))
    assert flops == pytest.approx(case.least().flops, rel=1e-9)


def test_hybrid_is_window_blocks_and_global_ones():
    def part(decoder, depth):
        config = model_config("audiomae_base", decoder=decoder, decoder_depth=depth, prefix_tokens=0)
        return cost(config, 102, 1024).parts["decoder"].flops

    assert part("hybrid", 12) == part("window", 8) + part("global", 4)


def test_the_tail_that_nobody_reads():
    """3.5 % of MAE-AST's products and 0.7 % of Audio-MAE's."""
    for model, share in (("mae_ast_patch_base", 0.035), ("audiomae_base", 0.007)):
        case = Case(model, "ours", "fp32", 1)
        assert 1 - case.least().flops / case.cost().flops == pytest.approx(share, abs=1e-3)
