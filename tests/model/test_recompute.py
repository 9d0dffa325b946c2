"""What is computed again in the backward pass changes memory and nothing else."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import audiomae
from audiomae.config import RECOMPUTE
from bench.memory import saved_bytes

SIZES = {"frames": 128, "width": 64, "depth": 2, "heads": 2}
DECODER = {"decoder_width": 64, "decoder_heads": 2, "decoder_depth": 2}
CASES = {
    "window": ("audiomae_base", {**DECODER}),
    "hybrid": ("audiomae_base", {**DECODER, "decoder": "hybrid", "global_blocks": 1}),
    "global": ("audiomae_base", {**DECODER, "decoder": "global"}),
    "mae_ast": ("mae_ast_patch_base", {**DECODER}),
    "ssast": ("ssast_patch_base", {}),
}


def step(case, recompute, autocast=False):
    """(loss and gradients by name, bytes kept for the backward pass, FLOPs of the step)."""
    name, options = CASES[case]
    torch.manual_seed(0)
    model = audiomae.create_model(name, **SIZES, **options, recompute=recompute).train()
    spectrogram = torch.randn(2, 128, 128)
    mask = model.draw_mask(2)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(spectrogram, mask).loss

    torch.manual_seed(1)  # decides the dropouts
    with FlopCounterMode(display=False) as flops:
        saved, loss = saved_bytes(forward, model.parameters())
        loss.backward()
    result = {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}
    return result, saved, flops.get_total_flops()


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_same_numbers_with_less_memory(case, autocast):
    runs = {recompute: step(case, recompute, autocast) for recompute in RECOMPUTE}
    expected = runs["none"][0]
    for recompute, (result, _, _) in runs.items():
        for name, value in expected.items():
            assert torch.equal(result[name], value), (recompute, name)
    none, activations, blocks = (runs[recompute][1] for recompute in ("none", "activations", "blocks"))
    assert blocks < activations < none


@pytest.mark.parametrize("case", CASES)
def test_activations_cost_no_product_with_weights(case):
    assert step(case, "activations")[2] == step(case, "none")[2] < step(case, "blocks")[2]


def test_masked_tokens_alone_leave_the_last_attention():
    """The last decoder block's projection and MLP run over the masked tokens, as the FLOP counter sees it."""
    model = audiomae.create_model("mae_ast_patch_base", **SIZES, **DECODER).eval()
    mask = model.draw_mask(1)
    with FlopCounterMode(display=False) as flops:
        model(torch.randn(1, 128, 128), mask)
    counts = flops.get_flop_counts()
    inner, last = (sum(counts[f"MaskedAutoencoder.decoder.blocks.{i}.mlp.fc1"].values()) for i in range(2))
    assert last == inner * mask.ids_masked.shape[1] / mask.num_tokens


def test_unknown_recompute_is_refused():
    with pytest.raises(
        ValueError, match="recompute must be one of 'none', 'activations', 'blocks', got 'all'"
    ):
        audiomae.create_model("audiomae_base", recompute="all")
