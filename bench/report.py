"""From measurements.csv to a table, report.md and two plots. Reads the CSV and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import results
from .timing import plural, quantile, spread

_KEY = ("model", "passes", "provider", "dtype", "mode", "batch", "frames")


@dataclass
class Row:
    """All that was measured of one case. `seconds` is by round; with an `error` there are no numbers."""

    model: str
    passes: int
    provider: str
    dtype: str
    mode: str
    batch: int
    frames: int
    tokens: int = 0
    kept: int = 0
    seconds: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def full_tokens(self) -> bool:
        """Whether it is the baseline that encodes every token (SSAST)."""
        return self.model.startswith("ssast")

    @property
    def name(self) -> str:
        return self.model + ({1: ", one pass", 2: ", two passes"}[self.passes] if self.full_tokens else "")

    @property
    def median(self) -> float:
        """Seconds."""
        return quantile(list(self.seconds.values()), 0.5)

    @property
    def spread(self) -> tuple[float, float]:
        """Seconds, see `timing.spread`."""
        return spread(list(self.seconds.values()))


def collect(records: Iterable[dict]) -> list[Row]:
    """Rows in the order of their first appearance. A row with an error anywhere loses its numbers."""
    rows: dict[tuple, Row] = {}
    for record in records:
        if not record["model"]:
            continue
        key = tuple(record[name] for name in _KEY)
        row = rows.setdefault(key, Row(*key, tokens=record["tokens"], kept=record["kept"]))
        if record["metric"] == "error":
            row.error = row.error or record["note"]
        elif record["metric"] == "seconds":
            row.seconds[record["round"]] = record["value"]
        elif record["metric"] != "loss":
            row.metrics[record["metric"]] = record["value"]
    for row in rows.values():
        if row.error is None and not (row.seconds and "floor" in row.metrics):
            row.error = "not finished: the run ended before"
        if row.error is not None:
            row.seconds, row.metrics = {}, {}
    order = sorted({(row.model, row.passes) for row in rows.values()})
    dtypes = list(dict.fromkeys(row.dtype for row in rows.values()))
    providers = ["plain", *(row.provider for row in rows.values())]

    def place(row):
        return dtypes.index(row.dtype), order.index((row.model, row.passes)), providers.index(row.provider)

    return sorted(rows.values(), key=place)


def within_rounds(slow: dict[int, float], fast: dict[int, float]) -> tuple[float, float, float]:
    """Median and spread of ``slow / fast`` over the rounds that both have."""
    ratios = [slow[i] / fast[i] for i in slow.keys() & fast.keys()]
    return quantile(ratios, 0.5), *spread(ratios)


@dataclass(frozen=True)
class Ratio:
    """How many times `fast` beats `slow` in time, memory and FLOPs."""

    fast: Row
    slow: Row

    def time(self) -> tuple[float, float, float]:
        """Median and spread of the ratios within each round: what slows the machine down for a while cancels."""
        return within_rounds(self.slow.seconds, self.fast.seconds)

    def metric(self, name: str) -> float:
        return self.slow.metrics[name] / self.fast.metrics[name]


def _pairs(rows: Sequence[Row], keep: Callable[[Row, Row], bool]) -> list[Ratio]:
    good = [row for row in rows if row.error is None]
    same = ("dtype", "mode", "batch", "frames")
    return [
        Ratio(fast, slow)
        for fast in good
        for slow in good
        if all(getattr(fast, name) == getattr(slow, name) for name in same)
        and fast.seconds.keys() & slow.seconds.keys()
        and keep(fast, slow)
    ]


def architecture_ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Visible-only encoders against SSAST, both by the same provider."""
    return _pairs(rows, lambda a, b: a.provider == b.provider and not a.full_tokens and b.full_tokens)


