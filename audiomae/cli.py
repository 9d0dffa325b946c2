"""The command line: `audiomae doctor | prepare | pretrain | finetune | evaluate | embed | convert | verify`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from audiomae_kernels import OPS, _native, implementations

from .attention import BACKENDS, why_not
from .classifier import Classifier
from .config import list_models
from .create import create_model, load
from .data import load_batch, recordings
from .data.pack import add_command as add_prepare
from .frontend import num_frames
from .model import MaskedAutoencoder, Output, SpectrogramModel
from .upstream import load_upstream, position_layout, to_upstream


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors that a user can mend are printed as one sentence. Returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Training parses its own options, of which configuration files are a part.
    own = arguments[:1] and arguments[0] in _TRAINING
    rest = arguments[1:] if own else []
    options = _parser().parse_args(arguments[: len(arguments) - len(rest)])
    try:
        status = options.run(rest if own else options)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"audiomae {options.command}: {error}", file=sys.stderr)
        return 1
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="audiomae", description="Masked-autoencoder pre-training on audio spectrograms."
    )
    parser.add_argument("--version", action="version", version=f"audiomae {_version('audiomae')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="what this machine has, and which implementation serves each op",
        description="Tells what this machine has, which implementation serves each op, and why the others do not. "
        "The exit status is 1 if the environment names a native library or a CPU tier that cannot be had.",
    )
    doctor.set_defaults(run=_doctor)

    add_prepare(commands)

    for name, (run, text) in _TRAINING.items():
        commands.add_parser(name, add_help=False, help=text).set_defaults(run=run)

    embed = commands.add_parser(
        "embed",
        help="clip embeddings of audio files",
        description="Writes one embedding per file: the mean over the patch tokens. Clips are cut or padded to the "
        "length the model was made for (10.24 s for AudioSet models). The file written holds two arrays, `files` "
        "(paths) and `embeddings` (files, width), in the order of the arguments.",
    )
    embed.add_argument("files", nargs="+", type=Path, metavar="FILE", help="WAV, FLAC, OGG or MP3")
    embed.add_argument(
        "--model", required=True, help="a path, a hub id, or a name: " + ", ".join(list_models())
    )
    embed.add_argument(
        "--out", type=Path, default=Path("embeddings.npz"), help="npz file; default: %(default)s"
    )
    embed.add_argument(
        "--batch-size", type=_positive, default=8, help="clips at a time; default: %(default)s"
    )
    embed.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1; default: %(default)s")
    _add_overrides(embed)
    embed.set_defaults(run=_embed)

    convert = commands.add_parser(
        "convert",
        help="a published checkpoint to ours, or ours to the published names",
        description="From a published checkpoint to a folder with safetensors and config.json, or from such a "
        "folder to a file with the published code's names, shapes and values.",
    )
    convert.add_argument(
        "input", type=Path, metavar="IN", help="a folder of ours, or .pth, .pt, .bin, .safetensors"
    )
    convert.add_argument(
        "output", type=Path, metavar="OUT", help="folder to write; from a folder: a .pth file"
    )
    convert.add_argument("--force", action="store_true", help="write over what is at OUT already")
    _add_overrides(convert)
    convert.set_defaults(run=_convert)

    verify = commands.add_parser("verify", help="what a checkpoint is, and whether it works")
    verify.add_argument("checkpoint", help="a published file, or a folder or hub id of ours")
    _add_overrides(verify)
    verify.set_defaults(run=_verify)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what a published checkpoint's tensors cannot say")
    group.add_argument("--tokens", choices=("patch", "frame"), help="which MAE-AST this is")
    group.add_argument("--num-heads", type=_positive, help="attention heads (default: of 64 channels each)")
    group.add_argument(
        "--stride", type=_positive, nargs=2, metavar=("TIME", "FREQUENCY"), help="of overlapping patches"
    )
    group.add_argument(
        "--raw-target",
        action="store_true",
        help="Audio-MAE trained without normalised targets (norm_pix_loss)",
    )


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    given = {"tokens": options.tokens, "num_heads": options.num_heads}
    if options.stride:
        given["stride"] = tuple(options.stride)
    if options.raw_target:
        given["normalize_target"] = False
    return {key: value for key, value in given.items() if value is not None}


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


# -- doctor --------------------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    no_native = _native.why_not()
    print("Versions")
    print(f"  {'python':<12} {platform.python_version()} on {platform.platform()}")
    for package in ("audiomae", "torch", "triton", "torchaudio", "soundfile", "numpy", "safetensors"):
        print(f"  {package:<12} {_version(package)}")
    print("Devices")
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    print(f"  {'cpu':<12} {threads}, {torch.backends.cpu.get_cpu_capability()}")
    for name, state in _accelerators():
        print(f"  {name:<12} {state}")
    print("Native library")
    print(f"  {no_native or _native.LIBRARY}")
    for tier, chosen, reason in _native.cpu_tiers():
        print(f"  {'*' if chosen else ' '} {tier:<12} {reason}".rstrip())
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        print(f"Ops on {device} (* serves float32)")
        for op in OPS:
            for served in implementations(op, device):
                state = served.reason or "available"
                state = "no native library, see above" if state == no_native else state
                print(f"  {'*' if served.chosen else ' '} {op:<17} {served.name:<10} {state}")
        print(f"Attention on {device}")
        for backend in BACKENDS:
            state = why_not(backend, torch.device(device))
            state = "no native library, see above" if no_native and state == no_native.rstrip(".") else state
            print(f"  {backend:<12} {state or 'available'}")
    return 1 if no_native and _native.demanded() else 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _accelerators() -> list[tuple[str, str]]:
    if torch.version.cuda is None and torch.version.hip is None:
        return [("cuda", "this build of torch has no GPU support")]
    if not torch.cuda.is_available():
        return [("cuda", "no usable GPU: " + _why_no_gpu())]
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        found.append(
            (f"cuda:{i}", f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}")
        )
    return found


def _why_no_gpu() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split("\n")[0]
    return "torch sees none"


# -- training ------------------------------------------------------------------------------------------------


@contextmanager
def _training_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"training needs the package {error.name}: install audiomae with its training extra, "
            "pip install 'audiomae[train]'"
        ) from error


def _pretrain(arguments: Sequence[str]) -> None:
    with _training_extra():
        from .train import pretrain
        from .train.command import parse
    pretrain(parse(arguments))


def _finetune(arguments: Sequence[str]) -> None:
    with _training_extra():
        from .finetune.command import run_finetune
    run_finetune(arguments)


def _evaluate(arguments: Sequence[str]) -> None:
    with _training_extra():
        from .finetune.command import run_evaluate
    run_evaluate(arguments)


_TRAINING = {
    "pretrain": (_pretrain, "a model from recordings, on one machine or many"),
    "finetune": (_finetune, "a classifier from a model and labelled recordings"),
    "evaluate": (_evaluate, "how good a fine-tuned classifier is, class by class"),
}


# -- embed ---------------------------------------------------------------------------------------------------


def _embed(options: argparse.Namespace) -> None:
    _check_writable(options.out)
    for file in options.files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
    device = _device(options.device)
    if options.model in list_models():
        if _overrides(options):
            raise ValueError(
                f"the name {options.model} says all of the model: leave out what describes a file"
            )
        model = create_model(options.model)
        print(f"{options.model} has random weights: a baseline, not an embedding", file=sys.stderr)
    else:
        model = _load(options.model, options)
    embeddings = embed_files(model.float().to(device).eval(), options.files, options.batch_size)
    with options.out.open("wb") as out:  # given a name, savez would append .npz
        np.savez(out, files=np.array([str(file) for file in options.files]), embeddings=embeddings)
    for file, row in zip(options.files, embeddings, strict=True):
        print(f"{file}  {row.shape[0]} values, norm {np.linalg.norm(row):.3f}")
    print(f"wrote {options.out}: embeddings {embeddings.shape}")


def _check_writable(out: Path) -> None:
    if out.is_dir():
        raise IsADirectoryError(f"--out is a file to write, but {out} is a folder")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder {out.parent} of --out does not exist")


def _device(name: str) -> torch.device:
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if "device type" in reason:
            reason = "devices are called cpu, cuda or cuda:1"
        raise ValueError(f"--device {name} cannot be used: {reason}") from error
    return torch.device(name)


@torch.inference_mode()
def embed_files(model: SpectrogramModel, files: Sequence[Path], batch_size: int = 8) -> np.ndarray:
    """(clips, D) float32: mean over the patch tokens of each file, cut or padded to the model's length."""
    device = next(model.parameters()).device
    frontend = model.config.frontend
    shortest = 1  # frames; padding makes up the rest of a patch
    if frontend.frames is None:
        batch_size = 1  # clips of their own length cannot share a batch
        shortest = model.config.patch[0]
    rows = []
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        waveform, lengths = load_batch(batch, frontend)
        for file, length in zip(batch, lengths.tolist(), strict=True):
            if frontend.num_frames(length) < shortest:
                raise ValueError(
                    f"{file}: {length} samples at {frontend.sample_rate} Hz are too short, "
                    f"the model needs {25 + 10 * (shortest - 1)} ms"
                )
            if num_frames(length, frontend.sample_rate) > frontend.num_frames(length):
                print(f"{file}: embedded up to frame {frontend.frames}, the model's length", file=sys.stderr)
        spectrogram = frontend(waveform.to(device), lengths.to(device))
        tokens = model.encode(spectrogram)[:, model.num_prefix_tokens :]
        rows.append(tokens.mean(dim=1).float().cpu())
    return torch.cat(rows).numpy()


