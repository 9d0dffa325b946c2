"""From measurements.csv to tables, report.md and a plot. Reads the CSV and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import results
from ..report import brackets, ceilings_table, environment, markdown, warnings, with_spread, within_rounds
from ..timing import quantile, spread
from .cases import MODES, SHAPES
from .providers import PROVIDERS

OURS = ("native", "triton")
BASELINES = ("eager", "compiled")
_DESCRIPTIONS = {(shape.op, shape.name): shape.description for shape in SHAPES}
_HEADINGS = {
    "forward": "Forward",
    "backward": "Backward",
    "forward+backward": "Forward and backward",
}


@dataclass
class Row:
    """A provider on a case. `seconds` is by mode and round; with an `error` there are no numbers."""

    provider: str
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    notes: dict[str, str] = field(default_factory=dict)  # mode -> why it has no number
    late: dict[int, bool] = field(default_factory=dict)  # round -> whether its times are the host's in part

    def median(self, mode: str) -> float:
        return quantile(list(self.seconds[mode].values()), 0.5)


@dataclass
class Group:
    """All that was measured of one case."""

    op: str
    shape: str
    dtype: str
    batch: int
    rows: dict[str, Row] = field(default_factory=dict)
    copy: Row = field(default_factory=lambda: Row("copy"))
    bytes: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    peak: float | None = None  # FLOP/s

    @property
    def modes(self) -> list[str]:
        return [mode for mode in MODES if mode in self.bytes]

    def floor(self, mode: str) -> float | None:
        """Seconds below which the mode cannot go here: the copy beside it or the arithmetic, whichever is longer."""
        parts = MODES[:2] if mode == MODES[2] else (mode,)
        if self.peak is None or any(part not in self.copy.seconds for part in parts):
            return None
        return sum(max(self.copy.median(part), self.flops[part] / self.peak) for part in parts)

    def against(self, baseline: str, row: Row, mode: str) -> tuple[float, float, float] | None:
        """How many times as fast as the baseline, see `report.within_rounds`."""
        other = self.rows.get(baseline)
        if other is None or not other.seconds.get(mode, {}).keys() & row.seconds.get(mode, {}).keys():
            return None
        return within_rounds(other.seconds[mode], row.seconds[mode])


def collect(records: Iterable[dict]) -> list[Group]:
    """Groups in the order of their first appearance. A row with an error loses its numbers."""
    groups: dict[tuple, Group] = {}
    peaks: dict[str, float] = {}
    for record in records:
        if record["metric"] == "matmul_ceiling":
            peaks[record["dtype"]] = max(record["value"], peaks.get(record["dtype"], 0.0))
        if not record["op"]:
            continue
        key = tuple(record[name] for name in ("op", "shape", "dtype", "batch"))
        group = groups.setdefault(key, Group(*key))
        metric, mode, provider = record["metric"], record["mode"], record["provider"]
        if not provider:
            getattr(group, metric)[mode] = record["value"]
            continue
        row = group.copy if provider == "copy" else group.rows.setdefault(provider, Row(provider))
        if metric == "error":
            if mode:
                row.notes[mode] = record["note"]
            else:
                row.error = row.error or record["note"]
        elif metric == "seconds":
            row.seconds.setdefault(mode, {})[record["round"]] = record["value"]
        elif metric == "late":
            row.late[record["round"]] = record["value"] > 0.5  # see `timing.PassesOnCUDA`
        else:
            row.metrics[metric] = record["value"]
    order = [*PROVIDERS]
    for group in groups.values():
        group.rows = {name: group.rows[name] for name in sorted(group.rows, key=order.index)}
        group.peak = peaks.get(group.dtype)
        for row in group.rows.values():
            if row.error is None and not row.seconds:
                row.error = "not finished: the run ended before"
            if row.error is not None:
                row.seconds, row.metrics = {}, {}
    return list(groups.values())


def _ms(seconds: Iterable[float]) -> str:
    values = [1e3 * value for value in seconds]
    return with_spread(*values, digits=3 if values[0] < 1 else 2 if values[0] < 10 else 1)


def _figures(group: Group, row: Row, mode: str) -> list[str]:
    """Cells: ms, against eager, against compiled, GB/s, share of the floor."""
    median, floor = row.median(mode), group.floor(mode)
    ratios = [group.against(baseline, row, mode) for baseline in BASELINES]
    return [
        _ms((median, *spread(list(row.seconds[mode].values())))),
        *("—" if ratio is None else with_spread(*ratio) for ratio in ratios),
        f"{group.bytes[mode] / median / 1e9:.1f}",
        "—" if floor is None else f"{100 * floor / median:.0f} %",
    ]


_FIGURES = ("ms", "against eager", "against compiled", "GB/s", "of floor")


def summary_table(groups: Sequence[Group]) -> str:
    """This project's kernels in each case, forward and backward where there is one."""
    lines = [
        [
            group.op,
            group.shape,
            group.dtype,
            str(group.batch),
            row.provider,
            *_figures(group, row, group.modes[-1]),
        ]
        for group in groups
        for row in group.rows.values()
        if row.provider in OURS and row.seconds
    ]
    return markdown(["op", "shape", "dtype", "batch", "provider", *_FIGURES], lines) if lines else ""


