"""Masked autoencoders on spectrograms: Audio-MAE and MAE-AST, top to bottom.

Audio-MAE: Huang et al., "Masked Autoencoders that Listen", NeurIPS 2022 (arXiv 2207.06405).
MAE-AST: Baade et al., "MAE-AST: Masked Autoencoding Audio Spectrogram Transformer", Interspeech 2022
(arXiv 2203.16691).

Shapes: B clips, R = B * m rows (m masks of each clip, usually 1), T frames, F mel bins, grid (T', F') of
L = T' * F' tokens in time-major order t * F' + f, P prefix tokens, K kept and M masked tokens, D width,
H heads, d = D / H, V = patch values, N tokens of a window.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

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
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .attention import Packed, attention, require_backend
from .config import EncoderConfig, MAEConfig
from .masking import Grid, Mask
from .pretrained import PretrainedMixin

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


def sincos_2d(width: int, grid: Grid, transposed: bool = False) -> Tensor:
    """(L, D) fixed 2-D sin-cos positions: half of D encodes the frequency index, half the time index.

    Each half is [sin | cos] of position / 10000^(2i / (D/2)). `transposed` gives Audio-MAE's published table,
    which was built on the grid (F', T') while its tokens run over (T', F'): token i then has the codes of
    (i % T', i // T') instead of (i % F', i // F'). The codes stay unique.
    """
    token = torch.arange(grid[0] * grid[1], dtype=torch.float64)
    row = grid[0] if transposed else grid[1]
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    halves = []
    for position in (token % row, token.div(row, rounding_mode="floor")):
        angle = position[:, None] * omega
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()


def sinusoids_1d(width: int, tokens: int, device: torch.device | None = None) -> Tensor:
    """(L, D) positions of Vaswani et al. 2017, sin and cos interleaved, in float32 as MAE-AST has them."""
    step = torch.exp(torch.arange(0, width, 2, device=device).float() * (-math.log(10000.0) / width))
    angle = torch.arange(tokens, device=device).float()[:, None] * step
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


class Positions(nn.Module):
    """Position embeddings of the prefix and of a clip's tokens; `EncoderConfig.positions` names the kinds."""

    def __init__(self, kind: str, grid: Grid, prefix: int, width: int):
        super().__init__()
        self.kind, self.grid, self.prefix = kind, grid, prefix
        tokens = grid[0] * grid[1]
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


# -- blocks --------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


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
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (..., L, 3, H, d)
        dropout = self.dropout if self.training else 0.0
        return self.proj(attention(qkv, packed=packed, dropout=dropout, backend=self.backend))


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

    def forward(self, x: Tensor, grid: Grid, offsets: Tensor) -> Tensor:
        """x (B, L, D); offsets (N, N, 2) from `log_offsets`."""
        bias = self.bias_mlp(offsets).permute(2, 0, 1)  # (H, N, N)
        x = window_attention(
            self.qkv(x), self.tau, bias, grid=grid, window=self.window, shift=self.shift, impl=self.impl
        )
        return self.proj(x)