# -- checkpoints ---------------------------------------------------------------------------------------------


def _convert(options: argparse.Namespace) -> None:
    if options.input.is_dir():
        _export(options)
        return
    if options.output.is_file():
        raise FileExistsError(f"OUT is a folder to write, but {options.output} is a file")
    if options.output.is_dir() and any(options.output.iterdir()) and not options.force:
        raise FileExistsError(f"the folder {options.output} is not empty: choose another, or add --force")
    model = load_upstream(options.input, **_overrides(options))
    model.save_pretrained(options.output)
    kind, carried = model.upstream.kind, len(model.upstream.extras)
    print(f"{options.input}: {kind}, {_parameters(model)} parameters, {carried} unused tensors carried along")
    print(f"wrote {options.output}")


def _export(options: argparse.Namespace) -> None:
    if options.output.suffix != ".pth" or options.output.is_dir():
        raise ValueError(f"from a folder, OUT is a .pth file to write, got {options.output}")
    if not options.output.parent.is_dir():
        raise FileNotFoundError(f"the folder {options.output.parent} of OUT does not exist: make it first")
    if options.output.exists() and not options.force:
        raise FileExistsError(f"{options.output} exists already: choose another name, or add --force")
    state = to_upstream(_load(options.input, options))
    temporary = options.output.with_suffix(".pth.part")
    torch.save({"model": state}, temporary)
    temporary.replace(options.output)
    print(f"wrote {options.output}: {len(state)} tensors under the published code's names")


