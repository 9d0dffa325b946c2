"""Masked autoencoders on spectrograms: Audio-MAE and MAE-AST, top to bottom.

Audio-MAE: Huang et al., "Masked Autoencoders that Listen", NeurIPS 2022 (arXiv 2207.06405).
MAE-AST: Baade et al., "MAE-AST: Masked Autoencoding Audio Spectrogram Transformer", Interspeech 2022
(arXiv 2203.16691).
CrossMAE's decoder: Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", TMLR 2025 (arXiv 2401.14391).

Shapes: B clips, R = B * m rows (m masks of each clip, usually 1), T frames, F mel bins, grid (T', F') of
L = T' * F' tokens in time-major order t * F' + f, P prefix tokens, K kept and M masked tokens, D width,
H heads, d = D / H, V = patch values, N tokens of a window. Clips of different lengths are packed (`ragged.py`), and
`total` then stands for the tokens of all rows.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from audiomae_kernels import (
    implementations,
    info_nce,
    masked_mse,
    patch_gather,
    unshuffle,
    window_attention,
)
from audiomae_kernels.window_attention import clip_window
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from .attention import Packed, attention, require_backend
from .config import EncoderConfig, MAEConfig
from .masking import Grid, Mask, RaggedMask
from .pretrained import PretrainedMixin
from .ragged import Clips, Rows, as_ragged, ragged_info_nce, runs
from .recompute import again
from .words import plural

MAX_FLAT_TOKENS = 48000  # MAE-AST's published table of 1-D positions


class Output(OrderedDict):
    """What a model returns: an ordered mapping whose values are attributes and can be indexed too.

    `out.loss`, `out["loss"]` and `out[0]` are the same tensor. Registered as a pytree.
    """

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this output has no {name!r}, only {', '.join(self)}") from None

    def __getitem__(self, key: str | int):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


pytree.register_pytree_node(
    Output,
    lambda out: (list(out.values()), list(out)),
    lambda values, names: Output(zip(names, values, strict=True)),
    serialized_type_name="audiomae.Output",
    flatten_with_keys_fn=lambda out: ([(pytree.MappingKey(k), v) for k, v in out.items()], list(out)),
)


def require(impl: str | None, *ops: str) -> None:
    """Raises RuntimeError if an implementation that was asked for by name does not exist here for these ops."""
    if impl in (None, "reference"):
        return
    for op in ops:
        for served in implementations(op, {"native": "cpu", "triton": "cuda"}[impl]):
            if served.name == impl and not served.available:
                raise RuntimeError(f"impl={impl!r} cannot run. {served.reason}")


# -- positions -----------------------------------------------------------------------------------------------


def sincos_2d(width: int, grid: Grid, transposed: bool = False, steps: int | None = None) -> Tensor:
    """(L, D) fixed 2-D sin-cos positions: half of D encodes the frequency index, half the time index.

    Each half is [sin | cos] of position / 10000^(2i / (D/2)). `transposed` gives Audio-MAE's published table,
    which was built on the grid (F', T') while its tokens run over (T', F'): token i then has the codes of
    (i % T', i // T') instead of (i % F', i // F'). The codes stay unique. With `steps` there are so many time steps,
    between the first and the last one of the grid.
    """
    time, frequency = _times(grid[0], steps)[:, None], torch.arange(grid[1], dtype=torch.float64)
    if transposed:
        token = time * grid[1] + frequency
        axes = (token % grid[0], token.div(grid[0], rounding_mode="floor"))
    else:
        axes = torch.broadcast_tensors(frequency, time)
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    halves = []
    for position in axes:
        angle = position.reshape(-1, 1) * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()


def _times(old: int, new: int | None) -> Tensor:
    """(new,) float64 places between the first and the last of `old` steps; these steps themselves for None."""
    steps = torch.arange(old if new is None else new, dtype=torch.float64)
    return steps if new is None else steps * ((old - 1) / max(1, new - 1))


def sinusoids_1d(width: int, tokens: int | Tensor, device: torch.device | None = None) -> Tensor:
    """(L, D) positions of Vaswani et al. 2017, sin and cos interleaved, in float32 as MAE-AST has them.

    Of the first so many tokens, or of these places (L,).
    """
    step = torch.exp(torch.arange(0, width, 2, device=device).float() * (-math.log(10000.0) / width))
    places = tokens if isinstance(tokens, Tensor) else torch.arange(tokens, device=device)
    angle = places.float()[:, None] * step
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def same_table(given: Tensor, fresh: Tensor) -> bool:
    """Whether a stored table of positions is the one of a formula."""
    # The published code rounds angles to float32 on the way; the table may be stored in less than that.
    atol = max(1e-4, torch.finfo(given.dtype).eps) if given.is_floating_point() else 0.0
    return given.shape == fresh.shape and torch.allclose(
        given.float(), fresh.to(given.device), rtol=0, atol=atol
    )


class Positions(nn.Module):
    """Position embeddings of the prefix and of a clip's tokens; `EncoderConfig.positions` names the kinds."""

    def __init__(self, kind: str, grid: Grid, prefix: int, width: int):
        super().__init__()
        self.kind, self.grid, self.prefix = kind, grid, prefix
        tokens = grid[0] * grid[1]
        if kind == "flat" and tokens > MAX_FLAT_TOKENS:
            raise ValueError(
                f"clips of {tokens} tokens are longer than the positions, which reach {MAX_FLAT_TOKENS}"
            )
        if kind == "learned":
            self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, prefix + tokens, width), std=0.02))
        elif kind == "flat":  # a formula: nothing to store with the weights
            table = torch.cat([torch.zeros(prefix, width), sinusoids_1d(width, tokens)])
            self.register_buffer("table", table[None], persistent=False)
        else:
            table = sincos_2d(width, grid, transposed=kind == "transposed")
            self.register_buffer("table", torch.cat([torch.zeros(prefix, width), table])[None])

    @property
    def max_steps(self) -> int | None:
        """Time steps of the longest clip, None where only the number of tokens is bounded."""
        return None if self.kind == "flat" else self.grid[0]

    def forward(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Of a clip with this grid: (P, D) for the prefix, (L, D) for the tokens."""
        tokens = grid[0] * grid[1]
        prefix, table = self.table[0, : self.prefix], self.table[0, self.prefix :]
        if self.kind == "learned":  # SSAST cuts from the middle
            first = (self.grid[0] - grid[0]) // 2 * grid[1]
            return prefix, table[first : first + tokens]
        if tokens > table.shape[0]:
            return prefix, sinusoids_1d(table.shape[1], tokens, table.device).to(table.dtype)
        # The start of the table is the only exact part of it: the transposed one is no product of two axes.
        return prefix, table[:tokens]

    def packed(self, grids: Sequence[Grid]) -> Tensor:
        """(total, D): of the tokens of packed rows with these grids."""
        return torch.cat([self(grid)[1] for grid in grids])

    @torch.no_grad()
    def stretch(self, steps: int) -> None:
        """Interpolates the table in time to so many steps.

        A table that is a formula's gets the formula's values at fractional steps, any other one is interpolated
        linearly.
        """
        (old, bands), width, table = self.grid, self.table.shape[2], self.table[0, self.prefix :]
        transposed = self.kind == "transposed"
        if self.kind == "flat":
            places = _times(old, steps)[:, None] * bands + torch.arange(bands, dtype=torch.float64)
            fresh = sinusoids_1d(width, places.flatten())
        elif self.kind != "learned" and same_table(table, sincos_2d(width, self.grid, transposed)):
            fresh = sincos_2d(width, self.grid, transposed, steps)
        else:
            columns = table.unflatten(0, self.grid).permute(1, 2, 0).float()  # (F', D, T')
            fresh = (
                F.interpolate(columns, steps, mode="linear", align_corners=True)
                .permute(2, 0, 1)
                .flatten(0, 1)
            )
        stretched = torch.cat([self.table[0, : self.prefix], fresh.to(table)])[None]
        self.table = nn.Parameter(stretched) if self.kind == "learned" else stretched
        self.grid = (steps, bands)


# -- blocks --------------------------------------------------------------------------------------------------


def take(x: Tensor, ids: Tensor | None) -> Tensor:
    """(R, L, D), (R, M) -> (R, M, D): the tokens with these ids, all of them for None. Packed: (total, D), (M,)."""
    if ids is None:
        return x
    return x[ids] if ids.ndim == 1 else x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.fc1(x))

    def activate(self, hidden: Tensor) -> Tensor:
        """From fc1's output to the end."""
        return self.fc2(F.gelu(hidden))


class GlobalAttention(nn.Module):
    """Scaled dot-product attention over all tokens of a clip."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, backend: str | None = None):
        super().__init__()
        if backend is not None:
            require_backend(backend)
        self.heads, self.dropout, self.backend = heads, dropout, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, packed: Packed | None = None) -> Tensor:
        """x (B, L, D), or (total, D) where `packed` says which tokens are whose."""
        return self.proj(self.mix(self.qkv(x), packed))

    def mix(self, qkv: Tensor, packed: Packed | None = None) -> Tensor:
        """(..., 3 * D) -> (..., D): the heads' outputs."""
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (..., L, 3, H, d)
        dropout = self.dropout if self.training else 0.0
        return attention(qkv, packed=packed, dropout=dropout, backend=self.backend)


class WindowAttention(nn.Module):
    """Cosine attention in shifted windows with a continuous position bias, Audio-MAE's variant of Swin v2's.

    softmax(q.k / clamp(|q||k|, 1e-6) / clamp(tau, 0.01) + bias + shift mask) v, where tau is learned per head
    and the bias comes from an MLP on the log-spaced offset of two tokens.
    """

    def __init__(
        self, width: int, heads: int, window: Grid, shift: Grid, bias_dropout: float, impl: str | None
    ):
        super().__init__()
        require(impl, "window_attention")
        self.window, self.shift, self.impl = window, shift, impl
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.tau = nn.Parameter(torch.ones(heads))
        self.bias_mlp = nn.Sequential(
            nn.Linear(2, 384),
            nn.ReLU(),
            nn.Dropout(bias_dropout),
            nn.Linear(384, heads),
            nn.Dropout(bias_dropout),
        )

    def forward(self, x: Tensor, grid: Grid | Sequence[Grid], offsets: Tensor) -> Tensor:
        """x (B, L, D), or (total, D) with a grid for each row; offsets (N, N, 2) from `log_offsets`."""
        return self.proj(self.mix(self.qkv(x), grid, self.bias(offsets)))

    def bias(self, offsets: Tensor) -> Tensor:
        """(N, N, 2) -> (H, N, N)."""
        return self.bias_mlp(offsets).permute(2, 0, 1)

    def mix(self, qkv: Tensor, grid: Grid | Sequence[Grid], bias: Tensor) -> Tensor:
        """(..., 3 * D) -> (..., D): the heads' outputs."""
        return attend_windows(
            qkv, self.tau, bias, grid=grid, window=self.window, shift=self.shift, impl=self.impl
        )


def attend_windows(
    qkv: Tensor,
    tau: Tensor,
    bias: Tensor,
    *,
    grid: Grid | Sequence[Grid],
    window: Grid,
    shift: Grid,
    impl: str | None,
) -> Tensor:
    """`window_attention` of a dense batch, or of packed rows with a grid each: one call for each run of equal grids.

    `bias` is for the windows of the last row, the longest. A grid with fewer time steps than the window has smaller
    windows, whose tokens are the first of a larger one.
    """
    options = {"window": window, "shift": shift, "impl": impl}
    if isinstance(grid[0], int):
        return window_attention(qkv, tau, bias, grid=grid, **options)
    (steps, bands), _ = clip_window(grid[-1], window, shift)
    bias = bias.unflatten(2, (steps, bands)).unflatten(1, (steps, bands))
    out = []
    for size, rows in runs(qkv, grid, [t * f for t, f in grid]):
        (t, _), _ = clip_window(size, window, shift)
        part = bias[:, :t, :, :t].flatten(3, 4).flatten(1, 2)
        out.append(window_attention(rows, tau, part, grid=size, **options).flatten(0, 1))
    return torch.cat(out)


class CrossAttention(nn.Module):
    """Scaled dot-product attention of decoded tokens to the encoder's output, by PyTorch on any device."""

    def __init__(self, width: int, memory_width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, counts: tuple[Sequence[int], Sequence[int]] = ()) -> Tensor:
        """x (B, M, D), memory (B, K, D'); packed both where `counts` has the tokens of each row in x and memory.

        Packed rows are attended one by one.
        """
        return self.proj(self.mix(self.q(x), memory, counts))

    @property
    def qkv(self) -> nn.Linear:
        """What `Block` multiplies first: the queries alone."""
        return self.q

    def mix(self, q: Tensor, memory: Tensor, counts: tuple[Sequence[int], Sequence[int]] = ()) -> Tensor:
        """(..., D) and the memory -> (..., D): the heads' outputs."""
        q = q.unflatten(-1, (self.heads, -1))  # (..., M, H, d)
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        dropout = self.dropout if self.training else 0.0
        if counts:
            decoded, kept = (list(c) for c in counts)
            rows = zip(q[None].split(decoded, 1), *(y[None].split(kept, 1) for y in (k, v)), strict=True)
            x = torch.cat([self._attend(*row, dropout) for row in rows], dim=1)[0]
        else:
            x = self._attend(q, k, v, dropout)
        return x.flatten(-2)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """(B, M, H, d), twice (B, K, H, d) -> (B, M, H, d)."""
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, dropout_p=dropout).transpose(1, 2)