def log_offsets(window: Grid) -> Tensor:
    """(N, N, 2) sign(d) * ln(1 + |d|) of the offsets d in time and frequency between a window's tokens."""
    axes = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    place = torch.stack(axes, dim=-1).flatten(0, 1).float()  # (N, 2)
    offset = place[:, None] - place[None]
    return offset.sign() * offset.abs().log1p()


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): leaves a branch out for some of the clips."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.empty(x.shape[0], 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.rate)
        return x * keep / (1.0 - self.rate)


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
    """

    def __init__(
        self, attention: nn.Module, width: int, mlp_ratio: float, norm: str, eps: float, dropout: nn.Module
    ):
        super().__init__()
        self.order = norm
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, round(width * mlp_ratio))
        self.dropout = dropout

    def forward(self, x: Tensor, *context: Grid | Tensor | Packed) -> Tensor:
        """`context` is what the attention takes beside x."""
        x = self._branch(x, self.norm1, self.attn, *context)
        return self._branch(x, self.norm2, self.mlp)

    def _branch(
        self, x: Tensor, norm: nn.Module, layer: nn.Module, *context: Grid | Tensor | Packed
    ) -> Tensor:
        if self.order == "pre":
            return x + self.dropout(layer(norm(x), *context))
        if self.order == "res-post":
            return x + self.dropout(norm(layer(x, *context)))
        return norm(x + self.dropout(layer(x, *context)))


def global_block(c: EncoderConfig, width: int, heads: int, drop_path: float = 0.0) -> Block:
    dropout = nn.Dropout(c.dropout)
    if drop_path:
        dropout = nn.Sequential(dropout, DropPath(drop_path))
    # Our own kernel is one of the kernels that `impl` names, and neither a reference nor Triton's.
    backend = "sdpa" if c.attention is None and c.impl in ("reference", "triton") else c.attention
    layer = GlobalAttention(width, heads, c.attention_dropout, backend)
    return Block(layer, width, c.mlp_ratio, c.norm, c.norm_eps, dropout)


class SpectrogramNorm(nn.BatchNorm2d):
    """MAE-AST's input: the batch's spectrograms normalised by their joint mean and variance, times 0.5.

    mode: "batch" (statistics of this batch), "running" (stored ones) or "auto" (batch in training).
    """

    def __init__(self, mode: str):
        super().__init__(1, affine=False)
        self.mode = mode

    def forward(self, spectrogram: Tensor) -> Tensor:
        """(B, T, F) -> (B, T, F) in the dtype of the statistics."""
        spectrogram = spectrogram.to(self.running_mean.dtype)
        batch = self.training if self.mode == "auto" else self.mode == "batch"
        running = (self.running_mean, self.running_var)
        if batch and self.training:
            self.num_batches_tracked.add_(1)
        elif batch:
            running = (None, None)  # in evaluation the stored statistics stay as they are
        x = F.batch_norm(spectrogram[:, None], *running, training=batch, momentum=self.momentum, eps=self.eps)
        return 0.5 * x[:, 0]


def spectrogram_norm(c: EncoderConfig) -> nn.Module:
    return nn.Identity() if c.input_norm == "none" else SpectrogramNorm(c.input_norm)


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
        self.input_dropout = nn.Dropout(c.input_dropout)
        self.layer_drop = LayerDrop(c.layer_drop)
        self.input_norm = (
            nn.Sequential(nn.LayerNorm(c.width, eps=c.norm_eps), nn.Dropout(c.dropout))
            if c.norm == "post"
            else nn.Identity()
        )
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

    def embed(self, spectrogram: Tensor, ids: Tensor) -> Tensor:
        """(B, T, F), (R, K) -> (R, K, D): linear patch embeddings without positions."""
        c = self.config
        patches = patch_gather(spectrogram, ids, patch=c.patch, stride=c.stride, impl=c.impl)
        return self.patch_embed(patches.to(self.patch_embed.weight.dtype))

    def transform(
        self, x: Tensor, grid: Grid, layers: Sequence[int] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """(R, K, D) tokens with positions -> (R, P + K, D)."""
        if self.prefix is not None:
            prefix_positions, _ = self.positions(grid)
            x = torch.cat([(self.prefix + prefix_positions).expand(x.shape[0], -1, -1), x], dim=1)
        x = self.input_norm(x)
        hidden = []
        for i, block in enumerate(self.blocks, start=1):
            x = self.layer_drop(x, block(x))
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
        self.input_norm = (
            nn.Sequential(nn.LayerNorm(width, eps=c.norm_eps), nn.Dropout(c.dropout))
            if c.norm == "post"
            else nn.Identity()
        )
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
        return Block(attention, c.decoder_width, c.mlp_ratio, "res-post", c.norm_eps, nn.Dropout(c.dropout))

    def _window(self, grid: Grid) -> Grid:
        """A window no larger than the grid."""
        return min(self.config.window[0], grid[0]), min(self.config.window[1], grid[1])

    def _offsets(self, grid: Grid) -> Tensor:
        window = self._window(grid)
        if window == self._window(self.config.grid()):
            return self.offsets
        return log_offsets(window).to(self.offsets)

    def forward(self, latent: Tensor, mask: Mask, grid: Grid) -> Tensor:
        """(R, P + K, D) -> (R, M, decoder width), the masked tokens in the order of `mask.ids_masked`."""
        prefix = self.config.prefix_tokens
        x = self.embed(latent)
        prefix_positions, positions = self.positions(grid)
        # The residual stream stays in the positions' precision under autocast, as in the encoder.
        tokens = x[:, prefix:].to(positions.dtype)
        tokens = unshuffle(tokens, mask.ids_keep, self.mask_token.flatten(), positions, impl=self.config.impl)
        # Window blocks need the bare grid: as published, they do without the cls token.
        prefix = prefix if self.config.decoder == "global" else 0
        if prefix:
            tokens = torch.cat([x[:, :prefix] + prefix_positions, tokens], dim=1)
        x = self.input_norm(tokens)
        offsets = self._offsets(grid)
        for block in self.blocks:
            window = (grid, offsets) if isinstance(block.attn, WindowAttention) else ()
            x = self.layer_drop(x, block(x, *window))
        masked = (mask.ids_masked + prefix)[:, :, None].expand(-1, -1, x.shape[2])
        return self.norm(x.gather(1, masked))


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
    ) -> Mask:
        """A mask of the configured strategy and ratio for clips of so many frames (None: `config.frames`)."""
        c = self.config
        return Mask.draw(c.masking, batch, c.grid(frames), c.mask_ratio, generator, device)

    def encode(
        self,
        spectrogram: Tensor,
        mask: Mask | None = None,
        lengths: Tensor | None = None,
        layers: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Encoder output, of all tokens or of those that `mask` keeps.

        Args:
            spectrogram: (B, T, F) or (B, 1, T, F) normalised log-mel.
            mask: R = B * m rows, row i belonging to clip i // m; None encodes every token.
            lengths: (B,) valid frames. Zeros after a clip's end are attended, as published, so they change
                nothing here.
            layers: block numbers from 1; then the outputs of these blocks are returned, in ascending order.

        Returns:
            (R, P + K, D) after the final norm, prefix tokens first; with `layers` a tuple of such tensors,
            before the final norm.

        Raises:
            ValueError: the input, the mask or a layer number does not fit the model.
        """
        spectrogram = check_spectrogram(spectrogram, lengths, self.encoder)
        if mask is not None:
            check_mask(mask, spectrogram, self.config)
        numbers = range(1, self.config.depth + 1)
        if layers is not None and not (isinstance(layers, Sequence) and set(layers) <= set(numbers)):
            raise ValueError(
                f"layers must be a sequence of block numbers from 1 to {self.config.depth}, got {layers!r}"
            )
        ids_keep = None if mask is None else mask.ids_keep
        return self.encoder(self.spectrogram_norm(spectrogram), ids_keep, layers)