def _load(source: str | Path, options: argparse.Namespace) -> SpectrogramModel:
    if Path(source).is_dir() and _overrides(options):
        raise ValueError(
            f"{source} is a folder of ours, whose config.json says all of the model: leave out what describes "
            "a published file"
        )
    return load(source, **_overrides(options))


def _verify(options: argparse.Namespace) -> None:
    model = _load(options.checkpoint, options).eval()
    c = model.config
    kind = model.upstream.kind if model.upstream is not None else type(model).__name__
    print(f"family            {kind} ({c.width} wide, {c.depth} blocks, {_parameters(model)} parameters)")
    print(f"tokens            patch {c.patch}, stride {c.step}, grid {c.grid()} of {c.frames} frames")
    if isinstance(model, MaskedAutoencoder):
        blocks = f", {c.num_decoder_blocks} blocks of width {c.decoder_width}" if c.decoder != "none" else ""
        print(f"decoder           {c.decoder}{blocks}")
    layouts = [
        position_layout(part.positions.table, c.grid())
        if c.positions in ("transposed", "grid")
        else c.positions
        for part in (model.encoder, getattr(model, "decoder", None))
        if part is not None
    ]
    print(f"position layout   {', decoder '.join(layouts)}")
    print("missing keys      none")
    extras = sorted(model.upstream.extras) if model.upstream is not None else []
    print(f"unexpected keys   {', '.join(extras) or 'none'}")
    bad = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(
            f"{options.checkpoint}: {len(bad)} tensors hold NaN or infinity, the first is {bad[0]}"
        )
    print("weights           finite")
    for name, value in _trial(model.float()).items():
        print(f"{name:<17} {value}")


@torch.inference_mode()
def _trial(model: SpectrogramModel) -> dict[str, str]:
    """What the model makes of a real recording; a ValueError where that is not finite."""
    recording = recordings()[-1]
    spectrogram = model.config.frontend(*load_batch([recording], model.config.frontend))
    limit = model.encoder.positions.max_steps
    if limit is not None:
        spectrogram = spectrogram[:, : model.config.frames]
    if isinstance(model, Classifier):
        checked: Output | torch.Tensor = model(spectrogram).logits
        result = {"logits": f"finite, from {checked.min():.3f} to {checked.max():.3f}"}
    elif isinstance(model, MaskedAutoencoder) and model.config.decoder == "none":
        checked = model.encode(spectrogram)
        result = {"embedding": f"finite, of norm {checked.mean(dim=1).norm():.3f}"}
    else:
        generator = torch.Generator().manual_seed(0)
        mask = model.draw_mask(1, spectrogram.shape[1], generator)
        out = model(spectrogram, mask)
        checked = torch.stack([out.loss, *out.losses.values()])
        parts = ", ".join(f"{name} {value:.4f}" for name, value in out.losses.items())
        result = {"loss": f"finite, {out.loss:.4f} ({parts})"}
    if not torch.isfinite(checked).all():
        raise ValueError(f"the model gives NaN or infinity on the recording {recording.name}")
    return result | {"recording": f"{recording.name}, {spectrogram.shape[1]} frames"}


def _parameters(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,}"