def log_offsets(window: Grid) -> Tensor:
    """(N, N, 2) sign(d) * ln(1 + |d|) of the offsets d in time and frequency between a window's tokens."""
    axes = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    place = torch.stack(axes, dim=-1).flatten(0, 1).float()  # (N, 2)
    offset = place[:, None] - place[None]
    return offset.sign() * offset.abs().log1p()


class Dropout(nn.Dropout):
    """`nn.Dropout`, and on a CPU a faster one: PyTorch draws on one thread there, a double for each value.

    16 random bits for each value do: p is rounded to a multiple of 2^-16, and the scale is that of the rounded one.
    """

    def forward(self, x: Tensor) -> Tensor:
        ours = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if not self.training or not 0.0 < self.p < 1.0 or not ours:
            return super().forward(x)
        limit = min(round(self.p * 2**16), 2**16 - 1)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        dropped = (words.view(torch.int16)[: x.numel()] < limit - 2**15).view(x.shape)
        return x.masked_fill(dropped, 0.0) * (2**16 / (2**16 - limit))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): leaves a branch out for some of the clips."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, packed: Packed | None = None) -> Tensor:
        """x (B, L, D), or (total, D) where `packed` says which tokens are whose."""
        if not self.training or self.rate == 0.0:
            return x
        clips, ones = (len(x), (1, 1)) if packed is None else (len(packed.lengths), (1,))
        keep = torch.empty(clips, *ones, dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.rate)
        if packed is not None:
            keep = keep.repeat_interleave(packed.cu_seqlens.diff(), dim=0, output_size=len(x))
        return x * keep / (1.0 - self.rate)


