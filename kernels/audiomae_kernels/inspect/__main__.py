"""``python -m audiomae_kernels.inspect``: see the package."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from audiomae_kernels import _triton

DTYPES = ("bfloat16", "float16", "float32")
DEFAULT_LAUNCHES = "audiomae_kernels.inspect.launches"
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
    parser = argparse.ArgumentParser("python -m audiomae_kernels.inspect", description=__doc__)
    parser.add_argument("--targets", help="comma-separated, such as sm_90,gfx942; default: all")
    parser.add_argument("--dtypes", help="comma-separated, such as bfloat16; default: all three")
    parser.add_argument("--quick", action="store_true", help="a selection of targets, dtypes and alignments")
    parser.add_argument("--clips", type=int, default=64, help="size at which times are predicted")
    parser.add_argument("--launches", default=DEFAULT_LAUNCHES, help="module with LAUNCHES to inspect")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write rows, traffic and findings here, print no table")
    parser.add_argument("--baseline", type=Path, help="reviewed binaries to compare with")
    parser.add_argument("--write-baseline", type=Path, help="write it, after a review of the table")
    args = parser.parse_args(argv)
    if not _triton.available():
        parser.error(_triton.why_not())

    from audiomae_kernels.inspect import lint, survey, traffic
    from audiomae_kernels.inspect.targets import TARGETS

    targets = args.targets.split(",") if args.targets else list(TARGETS)
    dtypes = args.dtypes.split(",") if args.dtypes else list(DTYPES)
    if unknown := [name for name in targets if name not in TARGETS] + [d for d in dtypes if d not in DTYPES]:
        parser.error(
            f"{', '.join(unknown)}: the targets are {', '.join(TARGETS)}, the dtypes {', '.join(DTYPES)}."
        )
    jobs = [
        job
        for job in (QUICK if args.quick else itertools.product(TARGETS, DTYPES, (True, False)))
        if job[0] in targets and job[1] in dtypes
    ]
    launches = lint.load_launches(args.launches, args.quick)
    by_name = {launch.name: launch for launch in launches}
    rows = survey.compile_all(args.launches, args.quick, jobs, args.processes)
    found = [sentence for row in rows for sentence in lint.violations(row, by_name[row["launch"]])]
    found += lint.missing(rows, launches, jobs)
    counted = ["bfloat16"] if args.quick else dtypes
    try:
        report = traffic.measure(counted, args.launches, args.quick)
    except RuntimeError as error:
        report = {}
        found.append(f"No bytes were counted, and no times are predicted. {error}")
    else:
        found += lint.traffic_violations(report, launches, counted)
    if args.write_baseline:
        lint.write_baseline(rows, args.write_baseline)
    if args.baseline:
        found += lint.compare(rows, json.loads(args.baseline.read_text()))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "traffic": report, "findings": found}, indent=1))
    else:
        print(binaries_table(rows))
        if report:
            print("", traffic_table(report, launches, args.clips), sep="\n")
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
