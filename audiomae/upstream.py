"""Published checkpoints in and out: Audio-MAE, SSAST, MAE-AST, and timm's port of the Audio-MAE encoder.

A state dict is recognised by its keys, sizes are read off the shapes, and every tensor goes through a `Rule` that
can be undone: `to_upstream(from_upstream(sd))` is `sd`, key by key and bit by bit. What a model has no use for is
carried along.

Token order: Audio-MAE and MAE-AST number tokens time-major, as this project does. SSAST numbers them
frequency-major and reads patches as (mel, time): its kernels, patch outputs and positions are permuted.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .classifier import Classifier
from .config import MODELS, ClassifierConfig, Config, MAEConfig, SSASTConfig, replace
from .model import MAX_FLAT_TOKENS, MaskedAutoencoder, SpectrogramModel, same_table, sincos_2d, sinusoids_1d
from .pretrained import Upstream, build, check_finite, read_safetensors
from .ssast import SSAST
from .words import plural

State = dict[str, Tensor]

AUDIOMAE, AUDIOMAE_ENCODER, AUDIOMAE_FINETUNED = "Audio-MAE", "Audio-MAE encoder", "Audio-MAE fine-tuned"
AUDIOMAE_POOLED = "Audio-MAE encoder with pooling"  # timm's classifier without its head
SSAST_KIND, MAE_AST_KIND = "SSAST", "MAE-AST"

# A key (or the start of keys) that only this kind has; the first that fits names it.
_KINDS = {
    "decoder_blocks.0.": AUDIOMAE,
    "post_extract_proj.": MAE_AST_KIND,
    "v.patch_embed.": SSAST_KIND,
    "fc_norm.": AUDIOMAE_FINETUNED,
    "patch_embed.proj.": AUDIOMAE_ENCODER,
}


# -- rules ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One of our tensors and the upstream tensors it is made of."""

    ours: str
    theirs: tuple[str, ...]
    decode: Callable[[list[Tensor]], Tensor] = lambda tensors: tensors[0]
    encode: Callable[[Tensor], list[Tensor]] = lambda tensor: [tensor]


def _linear(ours: str, theirs: str) -> Iterator[Rule]:
    for part in ("weight", "bias"):
        yield Rule(f"{ours}.{part}", (f"{theirs}.{part}",))


def _joined(ours: str, theirs: tuple[str, ...], dim: int = 0) -> Rule:
    """Several tensors of one size, one after the other."""
    return Rule(ours, theirs, lambda t: torch.cat(t, dim), lambda t: list(t.chunk(len(theirs), dim)))


def _kernel(ours: str, theirs: str, patch: tuple[int, int]) -> Rule:
    """Conv2d weight (D, 1, pt, pf) <-> Linear weight (D, pt * pf)."""
    return Rule(ours, (theirs,), lambda t: t[0].flatten(1), lambda t: [t.unflatten(1, (1, *patch))])


def _vit_block(ours: str, theirs: str) -> Iterator[Rule]:
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        yield from _linear(f"{ours}.{part}", f"{theirs}.{part}")


def _window_block(ours: str, theirs: str) -> Iterator[Rule]:
    yield from _vit_block(ours, theirs)
    yield Rule(f"{ours}.attn.tau", (f"{theirs}.attn.tau",))
    yield from _linear(f"{ours}.attn.bias_mlp.0", f"{theirs}.attn.meta_mlp.fc1")
    yield from _linear(f"{ours}.attn.bias_mlp.3", f"{theirs}.attn.meta_mlp.fc2")


def _fairseq_block(ours: str, theirs: str) -> Iterator[Rule]:
    for part in ("weight", "bias"):
        names = tuple(f"{theirs}.self_attn.{x}_proj.{part}" for x in "qkv")
        yield _joined(f"{ours}.attn.qkv.{part}", names)
    for a, b in (
        ("attn.proj", "self_attn.out_proj"),
        ("norm1", "self_attn_layer_norm"),
        ("mlp.fc1", "fc1"),
        ("mlp.fc2", "fc2"),
        ("norm2", "final_layer_norm"),
    ):
        yield from _linear(f"{ours}.{a}", f"{theirs}.{b}")


