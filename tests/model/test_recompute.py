"""What is computed again in the backward pass changes memory and nothing else."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import audiomae
from audiomae.config import RECOMPUTE
from audiomae.recompute import again
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


def small(recompute="activations"):
    name, options = CASES["mae_ast"]
    still = {"dropout": 0.0, "attention_dropout": 0.0, "input_dropout": 0.0, "layer_drop": 0.0}
    model = audiomae.create_model(name, **SIZES, **options, **still, recompute=recompute).train()
    return model, torch.randn(2, 128, 128)


def test_parameters_that_were_exchanged_are_an_error():
    """torch.func.functional_call: they are back in their place when the backward pass computes again."""
    model, x = small()
    mask = model.draw_mask(2)
    others = {n: (2 * p.detach()).requires_grad_() for n, p in model.named_parameters()}
    loss = torch.func.functional_call(model, others, (x, mask)).loss
    with pytest.raises(RuntimeError, match='choose recompute="none"'):
        loss.backward()


def test_parameters_that_were_changed_are_an_error():
    x = torch.randn(3, 8, requires_grad=True)
    norm, layer = torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)
    y = again(lambda x: layer(norm(x)), x, norm, layer)
    with torch.no_grad():
        norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed or exchanged"):
        y.sum().backward()


def test_an_input_changed_in_place_is_an_error():
    x = torch.randn(3, 8, requires_grad=True)
    y = x * 1
    z = again(lambda y: y.sigmoid().exp(), y)
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_hooks_of_others_see_the_input_alone(grad):
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(3, 8, requires_grad=grad)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
        y = again(lambda x: ((x @ weight).sigmoid() @ weight).exp(), x)
    assert seen == [x.data_ptr()]
    y.sum().backward()
    again_grad, weight.grad = weight.grad, None
    (((x @ weight).sigmoid() @ weight).exp()).sum().backward()
    assert torch.equal(weight.grad, again_grad)
