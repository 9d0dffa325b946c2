"""Whole training steps on the device: precision, loss curves, graphs, determinism."""

import contextlib
import copy
from functools import partial

import pytest
import torch
from budget import compare
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm
from training import Calls, batches, eager, judge_curves, relative, still, tiny

NAMES = ("audiomae_base", "mae_ast_patch_base", "ssast_patch_base")
each_model = pytest.mark.parametrize("name", NAMES)
AUTOCAST = [
    pytest.param(None, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16 autocast"),
    pytest.param(torch.float16, id="float16 autocast"),
]


def batches_on(device, model, seed=0):
    return [(x.to(device), mask.to(device)) for x, mask in batches(model, seed)]


def make_optimizer(model, lr, **options):
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True, **options
    )


def train(model, data, lr=3e-3, autocast=None, optimizer=None, scaler=None):
    """Curves of loss and gradient norm (steps,), training in place; float16 with a gradient scaler."""
    device = data[0][0].device.type
    model.train()
    optimizer = optimizer or make_optimizer(model, lr)
    scaler = scaler or torch.amp.GradScaler(device, init_scale=2.0**10, enabled=autocast == torch.float16)
    losses, norms = [], []
    for spectrogram, mask in data:
        optimizer.zero_grad()
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = model(spectrogram.to(next(model.parameters()).dtype), mask).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(get_total_norm([p.grad for p in model.parameters()]))
        losses.append(loss.detach())
        scaler.step(optimizer)
        scaler.update()
    return {"loss": torch.stack(losses), "gradient norm": torch.stack(norms)}


@each_model
@pytest.mark.parametrize("autocast", AUTOCAST)
def test_loss_curve(name, autocast, device, impl):
    """Twenty steps: at most twice the error of plain PyTorch, both against float64, in the median of nine draws."""
    curves = []
    for seed in range(9):
        model = tiny(name, seed, impl=impl).to(device)
        data, twin = batches_on(device, model, seed), copy.deepcopy(model)
        with eager():
            exact = train(copy.deepcopy(model).double(), data)
            plain = train(twin, data, autocast=autocast)
        curves.append((train(model, data, autocast=autocast), plain, exact))
    judge_curves(curves)


@each_model
@pytest.mark.parametrize("autocast", AUTOCAST)
def test_the_step_takes_the_default_kernels(name, autocast, device, on_gpu):
    model = tiny(name).to(device)
    with Calls() as calls:
        train(model, batches_on(device, model)[:1], autocast=autocast)
    served = set().union(*calls.served.values())
    assert served == {"triton"} if on_gpu else served <= {"native", "reference"}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_overflow_in_float16_skips_the_step(device, impl):
    model = tiny("audiomae_base", impl=impl).to(device)
    data, before = batches_on(device, model)[:3], copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, 1e-3)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**60)
    norm = train(model, data[:1], autocast=torch.float16, optimizer=optimizer, scaler=scaler)["gradient norm"]
    assert not norm.isfinite().any()
    assert scaler.get_scale() == 2.0**59
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    scaler.update(2.0**10)
    curve = train(model, data[1:], autocast=torch.float16, optimizer=optimizer, scaler=scaler)
    assert curve["gradient norm"].isfinite().all() and scaler.get_scale() == 2.0**10
    assert not torch.equal(model.decoder.mask_token, before["decoder.mask_token"])