def _audiomae_rules(c: MAEConfig | ClassifierConfig) -> Iterator[Rule]:
    yield Rule("encoder.prefix", ("cls_token",))
    yield Rule("encoder.positions.table", ("pos_embed",))
    yield _kernel("encoder.patch_embed.weight", "patch_embed.proj.weight", c.patch)
    yield Rule("encoder.patch_embed.bias", ("patch_embed.proj.bias",))
    for i in range(c.depth):
        yield from _vit_block(f"encoder.blocks.{i}", f"blocks.{i}")
    if isinstance(c, ClassifierConfig):
        yield from _linear("fc_norm", "fc_norm")
        yield from _linear("head", "head")
        return
    yield from _linear("encoder.norm", "norm")
    if c.decoder == "none":
        return
    yield Rule("decoder.mask_token", ("mask_token",))
    yield Rule("decoder.positions.table", ("decoder_pos_embed",))
    local = {"window": c.num_decoder_blocks, "hybrid": c.num_decoder_blocks - c.global_blocks, "global": 0}
    for i in range(c.num_decoder_blocks):
        block = _window_block if i < local[c.decoder] else _vit_block
        yield from block(f"decoder.blocks.{i}", f"decoder_blocks.{i}")
    yield from _linear("decoder.embed", "decoder_embed")
    yield from _linear("decoder.norm", "decoder_norm")
    yield from _linear("reconstruction_head", "decoder_pred")


