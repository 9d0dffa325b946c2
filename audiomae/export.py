"""Encoders and classifiers for other runtimes: `torch.export` (.pt2) and ONNX (.onnx).

What is exported takes the normalised spectrogram of a clip, as long as the clip is: the front end stays in front of it.
Batch and length are free, from one frame (of a model of frames: from two patches) to the end of the model's positions;
what a clip lacks is filled up in the graph. A longer clip is cut into chunks by the caller, or the positions are
interpolated before the export.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import Classifier
from .config import replace
from .embedding import stretched
from .model import SpectrogramModel
from .options import add_overrides, check_writable, file_to_write, open_model, positive, replacing
from .pretrained import build

__all__ = ["Exportable", "export"]

CONFIG = "config.json"  # the name under which a file carries the model's configuration


class Exportable(nn.Module):
    """Encoder or classifier in plain PyTorch: custom ops do not exist in other runtimes.

    A copy with `impl="reference"`, attention by SDPA, patches read by their indices, and without dropout. It fills a
    clip up as `Embedder` and `Tagger` do by default: an encoder, or a classifier with pad="exclude", with zeros to
    whole patches; a classifier with pad="attend" to the front end's length, all of which is attended, as published.

    Args:
        model: a pre-trained model, whose encoder is taken, or a classifier.
    """

    def __init__(self, model: SpectrogramModel):
        super().__init__()
        classifies = isinstance(model, Classifier)
        pad = model.config.pad if classifies and model.config.frontend.frames else "exclude"
        self.config = replace(model.config, impl="reference", attention="sdpa", recompute="none", pad=pad)
        copy = build(self.config)
        copy.load_state_dict(model.state_dict())
        copy.float().eval().requires_grad_(False)
        self.spectrogram_norm, self.encoder = copy.spectrogram_norm, copy.encoder
        # Positions that are a formula's are in no state dict.
        self.encoder.positions.load_state_dict(model.encoder.positions.state_dict())
        self.head = nn.Sequential(copy.fc_norm, copy.head) if classifies else None

    def forward(self, spectrogram: Tensor) -> Tensor:
        """(B, T, F) float32 -> (B, P + L, D) after the final norm, prefix tokens first; or (B, classes) logits."""
        c, encoder = self.config, self.encoder
        (steps, bands), table = c.grid(), encoder.positions.table[0, c.prefix_tokens :]
        filled, count = self._filled(spectrogram)
        ids = torch.arange(count * bands, device=spectrogram.device)
        # By index, since a free number of steps cannot be merged with the bands by a view.
        frames, bins = (torch.arange(size, device=ids.device) for size in c.patch)
        frames = (ids // bands * c.step[0])[:, None, None] + frames[:, None]
        bins = (ids % bands * c.step[1])[:, None, None] + bins
        patches = filled[:, frames, bins].flatten(2)  # (B, L, V)
        if c.positions == "learned":  # SSAST cuts from the middle
            ids = ids + (steps - count) // 2 * bands
        x = encoder.patch_embed(patches) + F.embedding(ids, table)
        tokens = encoder.transform(x, c.grid())
        return tokens if self.head is None else self.head(tokens[:, c.prefix_tokens :].mean(dim=1))

    def _filled(self, spectrogram: Tensor) -> tuple[Tensor, int]:
        """(B, T + a fixed number, F) normalised as the model does it, and how many time steps of it are read."""
        c, frames = self.config, spectrogram.shape[1]
        least, step = c.patch[0], c.step[0]
        if c.pad == "attend":
            extra, value = c.frontend.frames, c.frontend.padding
            count = (torch.sym_max(frames, extra) - least) // step + 1
        else:
            extra, value, reach = least, 0.0, (c.grid()[0] - 1) * step + least
            if (rest := c.frames - reach) > 0:
                # Patches that overlap do not reach the end of a clip of full length, as published. A longer clip
                # still asks for positions that there are not, and fails.
                frames = torch.sym_max(torch.sym_min(frames, reach), frames - rest)
            count = (torch.sym_max(frames, least) - least + step - 1) // step + 1
        # More than enough: a fixed number needs no arithmetic on shapes that a runtime may not have.
        filled = F.pad(spectrogram, (0, 0, 0, extra), value=value)
        if c.input_norm != "none":
            filled = self.spectrogram_norm(filled, spectrogram)
        return filled, count


def export(model: SpectrogramModel, path: str | Path, frames: int | None = None) -> Path:
    """Write a pre-trained model's encoder, or a classifier, for other runtimes.

    Args:
        path: of the file to write; its suffix says how: .onnx, or .pt2 for `torch.export`.
        frames: how long clips may be; None: as the model's positions reach. Beyond that these are interpolated.

    The input is called "spectrogram", the output "tokens" or "logits". The model's configuration, front end and labels
    among it, goes along: in ONNX's metadata under "audiomae", in a .pt2 file as the extra file config.json.

    Raises:
        ValueError: another suffix, fewer frames than the model has, or a front end that fills up to more.
        ImportError: onnx or onnxscript is missing.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{path}: the suffix says the format, and .onnx or .pt2 was expected")
    if frames is not None and frames < model.config.frames:
        model_frames = model.config.frames
        raise ValueError(
            f"frames={frames} is less than the {model_frames} that the model's positions reach already"
        )
    module = Exportable(model if frames is None else stretched(model, frames)).cpu()
    c = module.config
    if c.grid()[0] < 4:
        raise ValueError(
            f"a model of {c.frames} frames has too few patches to be exported for clips of any length"
        )
    if c.pad == "attend" and c.frontend.frames > c.frames:
        raise ValueError(
            f"the front end fills clips up to {c.frontend.frames} frames, but the model's positions reach {c.frames}: "
            "change frames of one of them"
        )
    # A free size cannot be 1: a model of one band, as MAE-AST's of frames, begins with two tokens.
    least = 1 if c.grid()[1] > 1 else c.patch[0] + 1
    dynamic = {
        "spectrogram": {
            0: torch.export.Dim("batch", min=1),
            1: torch.export.Dim("frames", min=least, max=c.frames),
        }
    }
    example = torch.zeros(2, c.frames - c.step[0], c.mel_bins)
    settings = json.dumps(c.to_dict())
    with torch.no_grad(), replacing(path) as temporary:
        program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
        if path.suffix == ".pt2":
            with temporary.open("wb") as file:
                torch.export.save(program, file, extra_files={CONFIG: settings})
        else:
            onnx = _to_onnx(program, "tokens" if module.head is None else "logits")
            onnx.model.metadata_props["audiomae"] = settings
            onnx.save(temporary)
    return path


