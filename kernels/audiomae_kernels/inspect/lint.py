"""The rules for binaries, and the comparison with a baseline that a person has looked at.

The rules hold for every binary. Registers, shared memory, widths and matrix instructions of the quick selection
are compared with tests/triton/baseline.json, which holds for one version of Triton: a difference there is no
error of its own, but wants a look at the table before ``python -m audiomae_kernels.inspect --quick
--write-baseline FILE``.

TF32 has a rule of its own: none in float32, which promises IEEE products; allowed in float16, whose backward of
window_attention multiplies float32 values up to 1e8 that float16 cannot hold (TF32 has float32's range, and
float16's 10 bits of fraction, though truncated); none in bfloat16, which can hold them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import triton

from audiomae_kernels.inspect.launches import Launch

# What the compiler does not do wider, in bits. AMD's stores the result of a matrix instruction as it lies in
# the registers, four values in a row; the kernel is bound by its products.
NARROWER = {("gfx942", "info_nce_bwd_kernel", "d_x"): 64}
REVIEWED = ("registers", "shared", "matrix", "products", "loads", "stores")


def load_launches(module: str, quick: bool = False) -> tuple[Launch, ...]:
    """``LAUNCHES`` of a module by name, or the quick ones among them."""
    return tuple(launch for launch in import_module(module).LAUNCHES if launch.quick or not quick)


def key(row: dict) -> str:
    return f"{_group(row)} | {row['target']}"


def _group(row: dict) -> str:
    pointers = "aligned" if row["aligned"] else "unaligned"
    return " | ".join((row["launch"], row["kernel"], row["dtype"], pointers))


def _text(value: int | str | dict[str, list[int]]) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {'/'.join(map(str, widths))}" for name, widths in sorted(value.items()))
    return str(value)


def violations(row: dict, launch: Launch) -> list[str]:
    """What is wrong with one binary, a sentence each."""
    found = []
    if row["spills"] or row["local"]:
        found.append(f"it spills ({row['spills']}) or has local memory ({row['local']} bytes)")
    if row["atomics"]:
        found.append(f"it has {row['atomics']} atomic instructions: sums would not be deterministic")
    if row["reduced"] and row["dtype"] != "float16":
        found.append(f"it has {row['reduced']} matrix instructions that round float32 to TF32")
    if row["narrow"]:
        found.append(f"{row['narrow']} offsets are multiplied with a run-time argument in 32 bits")
    if row["dtype"] != "float32" and launch.flops.get(row["function"]) and not row["matrix"]:
        found.append("its dots do not run on tensor cores")
    if row["dtype"] == "bfloat16" and row["aligned"]:
        for operand in launch.streams.get(row["function"], ()):
            widths = _widths(row, operand)
            least = NARROWER.get((row["target"], row["function"], operand), 128)
            if not widths:
                found.append(f"no access of its streaming operand {operand} was found")
            elif min(widths) < least:
                found.append(f"its streaming operand {operand} is accessed {min(widths)} bits at a time")
    for kind in ("loads", "stores"):
        if "?" in row[kind]:
            found.append(f"some of its {kind} could not be followed back to an operand")
    return [f"{key(row)}: {sentence}" for sentence in found]


def _widths(row: dict, operand: str) -> list[int]:
    """Of all accesses that may be of `operand`: "q|k" names either."""
    accesses = [*row["loads"].items(), *row["stores"].items()]
    return [width for names, widths in accesses if operand in names.split("|") for width in widths]


def missing(rows: Iterable[dict], launches: Iterable[Launch], jobs: Iterable[tuple]) -> list[str]:
    """Kernels that a launch names and that no binary is of, for each (target, dtype, aligned), a sentence each.

    Without them a kernel under a new name would pass every rule.
    """
    seen = {tuple(row[name] for name in ("launch", "function", "target", "dtype", "aligned")) for row in rows}
    return [
        f"{launch.name} | {kernel} | {dtype} | {'aligned' if aligned else 'unaligned'} | {target}: "
        "the launch names this kernel, and no binary of it was found"
        for launch in launches
        for kernel in launch.kernels
        for target, dtype, aligned in jobs
        if (launch.name, kernel, target, dtype, aligned) not in seen
    ]


def traffic_violations(
    report: dict[str, dict], launches: Iterable[Launch], dtypes: Iterable[str]
) -> list[str]:
    """Streaming operands of which more bytes move than must, and kernels without a count, a sentence each."""
    found = []
    for launch, dtype in itertools.product(launches, dtypes):
        for kernel in launch.kernels:
            name = f"{launch.name} | {kernel} | {dtype}"
            if name not in report:
                found.append(f"{name}: the launch names this kernel, and none of its bytes were counted")
            elif (allowed := launch.allowed(kernel)) is not None and kernel in launch.streams:
                ratio = moved_over_fewest(report[name], launch.streams[kernel], dtype)
                if ratio > allowed:
                    found.append(f"{name}: moves {ratio:.2f} times the fewest bytes, {allowed} is allowed")
    return found


def moved_over_fewest(entry: dict, operands: dict[str, int], dtype: str) -> float:
    size = 4 if dtype == "float32" else 2
    return sum(entry["operands"][name] for name in operands) / sum(n * size for n in operands.values())


def compare(rows: Iterable[dict], baseline: dict) -> list[str]:
    """Differences from the reviewed baseline, a sentence each; none for another version of Triton."""
    if baseline["triton"] != triton.__version__:
        return []
    found = []
    for row in rows:
        group = baseline["binaries"].get(_group(row), {})
        for name in REVIEWED:
            was = next(
                (text for text, on in group.get(name, {}).items() if row["target"] in on.split()), None
            )
            if was is None:
                found.append(f"{key(row)}: nobody has reviewed it")
                break
            if _text(row[name]) != was:
                found.append(f"{key(row)}: {name} is {_text(row[name])}, and was {was} when reviewed")
    return found


def write_baseline(rows: Iterable[dict], path: Path) -> None:
    """A kernel and dtype a line, each value with the targets that have it: a review reads as a diff."""
    groups: dict[str, dict[str, dict[str, list[str]]]] = {}
    for row in rows:
        columns = groups.setdefault(_group(row), {name: {} for name in REVIEWED})
        for name in REVIEWED:
            columns[name].setdefault(_text(row[name]), []).append(row["target"])
    lines = []
    for group, columns in sorted(groups.items()):
        merged = {
            name: {text: " ".join(sorted(targets)) for text, targets in sorted(values.items())}
            for name, values in columns.items()
        }
        lines.append(f"{json.dumps(group)}: {json.dumps(merged)}")
    body = ",\n".join(lines)
    path.write_text(f'{{"triton": "{triton.__version__}", "binaries": {{\n{body}\n}}}}\n')


def binaries_in(baseline: dict) -> int:
    """How many binaries it holds."""
    return sum(
        len(on.split()) for columns in baseline["binaries"].values() for on in columns[REVIEWED[0]].values()
    )
