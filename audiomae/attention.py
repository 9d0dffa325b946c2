"""Scaled dot-product attention over dense or packed tokens: our own, PyTorch's, flash-attn's or xformers'.

Shapes: B clips of L tokens each in a dense batch, H heads, d channels of a head. A packed batch holds clips of
different lengths one after the other, `total` tokens without padding; `Packed` says where each one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import audiomae_kernels as ak
import torch
import torch.nn.functional as F
from audiomae_kernels import _library
from torch import Tensor


def on_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Numbers of the host as a tensor on a device, without waiting for it."""
    device = torch.device(device)
    # From pinned memory the copy waits for nothing.
    pinned = device.type == "cuda" and torch.cuda.is_available()
    return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=pinned).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the clips of a packed batch lie. Made once per batch with `Packed.of`, used by every layer.

    Attributes:
        lengths: tokens of each clip.
        cu_seqlens: (B + 1,) int32 on the tokens' device, 0 and the end of each clip.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Packed:
        """Clips of these lengths, for tokens on `device`.

        Raises:
            ValueError: no clip, or a length that is no positive integer. A tensor is refused too: reading it
                would wait for its device.
        """
        if (
            isinstance(lengths, Tensor)
            or not lengths
            or not all(isinstance(n, int) and n > 0 for n in lengths)
        ):
            raise ValueError(f"lengths must be positive integers, one for each clip, got {lengths!r}")
        return cls(tuple(lengths), on_device([0, *accumulate(lengths)], torch.int32, device))

    @cached_property
    def block_diagonal(self) -> Any:
        """xformers' form of the same."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        return BlockDiagonalMask.from_seqlens(self.lengths, device=self.cu_seqlens.device)


def attention(
    qkv: Tensor,
    *,
    packed: Packed | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """softmax(q kᵀ / √d) v for each clip and head.

    Args:
        qkv: (B, L, 3, H, d), or (total, 3, H, d) with `packed`. Float, in a dtype that the backend serves.
        packed: where the clips of a packed batch lie; a token attends to its own clip only.
        dropout: rate at which attention weights are dropped.
        backend: one of `BACKENDS`; None: the best there is, see `best_backend`.

    Returns:
        (B, L, H * d) or (total, H * d) in the dtype of qkv.

    Raises:
        ValueError: there is no such backend, or the shapes do not fit.
        RuntimeError: the backend cannot run here, or not on this device, dtype or head dimension.
    """
    dtype = qkv.dtype
    if backend is None:
        dtype = _computed_in(qkv)
        backend = "sdpa" if torch.compiler.is_exporting() else best_backend(qkv.device, dtype)
    require_backend(backend, qkv.device, dtype, qkv.shape[-1])
    chosen = BACKENDS[backend]
    if packed is None:
        if qkv.ndim != 5:
            raise ValueError(f"without packed=, qkv must be (B, L, 3, H, d), got {tuple(qkv.shape)}")
        return chosen.dense(qkv, dropout).flatten(-2)
    total = sum(packed.lengths)
    if qkv.ndim != 4 or qkv.shape[0] != total:
        raise ValueError(
            f"qkv must be ({total}, 3, H, d) for packed clips of {total} tokens in all, got {tuple(qkv.shape)}"
        )
    if packed.cu_seqlens.device != qkv.device:
        raise ValueError(
            f"packed is on {packed.cu_seqlens.device}, the tokens on {qkv.device}: "
            "make it with Packed.of(lengths, device)"
        )
    if len(set(packed.lengths)) == 1:  # a dense batch after all
        return chosen.dense(qkv.unflatten(0, (len(packed.lengths), -1)), dropout).flatten(0, 1).flatten(-2)
    return chosen.packed(qkv, packed, dropout).flatten(-2)


# Under torch.compile the answer is a constant of the graph.
@torch.compiler.assume_constant_result
def best_backend(device: torch.device, dtype: torch.dtype) -> str:
    """ "native" on a CPU where our own kernel serves the dtype, else "sdpa".

    Raises:
        RuntimeError: the environment names a native library or a CPU tier that cannot be had.
    """
    if device.type != "cpu":
        return "sdpa"
    chosen = _library.resolve("attention", None, torch.empty(0, dtype=dtype, device=device))
    return "native" if chosen == "native" else "sdpa"


def _computed_in(qkv: Tensor) -> torch.dtype:
    """The dtype that autocast gives to attention, where it is on."""
    kind = qkv.device.type
    if qkv.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return qkv.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else qkv.dtype


# -- backends ------------------------------------------------------------------------------------------------


def _native(qkv: Tensor, dropout: float) -> Tensor:
    return ak.attention(qkv, dropout=dropout, impl="native").unflatten(-1, qkv.shape[-2:])


def _native_packed(qkv: Tensor, packed: Packed, dropout: float) -> Tensor:
    out = ak.attention(qkv, cu_seqlens=packed.cu_seqlens, dropout=dropout, impl="native")
    return out.unflatten(-1, qkv.shape[-2:])


def _native_why_not(device: torch.device | None, dtype: torch.dtype | None) -> str:
    served = ak.implementations("attention", device or "cpu", dtype or torch.float32)
    return next(line.reason for line in served if line.name == "native")


def _sdpa(qkv: Tensor, dropout: float) -> Tensor:
    q, k, v = qkv.transpose(-4, -2).unbind(-3)  # each (..., H, L, d)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(-3, -2)


def _sdpa_packed(qkv: Tensor, packed: Packed, dropout: float) -> Tensor:
    if _varlen_serves(qkv, dropout):
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = packed.cu_seqlens, max(packed.lengths)
        return varlen_attn(*qkv.unbind(-3), ends, ends, longest, longest)
    # Clip by clip: nothing padded is computed, no mask keeps SDPA from its fused kernels, and a clip gives what
    # it gives alone. Nested tensors would be one call, but initialise CUDA even for tensors on the CPU.
    clips = qkv[None].split(packed.lengths, dim=1)
    return torch.cat([_sdpa(clip, dropout) for clip in clips], dim=1)[0]


def _varlen_serves(qkv: Tensor, dropout: float) -> bool:
    """Whether PyTorch's own kernel for packed clips does: flash attention without dropout, on NVIDIA."""
    return (
        qkv.is_cuda
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and dropout == 0.0
        and qkv.dtype in (torch.float16, torch.bfloat16)
        and qkv.shape[-1] % 8 == 0
        and qkv.shape[-1] <= 256
        and torch.cuda.get_device_capability(qkv.device) >= (8, 0)
    )