class MaskedAutoencoder(SpectrogramModel):
    """Audio-MAE or MAE-AST: a deep encoder on the visible patches, a decoder, and losses on the masked ones.

    Build one with `audiomae.create_model`. Attribute `config` holds its `MAEConfig`.
    """

    config_class = MAEConfig

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        if config.decoder != "none":
            self.decoder = Decoder(config)
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

    def forward(self, spectrogram: Tensor, mask: Mask | None = None, lengths: Tensor | None = None) -> Output:
        """Training loss of a batch.

        Args:
            spectrogram: (B, T, F) or (B, 1, T, F) normalised log-mel. Takes no gradient.
            mask: R = B * m rows, row i belonging to clip i // m; None draws one (`draw_mask`).
            lengths: see `encode`.

        Returns:
            `Output` with `loss` (scalar, fp32), `losses` (its parts, unweighted: "reconstruction",
            "info_nce"), `pred` (R, M, V) for the masked tokens in the order of `mask.ids_masked`, `mask`, and
            `pred_info_nce` (R, M, V) where there is that loss.

        Raises:
            ValueError: the input or the mask does not fit the model.
        """
        if self.config.decoder == "none":
            raise ValueError(
                "this model is an encoder without a decoder: use encode(), or create one with a decoder"
            )
        spectrogram = check_spectrogram(spectrogram, lengths, self.encoder)
        if mask is None:
            mask = self.draw_mask(spectrogram.shape[0], spectrogram.shape[1], device=spectrogram.device)
        check_mask(mask, spectrogram, self.config)
        spectrogram = self.spectrogram_norm(spectrogram)
        latent = self.encoder(spectrogram, mask.ids_keep)
        hidden = self.decoder(latent, mask, self.config.grid(spectrogram.shape[1]))
        return self.forward_loss(spectrogram, hidden, mask)

    def forward_loss(self, spectrogram: Tensor, hidden: Tensor, mask: Mask) -> Output:
        """Losses from the decoded masked tokens (R, M, decoder width); see `forward`."""
        c = self.config
        patches = {"patch": c.patch, "stride": c.stride, "impl": c.impl}
        pred = pred_info_nce = None
        loss, losses = 0.0, {}
        if c.reconstruction_weight:
            pred = self.reconstruction_head(hidden)
            losses["reconstruction"] = masked_mse(
                pred, spectrogram, mask.ids_masked, normalize=c.normalize_target, **patches
            )
            loss = loss + c.reconstruction_weight * losses["reconstruction"]
        if c.info_nce_weight:
            pred_info_nce = self.info_nce_head(hidden)
            target = patch_gather(spectrogram, mask.ids_masked, **patches)
            losses["info_nce"] = info_nce(pred_info_nce, target, over="target", impl=c.impl)
            loss = loss + c.info_nce_weight * losses["info_nce"]
        out = Output(loss=loss, losses=losses, pred=pred, mask=mask)
        if pred_info_nce is not None:
            out["pred_info_nce"] = pred_info_nce
        return out