class BranchDropout(nn.Sequential):
    """Dropout of values, then perhaps `DropPath`, which must know the clips of packed tokens."""

    def forward(self, x: Tensor, packed: Packed | None = None) -> Tensor:
        for layer in self:
            x = layer(x, packed) if isinstance(layer, DropPath) else layer(x)
        return x


class LayerDrop(nn.Module):
    """Leaves a whole layer out for all of a batch (Fan et al. 2020)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y, or its input x."""
        if not self.training or self.rate == 0.0:
            return y
        # A choice on the device: no wait for it, and the same parameters are used on every rank.
        return torch.where(torch.rand((), device=x.device) < self.rate, x, y)


class Block(nn.Module):
    """Attention and MLP, each with a LayerNorm and a skip connection.

    norm: "pre" x + f(norm(x)) (ViT), "post" norm(x + f(x)) (MAE-AST), "res-post" x + norm(f(x)) (window blocks).
    recompute: see `EncoderConfig`.
    """

    def __init__(
        self,
        attention: GlobalAttention | WindowAttention | CrossAttention,
        width: int,
        mlp_ratio: float,
        norm: str,
        eps: float,
        dropout: nn.Module,
        recompute: str = "none",
    ):
        super().__init__()
        self.order, self.recompute = norm, recompute
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, round(width * mlp_ratio))
        self.dropout = dropout

    def forward(self, x: Tensor, *context: Grid | Tensor | Packed, ids: Tensor | None = None) -> Tensor:
        """(R, L, D) -> (R, L, D), or (R, M, D) for the tokens `ids` (R, M) only; packed as in `take`.

        `context` is what the attention takes beside x.
        """
        if self.recompute == "blocks" and torch.is_grad_enabled():
            return checkpoint(self._forward, x, *context, ids=ids, use_reentrant=False)
        return self._forward(x, *context, ids=ids)

    def _forward(self, x: Tensor, *context: Grid | Tensor | Packed, ids: Tensor | None) -> Tensor:
        def drop(y: Tensor) -> Tensor:
            # The context of global attention, and that alone, says which tokens are whose.
            return self.dropout(y, *context) if isinstance(self.dropout, BranchDropout) else self.dropout(y)

        if self.order == "pre":
            qkv = self._again(lambda x: self.attn.qkv(self.norm1(x)), x, self.norm1, self.attn.qkv)
            x = take(x, ids) + drop(self._attend(qkv, *context, ids=ids))
            hidden = self._again(lambda x: self.mlp.fc1(self.norm2(x)), x, self.norm2, self.mlp.fc1)
            return x + drop(self._again(self.mlp.activate, hidden, self.mlp.fc2))
        y = self._attend(self.attn.qkv(x), *context, ids=ids)
        if self.order == "res-post":
            x = take(x, ids) + drop(self.norm1(y))
            return x + drop(self.norm2(self._again(self.mlp.activate, self.mlp.fc1(x), self.mlp.fc2)))
        x, hidden = self._again(self._norm_and_expand, take(x, ids) + drop(y), self.norm1, self.mlp.fc1)
        return self.norm2(x + drop(self._again(self.mlp.activate, hidden, self.mlp.fc2)))

    def _attend(self, qkv: Tensor, *context: Grid | Tensor | Packed, ids: Tensor | None) -> Tensor:
        """From the attention's qkv to its end, for the tokens `ids`."""
        if not isinstance(self.attn, WindowAttention):
            return self.attn.proj(take(self.attn.mix(qkv, *context), ids))
        grid, offsets = context
        bias = self.attn.bias(offsets)  # outside of what is computed again: it has dropout
        return self._again(
            lambda qkv: self.attn.proj(take(self.attn.mix(qkv, grid, bias), ids)),
            qkv,
            self.attn,
            self.attn.proj,
        )

    def _norm_and_expand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm1(x)
        return x, self.mlp.fc1(x)

    def _again(self, function: Callable, x: Tensor, *modules: nn.Module) -> Tensor | tuple[Tensor, ...]:
        return again(function, x, *modules) if self.recompute == "activations" else function(x)


def global_block(c: EncoderConfig, width: int, heads: int, drop_path: float = 0.0) -> Block:
    dropout = BranchDropout(Dropout(c.dropout), *([DropPath(drop_path)] if drop_path else []))
    # Our own kernel is one of the kernels that `impl` names, and neither a reference nor Triton's.
    backend = "sdpa" if c.attention is None and c.impl in ("reference", "triton") else c.attention
    layer = GlobalAttention(width, heads, c.attention_dropout, backend)
    return Block(layer, width, c.mlp_ratio, c.norm, c.norm_eps, dropout, c.recompute)


