"""python -m bench: what the models cost on this machine. See bench/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

_STARTED = time.perf_counter()


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    levels = parser.add_subparsers(dest="level", required=True, metavar="LEVEL")
    models = levels.add_parser("models", help="a training step of whole models: ours, plain PyTorch, SSAST")
    preset = models.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="under four minutes on two CPU cores (default)")
    preset.add_argument("--full", action="store_true", help="batches of 8 clips, 10 rounds, no limit of time")
    models.add_argument(
        "--models", nargs="+", metavar="NAME", help="default: the three published base models"
    )
    models.add_argument(
        "--dtypes", nargs="+", metavar="DTYPE", help="fp32 and bf16 (autocast); default: both"
    )
    models.add_argument("--batch-size", type=_positive, metavar="N", help="clips per step")
    models.add_argument("--rounds", type=_positive, metavar="N", help="interleaved rounds")
    models.add_argument("--frames", type=_positive, default=1024, metavar="N", help="length of a clip")
    models.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    models.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads; default: PyTorch's choice"
    )
    models.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "latest", metavar="DIR"
    )
    return parser


def _chosen(parser, option: str, given, known, default) -> tuple[str, ...]:
    for name in given or ():
        if name not in known:
            parser.error(f"{option}: there is no {name!r} here; choose from {', '.join(known)}.")
    return tuple(dict.fromkeys(given or default))


def main(argv: list[str] | None = None, started: float = _STARTED) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)

    import torch

    from . import models, registry
    from .device import DeviceError

    names = _chosen(parser, "--models", arguments.models, registry.MODELS, registry.DEFAULT_MODELS)
    dtypes = _chosen(parser, "--dtypes", arguments.dtypes, tuple(registry.DTYPES), tuple(registry.DTYPES))
    if arguments.frames % 64:
        parser.error(
            f"--frames must be a multiple of 64 (four patches of 16 frames), got {arguments.frames}."
        )
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out must be a folder, but {arguments.out} is a file.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = models.Options(
        models=names,
        dtypes=dtypes,
        out=arguments.out,
        full=arguments.full,
        batch=arguments.batch_size,
        rounds=arguments.rounds,
        frames=arguments.frames,
        device=arguments.device,
    )
    try:
        models.run(options, started)
    except DeviceError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