def _ssast_rules(c: SSASTConfig) -> Iterator[Rule]:
    (pt, pf), (frames, bands) = c.patch, c.grid()

    def swap(dim: int, first: int, second: int) -> Callable[[Tensor], Tensor]:
        """(..., first * second, ...) -> (..., second * first, ...)."""
        return lambda t: t.unflatten(dim, (first, second)).transpose(dim, dim + 1).flatten(dim, dim + 1)

    def tokens(reorder: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        return torch.cat([t[:, : c.prefix_tokens], reorder(t[:, c.prefix_tokens :])], dim=1)

    to_time_major, to_frequency_major = swap(1, bands, frames), swap(1, frames, bands)
    rows_in, rows_out = swap(0, pf, pt), swap(0, pt, pf)  # patch values: (mel, time) <-> (time, mel)
    yield Rule("mask_token", ("mask_embed",))
    yield _joined("encoder.prefix", ("v.cls_token", "v.dist_token"), dim=1)
    yield Rule(
        "encoder.positions.table",
        ("v.pos_embed",),
        lambda t: tokens(to_time_major, t[0]),
        lambda t: [tokens(to_frequency_major, t)],
    )
    yield Rule(
        "encoder.patch_embed.weight",
        ("v.patch_embed.proj.weight",),
        lambda t: t[0].transpose(2, 3).flatten(1),
        lambda t: [t.unflatten(1, (1, pt, pf)).transpose(2, 3)],
    )
    yield Rule("encoder.patch_embed.bias", ("v.patch_embed.proj.bias",))
    for i in range(c.depth):
        yield from _vit_block(f"encoder.blocks.{i}", f"v.blocks.{i}")
    yield from _linear("encoder.norm", "v.norm")
    for ours, theirs in (("info_nce_head", "cpredlayer"), ("reconstruction_head", "gpredlayer")):
        yield from _linear(f"{ours}.0", f"{theirs}.0")
        for part in ("weight", "bias"):
            yield Rule(
                f"{ours}.2.{part}",
                (f"{theirs}.2.{part}",),
                lambda t: rows_in(t[0]),
                lambda t: [rows_out(t)],
            )


def _mae_ast_rules(c: MAEConfig) -> Iterator[Rule]:
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        yield Rule(f"spectrogram_norm.{name}", (f"batch_norm.{name}",))
    yield from _linear("encoder.patch_embed", "post_extract_proj")
    yield from _linear("encoder.input_norm.0", "encoder.layer_norm")
    for i in range(c.depth):
        yield from _fairseq_block(f"encoder.blocks.{i}", f"encoder.layers.{i}")
    yield Rule("decoder.mask_token", ("decoder_mask_emb",), lambda t: t[0][None, None], lambda t: [t[0, 0]])
    yield from _linear("decoder.input_norm.0", "decoder.layer_norm")
    for i in range(c.num_decoder_blocks):
        yield from _fairseq_block(f"decoder.blocks.{i}", f"decoder.layers.{i}")
    yield from _linear("reconstruction_head", "final_proj_reconstruction")
    yield from _linear("info_nce_head", "final_proj_classification")


def upstream_rules(config: Config) -> list[Rule]:
    """How a model's tensors correspond to upstream's. Linear, so that gradients go the same way.

    Raises:
        ValueError: upstream has no model of this kind.
    """
    if isinstance(config, MAEConfig) and config.decoder == "cross":
        raise ValueError(
            f'there is no published form of a {config.family} with decoder="cross", an option of this project: '
            "model.save_pretrained keeps it"
        )
    if config.family == "audiomae":
        return list(_audiomae_rules(config))
    if isinstance(config, SSASTConfig):
        return list(_ssast_rules(config))
    if isinstance(config, MAEConfig) and config.decoder == "global":
        return list(_mae_ast_rules(config))
    raise ValueError(f"there is no published form of a {config.family} {type(config).__name__}")


# -- in ------------------------------------------------------------------------------------------------------


def from_upstream(state_dict: State, **overrides: Any) -> MaskedAutoencoder | SSAST | Classifier:
    """A model with the weights of a published checkpoint.

    Args:
        state_dict: names and tensors of a pre-trained Audio-MAE (window, global or mixed decoder), a fine-tuned
            one, timm's port of its encoder (pre-trained or fine-tuned), SSAST, or MAE-AST. Sizes are inferred.
        overrides: what keys and shapes cannot say. `tokens="patch"|"frame"` is needed for MAE-AST;
            `normalize_target` (default True for Audio-MAE), `window_shift`, `stride`, `num_heads` (default:
            heads of 64), and any other field of the configuration.

    Returns:
        The model, in the dtype of the tensors, on the CPU, sharing no memory with them. `model.upstream` carries
        what it had no use for. An encoder that timm saved with `fc_norm` and no head becomes a classifier whose
        head is the identity: its logits are timm's pooled features.

    Raises:
        ValueError: no known kind of checkpoint, missing tensors, tensors of the wrong shape or type, or
            overrides that do not fit.
    """
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"a state dict maps names to tensors, but {name!r} is mapped to a {type(tensor).__name__}"
            )
        if tensor.layout == torch.strided and tensor.device.type != "meta":
            stored = tensor.untyped_storage().nbytes() // tensor.element_size()
            if tensor.numel() > stored:
                raise ValueError(f"{name} claims {tensor.numel():,} values, of which {stored:,} are stored")
    prefix = "module." if state_dict and all(name.startswith("module.") for name in state_dict) else ""
    state = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    kind = recognize(state)
    if "tokens" in overrides and kind != MAE_AST_KIND:
        raise ValueError(f"tokens= tells MAE-AST's models apart, and this is a checkpoint of {kind}")
    given = state
    try:
        if kind == AUDIOMAE_POOLED:
            (width,) = _shape(state, "fc_norm.weight", 1)
            state = state | _identity_head(width, state["fc_norm.weight"].dtype)
        config = _infer_config(kind, state, dict(overrides))
    except KeyError as error:
        raise ValueError(f"this looks like a checkpoint of {kind}, but {error.args[0]} is missing") from None
    rules = upstream_rules(config)
    missing = [name for rule in rules for name in rule.theirs if name not in state]
    if missing:
        raise ValueError(
            f"this looks like a checkpoint of {kind}, but it lacks {plural(len(missing), 'tensor')}: {_listed(missing)}"
        )
    with torch.device("meta"):  # shapes first: nothing is allocated before everything fits
        expected = build(config).state_dict()
    _check_covered(rules, expected, kind)
    ours = {rule.ours: _decoded(rule, state, expected[rule.ours]) for rule in rules}
    check_finite(ours, f"this checkpoint of {kind}")
    used = {name for rule in rules for name in rule.theirs}
    extras = {name: _copied(tensor) for name, tensor in given.items() if name not in used}
    _check_sinusoids(extras)
    model = build(config).to(ours["encoder.patch_embed.weight"].dtype)
    model.load_state_dict(ours, assign=True)  # each tensor keeps its own dtype
    model.upstream = Upstream(kind, prefix, extras)
    return model


def recognize(state: State) -> str:
    """Which published state dict this is, by its keys.

    Raises:
        ValueError: none of them; the message names keys that would have told.
    """
    for mark, kind in _KINDS.items():
        if any(name.startswith(mark) for name in state):
            headless = kind == AUDIOMAE_FINETUNED and not any(name.startswith("head.") for name in state)
            return AUDIOMAE_POOLED if headless else kind
    raise ValueError(
        f"this state dict matches no known model. None of its {plural(len(state), 'key')} ({_listed(list(state))}) "
        f"starts like {', '.join(f'{mark}* ({kind})' for mark, kind in _KINDS.items())}"
    )