class SpectrogramNorm(nn.BatchNorm2d):
    """MAE-AST's input: the batch's spectrograms normalised by their joint mean and variance, times 0.5.

    mode: "batch" (statistics of this batch), "running" (stored ones) or "auto" (batch in training).
    """

    def __init__(self, mode: str):
        super().__init__(1, affine=False)
        self.mode = mode

    def forward(self, spectrogram: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, T, F) -> (B, T, F) in the dtype of the statistics, which are those of `valid` (frames, F) if given."""
        spectrogram = spectrogram.to(self.running_mean.dtype)
        batch = self.training if self.mode == "auto" else self.mode == "batch"
        running = (self.running_mean, self.running_var)
        if batch and self.training:
            self.num_batches_tracked.add_(1)
        elif batch:
            running = (None, None)  # in evaluation the stored statistics stay as they are
        if batch and valid is not None:
            running, batch = self._statistics(valid.to(spectrogram.dtype), *running), False
        x = F.batch_norm(spectrogram[:, None], *running, training=batch, momentum=self.momentum, eps=self.eps)
        return 0.5 * x[:, 0]

    def _statistics(self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> tuple:
        """Mean and biased variance of x, (1,) each; the running ones follow as in `nn.BatchNorm2d`."""
        var, mean = (t[None] for t in torch.var_mean(x, correction=0))
        if running_mean is not None:
            running_mean.lerp_(mean, self.momentum)
            running_var.lerp_(var * (x.numel() / max(1, x.numel() - 1)), self.momentum)
        return mean, var


def spectrogram_norm(c: EncoderConfig) -> nn.Module:
    return nn.Identity() if c.input_norm == "none" else SpectrogramNorm(c.input_norm)


def tokens_norm(c: EncoderConfig, width: int) -> nn.Module:
    """What comes before the first block: a LayerNorm and dropout with post-norm blocks, else nothing."""
    if c.norm == "post":
        return nn.Sequential(nn.LayerNorm(width, eps=c.norm_eps), Dropout(c.dropout))
    return nn.Identity()


def init_vit(encoder: Encoder) -> None:
    """The Vision Transformer's initialisation, of blocks and prefix tokens."""
    for module in encoder.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    if encoder.prefix is not None:
        nn.init.trunc_normal_(encoder.prefix, std=0.02)


