"""`audiomae reconstruct`: a picture of what a masked autoencoder makes of a recording."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .masking import STRATEGIES, Mask, check_ratio
from .model import MaskedAutoencoder, SpectrogramModel
from .options import Recording, add_model, check_device, check_writable, file_to_write, open_model, replacing
from .picture import draw_reconstruction, reconstruct
from .ssast import SSAST
from .words import plural


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "reconstruct",
        help="a picture: a spectrogram, what the encoder sees of it, and what the decoder makes of that",
        description="Draws the spectrogram of a recording, the same with patches masked, and the reconstruction. A "
        "recording that is longer than the model is shown from --start on.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a recording")
    parser.add_argument(
        "--out", type=file_to_write(".png"), required=True, metavar="PNG", help="picture to write"
    )
    parser.add_argument(
        "--masking", choices=STRATEGIES, help="strategy; default: the one that the model is trained with"
    )
    parser.add_argument(
        "--mask-ratio",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="of the tokens, or of time steps and of frequency bands with time_frequency; default: the model's",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the mask; default: %(default)s")
    parser.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="default: %(default)s")
    add_model(parser)
    parser.set_defaults(run=_reconstruct)


def _reconstruct(options: argparse.Namespace) -> None:
    check_writable(options.out)
    if find_spec("matplotlib") is None:
        raise ImportError("a picture needs matplotlib, which is not installed: pip install matplotlib")
    if not options.file.is_file():
        raise FileNotFoundError(f"there is no file {options.file}")
    device = check_device(options.device)
    model = open_model(options.model, options, random="the picture shows a model that has learned nothing")
    c = model.config
    if not isinstance(model, (MaskedAutoencoder, SSAST)) or getattr(c, "decoder", None) == "none":
        raise ValueError(
            f"{options.model} is a {type(model).__name__} without a decoder: it reconstructs nothing"
        )
    masking = options.masking or c.masking
    ratio = _ratio(options.mask_ratio, masking, c)
    spectrogram = _excerpt(options.file, options.start, model).to(device)
    model = model.float().to(device).eval()
    torch.manual_seed(options.seed)  # of what a decoder draws (`decode_ratio`)
    mask = Mask.draw(
        masking, 1, c.grid(spectrogram.shape[1]), ratio, torch.Generator().manual_seed(options.seed)
    )
    if mask.ids_masked.shape[1] == 0:
        raise ValueError(
            f"{options.file}: of {mask.num_tokens} patches {masking} masks none at a ratio of {ratio}: the "
            "recording is too short for it"
        )
    share = mask.ids_masked.shape[1] / mask.num_tokens
    with replacing(options.out) as temporary:
        images = reconstruct(model, spectrogram, mask.to(device))
        draw_reconstruction(temporary, *images, title=f"{options.file.name}, {masking}, {share:.0%} masked")
    hidden = images[1].isnan() & images[2].isfinite()
    error = (images[2] - images[0])[hidden].square().mean().item()
    seconds = spectrogram.shape[1] / 100
    print(
        f"{options.file}: {seconds:.2f} s from {options.start:g} s on, {masking}, "
        f"{mask.ids_masked.shape[1]} of {mask.num_tokens} patches masked, mean squared error {error:.4f}"
    )
    print(f"wrote {options.out}")


def _ratio(given: list[float] | None, masking: str, c: Any) -> float | tuple[float, float]:
    """The ratio for this strategy: the one given, or the model's."""
    if given is None:
        ratio = c.mask_ratio
        if isinstance(ratio, tuple) and masking != "time_frequency":
            raise ValueError(
                f"the model masks {ratio} of time and frequency: say how much {masking} is, --mask-ratio"
            )
    else:
        ratio = given[0] if len(given) == 1 else tuple(given)
    check_ratio(masking, ratio)
    return ratio


def _excerpt(file: Path, start: float, model: SpectrogramModel) -> torch.Tensor:
    """(1, T, F) whole patches from `start` seconds on, as many as there are and the model takes."""
    c = model.config
    frontend = dataclasses.replace(c.frontend, frames=None)
    spectrogram = frontend(Recording(str(file)).load(frontend.sample_rate))
    total, first = len(spectrogram), round(100 * start)
    if total < c.patch[0]:
        raise ValueError(
            f"{file} is too short: it has {plural(total, 'frame')} of 10 ms, and this model sees {c.patch[0]} at least"
        )
    last = (total - c.patch[0]) / 100
    if not 0 <= start <= last:
        raise ValueError(
            f"--start {start:g} must lie between 0 and {last:g}, where the last patch of {file} begins"
        )
    spectrogram = spectrogram[first : first + c.frames]
    if total - first > c.frames:
        print(f"{file}: {c.frames} of its {total} frames are shown, the model's length", file=sys.stderr)
    steps, _ = c.grid(len(spectrogram))
    return spectrogram[None, : (steps - 1) * c.step[0] + c.patch[0]]