def system_ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Ours against the plain baseline of the same model, and visible-only encoders also against plain SSAST."""

    def keep(fast, slow):
        same = (fast.model, fast.passes) == (slow.model, slow.passes)
        against_ssast = slow.full_tokens and not fast.full_tokens
        return fast.provider == "ours" and slow.provider == "plain" and (same or against_ssast)

    return _pairs(rows, keep)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table padded so that it reads on a screen too; the first columns of words are left-aligned."""
    lines = [list(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    numeric = [all(line[i][:1] in "0123456789—" for line in lines) for i in range(len(header))]

    def joined(cells):
        padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = (
        "|"
        + "|".join("-" * (w + 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True))
        + "|"
    )
    return "\n".join([joined(header), rule, *map(joined, lines)])


def with_spread(median: float, low: float, high: float, digits: int = 2) -> str:
    if low == high:  # a single round has no spread to show
        return f"{median:.{digits}f}"
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def rows_table(rows: Sequence[Row]) -> str:
    header = ("model", "provider", "dtype", "clips/s", "ms per step", "GFLOP/clip", "floor, ms", "of floor")
    header += ("saved, MB", "peak, MB")
    lines = []
    for row in rows:
        line = [row.name, row.provider, row.dtype]
        if row.error is None:
            median, (low, high) = row.median, row.spread
            line += [
                with_spread(row.batch / median, row.batch / high, row.batch / low),
                f"{1e3 * median:.0f}",
                f"{row.metrics['flops'] / 1e9:.1f}",
                f"{1e3 * row.metrics['floor']:.0f}",
                f"{100 * row.metrics['floor'] / median:.0f} %",
                f"{row.metrics['saved'] / 1e6:.0f}",
                f"{row.metrics['peak'] / 1e6:.0f}",
            ]
        else:
            line += ["—"] * 7
        lines.append(line)
    return markdown(header, lines)


def ratios_table(ratios: Sequence[Ratio], providers: bool) -> str:
    """`providers`: whether the two sides' providers differ and have to be named."""
    lines = []
    for ratio in ratios:
        fast, slow = ratio.fast, ratio.slow
        line = (
            [fast.name + " (ours)", slow.name + " (plain)"]
            if providers
            else [fast.name, slow.name, fast.provider]
        )
        line += [
            fast.dtype,
            with_spread(*ratio.time()),
            f"{ratio.metric('flops'):.2f}",
        ]
        lines.append([*line, f"{ratio.metric('saved'):.2f}", f"{ratio.metric('peak'):.2f}"])
    header = ["this", "against"] + ([] if providers else ["both by"])
    return markdown([*header, "dtype", "times as fast", "FLOP model", "saved bytes", "peak memory"], lines)


def environment(first: dict) -> str:
    """The machine and the versions, from any row of the CSV."""
    return (
        f"{first['device_name']}; {plural(first['threads'], 'thread')} of {plural(int(first['cores']), 'core')}; "
        f"{first['system']}; torch {first['torch']}, Python {first['python']}; "
        f"commit {first['commit'] or 'unknown'}; {first['started']}; preset {first['preset']}."
    )


def warnings(records: Sequence[dict]) -> list[str]:
    """What makes the run's times doubtful, as sentences."""
    found = []
    cores = int(records[0]["cores"] or 1)
    for record in records:
        if record["metric"] == "others_running" and (record["value"] or 0) > max(0.5, 0.1 * cores):
            found.append(
                f"The machine was busy at the start: {record['value']:.1f} other processes were running on "
                f"{plural(cores, 'core')}. Run it again on an idle machine."
            )
    if any(record["metric"] == "interrupted" for record in records):
        found.append("The run was interrupted: this is what it measured until then.")
    copies = [record["value"] for record in records if record["metric"] == "copy_ceiling"]
    if len(copies) > 1 and abs(copies[-1] - copies[0]) > 0.2 * max(copies[0], copies[-1]):
        found.append(
            f"The speed of the machine changed during the run: memory was copied at {copies[0] / 1e9:.1f} GB/s "
            f"before the timing and at {copies[-1] / 1e9:.1f} GB/s after it."
        )
    return found


def ceilings_table(records: Sequence[dict]) -> str:
    """The best rate seen for each product, by dtype: the lowest, the median and the highest of the shapes."""
    best: dict[str, dict[str, float]] = {}
    copies = []
    for record in records:
        if record["metric"] == "matmul_ceiling":
            shapes = best.setdefault(record["dtype"], {})
            shapes[record["part"]] = max(record["value"], shapes.get(record["part"], 0.0))
        elif record["metric"] == "copy_ceiling":
            copies.append(record["value"])
    lines = [
        [
            f"matrix products, {dtype}",
            *(f"{quantile(list(s.values()), q) / 1e9:.0f}" for q in (0, 0.5, 1)),
            "GFLOP/s",
        ]
        for dtype, s in best.items()
    ]
    if copies:
        lines.append(["memory copy", *(f"{quantile(copies, q) / 1e9:.1f}" for q in (0, 0.5, 1)), "GB/s"])
    return markdown(["ceiling", "lowest", "median", "highest", "unit"], lines)


def brackets(rounds: int) -> str:
    """What stands in brackets after a median of so many rounds."""
    return "the 10 % and 90 % quantiles" if rounds >= 5 else "the lowest and the highest"


def text(records: Sequence[dict]) -> str:
    """The whole report in Markdown."""
    rows, first = collect(records), records[0]
    rounds = max((len(row.seconds) for row in rows), default=0)
    sections = [
        "# Benchmark: whole models, one training step",
        environment(first),
        *(f"**{warning}**" for warning in warnings(records)),
    ]
    if not rows:
        return "\n\n".join([*sections, "No row was measured."]) + "\n"
    one = rows[0]
    sections += [
        f"A step is forward, backward and AdamW on {plural(one.batch, 'clip')} of {one.frames} frames x 128 mel bins "
        f"({one.tokens} tokens), spectrograms of real recordings. {plural(rounds, 'interleaved round')}; "
        f"the figures are medians with {brackets(rounds)} in brackets. bf16 is fp32 weights under bf16 autocast. "
        "No dropout anywhere: each row's loss and gradient norm were checked against the fp32 baseline with "
        "the same weights and mask, and a row that failed has no numbers.",
        rows_table(rows),
    ]
    if failed := [f"- {row.name}, {row.provider}, {row.dtype}: {row.error}" for row in rows if row.error]:
        sections += ["Rows without numbers:", "\n".join(failed)]
    sections.append(
        "*Floor*: every matrix product at the rate measured for its own shape in this run, attention's at "
        "the best rate, and the optimizer's traffic at the speed of a copy. *Saved*: storages that autograd "
        "keeps for the backward pass, without parameters. *Peak*: of a fresh process that makes one step "
        "(weights, optimizer state and activations)."
    )
    if ratios := architecture_ratios(rows):
        sections += [
            "## Architecture: a visible-only encoder against SSAST, both by the same provider",
            ratios_table(ratios, providers=False),
        ]
    if ratios := system_ratios(rows):
        sections += [
            "## System: ours against plain PyTorch with SDPA",
            ratios_table(ratios, providers=True),
        ]
    if any(record["metric"].endswith("_ceiling") for record in records):
        sections += ["## Ceilings of this machine, in this run", ceilings_table(records)]
    return "\n\n".join(sections) + "\n"


def _plot(rows: Sequence[Row], path: Path, title: str, unit: str, panels) -> None:
    """A horizontal bar chart; `panels` are (title, value of a row, (below, above) of a row or None)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = [row for row in rows if row.error is None]
    figure = Figure(figsize=(6 * len(panels) + 3, 1.5 + 0.34 * max(1, len(good))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (subtitle, value, error) in zip(axes, panels, strict=True):
        values = [value(row) for row in good]
        whiskers = list(zip(*map(error, good), strict=True)) if error and good else None
        colors = [{"ours": "#1b6ca8", "plain": "#b0b7bf"}.get(row.provider, "#d08c3f") for row in good]
        axis.barh(range(len(good)), values, xerr=whiskers, color=colors, error_kw={"lw": 1, "capsize": 2})
        axis.set(xlabel=unit, title=subtitle)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(good)), [f"{row.name}  {row.provider}  {row.dtype}" for row in good])
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def write(csv: Path, out: Path) -> str:
    """Write report.md, throughput.png and memory.png into `out`; return the report's text.

    Raises:
        ValueError: the CSV is not a benchmark record, or is empty.
    """
    records = results.read(csv)
    report, rows = text(records), collect(records)
    (out / "report.md").write_text(report + "\n![throughput](throughput.png)\n\n![memory](memory.png)\n")

    def whiskers(row):
        low, high = row.spread
        return row.batch / row.median - row.batch / high, row.batch / low - row.batch / row.median

    title = f"median, {brackets(max((len(row.seconds) for row in rows), default=0))}"
    _plot(
        rows,
        out / "throughput.png",
        "Training throughput",
        "clips per second",
        [(title, lambda row: row.batch / row.median, whiskers)],
    )
    memory = [
        ("saved for the backward pass", lambda row: row.metrics["saved"] / 1e6, None),
        ("peak of a fresh process", lambda row: row.metrics["peak"] / 1e6, None),
    ]
    _plot(rows, out / "memory.png", "Memory of a training step", "MB", memory)
    return report