def _decoded(rule: Rule, state: State, expected: Tensor) -> Tensor:
    """The rule's tensor out of upstream's, if it has the shape of `expected` and is float where that is."""
    given = [state[name] for name in rule.theirs]
    try:
        tensor = rule.decode(given)
    except (RuntimeError, IndexError):
        tensor = None
    if tensor is None or tensor.shape != expected.shape:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(rule.theirs, given, strict=True))
        raise ValueError(
            f"wrong shape: {shapes} cannot become our {rule.ours} of shape {tuple(expected.shape)}"
        )
    floating = expected.is_floating_point()
    if len({t.dtype for t in given}) > 1 or any(
        t.layout != torch.strided or t.is_floating_point() != floating for t in given
    ):
        types = ", ".join(f"{n} {t.layout} {t.dtype}" for n, t in zip(rule.theirs, given, strict=True))
        wanted = "float" if floating else "integer"
        raise ValueError(
            f"wrong type: {types} cannot become our {rule.ours}, a dense tensor of one {wanted} type"
        )
    return _copied(tensor)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _identity_head(width: int, dtype: torch.dtype) -> State:
    """A head that returns what `fc_norm` gives."""
    return {"head.weight": torch.eye(width, dtype=dtype), "head.bias": torch.zeros(width, dtype=dtype)}


def _check_covered(rules: list[Rule], ours: State, kind: str) -> None:
    """Refuses a model whose tensors are not exactly those that `kind` has names for."""
    names = {rule.ours for rule in rules}
    if names != set(ours):
        odd = sorted(names.symmetric_difference(ours))
        raise ValueError(
            f"the configuration is not that of a published {kind} model: "
            f"{_listed(odd)} would be without a counterpart"
        )


