"""``python -m audiomae_kernels.inspect``: its options, its progress and its two tables."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from audiomae_kernels import _triton

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # short names: those of the benchmark
DEFAULT_LAUNCHES = "audiomae_kernels.inspect.launches"
DESCRIPTION = """\
Compiles the Triton kernels for GPUs that need not be there and prints two tables: what the binaries hold
(registers, spills, access widths, matrix instructions), and the bytes that programs move, with the times
predicted from them. Progress goes to stderr, and a sentence for each rule that is broken; it then exits with 1."""
# What `make test` can afford: each kind of matrix instruction, each dtype, and pointers of both kinds.
QUICK = (
    ("sm_80", "bfloat16", True),
    ("sm_90", "bfloat16", True),
    ("sm_100", "float16", True),
    ("sm_120", "float32", False),
    ("gfx942", "bfloat16", True),
)


def binaries_table(rows: list[dict]) -> str:
    header = (
        "| launch | kernel | target | dtype | pointers | registers | shared | spills | warps | occupancy "
        "| matrix | loads | stores |"
    )
    lines = [header, "|" + " --- |" * header.count(" |")]
    for row in rows:
        loads, stores = (
            ", ".join(f"{name} {'/'.join(map(str, widths))}" for name, widths in row[kind].items())
            for kind in ("loads", "stores")
        )
        matrix = f"{row['products']} {row['matrix']}" if row["products"] else "-"
        lines.append(
            f"| {row['launch']} | {row['kernel']} | {row['target']} | {row['dtype']} "
            f"| {'aligned' if row['aligned'] else 'unaligned'} | {row['registers']} | {row['shared']} "
            f"| {row['spills']} | {row['warps']} | {row['occupancy']:.0%} | {matrix} "
            f"| {loads} | {stores} |"
        )
    return "\n".join(lines)


def traffic_table(report: dict[str, dict], launches, clips: int) -> str:
    """Bytes, and the predicted times: floors from data-sheet peaks, of nothing that was run."""
    from audiomae_kernels.inspect.lint import moved_over_fewest
    from audiomae_kernels.inspect.targets import MACHINES

    machines = " | ".join(f"{machine.name}, predicted us" for machine in MACHINES)
    header = (
        f"| launch | kernel | dtype | fewest bytes a clip | moved / fewest | bytes a program | {machines} |"
    )
    lines = [header, "|" + " --- |" * (header.count(" |"))]
    for launch in launches:
        for kernel, operands in launch.streams.items():
            for name, entry in report.items():
                if not name.startswith(f"{launch.name} | {kernel} | "):
                    continue
                dtype = name.split(" | ")[2]
                fewest = sum(operands.values()) * (4 if dtype == "float32" else 2)
                ratio = moved_over_fewest(entry, operands, dtype)
                flops = launch.flops.get(kernel, 0)
                times = " | ".join(
                    f"{machine.predicted_seconds(clips * fewest, clips * flops, dtype) * 1e6:.1f}"
                    for machine in MACHINES
                )
                lines.append(
                    f"| {launch.name} | {kernel} | {dtype} | {fewest} | {ratio:.3f} "
                    f"| {sum(entry['operands'].values()) / entry['programs']:.0f} | {times} |"
                )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m audiomae_kernels.inspect",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    of_targets = "of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942; default: all"
    option("--targets", nargs="+", metavar="TARGET", help=of_targets)
    of_dtypes = "of bf16, fp16, fp32, or their long names, such as bfloat16; default: all"
    option("--dtypes", nargs="+", metavar="DTYPE", help=of_dtypes)
    option("--quick", action="store_true", help="the main launches, for five combinations of these")
    option(
        "--clips",
        type=_positive,
        metavar="N",
        default=64,
        help="batch whose times are predicted; default: 64",
    )
    option(
        "--launches",
        metavar="MODULE",
        default=DEFAULT_LAUNCHES,
        help="whose LAUNCHES to inspect; default: ours",
    )
    option("--processes", type=_positive, metavar="N", default=2, help="that compile at a time; default: 2")
    option(
        "--json", type=Path, metavar="FILE", help="for rows, traffic and findings; no table is printed then"
    )
    option("--baseline", type=Path, metavar="FILE", help="with reviewed binaries: differences are findings")
    option(
        "--write-baseline", type=Path, metavar="FILE", help="for these binaries, after a review of the table"
    )
    args = parser.parse_args(argv)
    if not _triton.available():
        parser.error(_triton.why_not())

    from audiomae_kernels.inspect import lint, survey, traffic
    from audiomae_kernels.inspect.targets import TARGETS

    targets = _chosen(parser, "--targets", args.targets, {name: name for name in TARGETS})
    dtypes = _chosen(parser, "--dtypes", args.dtypes, DTYPES)
    jobs = [
        job
        for job in (QUICK if args.quick else itertools.product(TARGETS, DTYPES.values(), (True, False)))
        if job[0] in targets and job[1] in dtypes
    ]
    if not jobs:
        parser.error(
            "--quick has none of these --targets in these --dtypes; it has "
            f"{', '.join(f'{target} in {dtype}' for target, dtype, _ in QUICK)}."
        )
    try:
        launches = lint.load_launches(args.launches, args.quick)
    except ImportError as error:
        parser.error(f"--launches: {error}.")
    for option_name, path in (("--json", args.json), ("--write-baseline", args.write_baseline)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{option_name}: there is no folder {path.parent} to write {path.name} to.")
    try:
        baseline = json.loads(args.baseline.read_text()) if args.baseline else None
    except (OSError, ValueError) as error:
        parser.error(f"--baseline: {args.baseline} cannot be read ({error}); --write-baseline makes one.")
    by_name = {launch.name: launch for launch in launches}

    wanted = [(launch.name, *job) for job in jobs for launch in launches]
    rows, compiled = [], survey.compile_all(args.launches, wanted, args.processes)
    for i, ((launch, target, dtype, aligned), found) in enumerate(zip(wanted, compiled, strict=True), 1):
        rows += found
        pointers = "aligned" if aligned else "unaligned"
        _say(f"{i} of {len(wanted)} compiled: {launch} / {target} / {dtype} / {pointers}")
    found = [sentence for row in rows for sentence in lint.violations(row, by_name[row["launch"]])]
    found += lint.missing(rows, launches, jobs)

    counted = ["bfloat16"] if args.quick else dtypes
    done = itertools.count(1)
    total = len(launches) * len(counted)
    try:
        report = traffic.measure(
            counted,
            args.launches,
            args.quick,
            lambda launch, dtype: _say(f"bytes of {next(done)} of {total} counted: {launch} / {dtype}"),
        )
    except RuntimeError as error:
        report = {}
        found.append(f"No bytes were counted, and no times are predicted. {error}")
    else:
        found += lint.traffic_violations(report, launches, counted)
    if args.write_baseline:
        lint.write_baseline(rows, args.write_baseline)
    if baseline is not None:
        found += lint.compare(rows, baseline)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "traffic": report, "findings": found}, indent=1))
    else:
        print(binaries_table(rows))
        if report:
            print("", traffic_table(report, launches, args.clips), sep="\n")
    for sentence in found:
        _say(sentence)
    return 1 if found else 0


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it has to be a positive integer, not {text!r}.")
    return int(text)


def _chosen(parser, option: str, given: list[str] | None, known: dict[str, str]) -> list[str]:
    """Full names of what was given, by spaces or commas; all without. `known`: short name -> full name."""
    if given is None:
        return list(known.values())
    names = known | {name: name for name in known.values()}
    words = [word for text in given for word in text.split(",")]
    if unknown := [word for word in words if word not in names]:
        parser.error(
            f"{option}: there is no {', '.join(map(repr, unknown))}; choose from {', '.join(names)}."
        )
    return list(dict.fromkeys(names[word] for word in words))


if __name__ == "__main__":
    sys.exit(main())