# -- encoder and decoder -------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Embeds the visible patches only, adds positions and the prefix, and runs the Transformer over them."""

    def __init__(self, c: EncoderConfig):
        super().__init__()
        require(c.impl, "patch_gather")
        self.config = c
        self.patch_embed = nn.Linear(c.patch_values, c.width)
        self.prefix = nn.Parameter(torch.zeros(1, c.prefix_tokens, c.width)) if c.prefix_tokens else None
        self.positions = Positions(c.positions, c.grid(), c.prefix_tokens, c.width)
        self.input_dropout = Dropout(c.input_dropout)
        self.layer_drop = LayerDrop(c.layer_drop)
        self.input_norm = tokens_norm(c, c.width)
        self.blocks = nn.ModuleList(
            global_block(c, c.width, c.heads, drop_path=c.drop_path * i / max(1, c.depth - 1))
            for i in range(c.depth)
        )
        self.norm = (
            nn.LayerNorm(c.width, eps=c.norm_eps) if c.norm == "pre" and c.final_norm else nn.Identity()
        )

    def forward(
        self, spectrogram: Tensor, ids_keep: Tensor | None = None, layers: Sequence[int] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """(B, T, F), (R, K) token ids (None: all) -> (R, P + K, D), or one of these for each of `layers`."""
        grid = self.config.grid(spectrogram.shape[1])
        _, positions = self.positions(grid)
        if ids_keep is None:
            tokens = torch.arange(grid[0] * grid[1], device=spectrogram.device)
            x = self.embed(spectrogram, tokens.expand(spectrogram.shape[0], -1)) + positions
        else:  # as published, the input's dropout belongs to masking
            x = self.input_dropout(self.embed(spectrogram, ids_keep)) + F.embedding(ids_keep, positions)
        return self.transform(x, grid, layers)

    def forward_packed(
        self, spectrogram: Tensor, rows: Rows, masked: bool = True, layers: Sequence[int] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """`forward` of packed rows: the long spectrogram (1, T, F) -> (total, D), each row's prefix before its tokens.

        `masked` tells that there is a mask, which may keep all tokens.
        """
        x = self.embed(spectrogram, rows.patches_keep)[0]
        x = self.input_dropout(x) if masked else x
        x = x + F.embedding(rows.ids_keep[0], self.positions.packed(rows.grids))
        return self.transform(x, rows.grids[-1], layers, rows.kept)

    def embed(self, spectrogram: Tensor, ids: Tensor) -> Tensor:
        """(B, T, F), (R, K) -> (R, K, D): linear patch embeddings without positions."""
        c = self.config
        patches = patch_gather(spectrogram, ids, patch=c.patch, stride=c.stride, impl=c.impl)
        return self.patch_embed(patches.to(self.patch_embed.weight.dtype))

    def transform(
        self,
        x: Tensor,
        grid: Grid,
        layers: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """(R, K, D) tokens with positions -> (R, P + K, D); (total, D) with the tokens of each row in `counts`."""
        if self.prefix is not None:
            prefix_positions, _ = self.positions(grid)
            prefix = self.prefix + prefix_positions
            if counts is None:
                x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
            else:
                x = Rows.add_prefix(prefix.expand(len(counts), -1, -1), x, counts)
        packed = (
            () if counts is None else (Packed.of([self.config.prefix_tokens + n for n in counts], x.device),)
        )
        x = self.input_norm(x)
        hidden = []
        for i, block in enumerate(self.blocks, start=1):
            x = self.layer_drop(x, block(x, *packed))
            if layers is not None and i in layers:
                hidden.append(x)
        return self.norm(x) if layers is None else tuple(hidden)


class Decoder(nn.Module):
    """Fills masked places with the mask token and returns the decoded masked tokens."""

    def __init__(self, c: MAEConfig):
        super().__init__()
        require(c.impl, "unshuffle")
        self.config = c
        width, heads = c.decoder_width, c.decoder_heads
        # MAE-AST hands the encoder's output over as it is.
        self.embed = nn.Linear(c.width, width) if c.norm == "pre" or c.width != width else nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = Positions(c.positions, c.grid(), c.prefix_tokens, width)
        self.input_norm = tokens_norm(c, width)
        depth = c.num_decoder_blocks
        local = {"window": depth, "hybrid": depth - c.global_blocks, "global": 0}[c.decoder]
        self.blocks = nn.ModuleList(
            self._window_block(c, shifted=i % 2 == 1) if i < local else global_block(c, width, heads)
            for i in range(depth)
        )
        self.layer_drop = LayerDrop(c.layer_drop)
        self.norm = nn.LayerNorm(width, eps=c.norm_eps) if c.norm == "pre" else nn.Identity()
        self.register_buffer("offsets", log_offsets(self._window(c.grid())), persistent=False)

    @staticmethod
    def _window_block(c: MAEConfig, shifted: bool) -> Block:
        attention = WindowAttention(
            c.decoder_width,
            c.decoder_heads,
            c.window,
            c.window_shift if shifted else (0, 0),
            c.bias_dropout,
            c.impl,
        )
        dropout = Dropout(c.dropout)
        return Block(attention, c.decoder_width, c.mlp_ratio, "res-post", c.norm_eps, dropout, c.recompute)

    def _window(self, grid: Grid) -> Grid:
        """A window no larger than the grid."""
        return min(self.config.window[0], grid[0]), min(self.config.window[1], grid[1])

    def _offsets(self, grid: Grid) -> Tensor:
        window = self._window(grid)
        if window == self._window(self.config.grid()):
            return self.offsets
        return log_offsets(window).to(self.offsets)

    def draw_span(self, mask: Mask, grid: Grid) -> Span:
        """The windows that a step decodes (`decode_ratio`): columns of windows that are neighbours in time.

        Neighbours, so that shifted windows find theirs: the decoder works on the span as on a clip of its own.
        Where the span begins is drawn for each row; the share is rounded to whole columns, at least one.
        """
        (steps, bands), (height, _) = grid, self._window(grid)
        columns = -(-steps // height)
        length = min(steps, max(1, round(columns * self.config.decode_ratio)) * height)
        starts = -(-(steps - length) // height) + 1
        device = mask.ids_keep.device
        first = torch.randint(starts, (mask.ids_keep.shape[0], 1), device=device) * height
        # Where windows do not tile the clip, the last start is moved so that the span ends with the clip.
        ids = first.clamp(max=steps - length) * bands + torch.arange(length * bands, device=device)
        masked = mask.dense().gather(1, ids)
        places = (~masked).to(torch.uint8).argsort(dim=1, stable=True)
        places = places[:, : min(mask.ids_masked.shape[1], ids.shape[1])]
        ids_masked = torch.where(masked.gather(1, places), ids.gather(1, places), -1)
        return Span((length, bands), ids, places, ids_masked)

    def forward(self, latent: Tensor, mask: Mask, grid: Grid, span: Span | None = None) -> Tensor:
        """(R, P + K, D) -> (R, M, decoder width), the masked tokens in the order of `mask.ids_masked`.

        With a `span`, those of the span in the order of `span.ids_masked`, anything where that holds -1.
        """
        prefix = self.config.prefix_tokens
        x = self.embed(latent)
        prefix_positions, positions = self.positions(grid)
        # The residual stream stays in the positions' precision under autocast, as in the encoder.
        tokens = x[:, prefix:].to(positions.dtype)
        tokens = unshuffle(tokens, mask.ids_keep, self.mask_token.flatten(), positions, impl=self.config.impl)
        ids_masked = mask.ids_masked
        if span is not None:
            tokens = tokens.gather(1, span.ids[:, :, None].expand(-1, -1, tokens.shape[2]))
            grid, ids_masked = span.grid, span.places
        # Window blocks need the bare grid: as published, they do without the cls token.
        prefix = prefix if self.config.decoder == "global" else 0
        if prefix:
            tokens = torch.cat([x[:, :prefix] + prefix_positions, tokens], dim=1)
        x = self.input_norm(tokens)
        offsets = self._offsets(grid)
        *inner, last = self.blocks
        for block in inner:
            x = self.layer_drop(x, block(x, *self._context(block, grid, offsets)))
        masked = ids_masked + prefix  # nobody reads the other tokens after the last attention
        y = last(x, *self._context(last, grid, offsets), ids=masked)
        return self.norm(self.layer_drop(take(x, masked), y))

    @staticmethod
    def _context(
        block: Block, grid: Grid | Sequence[Grid], offsets: Tensor, packed: Packed | None = None
    ) -> tuple:
        if isinstance(block.attn, WindowAttention):
            return grid, offsets
        return () if packed is None else (packed,)

    def forward_packed(self, latent: Tensor, rows: Rows) -> Tensor:
        """`forward` of packed rows: (total, D) with prefix -> (total, decoder width), the masked tokens."""
        c = self.config
        prefix, x = Rows.cut_prefix(self.embed(latent), rows.kept, c.prefix_tokens)
        positions = self.positions.packed(rows.grids)
        tokens = x.to(positions.dtype)[None]
        tokens = unshuffle(tokens, rows.ids_keep, self.mask_token.flatten(), positions, impl=c.impl)[0]
        num_prefix = c.prefix_tokens if c.decoder == "global" else 0
        if num_prefix:
            prefix_positions, _ = self.positions(rows.grids[-1])
            tokens = Rows.add_prefix([p + prefix_positions for p in prefix], tokens, rows.tokens)
        packed = Packed.of([num_prefix + n for n in rows.tokens], tokens.device)
        x = self.input_norm(tokens)
        offsets = self._offsets(rows.grids[-1])
        *inner, last = self.blocks
        for block in inner:
            x = self.layer_drop(x, block(x, *self._context(block, rows.grids, offsets, packed)))
        masked = rows.masked_after(num_prefix)
        y = last(x, *self._context(last, rows.grids, offsets, packed), ids=masked)
        return self.norm(self.layer_drop(take(x, masked), y))


@dataclass(frozen=True, eq=False)
class Span:
    """What a window decoder with `decode_ratio` below 1 decodes in a step: S tokens of each row.

    Attributes:
        grid: (time steps, bands) of the span.
        ids: (R, S) int64, its tokens.
        places: (R, M') which of these S to predict: the masked ones, ascending, and as many others as it takes to
            have the same number in every row.
        ids_masked: (R, M') int64 ids of the masked ones, then -1.
    """

    grid: Grid
    ids: Tensor
    places: Tensor
    ids_masked: Tensor


class CrossDecoder(nn.Module):
    """CrossMAE's decoder (Fu et al. 2024, section 3): masked tokens read the encoder's output, and not each other.

    A block is cross-attention and an MLP, without self-attention, so that any share of the masked tokens can be
    decoded (`decode_ratio`) and the cost is M' x (P + K) instead of L x L. Each block reads a weighted sum of the
    outputs of *all* encoder blocks (inter-block attention; weights learned, drawn with variance 1 / depth), through a
    LayerNorm of its own: depth of the decoder times R * (P + K) * D values are stored for that.

    Not the published Audio-MAE or MAE-AST: what is learned differs. The paper finds fine-tuned accuracy on images on a
    par with that of self-attention; on spectrograms nobody has measured it.
    """

    def __init__(self, c: MAEConfig):
        super().__init__()
        self.config = c
        width = c.decoder_width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = Positions(c.positions, c.grid(), c.prefix_tokens, width)
        self.input_norm = tokens_norm(c, width)
        depth = c.num_decoder_blocks
        self.mix = nn.Parameter(torch.empty(depth, c.depth).normal_(std=c.depth**-0.5))
        self.memory_norms = nn.ModuleList(nn.LayerNorm(c.width, eps=c.norm_eps) for _ in range(depth))
        self.blocks = nn.ModuleList(self._block(c) for _ in range(depth))
        self.layer_drop = LayerDrop(c.layer_drop)
        self.norm = nn.LayerNorm(width, eps=c.norm_eps) if c.norm == "pre" else nn.Identity()

    @staticmethod
    def _block(c: MAEConfig) -> Block:
        layer = CrossAttention(c.decoder_width, c.width, c.decoder_heads, c.attention_dropout)
        dropout = Dropout(c.dropout)
        return Block(layer, c.decoder_width, c.mlp_ratio, c.norm, c.norm_eps, dropout, c.recompute)

    def choose(self, mask: Mask) -> Mask:
        """The mask with max(1, int(M * decode_ratio)) of each row's M masked tokens, uniformly drawn, ascending."""

        def share(masked: int) -> int:
            return min(masked, max(1, int(masked * self.config.decode_ratio)))

        ids, ragged = mask.ids_masked, isinstance(mask, RaggedMask)
        counts = [share(n) for n in mask.masked] if ragged else [share(ids.shape[1])] * ids.shape[0]
        # -1 stands after a row's own: it is drawn last, and sorted last.
        noise = torch.rand(ids.shape, device=ids.device).masked_fill(ids < 0, 2.0)
        drawn = ids.gather(1, noise.argsort(dim=1))[:, : max(counts)]
        if not ragged:
            return Mask(mask.ids_keep, drawn.sort(dim=1).values, mask.num_tokens)
        rows = [row[:n].sort().values for row, n in zip(drawn, counts, strict=True)]
        return replace(mask, ids_masked=pad_sequence(rows, True, -1), masked=tuple(counts))

    def forward(self, features: Sequence[Tensor], mask: Mask, grid: Grid) -> Tensor:
        """Outputs of all encoder blocks (R, P + K, D) -> (R, M, decoder width) in the order of `mask.ids_masked`."""
        _, positions = self.positions(grid)
        return self._decode(features, F.embedding(mask.ids_masked, positions))

    def forward_packed(self, features: Sequence[Tensor], rows: Rows) -> Tensor:
        """`forward` of packed rows: (total, D) with prefix -> (total, decoder width)."""
        queries = F.embedding(rows.ids_masked[0], self.positions.packed(rows.grids))
        counts = (rows.masked, [self.config.prefix_tokens + n for n in rows.kept])
        return self._decode(features, queries, counts)

    def _decode(self, features: Sequence[Tensor], positions: Tensor, *counts) -> Tensor:
        x = self.input_norm(self.mask_token.view(-1) + positions)
        memories = torch.einsum("ij,j...->i...", self.mix, torch.stack(list(features)))
        for block, norm, memory in zip(self.blocks, self.memory_norms, memories, strict=True):
            x = self.layer_drop(x, block(x, norm(memory), *counts))
        return self.norm(x)


# -- models ------------------------------------------------------------------------------------------------


class SpectrogramModel(nn.Module, PretrainedMixin):
    """What every model here has: a configuration, an input normalisation, and an encoder to take features from."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.spectrogram_norm = spectrogram_norm(config)
        self.encoder = Encoder(config)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches in what `encode` returns: 1 for Audio-MAE, 0 for MAE-AST, 2 for SSAST."""
        return self.config.prefix_tokens

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the published recipe does not decay.

        Audio-MAE: biases and all other 1-D parameters (cls and mask token do decay). MAE-AST, SSAST: none.
        """
        if self.config.family != "audiomae":
            return set()
        return {name for name, p in self.named_parameters() if p.ndim <= 1}

    def draw_mask(
        self,
        batch: int,
        frames: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Mask:
        """A mask of the configured strategy and ratio for clips of so many frames (None: `config.frames`).

        `masks_per_clip` rows for each of `batch` clips. With `lengths` and `pad="exclude"` a `RaggedMask`, in which
        each clip keeps its share of its own tokens.
        """
        rows = getattr(self.config, "masks_per_clip", 1)
        clips = self.clips(lengths)
        if clips is not None and len(clips.frames) != batch:
            raise ValueError(
                f"a mask for {plural(batch, 'clip')} needs as many lengths, got {len(clips.frames)}"
            )
        if clips is None:
            return self._draw_mask(batch * rows, self.config.grid(frames), generator, device)
        grids = [grid for grid in clips.grids for _ in range(rows)]
        return RaggedMask.drawn(grids, lambda n, grid: self._draw_mask(n, grid, generator, device))

    def _draw_mask(self, rows: int, grid: Grid, generator, device) -> Mask:
        c = self.config
        return Mask.draw(c.masking, rows, grid, c.mask_ratio, generator, device)

    def clips(self, lengths: Tensor | Sequence[int] | None) -> Clips | None:
        """Where and how long the clips of a ragged batch are: `tokens` and `grids` of each.

        None where `pad="attend"`, or without lengths: the batch is dense then.

        Raises:
            ValueError: `lengths` are on a device, and reading them would wait for it, or they are a tensor under
                torch.compile.
        """
        if lengths is None or self.config.pad == "attend":
            return None
        if not isinstance(lengths, (list, tuple)):
            lengths = torch.as_tensor(lengths)
            if lengths.device.type != "cpu":
                raise ValueError(
                    f'lengths are on {lengths.device}, and with pad="exclude" the shapes depend on them: pass a list '
                    "or a tensor on the CPU, so that nothing waits for the device"
                )
            if torch.compiler.is_compiling():
                raise ValueError("under torch.compile lengths must be a list: shapes depend on them")
            lengths = lengths.tolist()
        return Clips.of(lengths, self.config, self.encoder.positions.max_steps)

    def normalise(self, spectrogram: Tensor, clips: Clips | None) -> Tensor:
        """What the encoder and the losses read: (B, T, F), or the long spectrogram of a ragged batch."""
        if clips is None:
            return self.spectrogram_norm(spectrogram)
        joined = clips.join(spectrogram)
        if self.config.input_norm == "none":
            return joined
        return self.spectrogram_norm(joined, clips.valid(spectrogram))

    def encode(
        self,
        spectrogram: Tensor,
        mask: Mask | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Encoder output, of all tokens or of those that `mask` keeps.

        Args:
            spectrogram: (B, T, F) or (B, 1, T, F) normalised log-mel.
            mask: R = B * m rows, row i belonging to clip i // m; None encodes every token.
            lengths: (B,) valid frames, integers. With `pad="attend"` what follows a clip's end is attended, as
                published, and they change nothing. With `pad="exclude"` it is never read: a clip is filled up with
                zeros to whole patches, all clips are packed without padding, and each gives what it gives alone.
                (`input_norm` with the statistics of the batch depends on the batch; it counts valid frames only.)
                They must be on the host then; under torch.compile a list, with dynamic=False, since another set of
                lengths is another graph. Attention costs a call for each clip where the backend has none for packed
                clips, attention in windows one for each run of clips of equal length.
            layers: block numbers from 1; then the outputs of these blocks are returned, in ascending order.

        Returns:
            (R, P + K, D) after the final norm, prefix tokens first; with `layers` a tuple of such tensors,
            before the final norm. Of a ragged batch K is that of the row with most, and zeros follow the P +
            `mask.kept[i]` tokens of row i; without a mask these are P + `model.clips(lengths).tokens[i]`.

        Raises:
            ValueError: the input, the lengths, the mask or a layer number does not fit the model.
        """
        spectrogram = check_spectrogram(spectrogram, lengths, self.encoder)
        clips = self.clips(lengths)
        if mask is not None:
            check_mask(mask, spectrogram, self.config, clips)
        numbers = range(1, self.config.depth + 1)
        if layers is not None and not (isinstance(layers, Sequence) and set(layers) <= set(numbers)):
            raise ValueError(
                f"layers must be a sequence of block numbers from 1 to {self.config.depth}, got {layers!r}"
            )
        spectrogram = self.normalise(spectrogram, clips)
        if clips is None:
            return self.encoder(spectrogram, None if mask is None else mask.ids_keep, layers)
        seen = RaggedMask.everything(clips.tokens, spectrogram.device) if mask is None else as_ragged(mask)
        rows = Rows(clips, seen)
        x = self.encoder.forward_packed(spectrogram, rows, mask is not None, layers)
        counts = [self.num_prefix_tokens + n for n in rows.kept]
        return rows.unpack(x, counts) if layers is None else tuple(rows.unpack(y, counts) for y in x)


class MaskedAutoencoder(SpectrogramModel):
    """Audio-MAE or MAE-AST: a deep encoder on the visible patches, a decoder, and losses on the masked ones.

    Build one with `audiomae.create_model`. Attribute `config` holds its `MAEConfig`.
    """

    config_class = MAEConfig

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        if config.decoder != "none":
            self.decoder = CrossDecoder(config) if config.decoder == "cross" else Decoder(config)
            if config.reconstruction_weight:
                require(config.impl, "masked_mse")
                self.reconstruction_head = nn.Linear(config.decoder_width, config.patch_values)
            if config.info_nce_weight:
                require(config.impl, "info_nce")
                self.info_nce_head = nn.Linear(config.decoder_width, config.patch_values)
        self._init_weights()

    def _init_weights(self) -> None:
        pre_norm = self.config.norm == "pre"
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and (pre_norm or ".blocks." in name):
                if pre_norm:  # He et al. 2022
                    nn.init.xavier_uniform_(module.weight)
                else:  # BERT's
                    nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.encoder.prefix is not None:
            nn.init.normal_(self.encoder.prefix, std=0.02)
        if self.config.decoder != "none":
            if pre_norm:
                nn.init.normal_(self.decoder.mask_token, std=0.02)
            else:
                nn.init.uniform_(self.decoder.mask_token)

    def forward(
        self,
        spectrogram: Tensor,
        mask: Mask | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Output:
        """Training loss of a batch.

        Args:
            spectrogram: (B, T, F) or (B, 1, T, F) normalised log-mel. Takes no gradient.
            mask: R = B * m rows, row i belonging to clip i // m; None draws one (`draw_mask`).
            lengths: see `encode`. Of a ragged batch, losses are means over all masked tokens of the batch, so that a
                long clip weighs more than a short one; InfoNCE contrasts the tokens of a row with each other only.

        Returns:
            `Output` with `loss` (scalar, fp32), `losses` (its parts, unweighted: "reconstruction",
            "info_nce"), `pred` (R, M, V) for the masked tokens in the order of `mask.ids_masked`, `mask`, and
            `pred_info_nce` (R, M, V) where there is that loss. Where `mask.ids_masked` of a ragged batch holds -1,
            predictions are 0. With `decode_ratio` below 1 there is `ids_decoded` (R, M') too: predictions and losses
            are those of these tokens, and 0 where it holds -1.

        Raises:
            ValueError: the input, the lengths or the mask does not fit the model.
        """
        c = self.config
        if c.decoder == "none":
            raise ValueError(
                "this model is an encoder without a decoder: use encode(), or create one with a decoder"
            )
        spectrogram = check_spectrogram(spectrogram, lengths, self.encoder)
        clips = self.clips(lengths)
        batch, frames, _ = spectrogram.shape
        if mask is None:
            mask = self.draw_mask(batch, frames, device=spectrogram.device, lengths=lengths)
        check_mask(mask, spectrogram, c, clips)
        spectrogram = self.normalise(spectrogram, clips)
        layers = range(1, c.depth + 1) if c.decoder == "cross" else None
        decoded = mask  # masks what is decoded, if that is not all
        if c.decoder == "cross" and c.decode_ratio < 1.0:
            decoded = self.decoder.choose(mask)
        if clips is None:
            rows, grid = None, c.grid(frames)
            latent = self._features(self.encoder(spectrogram, mask.ids_keep, layers))
            if c.decoder == "window" and c.decode_ratio < 1.0:
                span = self.decoder.draw_span(mask, grid)
                decoded = replace(mask, ids_masked=span.ids_masked)
                hidden = self.decoder(latent, mask, grid, span)
            else:
                hidden = self.decoder(latent, decoded, grid)
        else:
            rows = Rows(clips, as_ragged(decoded))
            latent = self._features(self.encoder.forward_packed(spectrogram, rows, layers=layers))
            hidden = self.decoder.forward_packed(latent, rows)[None]
        out = self.forward_loss(spectrogram, hidden, decoded, rows)
        if decoded is not mask:
            out["mask"], out["ids_decoded"] = mask, decoded.ids_masked
        return out

    def _features(self, encoded: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """What the decoder reads; of the layers that a cross decoder takes, the last one is normalised."""
        return encoded if isinstance(encoded, Tensor) else (*encoded[:-1], self.encoder.norm(encoded[-1]))

    def forward_loss(
        self, spectrogram: Tensor, hidden: Tensor, mask: Mask, rows: Rows | None = None
    ) -> Output:
        """Losses from the decoded masked tokens (R, M, decoder width), (1, total, decoder width) if packed."""
        c = self.config
        patches = {"patch": c.patch, "stride": c.stride, "impl": c.impl}
        ids = mask.ids_masked if rows is None else rows.patches_masked
        windows = c.decoder == "window" and c.decode_ratio < 1.0
        pred = pred_info_nce = None
        loss, losses = 0.0, {}
        if c.reconstruction_weight:
            pred = self.reconstruction_head(hidden)
            if windows:
                pred = pred.masked_fill((ids < 0)[:, :, None], 0.0)
            mse = some_masked_mse if windows else masked_mse
            losses["reconstruction"] = mse(pred, spectrogram, ids, normalize=c.normalize_target, **patches)
            loss = loss + c.reconstruction_weight * losses["reconstruction"]
        if c.info_nce_weight:
            pred_info_nce = self.info_nce_head(hidden)
            target = patch_gather(spectrogram, ids, **patches)
            losses["info_nce"] = contrast(pred_info_nce, target, "target", c.impl, rows)
            loss = loss + c.info_nce_weight * losses["info_nce"]
        if rows is not None:
            pred, pred_info_nce = rows.unpack_masked(pred), rows.unpack_masked(pred_info_nce)
        out = Output(loss=loss, losses=losses, pred=pred, mask=mask)
        if pred_info_nce is not None:
            out["pred_info_nce"] = pred_info_nce
        return out


def contrast(pred: Tensor, target: Tensor, over: str, impl: str | None, rows: Rows | None) -> Tensor:
    """`info_nce` of (R, M, V), or of packed rows (1, total, V), each among its own tokens."""
    if rows is None:
        return info_nce(pred, target, over=over, impl=impl)
    return ragged_info_nce(pred[0], target[0], rows.masked, over, impl)


def some_masked_mse(
    pred: Tensor,
    spectrogram: Tensor,
    ids: Tensor,
    *,
    patch: Grid,
    stride: Grid | None,
    normalize: bool,
    impl: str | None,
) -> Tensor:
    """`masked_mse` of the tokens whose id is not -1. Stores their targets (R, M, V), which the op does not."""
    counts = ids >= 0
    target = patch_gather(spectrogram, ids.clamp(min=0), patch=patch, stride=stride, impl=impl)
    target = target.to(torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32))
    if normalize:
        target = target - target.mean(dim=-1, keepdim=True)
        var = target.square().sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)
        target = target / (var + 1e-6).sqrt()
    error = (pred - target).masked_fill(~counts[:, :, None], 0.0)
    return error.square().sum() / (counts.sum() * target.shape[-1]).clamp(min=1)


def check_spectrogram(
    spectrogram: Tensor, lengths: Tensor | Sequence[int] | None, encoder: Encoder
) -> Tensor:
    """The spectrogram as (B, T, F), if the encoder can take it; a ValueError that says why not otherwise."""
    c = encoder.config
    if not isinstance(spectrogram, Tensor):
        raise TypeError(f"the spectrogram must be a tensor, got {type(spectrogram).__name__}")
    shape = tuple(spectrogram.shape)
    if spectrogram.ndim == 4 and shape[1] == 1:
        spectrogram = spectrogram[:, 0]
    if spectrogram.ndim != 3:
        raise ValueError(
            f"the spectrogram must be (B, T, {c.mel_bins}) or (B, 1, T, {c.mel_bins}), got {shape}"
        )
    batch, frames, mel_bins = spectrogram.shape
    if not spectrogram.is_floating_point():
        raise ValueError(f"the spectrogram must be a float tensor, got {spectrogram.dtype}")
    if batch == 0:
        raise ValueError(f"the batch is empty: the spectrogram has shape {shape}")
    if mel_bins != c.mel_bins:
        raise ValueError(
            f"the model takes {c.mel_bins} mel bins in the last dimension, got a spectrogram of shape {shape}"
        )
    filled = lengths is not None and c.pad == "exclude"
    if frames < (1 if filled else c.patch[0]):
        raise ValueError(f"a clip needs at least {plural(c.patch[0], 'frame')} (one patch), got {frames}")
    grid, limit = c.grid(frames), encoder.positions.max_steps
    if (limit is not None and grid[0] > limit) or grid[0] * grid[1] > MAX_FLAT_TOKENS:
        reach = f"{c.frames} frames" if limit is not None else f"{MAX_FLAT_TOKENS} tokens"
        raise ValueError(
            f"a clip of {plural(frames, 'frame')} is longer than the model's positions, which reach {reach}: "
            "cut the clip, or create the model with a larger frames="
        )
    if lengths is not None:
        check_lengths(lengths, batch, frames)
    return spectrogram


def check_lengths(lengths: Tensor | Sequence[int], batch: int, frames: int) -> None:
    """Refuses what is not one number of valid frames for each clip."""
    if not isinstance(lengths, (list, tuple)):
        lengths = torch.as_tensor(lengths)
        fits = lengths.shape == (batch,) and not lengths.is_floating_point()
        # On a GPU a look at the values would wait for the device.
        looks = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        given = f"{lengths.dtype} {tuple(lengths.shape)}"
        values = lengths.tolist() if fits and looks else []
    else:
        values, given = lengths, lengths
        fits = len(values) == batch and all(isinstance(n, int) for n in values)
    if not fits:
        raise ValueError(f"lengths must hold one integer for each of {batch} clips, got {given}")
    if not all(1 <= n <= frames for n in values):
        raise ValueError(f"lengths must lie between 1 and the {frames} frames given, got {values}")


def check_mask(mask: Mask, spectrogram: Tensor, c: EncoderConfig, clips: Clips | None = None) -> None:
    """Refuses what is no mask, and a mask of other grids, another batch or device."""
    if not isinstance(mask, Mask):
        raise TypeError(
            f"the mask must be an audiomae.Mask, got {type(mask).__name__}: make one with Mask.from_keep(ids_keep, "
            "num_tokens)"
        )
    batch, rows = spectrogram.shape[0], mask.ids_keep.shape[0]
    if clips is None:
        grid = c.grid(spectrogram.shape[1])
        if isinstance(mask, RaggedMask):
            raise ValueError(
                "the mask is for clips of different lengths, which takes lengths=... and a model with "
                'pad="exclude"'
            )
        if mask.num_tokens != grid[0] * grid[1]:
            raise ValueError(
                f"the mask is for {mask.num_tokens} tokens, but clips of {spectrogram.shape[1]} frames have "
                f"{grid[0]} x {grid[1]} = {grid[0] * grid[1]}"
            )
    if rows == 0 or rows % batch:
        raise ValueError(
            f"the mask has {plural(rows, 'row')}, which is no multiple of the batch of {plural(batch, 'clip')}"
        )
    if clips is not None:
        wanted = tuple(n for n in clips.tokens for _ in range(rows // batch))
        given = as_ragged(mask).tokens
        if given != wanted:
            raise ValueError(
                f"the mask is for clips of {list(given)} tokens, but clips of {list(clips.frames)} frames have "
                f'{list(wanted)} with pad="exclude": draw it with model.draw_mask(batch, lengths=...), or make it '
                "with Mask.from_keep(ids_keep of each row, tokens of each row)"
            )
    if mask.ids_keep.device != spectrogram.device:
        raise ValueError(
            f"the mask is on {mask.ids_keep.device}, the spectrogram on {spectrogram.device}: "
            "move it with mask.to(device)"
        )
