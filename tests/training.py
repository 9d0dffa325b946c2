"""Twenty training steps, the error budget of their curves, and a record of the kernels that ran."""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from kernel_cases import REFERENCES
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import audiomae
from audiomae import Mask, model, ssast
from audiomae.attention import attention
from audiomae.config import MODELS

STEPS = 20
RATES = ("dropout", "attention_dropout", "input_dropout", "layer_drop", "bias_dropout")
# A grid of 8 x 4 tokens: windows of 4 x 4, the second decoder block's shifted, and heads of 32 as in the published
# decoder, which the kernels have paths of their own for.
TINY = {"width": 32, "heads": 2, "depth": 1, "frames": 128, "mel_bins": 64}
TINY |= {"decoder_width": 64, "decoder_heads": 2, "decoder_depth": 2}
_COMMON = {"patch_gather", "unshuffle", "unshuffle_backward", "masked_mse", "masked_mse_backward"}
_ATTENTION = {"attention", "attention_backward"}  # native only: elsewhere attention is PyTorch's
STEP_OPS = {  # of one training step
    "audiomae_base": _COMMON | {"window_attention", "window_attention_backward"},
    "mae_ast_patch_base": _COMMON | {"info_nce", "info_nce_backward"},
    "ssast_patch_base": _COMMON | {"info_nce", "info_nce_backward"},
}
NATIVE_STEP_OPS = {name: ops | _ATTENTION for name, ops in STEP_OPS.items()}


class Calls(TorchDispatchMode):
    """Notes what is called.

    Attributes:
        served: the implementations that serve each op, ``{"unshuffle_backward": {"native"}, ...}``.
        devices: types of the devices that hold a result of any operation of PyTorch.
    """

    def __init__(self):
        super().__init__()
        self.served, self.devices = defaultdict(set), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "audiomae":
            self.served[func._opname].add(kwargs["impl"])
        self.devices |= {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
        return result


def still(name: str, seed: int = 0, **overrides) -> nn.Module:
    """A named model whose steps draw nothing but masks: no dropout of any kind."""
    torch.manual_seed(seed)
    return audiomae.create_model(name, **_fields_of(name, dict.fromkeys(RATES, 0.0)), **overrides)


def tiny(name: str, seed: int = 0, **overrides) -> nn.Module:
    return still(name, seed, **_fields_of(name, TINY) | overrides)


def _fields_of(name: str, values: dict) -> dict:
    fields = {field.name for field in dataclasses.fields(MODELS[name])}
    return {key: value for key, value in values.items() if key in fields}


def batches(of: nn.Module, seed: int = 0, size: int = 2) -> Iterator[tuple[Tensor, Mask]]:
    """Twenty batches with their masks: a spectrum that stays the same in time, and noise."""
    c, generator = of.config, torch.Generator().manual_seed(seed)
    tones = torch.linspace(-2, 2, c.mel_bins).sin()
    for _ in range(STEPS):
        noise = 0.1 * torch.randn(size, c.frames, c.mel_bins, generator=generator)
        yield tones + noise, of.draw_mask(size, generator=generator)


def train(network: nn.Module, data, lr: float, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Trains in place; the loss and the norm of the gradient before each step of AdamW, (steps,) each."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    losses, norms = [], []
    for spectrogram, mask in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = network(spectrogram.to(network.encoder.patch_embed.weight.dtype), mask).loss
        loss.backward()
        losses.append(loss.detach())
        norms.append(get_total_norm([p.grad for p in network.parameters()]))
        optimizer.step()
    # AdamW takes no notice of gradients that are too large by a constant, so that the losses would not show it.
    return {"loss": torch.stack(losses), "gradient norm": torch.stack(norms)}


@contextlib.contextmanager
def eager():
    """Models are plain PyTorch inside: no ops, SDPA, and autocast chooses the dtypes."""

    def sdpa(qkv, *, backend, **options):
        return attention(qkv, **options, backend="sdpa")

    def plain(op):
        def function(x, *tensors, impl, **options):
            if op == "window_attention" and x.dim() == 3:
                x = x.unflatten(2, (3, tensors[0].shape[0], -1))
            return REFERENCES[op](x, *tensors, **options, upcast=False)

        return function

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(model, "attention", sdpa))
        for module in (model, ssast):
            plain_ops = {op: plain(op) for op in REFERENCES if op != "attention" and hasattr(module, op)}
            stack.enter_context(mock.patch.multiple(module, **plain_ops))
        yield


def assert_curves_within_budget(
    build: Callable[..., nn.Module],
    impl: str | None,
    lr: float,
    autocast: torch.dtype | None = None,
    draws: int = 1,
) -> None:
    """Training ``build(seed=..., impl=impl)``: twice the error of plain PyTorch, and one rounding more.

    The error is the relative distance of a curve, in float32 or under `autocast`, from that of the same model all in
    float64: its root mean square over the steps. Each of the `draws` (of weights, data and masks) is judged by
    itself, and the median of them decides. For training amplifies the first roundings, by a factor that the steps of
    a draw share and that differs a hundredfold between draws: a mean over steps and draws would be one draw's error.
    """
    triples = []
    for seed in range(draws):
        data = list(batches(build(seed=seed), seed))
        actual = train(build(seed=seed, impl=impl), data, lr, autocast)
        with eager():
            plain = train(build(seed=seed), data, lr, autocast)
            exact = train(build(seed=seed).double(), data, lr)
        triples.append((actual, plain, exact))
    judge_curves(triples)


def judge_curves(draws: Sequence[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]]) -> None:
    """(ours, plain PyTorch's, float64's) curves by name, of several draws; see `assert_curves_within_budget`."""
    judged = defaultdict(list)
    for actual, plain, exact in draws:
        loss = exact["loss"]
        assert loss[-4:].mean() < 0.9 * loss[:4].mean(), f"the curve hardly moves: {loss}"
        for name, truth in exact.items():
            assert actual[name].isfinite().all(), f"{name}: {actual[name]}"
            error, plain_error = (
                (run[name] / truth - 1).square().mean().sqrt().item() for run in (actual, plain)
            )
            budget = 2 * plain_error + torch.finfo(actual[name].dtype).eps
            judged[name].append((error / budget, error, plain_error, budget))
    over = []
    for name, figures in judged.items():
        share, error, plain_error, budget = sorted(figures)[len(draws) // 2]
        if share > 1:
            over.append(f"{name}: error {error:.3g}, eager error {plain_error:.3g}, budget {budget:.3g}")
    assert not over, "; ".join(over)


def relative(run: dict[str, Tensor], to: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (curve / to[name]).to(curve.dtype) for name, curve in run.items()}
