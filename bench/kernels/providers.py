"""Who computes an op. A provider is a function (case, device) -> the op as a function of its tensors, by name.

One that does not serve a case raises `Unable` with the reason, which the report lists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import audiomae_kernels as ak
import torch
from audiomae_kernels.window_attention.reference import BORDER, window_index
from torch import Tensor
from torch.nn import functional

from ..registry import DTYPES
from ..timing import ProviderError
from .cases import OPS, Case

Function = Callable[..., Tensor]


class Unable(ProviderError):
    """A provider that cannot serve a case here; the message says why."""


def eager(case: Case, device: torch.device) -> Function:
    """The reference as it stands, in the dtype of the inputs."""
    return case.reference(upcast=False)


def compiled(case: Case, device: torch.device) -> Function:
    """`torch.compile` of the eager reference, specialised on the shapes."""
    return torch.compile(case.reference(upcast=False), fullgraph=True, dynamic=False)


def _ours(impl: str, case: Case, device: torch.device) -> Function:
    if impl == "triton" and device.type == "cpu":
        raise Unable("Triton's kernels run on a GPU; times from its interpreter would say nothing.")
    for served in ak.implementations(case.op, device, DTYPES[case.dtype]):
        if served.name == impl and not served.available:
            raise Unable(served.reason)
    return partial(getattr(ak, case.op), **case.shape.options, impl=impl)


def _require_gpu(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise Unable(f"{name} serves GPUs only.")


# --- window attention by general attention --------------------------------------------------------


def _partition(x: Tensor, case: Case) -> Tensor:
    """(B, L, S, H, d) -> (S, B, windows, N, H, d): roll and partition."""
    (T, F), (wt, wf), shift = (case.shape.options[name] for name in ("grid", "window", "shift"))
    B, _, S, H, d = x.shape
    x = x.view(B, T, F, S, H, d)
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    x = x.view(B, T // wt, wt, F // wf, wf, S, H, d).permute(5, 0, 1, 3, 2, 4, 6, 7)
    return x.reshape(S, B, T // wt * (F // wf), wt * wf, H, d)


def _reverse(x: Tensor, case: Case) -> Tensor:
    """(B, windows, N, H, d) -> (B, L, H * d): the inverse of `_partition`."""
    (T, F), (wt, wf), shift = (case.shape.options[name] for name in ("grid", "window", "shift"))
    B, _, _, H, d = x.shape
    x = x.reshape(B, T // wt, F // wf, wt, wf, H * d).transpose(2, 3).reshape(B, T, F, H * d)
    if any(shift):
        x = x.roll(shift, (1, 2))
    return x.view(B, T * F, H * d)


def _unit(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Vectors of the length `scale`, rounded once."""
    return (functional.normalize(x.float(), dim=-1, eps=1e-6) * scale).to(x.dtype)


def _inverse_tau(tau: Tensor) -> Tensor:
    return 1 / tau.float().clamp(min=0.01)[:, None]


def _border(case: Case, device: torch.device, value: float) -> Tensor | None:
    """(windows, 1, N, N): `value` where a shift border lies between two places, else 0; None without a shift."""
    options = case.shape.options
    if not any(options["shift"]):
        return None
    _, region = window_index(options["grid"], options["window"], options["shift"], device)
    parted = region[:, None, :, None] != region[:, None, None, :]
    return torch.zeros(parted.shape, dtype=DTYPES[case.dtype], device=device).masked_fill(parted, value)


