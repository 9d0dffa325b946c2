"""Named model configurations.

`list_models()` names the published ones; every field is an override of `create_model(name, **overrides)`.
A configuration is plain data: it is written beside the weights as JSON.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .attention import BACKENDS
from .frontend import Frontend
from .masking import SHARED, check_ratio
from .words import plural

DECODERS = ("window", "hybrid", "global", "cross", "none")
PADS = ("attend", "exclude")
POSITIONS = ("transposed", "grid", "flat", "learned")
NORMS = ("pre", "post")
INPUT_NORMS = ("none", "auto", "batch", "running")
RECOMPUTE = ("none", "activations", "blocks")
IMPLEMENTATIONS = (None, "reference", "native", "triton")


def is_name(source: object) -> bool:
    """Whether a text names a model, rather than a path or a hub id.

    It does so beside a file or folder of that name, which "./name" or a `Path` stands for: what a command does
    must not depend on the folder that it is started in.
    """
    return isinstance(source, str) and source in list_models()


def suggest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _check_count(name: str, value: Any) -> None:
    if not _is_count(value, 1):
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_pair(name: str, value: Any, least: int = 1) -> None:
    if not (isinstance(value, tuple) and len(value) == 2 and all(_is_count(v, least) for v in value)):
        raise ValueError(
            f"{name} must be a pair (time, frequency) of integers of at least {least}, got {value!r}"
        )


def _check_rate(name: str, value: Any) -> None:
    if not (isinstance(value, (int, float)) and 0.0 <= value < 1.0):
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def _check_loss_weights(reconstruction: float, info_nce: float) -> None:
    if not (reconstruction >= 0 and info_nce >= 0 and reconstruction + info_nce > 0):
        raise ValueError(
            "reconstruction_weight and info_nce_weight must not be negative, and one of them not 0, "
            f"got {reconstruction} and {info_nce}"
        )


def _check_masks_per_clip(number: int, masking: str) -> None:
    _check_count("masks_per_clip", number)
    if number > 1 and masking in SHARED:
        raise ValueError(
            f"masking={masking!r} draws one mask for the whole batch, so that masks_per_clip={number} would be "
            "the same mask again and again: choose another strategy, or masks_per_clip=1"
        )


@dataclass(kw_only=True)
class EncoderConfig:
    """A Vision Transformer over spectrogram patches.

    Attributes:
        frames: spectrogram frames that the positions reach; shorter clips use a part of them.
        mel_bins: mel bands of the spectrogram.
        patch, stride: (frames, mel bins) of a patch and of the step between patches (None: the patch).
        width, depth, heads, mlp_ratio: of the Transformer.
        norm: "pre" (ViT) or "post" (MAE-AST: fairseq's post-norm with one more LayerNorm in front).
        norm_eps: LayerNorm's epsilon.
        prefix_tokens: 0, 1 (cls) or 2 (cls and distillation) learned tokens before the patches.
        final_norm: a LayerNorm after the last pre-norm block.
        positions: "transposed" is Audio-MAE's published 2-D sin-cos table, built on the transposed grid;
            "grid" the same table on the right grid, published with overlapping patches; "flat" MAE-AST's 1-D
            interleaved sinusoids over the token index; "learned" SSAST's parameter.
        input_norm: "none", or MAE-AST's batch norm over the whole spectrogram, times 0.5: with the batch's
            statistics ("batch"), the running ones ("running"), or by train/eval mode ("auto").
        dropout, attention_dropout: regularisation rates in every block.
        input_dropout: of the visible tokens' embeddings when there is a mask.
        layer_drop: of whole layers, in encoder and decoder.
        drop_path: of the encoder's branches, clip by clip; rises linearly over the depth.
        impl: kernel implementation: None (the best there is), "reference", "native" or "triton".
        attention: who computes attention over all tokens, in the encoder and in global decoder blocks: None (the
            best there is: "native" on a CPU that has the native library, in float32 and bfloat16, else "sdpa";
            with impl="reference" or "triton" always "sdpa"), "native" (this project's kernel for CPUs), "sdpa"
            (PyTorch), "flash_attn" or "xformers" (packages of their own, on GPUs only).
        pad: what `lengths` do. "attend": nothing, as published: what a clip was filled up with is attended and
            reconstructed like the rest. "exclude": it is kept out of attention, input statistics, pooling and loss,
            and a clip gives what it gives alone (see `SpectrogramModel.encode`).
        recompute: what the backward pass computes again to save memory: "none"; "activations", the outputs of
            LayerNorm, GELU and window attention, so no product with weights; "blocks", everything but each
            block's input (activation checkpointing: one more forward pass).
        frontend: how a waveform becomes this model's input.
    """

    family: str
    frames: int = 1024
    mel_bins: int = 128
    patch: tuple[int, int] = (16, 16)
    stride: tuple[int, int] | None = None
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    norm: str = "pre"
    norm_eps: float = 1e-6
    prefix_tokens: int = 1
    final_norm: bool = True
    positions: str = "transposed"
    input_norm: str = "none"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    input_dropout: float = 0.0
    layer_drop: float = 0.0
    drop_path: float = 0.0
    impl: str | None = None
    attention: str | None = None
    pad: str = "attend"
    recompute: str = "activations"
    frontend: Frontend = field(default_factory=lambda: Frontend.named("audioset"))

    def __post_init__(self):
        _one_of("positions", self.positions, POSITIONS)
        _one_of("norm", self.norm, NORMS)
        _one_of("input_norm", self.input_norm, INPUT_NORMS)
        _one_of("impl", self.impl, IMPLEMENTATIONS)
        _one_of("attention", self.attention, (None, *BACKENDS))
        _one_of("pad", self.pad, PADS)
        _one_of("recompute", self.recompute, RECOMPUTE)
        _one_of("prefix_tokens", self.prefix_tokens, (0, 1, 2))
        for name in ("frames", "mel_bins", "width", "depth", "heads"):
            _check_count(name, getattr(self, name))
        _check_pair("patch", self.patch)
        _check_pair("stride", self.step)
        for name in ("mlp_ratio", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout", "input_dropout", "layer_drop", "drop_path"):
            _check_rate(name, getattr(self, name))
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width must be a multiple of 4 and of heads={self.heads}, got {self.width}")
        if self.frames < self.patch[0] or self.mel_bins < self.patch[1]:
            raise ValueError(
                f"a patch of {self.patch} does not fit into {self.frames} frames x {self.mel_bins} mel bins"
            )

    # Other people's trainers read these: outputs that are not predictions, and the configuration for the log.
    keys_to_ignore_at_inference: ClassVar = ["mask"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"type": type(self).__name__, **fields, "frontend": self.frontend.to_dict()}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @property
    def step(self) -> tuple[int, int]:
        """(frames, mel bins) between neighbouring patches."""
        return self.patch if self.stride is None else self.stride

    def grid_of_filled(self, frames: int) -> tuple[int, int]:
        """(T', F') tokens of a clip of so many frames that is filled up to whole patches."""
        return max(0, -(-(frames - self.patch[0]) // self.step[0])) + 1, self.grid()[1]

    @property
    def patch_values(self) -> int:
        return self.patch[0] * self.patch[1]

    def grid(self, frames: int | None = None) -> tuple[int, int]:
        """(T', F') tokens of a clip of so many frames; frames that fill no patch are left out."""
        frames = self.frames if frames is None else frames
        return (
            (frames - self.patch[0]) // self.step[0] + 1,
            (self.mel_bins - self.patch[1]) // self.step[1] + 1,
        )


@dataclass(kw_only=True)
class MAEConfig(EncoderConfig):
    """Masked autoencoder: Audio-MAE (Huang et al. 2022) or MAE-AST (Baade et al. 2022).

    Attributes:
        decoder: "window" (Audio-MAE's shifted local attention), "global", "hybrid" (the paper's: local
            blocks, then `global_blocks` global ones), "cross" (see `CrossDecoder`: faster, and not the published
            model) or "none" (an encoder alone).
        decoder_width, decoder_depth, decoder_heads: of the decoder; depth None means 16, 8, 12 (published) and 12.
        decode_ratio: share of the decoder's work that is done in a step, for speed: of the masked tokens ("cross"),
            or of the windows ("window"). Less than 1 changes what is learned and is not the published model: the
            loss covers what is decoded, drawn anew for each row and step, and the other tokens give no gradient;
            in a window decoder, what lies outside the decoded windows is no context either. What that costs in
            quality is not known for spectrograms.
        window, window_shift: tokens (time, frequency); every second window block is shifted.
        bias_dropout: dropout inside the MLP that makes the window's position bias; published: 0.1.
        masking, mask_ratio: strategy of `Mask` and share of the tokens that is masked.
        masks_per_clip: rows that `draw_mask` draws for each clip. The spectrogram is read once for all; a batch of
            fewer clips with several masks has more correlated gradients than one of as many clips.
        normalize_target: reconstruct patches normalised by their own mean and variance.
        reconstruction_weight, info_nce_weight: of the two losses; 0 leaves a head out.
    """

    decoder: str = "window"
    decoder_width: int = 512
    decoder_depth: int | None = None
    decoder_heads: int = 16
    global_blocks: int = 4
    window: tuple[int, int] = (4, 4)
    window_shift: tuple[int, int] = (2, 0)
    bias_dropout: float = 0.1
    decode_ratio: float = 1.0
    masking: str = "random"
    mask_ratio: float | tuple[float, float] = 0.8
    masks_per_clip: int = 1
    normalize_target: bool = True
    reconstruction_weight: float = 1.0
    info_nce_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _one_of("decoder", self.decoder, DECODERS)
        for name in ("decoder_width", "decoder_heads", "global_blocks"):
            _check_count(name, getattr(self, name))
        if self.decoder_depth is not None:
            _check_count("decoder_depth", self.decoder_depth)
        _check_pair("window", self.window)
        _check_pair("window_shift", self.window_shift, least=0)
        _check_rate("bias_dropout", self.bias_dropout)
        check_ratio(self.masking, self.mask_ratio)
        _check_masks_per_clip(self.masks_per_clip, self.masking)
        _check_loss_weights(self.reconstruction_weight, self.info_nce_weight)
        self._check_decode_ratio()
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ValueError(
                f"decoder_width must be a multiple of 4 and of decoder_heads={self.decoder_heads}, "
                f"got {self.decoder_width}"
            )
        if not all(s < w for s, w in zip(self.window_shift, self.window, strict=True)):
            raise ValueError(
                f"window_shift must lie inside the window {self.window}, got {self.window_shift}"
            )
        if self.decoder == "hybrid" and not 0 < self.global_blocks < self.num_decoder_blocks:
            raise ValueError(
                f"a hybrid decoder needs local and global blocks: global_blocks={self.global_blocks} "
                f"of {self.num_decoder_blocks}"
            )

    def _check_decode_ratio(self) -> None:
        if not (isinstance(self.decode_ratio, (int, float)) and 0.0 < self.decode_ratio <= 1.0):
            raise ValueError(f"decode_ratio must lie in (0, 1], got {self.decode_ratio!r}")
        if self.decode_ratio == 1.0 or self.decoder == "cross":
            return
        if self.decoder != "window":
            raise ValueError(
                f'decode_ratio={self.decode_ratio} needs decoder="cross" or "window": in a {self.decoder!r} decoder '
                "every token attends to every other"
            )
        # How many masked tokens the drawn windows hold is known on the device only.
        for name, excluded in (("info_nce_weight", self.info_nce_weight), ("pad", self.pad == "exclude")):
            if excluded:
                raise ValueError(
                    f"decode_ratio={self.decode_ratio} of a window decoder does not go with "
                    f'{name}={getattr(self, name)!r}: choose decode_ratio=1.0, or decoder="cross"'
                )

    @property
    def num_decoder_blocks(self) -> int:
        if self.decoder_depth is not None:
            return self.decoder_depth
        return {"window": 16, "global": 8, "hybrid": 12, "cross": 12, "none": 0}[self.decoder]


@dataclass(kw_only=True)
class SSASTConfig(EncoderConfig):
    """SSAST (Gong et al. 2022), the full-token baseline.

    Attributes:
        passes: 1 forward serves both losses, or 2 with a mask each, as the published code does.
        masking, mask_ratio, masks_per_clip: as in `MAEConfig`.
        reconstruction_weight, info_nce_weight: of the two losses; both are always computed.
    """

    family: str = "ssast"
    prefix_tokens: int = 2
    positions: str = "learned"
    passes: int = 1
    masking: str = "cluster"
    mask_ratio: float = 400 / 512
    masks_per_clip: int = 1
    reconstruction_weight: float = 10.0
    info_nce_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _one_of("passes", self.passes, (1, 2))
        check_ratio(self.masking, self.mask_ratio)
        _check_masks_per_clip(self.masks_per_clip, self.masking)
        _check_loss_weights(self.reconstruction_weight, self.info_nce_weight)


@dataclass(kw_only=True)
class ClassifierConfig(EncoderConfig):
    """A pre-trained encoder with mean pooling, a LayerNorm and a linear head.

    Attributes:
        num_classes: outputs of the head; `labels` of the front end may name them.
        mask_time, mask_frequency: shares of time steps and frequency bands that are masked in training.
    """

    num_classes: int
    final_norm: bool = False
    mask_time: float = 0.0
    mask_frequency: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _check_count("num_classes", self.num_classes)
        for name in ("mask_time", "mask_frequency"):
            _check_rate(name, getattr(self, name))
        labels = self.frontend.labels
        if labels is not None and len(labels) != self.num_classes:
            raise ValueError(
                f"the front end names {plural(len(labels), 'label')}, but num_classes is {self.num_classes}"
            )


Config = MAEConfig | SSASTConfig | ClassifierConfig

_SIZES = {  # width, heads; depth is 12 but for the large model
    "tiny": {"width": 192, "heads": 3},
    "small": {"width": 384, "heads": 6},
    "base": {"width": 768, "heads": 12},
    "large": {"width": 1024, "heads": 16, "depth": 24},
}
_MAE_AST = {
    "family": "mae_ast",
    "norm": "post",
    "norm_eps": 1e-5,
    "prefix_tokens": 0,
    "positions": "flat",
    "input_norm": "auto",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "input_dropout": 0.1,
    "layer_drop": 0.05,
    "decoder": "global",
    "decoder_width": 768,
    "decoder_depth": 2,
    "decoder_heads": 12,
    "normalize_target": False,
    "mask_ratio": 0.75,
    "reconstruction_weight": 10.0,
    "info_nce_weight": 1.0,
    "frontend": Frontend.named("mae_ast"),
}

MODELS: dict[str, MAEConfig | SSASTConfig] = {
    **{
        f"audiomae_{size}": MAEConfig(family="audiomae", **_SIZES[size])
        for size in ("small", "base", "large")
    },
    "mae_ast_patch_base": MAEConfig(**_MAE_AST, masking="chunk"),
    "mae_ast_frame_base": MAEConfig(**_MAE_AST, patch=(2, 128)),
    **{f"ssast_patch_{size}": SSASTConfig(**_SIZES[size]) for size in ("tiny", "small", "base")},
    **{
        f"ssast_frame_{size}": SSASTConfig(**_SIZES[size], patch=(2, 128), masking="random")
        for size in ("tiny", "small", "base")
    },
}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(MODELS)


def model_config(name: str, **overrides: Any) -> MAEConfig | SSASTConfig:
    """The named configuration with some fields replaced.

    Raises:
        ValueError: no such model, or no such field; near names are suggested.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}{suggest(name, MODELS)} (see audiomae.list_models())")
    if MODELS[name].positions == "transposed" and overrides.get("stride"):
        overrides.setdefault("positions", "grid")  # as published: overlapping patches have the right grid
    config = replace(MODELS[name], **overrides)
    if "frontend" in overrides:
        return config
    # The front end pads clips to the length that the model takes.
    frames = config.frontend.frames and config.frames
    return replace(config, frontend=replace(config.frontend, frames=frames, mel_bins=config.mel_bins))


def replace(config: Config, **overrides: Any) -> Config:
    """`dataclasses.replace` that names a wrong field and what was perhaps meant."""
    names = [f.name for f in dataclasses.fields(config)]
    for key in overrides:
        if key not in names:
            raise ValueError(f"{type(config).__name__} has no field {key!r}{suggest(key, names)}")
    return dataclasses.replace(config, **{key: _tupled(value) for key, value in overrides.items()})


def from_dict(data: dict[str, Any]) -> Config:
    """The configuration whose `to_dict` is `data`.

    Raises:
        ValueError: an unknown type or field.
    """
    types = {c.__name__: c for c in (MAEConfig, SSASTConfig, ClassifierConfig)}
    if not isinstance(data, dict):
        raise ValueError(f"a configuration must be a mapping, got {data!r:.80}")
    fields = {key: _tupled(value) for key, value in data.items() if key != "type"}
    if data.get("type") not in types:
        raise ValueError(
            f"the configuration's type must be one of {', '.join(types)}, got {data.get('type')!r}"
        )
    config = types[data["type"]]
    known = {f.name for f in dataclasses.fields(config)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"{config.__name__} has no field {unknown[0]!r}{suggest(unknown[0], known)}")
    if "frontend" in fields:
        fields["frontend"] = Frontend.from_dict(fields["frontend"])
    return config(**fields)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
