"""python -m bench: what the models and their kernels cost on this machine. See bench/README.md."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_STARTED = time.perf_counter()


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0.0 < ratio < 1.0:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text!r}")
    return ratio


def _gigabytes(text: str) -> int:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0.0 < size < 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number of gigabytes, got {text!r}")
    return int(1e9 * size)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return rate


def _common(level: argparse.ArgumentParser, quick: str, full: str, rounds: str) -> None:
    preset = level.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help=quick)
    preset.add_argument("--full", action="store_true", help=full)
    level.add_argument("--rounds", type=_positive, metavar="N", help=f"interleaved rounds; default: {rounds}")
    level.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    level.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads; default: PyTorch's choice"
    )


def _out(level: argparse.ArgumentParser, default: Path, holds: str) -> None:
    shown = default.relative_to(Path(__file__).parents[1])
    text = f"folder for {holds}, which are replaced if they are there; default: {shown}"
    level.add_argument("--out", type=Path, default=default, metavar="DIR", help=text)


def _parser() -> argparse.ArgumentParser:
    from . import models as whole
    from . import registry
    from .kernels import run
    from .kernels.cases import OPS
    from .kernels.providers import PROVIDERS

    latest = Path(__file__).parent / "results" / "latest"
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    levels = parser.add_subparsers(dest="level", required=True, metavar="LEVEL")

    models = levels.add_parser("models", help="steps of whole models: ours, plain PyTorch, SSAST")
    models.set_defaults(run=_models, parser=models)
    _common(
        models,
        "under four minutes on two CPU cores (default)",
        f"all models and modes, lengths, mask ratios and batches varied one at a time, {whole.FULL_ROUNDS} rounds, no "
        "limit of time; goes on from where an earlier --full run of the same machine, commit and options stopped",
        f"up to {whole.QUICK_ROUNDS} as time allows, {whole.FULL_ROUNDS} with --full",
    )
    known = ", ".join(registry.MODELS)
    models.add_argument(
        "--models", nargs="+", metavar="NAME", help=f"of {known}; default: the three published base models"
    )
    models.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(registry.PROVIDERS)}; default: {' and '.join(registry.DEFAULT_PROVIDERS)}",
    )
    models.add_argument(
        "--modes",
        nargs="+",
        metavar="MODE",
        help=f"of {', '.join(registry.MODES)}; default: training, and the others as far as there is time",
    )
    models.add_argument(
        "--dtypes",
        nargs="+",
        metavar="DTYPE",
        help="fp32 and bf16 (autocast), or float32 and so on; default: both",
    )
    models.add_argument(
        "--batch-size",
        type=_positive,
        nargs="+",
        metavar="N",
        help=f"clips per step; default: {whole.FULL_BATCH}, on a CPU without --full the largest of "
        f"{_listed(whole.QUICK_BATCHES)} that leaves time for several rounds; --full: {_listed(registry.FULL_BATCHES)}",
    )
    models.add_argument(
        "--frames",
        type=_positive,
        nargs="+",
        metavar="N",
        help=f"lengths of a clip; default: {registry.FRAMES}, with --full {_listed(registry.FULL_FRAMES)}",
    )
    models.add_argument(
        "--mask-ratios",
        type=_ratio,
        nargs="+",
        metavar="R",
        help="shares of the tokens that are masked; default: each model's published one, with --full also "
        f"{_listed(registry.FULL_MASK_RATIOS)}",
    )
    models.add_argument(
        "--largest-batch",
        action="store_true",
        help="in place of times, the largest batch of each row that fits into memory",
    )
    models.add_argument(
        "--memory-budget",
        type=_gigabytes,
        metavar="GB",
        help="for --largest-batch; default: nine tenths of what is free",
    )
    text = "measurements.csv, report.md and plots"
    models.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for {text}; default: bench/results/latest, of --full and --largest-batch a folder in it. A "
        "quick run's files are replaced if they are there, a full run's are not",
    )
    models.set_defaults(latest=latest)

    kernels = levels.add_parser("kernels", help="each op against other ways to compute it")
    kernels.set_defaults(run=_kernels, parser=kernels)
    _common(
        kernels,
        "the main shapes at batch 8, under four minutes on two CPU cores (default)",
        f"all shapes at batches of {_listed(run.FULL_BATCHES)}, no limit of time",
        "; with --full ".join(
            f"up to {n}, for {s:.0f} s a case" for n, s in (run.QUICK_ROUNDS, run.FULL_ROUNDS)
        ),
    )
    kernels.add_argument("--ops", nargs="+", metavar="OP", help=f"of {', '.join(OPS)}; default: all")
    kernels.add_argument(
        "--providers", nargs="+", metavar="NAME", help=f"of {', '.join(PROVIDERS)}; default: all"
    )
    kernels.add_argument(
        "--dtypes",
        nargs="+",
        metavar="DTYPE",
        help="of fp32, bf16, fp16, or float32 and so on; default: all, without fp16 on a CPU, where it is slow",
    )
    kernels.add_argument(
        "--batch-size",
        type=_positive,
        nargs="+",
        metavar="N",
        help=f"clips; default: {_listed(run.QUICK_BATCHES)}, with --full {_listed(run.FULL_BATCHES)}",
    )
    _out(kernels, latest / "kernels", "measurements.csv, report.md and kernels.png")

    data = levels.add_parser(
        "data", help="decoding, resampling and batching, and how many workers feed a rate"
    )
    data.set_defaults(run=_data, parser=data)
    _common(data, "seven rounds (default)", "21 rounds", "7, with --full 21")
    data.add_argument(
        "--source", metavar="SOURCE", help="recordings of your own; default: made from the package's"
    )
    rate = data.add_mutually_exclusive_group()
    rate.add_argument(
        "--clips-per-second", type=_rate, metavar="RATE", help="training rate that the workers have to feed"
    )
    rate.add_argument(
        "--measured",
        type=Path,
        metavar="CSV",
        help="take the rate of the fastest row of a `models` run's CSV",
    )
    data.add_argument("--workers", type=_count, nargs="+", metavar="N", help="default: 0, 1, 2 and all cores")
    data.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="clips; default: 8")
    _out(data, latest / "data", "measurements.csv and report.md")
    return parser


def _chosen(parser, option: str, given, known, default) -> tuple[str, ...]:
    for name in given or ():
        if name not in known:
            parser.error(f"{option}: there is no {name!r} here; choose from {', '.join(known)}.")
    return tuple(dict.fromkeys(given or default))


def _distinct(given: Sequence | None) -> tuple | None:
    return tuple(dict.fromkeys(given)) if given else None


def _some(parser, option: str, given, known) -> tuple[str, ...] | None:
    """What was chosen, None where nothing was."""
    return _chosen(parser, option, given, known, ()) or None


def _dtypes(parser, given, known, default) -> tuple[str, ...]:
    from .registry import SPELLINGS

    for name in given or ():
        if SPELLINGS.get(name, name) not in known:
            spelled = ", ".join(f"{short} or {long}" for long, short in SPELLINGS.items() if short in known)
            parser.error(f"--dtypes: there is no {name!r} here; choose from {spelled}.")
    return tuple(dict.fromkeys(SPELLINGS.get(name, name) for name in given or default))


def _models(arguments, started: float) -> None:
    from . import largest, models, registry

    parser = arguments.parser
    for frames in arguments.frames or ():
        if frames % 16:
            parser.error(f"--frames must be a multiple of 16 (a patch), got {frames}.")
    if arguments.memory_budget and not arguments.largest_batch:
        parser.error("--memory-budget is for --largest-batch.")
    if arguments.largest_batch and (arguments.batch_size or arguments.rounds):
        parser.error(
            "--largest-batch times nothing and finds its own batches: leave --batch-size and --rounds out."
        )
    folder = "largest-batch" if arguments.largest_batch else "full" if arguments.full else "."
    options = models.Options(
        models=_some(parser, "--models", arguments.models, registry.MODELS),
        dtypes=_dtypes(parser, arguments.dtypes, registry.MODEL_DTYPES, registry.MODEL_DTYPES),
        providers=_chosen(
            parser, "--providers", arguments.providers, registry.PROVIDERS, registry.DEFAULT_PROVIDERS
        ),
        modes=_some(parser, "--modes", arguments.modes, registry.MODES),
        frames=_distinct(arguments.frames),
        mask_ratios=_distinct(arguments.mask_ratios),
        batches=_distinct(arguments.batch_size),
        out=arguments.out or arguments.latest / folder,
        full=arguments.full,
        rounds=arguments.rounds,
        device=arguments.device,
    )
    if arguments.largest_batch:
        largest.run(options, started, arguments.memory_budget)
    else:
        models.run(options, started)


def _kernels(arguments, started: float) -> None:
    from .kernels import cases, providers, run
    from .registry import DTYPES

    parser = arguments.parser
    options = run.Options(
        ops=_chosen(parser, "--ops", arguments.ops, cases.OPS, cases.OPS),
        providers=_chosen(
            parser, "--providers", arguments.providers, tuple(providers.PROVIDERS), providers.PROVIDERS
        ),
        out=arguments.out,
        dtypes=_dtypes(parser, arguments.dtypes, DTYPES, ()) or None,
        full=arguments.full,
        batches=tuple(dict.fromkeys(arguments.batch_size)) if arguments.batch_size else None,
        rounds=arguments.rounds,
        device=arguments.device,
    )
    run.run(options, started)


def _data(arguments, started: float) -> None:
    from . import pipeline
    from .timing import ProviderError

    options = pipeline.Options(
        out=arguments.out,
        source=arguments.source,
        clips_per_second=arguments.clips_per_second,
        measured=arguments.measured,
        workers=arguments.workers,
        batch=arguments.batch_size,
        full=arguments.full,
        rounds=arguments.rounds,
        device=arguments.device,
    )
    try:
        pipeline.run(options, started)
    except (OSError, ValueError, ProviderError) as error:
        arguments.parser.exit(1, f"bench: {error}\n")


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    arguments = _parser().parse_args(argv)

    import torch

    from .device import DeviceError
    from .start import Interrupted, UsageError

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        arguments.run(arguments, time.perf_counter() if started is None else started)
    except UsageError as error:
        arguments.parser.error(str(error))
    except DeviceError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"bench: {stop}.", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("bench: interrupted; no report was written.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # What ends a run for its time ends it as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(started=_STARTED))