def mode_table(groups: Sequence[Group], mode: str) -> str:
    """All providers of one shape; the table of the last mode has memory and the first call too."""
    last = mode == groups[0].modes[-1]
    memory = [m for m in ("saved", "peak") if any(m in r.metrics for g in groups for r in g.rows.values())]
    lines = []
    for group in groups:
        for row in (row for row in group.rows.values() if mode in row.seconds):
            line = [group.dtype, str(group.batch), row.provider, *_figures(group, row, mode)]
            if last:
                line += [f"{row.metrics[m] / 1e6:.1f}" if m in row.metrics else "—" for m in memory]
                line += [f"{row.metrics['first_call']:.2f}" if "first_call" in row.metrics else "—"]
            lines.append(line)
        floor = group.floor(mode)
        cells = ["—" if floor is None else _ms((floor,) * 3), "—", "—"]
        cells += ["—" if floor is None else f"{group.bytes[mode] / floor / 1e9:.1f}", "100 %"]
        lines.append(
            [group.dtype, str(group.batch), "*floor*", *cells, *(["—"] * (len(memory) + 1) if last else [])]
        )
    header = ["dtype", "batch", "provider", *_FIGURES]
    return markdown(header + ([*(f"{m}, MB" for m in memory), "first call, s"] if last else []), lines)


def without_numbers(groups: Sequence[Group]) -> list[str]:
    """A line for each reason, with the cases that it cost."""
    cost: dict[tuple[str, str], dict[str, None]] = {}
    for group in groups:
        for row in group.rows.values():
            reasons = [row.error] if row.error else row.notes.values()
            for reason in reasons:
                cost.setdefault((row.provider, reason), {})[
                    f"{group.op} {group.shape} {group.dtype} x{group.batch}"
                ] = None
    everything = len(groups)
    lines = []
    for (provider, reason), where in cost.items():
        count = f"{len(where)} of {everything} cases" if len(where) > 3 else "; ".join(where)
        lines.append(f"- {provider}: {reason} ({count})")
    return lines


def cut_short(records: Sequence[dict], groups: Sequence[Group]) -> list[str]:
    """A warning if the run ended before all of its cases."""
    planned = next((int(r["value"]) for r in records if r["metric"] == "cases"), len(groups))
    if len(groups) >= planned:
        return []
    return [f"The run ended early: {len(groups)} of {planned} cases were begun."]


def late_launches(groups: Sequence[Group]) -> list[str]:
    """A warning if the host was too slow for times of the device alone; it names the rows."""
    rows = [
        f"{group.op} {group.shape} {group.dtype} x{group.batch} {row.provider} "
        f"({sum(row.late.values())} of {len(row.late)} rounds)"
        for group in groups
        for row in (group.copy, *group.rows.values())
        if row.error is None and any(row.late.values())
    ]
    if not rows:
        return []
    return [
        "The host took longer for its launches than the GPU was kept busy, so that these times are upper bounds, "
        f"and ratios and floors taken from them are off: {'; '.join(rows)}."
    ]