def _folded(attend: Callable[..., Tensor], case: Case, device: torch.device) -> Function:
    """Attention on partitioned windows whose heads are (window, head), so that one mask serves all clips.

    Args:
        attend: (q, k, v (B, windows * H, N, d), mask (windows * H, N, N) or None, scale) -> like q.
    """
    cosine = case.shape.options["scoring"] == "cosine"
    border = _border(case, device, BORDER if cosine else float("-inf"))

    def function(qkv, tau, bias):
        # (S, B, windows, N, H, d) -> (S, B, windows * H, N, d)
        q, k, v = _partition(qkv, case).transpose(3, 4).flatten(2, 3)
        N, d = q.shape[2:]
        H = qkv.shape[3]
        mask = None if bias is None else bias.to(q.dtype)[None]
        if border is not None:
            mask = border if mask is None else mask + border
        if mask is not None:
            mask = mask.expand(q.shape[1] // H, H, N, N).reshape(-1, N, N)
        if cosine:
            inverse_tau = _inverse_tau(tau).repeat(q.shape[1] // H, 1)[:, None]  # (windows * H, 1, 1)
            q, k = _unit(q, inverse_tau), _unit(k)
        out = attend(q, k, v, mask, 1.0 if cosine else d**-0.5)
        return _reverse(out.unflatten(1, (-1, H)).transpose(2, 3), case)

    return function


def sdpa(case: Case, device: torch.device) -> Function:
    """PyTorch's scaled_dot_product_attention; on partitioned windows, bias and border as a float mask."""
    if case.op == "attention":
        dropout = case.shape.options["dropout"]

        def function(qkv, seed):
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, d)
            out = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            return out.transpose(1, 2).flatten(2)

        return function

    def attend(q, k, v, mask, scale):
        mask = None if mask is None else mask.expand(len(q), *mask.shape)
        return functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    return _folded(attend, case, device)


def xformers(case: Case, device: torch.device) -> Function:
    """xformers' memory_efficient_attention on partitioned windows, bias and border as a tensor."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise Unable(f"xformers does not import: {error}.") from None
    _require_gpu("xformers", device)

    def attend(q, k, v, mask, scale):
        mask = None if mask is None else mask.expand(len(q), *mask.shape)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale).transpose(1, 2)

    return _folded(attend, case, device)


def flash_attn(case: Case, device: torch.device) -> Function:
    """flash-attn on windows, and on the pieces that a shift border leaves of them, as packed sequences."""
    if case.shape.options["scoring"] == "cosine":
        raise Unable("flash-attn takes no bias.")
    try:
        from flash_attn import flash_attn_varlen_qkvpacked_func
    except ImportError as error:
        raise Unable(f"flash-attn does not import: {error}.") from None
    _require_gpu("flash-attn", device)
    if case.dtype == "fp32":
        raise Unable("flash-attn serves bf16 and fp16 only.")
    options = case.shape.options
    if options["shift"][1]:
        raise Unable("A shift in frequency parts windows into pieces that are no runs of tokens.")
    _, region = window_index(options["grid"], options["window"], options["shift"])
    windows, N = region.shape
    first = torch.ones(windows, N, dtype=torch.bool)
    first[:, 1:] = region[:, 1:] != region[:, :-1]
    starts = (first.repeat(case.batch, 1).flatten().nonzero().flatten()).int()
    starts = torch.cat([starts, torch.tensor([case.batch * windows * N], dtype=torch.int32)]).to(device)

    def function(qkv, tau, bias):
        packed = _partition(qkv, case).permute(1, 2, 3, 0, 4, 5)  # (B, windows, N, 3, H, d)
        shape = packed.shape
        out = flash_attn_varlen_qkvpacked_func(packed.reshape(-1, *shape[3:]), starts, N)
        return _reverse(out.view(*shape[:3], *shape[4:]), case)

    return function


def flex(case: Case, device: torch.device) -> Function:
    """FlexAttention, compiled, on tokens where they lie: windows are a block mask, bias and border a score_mod."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    options = case.shape.options
    cosine = options["scoring"] == "cosine"
    index, region = window_index(options["grid"], options["window"], options["shift"], device)
    windows, N = index.shape
    tokens = index.flatten()
    window, place, side = (torch.empty_like(tokens) for _ in range(3))
    window[tokens] = torch.arange(windows, device=device).repeat_interleave(N)
    place[tokens] = torch.arange(N, device=device).repeat(windows)
    side[tokens] = region.flatten()

    def mask_mod(b, h, i, j):
        same = window[i] == window[j]
        return same if cosine else same & (side[i] == side[j])

    block_mask = create_block_mask(mask_mod, None, None, len(tokens), len(tokens), device=device)

    def function(qkv, tau, bias):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, d)
        if not cosine:
            return attend(q, k, v, None, None)

        def score_mod(score, b, h, i, j):
            return score + bias[h, place[i], place[j]] + torch.where(side[i] == side[j], 0.0, BORDER)

        if device.type == "cpu":  # Inductor (torch 2.14) takes v for contiguous where q and k are computed
            v = v.contiguous()
        return attend(_unit(q, _inverse_tau(tau)[:, None]), _unit(k), v, score_mod, 1.0)

    def attend(q, k, v, score_mod, scale):
        out = flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale)
        return out.transpose(1, 2).flatten(2)

    return torch.compile(function, fullgraph=True, dynamic=False)


WINDOWS = ("window_attention",)
# name -> (function, ops that it serves)
PROVIDERS: dict[str, tuple[Callable[[Case, torch.device], Function], tuple[str, ...]]] = {
    "eager": (eager, OPS),
    "compiled": (compiled, OPS),
    "sdpa": (sdpa, (*WINDOWS, "attention")),
    "flex": (flex, WINDOWS),
    "xformers": (xformers, WINDOWS),
    "flash-attn": (flash_attn, WINDOWS),
    "native": (partial(_ours, "native"), OPS),
    "triton": (partial(_ours, "triton"), tuple(op for op in OPS if op != "attention")),
}

COMPILED = ("compiled", "flex", "triton")  # their first call takes long


def serving(op: str) -> tuple[str, ...]:
    """The providers of an op."""
    return tuple(name for name, (_, ops) in PROVIDERS.items() if op in ops)


def build(name: str, case: Case, device: torch.device) -> Function:
    """The provider's function for the case.

    Raises:
        Unable: it does not serve the case on this machine.
    """
    return PROVIDERS[name][0](case, device)


def draws_its_own(name: str, case: Case) -> bool:
    """Whether the provider drops other weights than the reference does."""
    return name == "sdpa" and case.without_dropout() is not case


def without_backward(name: str, case: Case, device: torch.device) -> str:
    """Why the provider has no backward pass for a case that has one; empty if it has."""
    if name == "flex" and device.type == "cpu":
        return "FlexAttention has no backward pass on a CPU; its forward pass was measured without gradients."
    return ""