@each_model
@pytest.mark.parametrize("autocast", AUTOCAST[:2])
@pytest.mark.parametrize("attention, lr", [("math", 3e-3), ("default", 0.0)], ids=["training", "still"])
def test_step_as_a_graph(name, autocast, attention, lr, device, impl, captured, wait):
    """Forward, backward and AdamW captured once; replayed on other data and masks as the eager steps, to the bit.

    A graph holds the launches of the eager step: the same kernels and splits of matrix products, which PyTorch
    gives workspaces of one size. Only the default attention's backward pass may add in any order: with it the
    weights stay, and the losses tell of the forward pass.
    """
    model = tiny(name, impl=impl).to(device).train()
    twin, data = copy.deepcopy(model), batches_on(device, model)[:4]
    static_x, static_mask = copy.deepcopy(data[0])

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=False):
            loss = model(static_x, static_mask).loss
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    def fill(x, mask):
        static_x.copy_(x)
        static_mask.ids_keep.copy_(mask.ids_keep)
        static_mask.ids_masked.copy_(mask.ids_masked)

    optimizer, eager_optimizer = (
        make_optimizer(m, lr, capturable=device.type == "cuda") for m in (model, twin)
    )
    with sdpa_kernel(SDPBackend.MATH) if attention == "math" else contextlib.nullcontext():
        (loss,), replay = captured(partial(step, model, optimizer))
        wait()
        model.load_state_dict(twin.state_dict())
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
        losses, expected = [], []
        for batch in data:
            fill(*batch)
            replay()
            losses.append(loss.clone())
            expected.extend(step(twin, eager_optimizer))
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    for key, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@each_model
def test_nobody_waits_for_the_step(name, device, impl, no_waiting):
    """Masks drawn on the device, forward, backward, AdamW."""
    model = tiny(name, impl=impl).to(device).train()
    optimizer = make_optimizer(model, 1e-3)
    spectrogram = torch.randn(2, model.config.frames, model.config.mel_bins, device=device)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(spectrogram).loss
        loss.backward()
        optimizer.step()

    step()
    with no_waiting():
        step()


def test_nobody_waits_for_the_front_end(device, no_waiting):
    frontend = tiny("audiomae_small").config.frontend
    waveform = torch.randn(2, 32_000, device=device)
    first = frontend(waveform)
    with no_waiting():
        second = frontend(waveform)
    assert second.device == device
    assert torch.equal(first, second)


@each_model
@pytest.mark.parametrize("autocast", AUTOCAST[:2])
def test_two_steps_give_the_same_bits(name, autocast, device, impl):
    """Every gradient, with attention that is deterministic itself."""
    gradients = []
    for _ in range(2):
        model = tiny(name, impl=impl).to(device)
        with sdpa_kernel(SDPBackend.MATH):
            train(model, batches_on(device, model)[:1], lr=0.0, autocast=autocast)
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


@pytest.mark.no_poison
@each_model
def test_compiled_step(name, device, on_gpu, impl):
    """Twenty losses and gradient norms: at most twice the error of plain PyTorch, both against float64."""
    torch.compiler.reset()
    curves = []
    for seed in (0, 1):
        model = tiny(name, seed, impl=impl).to(device)
        data, twin = batches_on(device, model, seed), copy.deepcopy(model)
        with eager():
            exact = train(copy.deepcopy(model).double(), data, lr=0.0)
            plain = train(twin, data, lr=0.0)
        compiled = torch.compile(model, fullgraph=True, backend="inductor" if on_gpu else "eager")
        actual = train(compiled, data, lr=0.0)
        curves.append([relative(run, to=exact) for run in (actual, plain, exact)])
    compare(*zip(*curves, strict=True))


@pytest.mark.parametrize("autocast", AUTOCAST)
def test_published_size(autocast, device, on_gpu, impl):
    """One step of the whole model against the references', in a rehearsal of a shorter one."""
    sizes = {} if on_gpu else {"frames": 64, "depth": 1, "decoder_depth": 2}
    ours = still("audiomae_base", impl=impl, **sizes).to(device)
    reference = still("audiomae_base", impl="reference", **sizes).to(device)
    reference.load_state_dict(ours.state_dict())
    step = partial(train, data=batches_on(device, ours)[:1], lr=0.0)
    exact, actual = step(reference), step(ours, autocast=autocast)
    for key, rtol in {
        "loss": 1e-4 if autocast is None else 1e-2,
        "gradient norm": 1e-3 if autocast is None else 5e-2,
    }.items():
        torch.testing.assert_close(actual[key], exact[key], rtol=rtol, atol=0)