def text(records: Sequence[dict]) -> str:
    """The whole report in Markdown."""
    groups = collect(records)
    rounds = [len(s) for g in groups for r in g.rows.values() for s in r.seconds.values()] or [0]
    counted = str(min(rounds)) if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    sections = [
        "# Benchmark: kernels",
        environment(records[0]),
        *(
            f"**{warning}**"
            for warning in (*cut_short(records, groups), *warnings(records), *late_launches(groups))
        ),
        f"Random inputs that no cache holds when a call begins. {counted} interleaved rounds a case; the figures are "
        f"medians with {brackets(min(rounds))} in brackets, ratios are taken within rounds. Output and gradients of "
        "every provider were held to an error budget against float64 before it was timed (see "
        "bench/README.md); one that failed has no numbers.",
        "*Against*: how many times as fast. *GB/s*: the least bytes that the op must move, by its time. *Floor*: a "
        "copy of as many bytes, timed beside the providers, or the arithmetic at the rate of a large matrix product, "
        "whichever takes longer. *Saved*: storages that autograd keeps for the backward pass, the op's inputs "
        "included and parameters not. *First call*: forward and backward, compilation included. A forward pass is "
        "that of training where there is a backward pass.",
    ]
    if summary := summary_table(groups):
        sections += ["## This project's kernels", summary]
    if lines := without_numbers(groups):
        sections += ["## Without numbers", "\n".join(lines)]
    for op, shape in dict.fromkeys((group.op, group.shape) for group in groups):
        chosen = [g for g in groups if (g.op, g.shape) == (op, shape) and g.bytes]
        if not chosen:
            continue
        sections += [f"## {op}: {shape}", _DESCRIPTIONS.get((op, shape), "") + "."]
        for mode in reversed(chosen[0].modes):
            sections += [f"{_HEADINGS[mode]}:", mode_table(chosen, mode)]
    if any(record["metric"].endswith("_ceiling") for record in records):
        sections += ["## Ceilings of this machine, in this run", ceilings_table(records)]
    return "\n\n".join(sections) + "\n"


_COLORS = {"native": "#1b6ca8", "triton": "#1b6ca8", "eager": "#8a929b", "compiled": "#b0b7bf"}


def plot(groups: Sequence[Group], path: Path) -> None:
    """A panel for each shape and dtype: providers' times, forward and backward, and the floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = {group.batch for group in groups}
    batch = 8 if 8 in batches else max(batches, default=8)
    shown = [g for g in groups if g.batch == batch and any(r.seconds for r in g.rows.values())]
    shapes = list(dict.fromkeys((g.op, g.shape) for g in shown))
    dtypes = list(dict.fromkeys(g.dtype for g in shown))
    figure = Figure(figsize=(1 + 5 * max(1, len(dtypes)), 1 + 2 * max(1, len(shapes))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(shapes)), max(1, len(dtypes)), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for group in shown:
        axis = axes[shapes.index((group.op, group.shape)), dtypes.index(group.dtype)]
        axis.set_axis_on()
        mode = group.modes[-1]
        rows = [row for row in group.rows.values() if mode in row.seconds]
        times = [1e3 * row.median(mode) for row in rows]
        ends = [spread([1e3 * s for s in row.seconds[mode].values()]) for row in rows]
        whiskers = list(zip(*((t - a, b - t) for t, (a, b) in zip(times, ends, strict=True)), strict=True))
        colors = [_COLORS.get(row.provider, "#d08c3f") for row in rows]
        axis.barh(
            [row.provider for row in rows],
            times,
            xerr=whiskers or None,
            color=colors,
            error_kw={"lw": 1, "capsize": 2},
        )
        if (floor := group.floor(mode)) is not None:
            axis.axvline(1e3 * floor, color="#b3261e", lw=1, ls="--")
        axis.invert_yaxis()
        axis.set_title(f"{group.op}, {group.shape}, {group.dtype}", fontsize="small")
        axis.set_xlabel("ms", fontsize="small")
        axis.tick_params(labelsize="small")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Forward and backward at batch {batch}; dashed: floor")
    figure.savefig(path, dpi=120)


def write(csv: Path, out: Path) -> str:
    """Write report.md and kernels.png into `out`; return the report's text.

    Raises:
        ValueError: the CSV is not a record of kernels, or is empty.
    """
    records = results.read(csv, results.KERNEL_COLUMNS)
    report = text(records)
    (out / "report.md").write_text(report + "\n![times](kernels.png)\n")
    plot(collect(records), out / "kernels.png")
    return report