def _depth(state: State, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({m.group(1) for name in state if (m := pattern.match(name))})


def _shape(state: State, name: str, dims: int) -> torch.Size:
    shape = state[name].shape
    if len(shape) != dims or not all(shape):
        raise ValueError(f"wrong shape: {name} should have {dims} dimensions and values, got {tuple(shape)}")
    return shape


def _infer_config(kind: str, state: State, overrides: dict[str, Any]) -> Config:
    if "num_heads" in overrides:
        overrides["heads"] = overrides.pop("num_heads")
    if kind == MAE_AST_KIND:
        return _infer_mae_ast(state, overrides)
    if kind == SSAST_KIND:
        return _infer_ssast(state, overrides)
    return _infer_audiomae(kind, state, overrides)


def _encoder_sizes(state: State, width: int, blocks: str, hidden: str, overrides: dict[str, Any]) -> dict:
    """Width, heads, depth and MLP ratio; `hidden` is the MLP's first layer in blocks that start with `blocks`."""
    if "heads" not in overrides and width % 64:
        raise ValueError(
            f"a width of {width} does not divide into heads of 64 channels: say how many heads with num_heads="
        )
    mlp = _shape(state, f"{blocks}0.{hidden}", 2)[0]
    return {"width": width, "heads": width // 64, "depth": _depth(state, blocks), "mlp_ratio": mlp / width}


def _infer_audiomae(kind: str, state: State, overrides: dict[str, Any]) -> MAEConfig | ClassifierConfig:
    width, _, *patch = _shape(state, "patch_embed.proj.weight", 4)
    sizes = _encoder_sizes(state, width, "blocks.", "mlp.fc1.weight", overrides) | {"patch": tuple(patch)}
    if kind in (AUDIOMAE_FINETUNED, AUDIOMAE_POOLED):
        base = ClassifierConfig(family="audiomae", num_classes=_shape(state, "head.weight", 2)[0])
    elif kind == AUDIOMAE_ENCODER:
        base = MAEConfig(family="audiomae", decoder="none")
    else:
        base = MAEConfig(family="audiomae")
        depth = _depth(state, "decoder_blocks.")
        marked = {name.partition(".attn.")[0] for name in state if re.search(r"\.attn\.(tau|meta_mlp)", name)}
        local = [f"decoder_blocks.{i}" in marked for i in range(depth)]
        sizes |= {
            "decoder": "window" if all(local) else "hybrid" if any(local) else "global",
            "decoder_width": _shape(state, "mask_token", 3)[2],
            "decoder_depth": depth,
        }
        if any(local):
            sizes["decoder_heads"] = _shape(state, "decoder_blocks.0.attn.tau", 1)[0]
        if any(local) and not all(local):
            sizes["global_blocks"] = local.count(False)
    positions = _shape(state, "pos_embed", 3)[1] - 1
    config = _with_frames(replace(base, **sizes | overrides), positions, overrides)
    layout = position_layout(state["pos_embed"], config.grid())
    return config if "positions" in overrides or layout == "unknown" else replace(config, positions=layout)


def position_layout(table: Tensor, grid: tuple[int, int]) -> str:
    """Which 2-D sin-cos table (1, 1 + L, D) this is: "transposed", "grid", or "unknown" (then used as it is)."""
    for layout in ("transposed", "grid"):
        fresh = sincos_2d(table.shape[2], grid, transposed=layout == "transposed")
        if same_table(table[0, 1:], fresh):
            return layout
    return "unknown"


def _infer_ssast(state: State, overrides: dict[str, Any]) -> SSASTConfig:
    width, _, bands, frames = _shape(state, "v.patch_embed.proj.weight", 4)
    sizes = _encoder_sizes(state, width, "v.blocks.", "mlp.fc1.weight", overrides)
    base = MODELS["ssast_frame_base" if bands == 128 else "ssast_patch_base"]
    config = replace(base, **sizes | {"patch": (frames, bands)} | overrides)
    return _with_frames(config, _shape(state, "v.pos_embed", 3)[1] - 2, overrides)


def _infer_mae_ast(state: State, overrides: dict[str, Any]) -> MAEConfig:
    tokens = overrides.pop("tokens", None)
    if tokens not in ("patch", "frame"):
        raise ValueError(
            "MAE-AST's patch and frame models have the same keys and shapes: say which this is with "
            'tokens="patch" or tokens="frame", on the command line --tokens patch or frame, to finetune: --model '
            f"mae_ast_patch_base or mae_ast_frame_base (got {tokens!r})"
        )
    width = _shape(state, "post_extract_proj.weight", 2)[0]
    sizes = _encoder_sizes(state, width, "encoder.layers.", "fc1.weight", overrides)
    sizes |= {
        "decoder_width": width,
        "decoder_heads": overrides.get("heads", sizes["heads"]),
        "decoder_depth": _depth(state, "decoder.layers."),
    }
    return replace(MODELS[f"mae_ast_{tokens}_base"], **sizes | overrides)


def _with_frames(config: Config, tokens: int, overrides: dict[str, Any]) -> Config:
    """The configuration for clips that have so many tokens; the front end cuts and pads to their length."""
    bands = config.grid()[1]
    if tokens < bands or tokens % bands:
        raise ValueError(
            f"{tokens} positions do not divide into {bands} bands of patches {config.patch} at stride "
            f"{config.step}: if the patches overlap, pass stride=(time, frequency)"
        )
    frames = (tokens // bands - 1) * config.step[0] + config.patch[0]
    return replace(
        config, **{"frames": frames, "frontend": replace(config.frontend, frames=frames)} | overrides
    )


def _check_sinusoids(extras: State) -> None:
    for name, table in extras.items():
        if name.endswith("_sine_pos_embed.pe"):
            _, tokens, width = _shape(extras, name, 3)
            tokens = min(tokens, 512)
            if not same_table(table[:1, :tokens], sinusoids_1d(width, tokens)[None]):
                raise ValueError(
                    f"{name} does not hold the published sinusoids: this model would read it wrongly"
                )


_CONTAINERS = ("model", "state_dict", "model_state_dict")


class _Inert:
    """Stands in for an object of the training code that a checkpoint mentions: takes everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What published checkpoints hold besides tensors and plain data, in modules or by name: the arguments of the
# training script, fairseq's configuration and the types that it mentions, and numbers in its training log.
_INERT_MODULES = ("argparse.", "pathlib.", "omegaconf.", "fairseq.", "typing.", "numpy.")
_INERT_NAMES = tuple(
    f"builtins.{x}" for x in ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple")
)


def _stand_ins(path: Path) -> list[tuple[Callable, str]]:
    """For `torch.serialization.safe_globals`: what this file may mention, as objects that do nothing."""
    try:
        mentioned = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # old format, or broken: torch.load tells
        mentioned = ["argparse.Namespace"]
    harmless = [name for name in mentioned if name.startswith(_INERT_MODULES) or name in _INERT_NAMES]
    return [(_Inert, name) for name in harmless] + [(lambda *factory: {}, "collections.defaultdict")]


def read_checkpoint(path: Path) -> State:
    """The state dict in a published file. Nothing in the file is executed.

    Args:
        path: `.safetensors`, or a file of `torch.save` (a state dict, or a dict that holds one as "model" or
            "state_dict"). Besides tensors and plain data only what published checkpoints are known to hold is
            let through (an argparse Namespace, omegaconf containers), as inert objects.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is broken, holds objects that are not let through, or no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    _check_expansion(path)
    try:
        with torch.serialization.safe_globals(_stand_ins(path)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle fails in any way
        raise ValueError(f"{path} is no checkpoint that can be read: {_reason(error)}") from error
    for key in _CONTAINERS:
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict) or not data or not _maps_names_to_tensors(data):
        raise ValueError(f"{path} holds no state dict: a mapping of names to tensors was expected")
    return data


def _check_expansion(path: Path) -> None:
    """torch.save stores tensors as they are. A compressed file of kilobytes may expand to any size."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > 2 * path.stat().st_size:
        raise ValueError(
            f"{path} is no checkpoint that can be read: it is compressed, which torch.save never does, and would "
            f"expand to {size:,} bytes"
        )


def _maps_names_to_tensors(data: dict) -> bool:
    return all(isinstance(name, str) and isinstance(t, Tensor) for name, t in data.items())


def _reason(error: Exception) -> str:
    """What torch.load found, without its advice to load the file unsafely."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds {found[1]}, and only tensors and plain data are accepted; nothing was executed"
    if "TorchScript" in str(error):
        return "it is a TorchScript archive; save the state dict instead"
    return "it is damaged, or not a file of torch.save"


def load_upstream(path: Path, **overrides: Any) -> MaskedAutoencoder | SSAST | Classifier:
    """`from_upstream` of a file; see `read_checkpoint` for what is accepted."""
    state = read_checkpoint(path)
    try:
        return from_upstream(state, **overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# -- out -----------------------------------------------------------------------------------------------------


def to_upstream(model: SpectrogramModel) -> State:
    """The state dict that the published code would have written: its names, shapes and values.

    A model that came from `from_upstream` gives everything back, unused tensors included. One that was made here
    gets what the published code expects besides the weights: SSAST's grid, MAE-AST's tables and unused layers.

    Raises:
        ValueError: there is no published form of this model.
    """
    if getattr(model.config, "decode_ratio", 1.0) < 1.0:
        raise ValueError(
            f"this model was trained with decode_ratio={model.config.decode_ratio}, which is not how the published one "
            "learns: model.save_pretrained keeps it"
        )
    ours = model.state_dict()
    kind = model.config.family if model.upstream is None else model.upstream.kind
    _check_covered(upstream_rules(model.config), ours, kind)
    state = encode_tensors(model.config, ours)
    if model.upstream is None:
        return state | _unused(model)
    if kind == AUDIOMAE_POOLED:
        head = _identity_head(model.config.width, torch.float32)
        if all(torch.equal(state[name].cpu().float(), head[name]) for name in head):  # not trained since
            state = {name: tensor for name, tensor in state.items() if name not in head}
    state |= model.upstream.extras
    return {model.upstream.prefix + name: tensor for name, tensor in state.items()}


def encode_tensors(config: Config, ours: State) -> State:
    """Tensors by our names -> by upstream's. Also for gradients: names that are missing are left out."""
    state = {}
    for rule in upstream_rules(config):
        if rule.ours in ours:
            tensors = rule.encode(ours[rule.ours].detach())
            state |= {name: t.contiguous() for name, t in zip(rule.theirs, tensors, strict=True)}
    return state


def _unused(model: SpectrogramModel) -> State:
    c = model.config
    if isinstance(c, SSASTConfig):
        frames, bands = c.grid()
        return {"p_input_fdim": torch.tensor(bands), "p_input_tdim": torch.tensor(frames)}
    if c.family == "mae_ast":
        table = sinusoids_1d(c.width, MAX_FLAT_TOKENS)[None]
        return {
            "encoder_mask_emb": torch.zeros(c.width),
            "layer_norm.weight": torch.ones(c.mel_bins),
            "layer_norm.bias": torch.zeros(c.mel_bins),
            "enc_sine_pos_embed.pe": table,
            "dec_sine_pos_embed.pe": table.clone(),
        }
    return {}


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