def _to_onnx(program: torch.export.ExportedProgram, output: str) -> torch.onnx.ONNXProgram:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'ONNX export needs onnxscript, which cannot be imported ({error}): pip install "audiomae[export]"'
        ) from error
    # It warns of torchvision's ops where that is not installed; nothing here has any.
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        return torch.onnx.export(
            program,
            input_names=["spectrogram"],
            output_names=[output],
            dynamic_shapes={"spectrogram": {0: "batch", 1: "frames"}},  # their names in the file
            dynamo=True,
            verbose=False,
        )
    finally:
        registration.setLevel(level)


# -- the command ---------------------------------------------------------------------------------------------


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="an encoder or a classifier for ONNX or torch.export",
        description="Writes a pre-trained model's encoder, or a classifier, as ONNX (--out name.onnx) or as a program "
        "of torch.export (--out name.pt2). It takes normalised spectrograms of any batch size and length, and fills "
        "them up as embed and tag do.",
    )
    parser.add_argument("--model", required=True, help="a folder, a published checkpoint, a hub id or a name")
    parser.add_argument(
        "--out",
        type=file_to_write(".onnx", ".pt2"),
        required=True,
        metavar="FILE",
        help="name.onnx or name.pt2",
    )
    parser.add_argument(
        "--frames",
        type=positive,
        help="longest clips, if longer than the model's: its positions are interpolated to reach them",
    )
    add_overrides(parser)
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    check_writable(options.out)
    model = open_model(options.model, options)
    export(model, options.out, options.frames)
    kind = "classifier" if isinstance(model, Classifier) else "encoder"
    size = options.out.stat().st_size / 2**20
    print(f"wrote {options.out}: {kind}, {size:.1f} MiB")
