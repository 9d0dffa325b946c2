"""The training step as one graph, exported, and learning."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import audiomae
from audiomae.model import Dropout

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

ENCODER = {"width": 32, "heads": 2, "depth": 1, "frames": 64}
DECODER = {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 2, "global_blocks": 1}
CASES = {
    "window": ("audiomae_base", DECODER | {"decoder": "window"}),
    "hybrid": ("audiomae_base", DECODER | {"decoder": "hybrid"}),
    "global": ("audiomae_base", DECODER | {"decoder": "global"}),
    "overlap": ("audiomae_base", DECODER | {"stride": (10, 10)}),
    "mae_ast_patch": ("mae_ast_patch_base", DECODER),
    "mae_ast_frame": ("mae_ast_frame_base", DECODER),
    "ssast_patch": ("ssast_patch_base", {}),
    "ssast_frame": ("ssast_frame_base", {}),
    "ssast_two_passes": ("ssast_patch_base", {"passes": 2}),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def build(case, **overrides):
    name, sizes = CASES[case]
    return audiomae.create_model(name, **ENCODER | sizes | overrides)


def step(model, *inputs, seed=7):
    """Loss and gradients by name; the seed decides masks and dropouts."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(*inputs)
    out.loss.backward()
    grads = {name.removeprefix("_orig_mod."): p.grad.clone() for name, p in model.named_parameters()}
    return {"loss": out.loss.detach()} | grads


def assert_equal(actual, expected, rtol):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=rtol * scale + 1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


SLOW = ("overlap", "mae_ast_frame", "ssast_frame", "ssast_two_passes")
GRAPHS = [
    *(pytest.param(case, False, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES),
    *((case, True) for case in ("window", "mae_ast_patch", "ssast_patch")),
]


@pytest.mark.parametrize(("case", "given"), GRAPHS)
def test_one_graph(case, given, monkeypatch):
    """Forward and backward in training mode, dropouts on, masks drawn inside or given, as in eager mode."""
    monkeypatch.setattr(Dropout, "forward", nn.Dropout.forward)  # what compiled models draw
    model = build(case).double().train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    counters.clear()
    for seed in (1, 2):  # new data and a new mask need no new graph
        x = torch.randn(2, 64, 128, dtype=torch.float64)
        inputs = (x, model.draw_mask(2)) if given else (x,)
        assert_equal(step(compiled, *inputs, seed=seed), step(model, *inputs, seed=seed), rtol=1e-10)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_one_graph_of_a_classifier():
    model = audiomae.create_classifier("audiomae_base", 5, **ENCODER, mask_time=0.5, drop_path=0.1).double()
    compiled = torch.compile(copy.deepcopy(model).train(), fullgraph=True, backend="aot_eager")
    x, labels = torch.randn(2, 64, 128, dtype=torch.float64), torch.tensor([1, 3])
    inputs = (x, None, None, labels)
    assert_equal(step(compiled, *inputs), step(model.train(), *inputs), rtol=1e-10)


def test_one_graph_of_encode():
    model = build("window").double().eval()
    encode = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64, 128, dtype=torch.float64)
    mask = model.draw_mask(2)
    torch.testing.assert_close(encode(x, mask), model.encode(x, mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(encode(x, layers=[1])[0], model.encode(x, layers=[1])[0], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_inductor():
    """Twice eager's error against float64, and a few roundings of each tensor's largest value."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile for CPUs needs g++")
    model = build("window").eval()
    x, mask = torch.randn(2, 64, 128), model.draw_mask(2)
    expected = step(model, x, mask)
    exact = step(copy.deepcopy(model).double(), x.double(), mask)
    actual = step(torch.compile(copy.deepcopy(model), fullgraph=True), x, mask)
    assert set(actual) == set(exact)
    for name, truth in exact.items():
        scale = truth.abs().max()
        error, eager = ((t[name].double() - truth).abs().max() for t in (actual, expected))
        assert error <= 2 * eager + 8 * torch.finfo(torch.float32).eps * scale, name


@pytest.mark.parametrize("case", ["window", "mae_ast_patch", "ssast_patch"])
def test_export(case):
    model = build(case).eval()
    x, mask = torch.randn(2, 64, 128), model.draw_mask(2)
    exported = torch.export.export(model, (x, mask))
    out = exported.module()(x, mask)
    assert list(out) == list(model(x, mask))
    torch.testing.assert_close(out.loss, model(x, mask).loss)


@pytest.mark.parametrize("case", ["window", "global", "mae_ast_patch", "ssast_patch"])
def test_learns(case):
    """Twenty steps with fused AdamW on one batch, a new mask in each."""
    still = {"layer_drop": 0.0, "dropout": 0.0} if case.startswith("mae_ast") else {}
    model = build(case, **still).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    # Tones: smooth in time, so that masked patches follow from visible ones.
    x = torch.linspace(-2, 2, 128).sin().expand(4, 64, 128) + 0.1 * torch.randn(4, 64, 128)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(x).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    assert all(map(torch.isfinite, torch.tensor(losses))) and last < 0.9 * first
