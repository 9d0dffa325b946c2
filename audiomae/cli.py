"""The command line: `audiomae --help` lists the commands."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch
from audiomae_kernels import FRONT_END, OPS, _native, implementations

from .attention import BACKENDS, why_not
from .classifier import Classifier
from .data import load_batch, recordings
from .data.pack import add_command as add_prepare
from .data.sources import read_labels
from .embed import add_commands as add_embed_and_tag
from .export import add_command as add_export
from .frontend import Frontend
from .model import MaskedAutoencoder, Output, SpectrogramModel
from .options import UsageError, add_overrides, check_writable, open_model, overrides, replacing
from .probe import add_command as add_probe
from .reconstruct import add_command as add_reconstruct
from .upstream import load_upstream, position_layout, to_upstream
from .words import plural


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors that a user can mend are printed as one sentence.

    Returns:
        The exit status: 2 if the command line is wrong by itself (argparse ends the program with it too), 1 for
        anything else that went wrong.
    """
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
    except KeyboardInterrupt:
        resumable = options.command in ("pretrain", "finetune")
        hint = "; --resume goes on from its last checkpoint" if resumable else ""
        print(f"\naudiomae {options.command}: interrupted{hint}", file=sys.stderr)
        return 130  # as a shell says it
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        sentence = str(error)
        # The operating system's, which nobody made a sentence of.
        if isinstance(error, OSError) and error.strerror:
            sentence = ": ".join(filter(None, (error.filename, error.strerror)))
        print(f"audiomae {options.command}: {sentence}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
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

    add_embed_and_tag(commands)
    add_probe(commands)
    add_reconstruct(commands)
    add_export(commands)

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
    convert.add_argument(
        "--labels",
        type=Path,
        metavar="CSV",
        help="names of a classifier's labels, to go with its weights: index, mid, display_name",
    )
    convert.add_argument("--force", action="store_true", help="write over what is at OUT already")
    add_overrides(convert)
    convert.set_defaults(run=_convert)

    verify = commands.add_parser("verify", help="what a checkpoint is, and whether it works")
    verify.add_argument("checkpoint", help="a published file, a folder or hub id of ours, or a model's name")
    add_overrides(verify)
    verify.set_defaults(run=_verify)
    return parser


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
        for op in (*FRONT_END, *OPS):
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


# -- checkpoints ---------------------------------------------------------------------------------------------


def _convert(options: argparse.Namespace) -> None:
    if options.input.is_dir():
        if options.labels is not None:
            raise ValueError(
                f"{options.input} is a folder of ours, whose labels are in its config.json already"
            )
        _export(options)
        return
    if options.output.is_file():
        raise FileExistsError(f"OUT is a folder to write, but {options.output} is a file")
    if options.output.is_dir() and any(options.output.iterdir()) and not options.force:
        raise FileExistsError(f"the folder {options.output} is not empty: choose another, or add --force")
    model = load_upstream(options.input, **overrides(options))
    if options.labels is not None:
        model.config.frontend = _with_labels(model, options.labels)
    model.save_pretrained(options.output)
    kind, carried = model.upstream.kind, len(model.upstream.extras)
    print(
        f"{options.input}: {kind}, {_parameters(model)} parameters, {plural(carried, 'unused tensor')} carried along"
    )
    print(f"wrote {options.output}")


def _with_labels(model: SpectrogramModel, path: Path) -> Frontend:
    _, labels = read_labels(path)
    if not isinstance(model, Classifier) or len(labels) != model.config.num_classes:
        classes = plural(model.config.num_classes, "class") if isinstance(model, Classifier) else "no classes"
        raise ValueError(f"{path} names {plural(len(labels), 'label')}, but the model has {classes}")
    return replace(model.config.frontend, labels=labels)


def _export(options: argparse.Namespace) -> None:
    if options.output.suffix != ".pth" or options.output.is_dir():
        raise ValueError(f"from a folder, OUT is a .pth file to write, got {options.output}")
    check_writable(options.output, "OUT")
    if options.output.exists() and not options.force:
        raise FileExistsError(f"{options.output} exists already: choose another name, or add --force")
    state = to_upstream(open_model(options.input, options))
    with replacing(options.output) as temporary, temporary.open("wb") as file:
        torch.save({"model": state}, file)
    print(f"wrote {options.output}: {len(state)} tensors under the published code's names")


def _verify(options: argparse.Namespace) -> None:
    model = open_model(options.checkpoint, options).eval()
    c = model.config
    kind = model.upstream.kind if model.upstream is not None else type(model).__name__
    print(
        f"family            {kind} ({c.width} wide, {plural(c.depth, 'block')}, {_parameters(model)} parameters)"
    )
    print(f"tokens            patch {c.patch}, stride {c.step}, grid {c.grid()} of {c.frames} frames")
    if isinstance(model, MaskedAutoencoder):
        blocks = (
            f", {plural(c.num_decoder_blocks, 'block')} of width {c.decoder_width}"
            if c.decoder != "none"
            else ""
        )
        print(f"decoder           {c.decoder}{blocks}")
    layouts = [
        position_layout(part.positions.table, c.grid())
        if c.positions in ("transposed", "grid")
        else c.positions
        for part in (model.encoder, getattr(model, "decoder", None))
        if part is not None
    ]
    layouts = ["unknown, used as it is" if layout == "unknown" else layout for layout in layouts]
    print(f"position layout   {', decoder '.join(layouts)}")
    print("missing keys      none")
    extras = sorted(model.upstream.extras) if model.upstream is not None else []
    print(f"unexpected keys   {', '.join(extras) or 'none'}")
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