def check_spectrogram(spectrogram: Tensor, lengths: Tensor | None, encoder: Encoder) -> Tensor:
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
    if frames < c.patch[0]:
        raise ValueError(f"a clip needs at least {c.patch[0]} frames (one patch), got {frames}")
    grid, limit = c.grid(frames), encoder.positions.max_steps
    if (limit is not None and grid[0] > limit) or grid[0] * grid[1] > MAX_FLAT_TOKENS:
        reach = f"{c.frames} frames" if limit is not None else f"{MAX_FLAT_TOKENS} tokens"
        raise ValueError(
            f"a clip of {frames} frames is longer than the model's positions, which reach {reach}: "
            "cut the clip, or create the model with a larger frames="
        )
    if lengths is not None:
        given = torch.as_tensor(lengths)
        if given.shape != (batch,) or given.is_floating_point():
            raise ValueError(
                f"lengths must hold one integer for each of {batch} clips, got {given.dtype} {tuple(given.shape)}"
            )
        # On a GPU a look at the values would wait for the device.
        looks = given.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and not ((given >= 1) & (given <= frames)).all():
            raise ValueError(
                f"lengths must lie between 1 and the {frames} frames given, got {given.tolist()}"
            )
    return spectrogram


def check_mask(mask: Mask, spectrogram: Tensor, c: EncoderConfig) -> None:
    """Refuses what is no mask, and a mask of another grid, batch or device."""
    if not isinstance(mask, Mask):
        raise TypeError(
            f"the mask must be an audiomae.Mask, got {type(mask).__name__}: make one with Mask.from_keep(ids_keep, "
            "num_tokens)"
        )
    grid, rows = c.grid(spectrogram.shape[1]), mask.ids_keep.shape[0]
    if mask.num_tokens != grid[0] * grid[1]:
        raise ValueError(
            f"the mask is for {mask.num_tokens} tokens, but clips of {spectrogram.shape[1]} frames have "
            f"{grid[0]} x {grid[1]} = {grid[0] * grid[1]}"
        )
    if rows == 0 or rows % spectrogram.shape[0]:
        raise ValueError(
            f"the mask has {rows} rows, which is no multiple of the batch of {spectrogram.shape[0]} clips"
        )
    if mask.ids_keep.device != spectrogram.device:
        raise ValueError(
            f"the mask is on {mask.ids_keep.device}, the spectrogram on {spectrogram.device}: "
            "move it with mask.to(device)"
        )