def _load_flash_attn() -> None:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: F401


def _flash_attn(qkv: Tensor, dropout: float) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*qkv.unbind(-3), dropout_p=dropout)


def _flash_attn_packed(qkv: Tensor, packed: Packed, dropout: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    ends, longest = packed.cu_seqlens, max(packed.lengths)
    return flash_attn_varlen_func(*qkv.unbind(-3), ends, ends, longest, longest, dropout_p=dropout)


def _load_xformers() -> None:
    from xformers.ops import memory_efficient_attention  # noqa: F401
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask  # noqa: F401


def _xformers(qkv: Tensor, dropout: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*qkv.unbind(-3), p=dropout)


def _xformers_packed(qkv: Tensor, packed: Packed, dropout: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv[None].unbind(-3)  # one row of all tokens
    return memory_efficient_attention(q, k, v, attn_bias=packed.block_diagonal, p=dropout)[0]


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        dense: ((B, L, 3, H, d), dropout) -> (B, L, H, d).
        packed: ((total, 3, H, d), packed, dropout) -> (total, H, d).
        package, install: what to install where `load` fails, and how; None: nothing.
        load: imports all that the calls need.
        capability: lowest CUDA compute capability for each dtype that is served.
        head_dims: served head dimensions.
    """

    dense: Callable[..., Tensor]
    packed: Callable[..., Tensor]
    package: str | None = None
    install: str = ""
    load: Callable[[], None] = lambda: None
    capability: dict[torch.dtype, tuple[int, int]] = field(default_factory=dict)
    head_dims: range = range(1, 2**16)


BACKENDS: dict[str, Backend] = {
    "native": Backend(_native, _native_packed),
    "sdpa": Backend(_sdpa, _sdpa_packed),
    "flash_attn": Backend(
        _flash_attn,
        _flash_attn_packed,
        package="flash-attn",
        install="pip install flash-attn --no-build-isolation",
        load=_load_flash_attn,
        capability={torch.float16: (8, 0), torch.bfloat16: (8, 0)},
        head_dims=range(1, 257),
    ),
    "xformers": Backend(
        _xformers,
        _xformers_packed,
        package="xformers",
        install="pip install xformers",
        load=_load_xformers,
        capability={torch.float32: (6, 0), torch.float16: (6, 0), torch.bfloat16: (8, 0)},
        head_dims=range(8, 257, 8),
    ),
}


# Under torch.compile the answer is a constant of the graph.
@torch.compiler.assume_constant_result
def why_not(
    backend: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> str:
    """Why a backend cannot run and what to do about it, "" if it can; what is None is not asked about."""
    chosen = BACKENDS[backend]
    name = chosen.package
    if name is None:
        return _native_why_not(device, dtype).removesuffix(".") if backend == "native" else ""
    try:
        chosen.load()
    except ModuleNotFoundError as error:
        if error.name == backend:  # also the name of its top-level module
            return f"The package {name} is not installed: {chosen.install}"
        return _broken(chosen, error)
    except (ImportError, OSError) as error:
        return _broken(chosen, error)
    if device is None:
        return ""
    if device.type != "cuda":
        return f"{name} runs on GPUs only, not on {device.type}: move model and input to a GPU"
    # xformers' kernels for ROCm have no float32, and compute capabilities are NVIDIA's.
    rocm = torch.version.hip is not None
    served = {t: least for t, least in chosen.capability.items() if not (rocm and t == torch.float32)}
    if dtype is not None and dtype not in served:
        return (
            f"{name} computes in {' and '.join(_name(t) for t in served)} here, not in {_name(dtype)}: "
            "run under torch.autocast or convert the model"
        )
    least = min(served.values()) if dtype is None else served[dtype]
    found = torch.cuda.get_device_capability(device)
    if not rocm and found < least:
        what = "" if dtype is None else f" for {_name(dtype)}"
        return f"{name} needs compute capability {_dotted(least)}{what}, and this GPU has {_dotted(found)}"
    if head_dim is not None and head_dim not in chosen.head_dims:
        dims = chosen.head_dims
        steps = "" if dims.step == 1 else f"multiples of {dims.step} "
        return f"{name} takes head dimensions {steps}up to {dims[-1]}, not {head_dim}: choose other widths"
    return ""


def require_backend(
    backend: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> None:
    """Raises an error that says what is missing where a backend cannot run; see `why_not`.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if BACKENDS[backend].package is None:
        head_dim = None  # any; under torch.compile it may be a symbol, of which no constant can be asked
    if reason := why_not(backend, device, dtype, head_dim):
        raise RuntimeError(f'attention="{backend}" cannot run. {reason}, or choose attention="sdpa"')


def _broken(backend: Backend, error: Exception) -> str:
    what = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"{backend.package} is installed but does not import with torch {torch.__version__} ({what}): "
        f"reinstall it, {backend.install}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
