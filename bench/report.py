"""From measurements.csv to a table, report.md and two plots. Reads the CSV and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from audiomae.words import plural

from . import results
from .registry import PROVIDER_NAMES
from .timing import quantile, spread

_KEY = ("group", "model", "passes", "provider", "dtype", "mode", "batch", "frames", "mask_ratio")
_TITLES = {
    "training": "Training step",
    "inference": "Inference: the forward pass with its losses, without gradients",
    "embeddings": "Embeddings: the encoder over all tokens, without gradients",
}


@dataclass
class Row:
    """All that was measured of one case. `seconds` is by round; with an `error` there are no numbers."""

    group: int | None
    model: str
    passes: int
    provider: str
    dtype: str
    mode: str
    batch: int
    frames: int
    mask_ratio: float | None
    tokens: int = 0
    kept: int = 0
    seconds: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def full_tokens(self) -> bool:
        """Whether it is the baseline that encodes every token (SSAST)."""
        return self.model.startswith("ssast")

    @property
    def name(self) -> str:
        passes = self.full_tokens and self.mode != "embeddings"
        return self.model + ({1: ", one pass", 2: ", two passes"}[self.passes] if passes else "")

    @property
    def computed_by(self) -> str:
        return PROVIDER_NAMES.get(self.provider, self.provider)

    @property
    def point(self) -> tuple:
        """What two rows must share to be compared."""
        return self.group, self.mode, self.dtype, self.batch, self.frames

    @property
    def masked(self) -> str:
        """The share of the tokens that is masked, in words."""
        return f"{100 * (1 - self.kept / self.tokens):.0f} %" if self.tokens else "—"

    @property
    def rate(self) -> float:
        """Clips per second, the median."""
        return self.batch / self.median

    @property
    def median(self) -> float:
        """Seconds."""
        return quantile(list(self.seconds.values()), 0.5)

    @property
    def spread(self) -> tuple[float, float]:
        """Seconds, see `timing.spread`."""
        return spread(list(self.seconds.values()))


def collect(records: Iterable[dict]) -> list[Row]:
    """Rows by group, dtype, model and provider. A row with an error anywhere loses its numbers."""
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
        elif record["value"] is None:
            row.notes[record["metric"]] = record["note"]
        elif record["metric"] not in ("loss", "rms"):
            row.metrics[record["metric"]] = record["value"]
            if record["note"]:
                row.notes[record["metric"]] = record["note"]
    for row in rows.values():
        if row.error is None and not (row.seconds and "floor" in row.metrics):
            row.error = "not finished: the run ended before"
        if row.error is not None:
            row.seconds, row.metrics = {}, {}
    groups = list(dict.fromkeys(row.group for row in rows.values()))
    order = sorted({(row.model, row.passes) for row in rows.values()})
    dtypes = list(dict.fromkeys(row.dtype for row in rows.values()))
    providers = list(dict.fromkeys([*PROVIDER_NAMES, *(row.provider for row in rows.values())]))

    def place(row):
        return (
            groups.index(row.group),
            dtypes.index(row.dtype),
            order.index((row.model, row.passes)),
            providers.index(row.provider),
        )

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
    return [
        Ratio(fast, slow)
        for fast in good
        for slow in good
        if fast.point == slow.point and fast.seconds.keys() & slow.seconds.keys() and keep(fast, slow)
    ]


def architecture_ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Visible-only encoders against SSAST, both by the same provider."""
    return _pairs(rows, lambda a, b: a.provider == b.provider and not a.full_tokens and b.full_tokens)


def system_ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Ours against the plain baseline of the same model, and visible-only encoders also against plain SSAST.

    A model without a baseline has none.
    """
    based = {row.model for row in rows if row.provider == "plain"}

    def keep(fast, slow):
        same = (fast.model, fast.passes) == (slow.model, slow.passes)
        against_ssast = slow.full_tokens and not fast.full_tokens
        return (
            fast.provider != "plain"
            and slow.provider == "plain"
            and fast.model in based
            and (same or against_ssast)
        )

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


def _where(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """The columns that say where a row was measured, those that differ between rows."""
    columns = [
        ("clips", lambda row: str(row.batch)),
        ("tokens", lambda row: str(row.tokens)),
        ("masked", lambda row: row.masked),
    ]
    shown = [column for column in columns[:2] if len({column[1](row) for row in rows}) > 1]
    chosen = {}  # the published ratio is the model's own: it differs between models, and tells nothing
    for row in rows:
        chosen.setdefault((row.model, row.passes), set()).add(row.masked)
    return shown + [columns[2]] * any(len(ratios) > 1 for ratios in chosen.values())


def _table(rows: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row], str]]]) -> str:
    """One line a row; one without numbers has dashes."""
    where = _where(rows)
    header = ["model", "provider", "dtype", *(name for name, _ in where), *(name for name, _ in columns)]
    lines = []
    for row in rows:
        line = [row.name, row.computed_by, row.dtype, *(value(row) for _, value in where)]
        lines.append(line + ["—" if row.error is not None else value(row) for _, value in columns])
    return markdown(header, lines)


def rows_table(rows: Sequence[Row]) -> str:
    """Speed."""

    def clips(row):
        low, high = row.spread
        return with_spread(row.rate, row.batch / high, row.batch / low)

    columns = [
        ("clips/s", clips),
        ("ms per step", lambda row: f"{1e3 * row.median:.0f}"),
        ("GFLOP/clip", lambda row: f"{row.metrics['flops'] / 1e9:.1f}"),
        ("floor, ms", lambda row: f"{1e3 * row.metrics['floor']:.0f}"),
        ("of floor", lambda row: f"{100 * row.metrics['floor'] / row.median:.0f} %"),
    ]
    return _table(rows, columns)


_MEMORY = ("weights", "gradients", "optimizer", "saved", "peak")


def memory_table(rows: Sequence[Row]) -> str:
    """MB: what a step holds, and its peak."""

    def megabytes(name):
        return lambda row: f"{row.metrics[name] / 1e6:.0f}" if name in row.metrics else "—"

    titles = {"saved": "saved for backward", "optimizer": "optimizer state"}
    columns = [
        (titles.get(name, name) + ", MB", megabytes(name))
        for name in _MEMORY
        if any(name in row.metrics for row in rows)
    ]
    if any("recomputed" in row.notes for row in rows):
        columns.append(("recomputed", lambda row: row.notes.get("recomputed", "—")))
    return _table(rows, columns)


def ratios_table(ratios: Sequence[Ratio], providers: bool) -> str:
    """`providers`: whether the two sides' providers differ and have to be named."""
    where = _where([ratio.fast for ratio in ratios])
    memory = [name for name in ("saved", "peak") if all(name in ratio.fast.metrics for ratio in ratios)]
    lines = []
    for ratio in ratios:
        fast, slow = ratio.fast, ratio.slow
        line = (
            [f"{fast.name} ({fast.computed_by})", f"{slow.name} (plain)"]
            if providers
            else [fast.name, slow.name, fast.computed_by]
        )
        line += [fast.dtype, *(value(fast) for _, value in where)]
        line += [with_spread(*ratio.time()), f"{ratio.metric('flops'):.2f}"]
        lines.append(line + [f"{ratio.metric(name):.2f}" for name in memory])
    header = ["this", "against"] + ([] if providers else ["both by"])
    header += ["dtype", *(name for name, _ in where), "times as fast", "FLOP model"]
    titles = {"saved": "saved bytes", "peak": "peak memory"}
    return markdown([*header, *(titles[name] for name in memory)], lines)


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


def _constant(rows: Sequence[Row]) -> str:
    """Where rows were measured, as far as it is the same for all."""
    where = {name for name, _ in _where(rows)}
    one = rows[0]
    clips = "several batches" if "clips" in where else plural(one.batch, "clip")
    frames = (
        "several lengths"
        if "tokens" in where
        else f"{one.frames} frames x 128 mel bins ({one.tokens} tokens)"
    )
    return f"{clips} of {frames}"


def text(records: Sequence[dict]) -> str:
    """The whole report in Markdown."""
    rows, first = collect(records), records[0]
    title = "# Benchmark: whole models"
    if any(record["metric"] == "largest_batch" for record in records):
        return largest_text(records)
    sections = [title, environment(first), *(f"**{warning}**" for warning in warnings(records))]
    if not rows:
        return "\n\n".join([*sections, "No row was measured."]) + "\n"
    counts = sorted({len(row.seconds) for row in rows if row.seconds} or {0})
    rounds = (
        plural(counts[0], "interleaved round")
        if len(counts) == 1
        else f"{counts[0]} to {counts[-1]} interleaved rounds"
    )
    sections.append(
        f"Spectrograms of real recordings. {rounds}; "
        f"the figures are medians with {brackets(counts[-1])} in brackets. bf16 is fp32 weights under bf16 autocast. "
        "No dropout anywhere: each row's loss and gradient norm (in training), loss (inference) or mean embedding "
        "was checked against the fp32 baseline with the same weights and mask, and a row that failed has no numbers."
    )
    if unbased := sorted({row.model for row in rows if row.notes.get("reference") == "reference ops"}):
        sections.append(
            f"{' and '.join(unbased)} {'has' if len(unbased) == 1 else 'have'} no plain baseline, and so no system "
            "ratio: checked against the same model on the ops' PyTorch references, in fp32."
        )
    if left := [record["note"] for record in records if record["metric"] == "left_out"]:
        sections.append(
            f"Left out, for there was no time: {', '.join(left)} (`--modes {' '.join(left)}` measures it)."
        )
    for mode in dict.fromkeys(row.mode for row in rows):
        sections += _of_mode(mode, [row for row in rows if row.mode == mode])
    if any(record["metric"].endswith("_ceiling") for record in records):
        sections += ["## Ceilings of this machine, in this run", ceilings_table(records)]
    return "\n\n".join(sections) + "\n"


def _of_mode(mode: str, rows: Sequence[Row]) -> list[str]:
    """The sections about one mode's rows."""
    training = mode == "training"
    sections = [
        f"## {_TITLES.get(mode, mode)}",
        f"{_constant(rows)[:1].upper()}{_constant(rows)[1:]}.",
        rows_table(rows),
    ]
    if failed := [
        f"- {row.name}, {row.computed_by}, {row.dtype}, {plural(row.batch, 'clip')} of {row.tokens} tokens: {row.error}"
        for row in rows
        if row.error
    ]:
        sections += ["Rows without numbers:", "\n".join(failed)]
    sections.append(
        "*Floor*: every matrix product at the rate measured for its own shape in this run, attention's at the best "
        "rate"
        + (
            ", and the optimizer's traffic at the speed of a copy."
            if training
            else "; forward products alone."
        )
    )
    sections += [
        "### Memory",
        memory_table(rows),
        "*Peak*: of a fresh process that makes one step, with all that stands before it. "
        + (
            "*Saved*: storages that autograd keeps for the backward pass, without parameters. *Recomputed*: what the "
            "backward pass computes again instead (`recompute` of the configuration)."
            if training
            else ""
        ),
    ]
    if ratios := architecture_ratios(rows):
        sections += [
            "### Architecture: a visible-only encoder against SSAST, both by the same provider",
            ratios_table(ratios, providers=False),
        ]
    if ratios := system_ratios(rows):
        sections += ["### System: ours against plain PyTorch with SDPA", ratios_table(ratios, providers=True)]
    return sections


def largest_text(records: Sequence[dict]) -> str:
    """The report of `--largest-batch`."""
    found: dict[tuple, dict] = {}
    for record in records:
        if record["model"]:
            key = tuple(record[name] for name in _KEY if name not in ("group", "batch"))
            entry = found.setdefault(key, {"first": record})
            if record["metric"] in ("largest_batch", "largest_peak", "bytes_per_clip"):
                entry[record["metric"]] = record["value"]
            elif record["metric"] == "error":
                entry["error"] = record["note"]
    budget = next((record["value"] for record in records if record["metric"] == "budget"), None)
    plain = {
        key[:2] + key[3:]: entry.get("largest_batch") for key, entry in found.items() if key[2] == "plain"
    }
    header = [
        "model",
        "provider",
        "dtype",
        "mode",
        "tokens",
        "largest batch",
        "against plain",
        "its peak, MB",
        "MB per clip",
    ]
    lines, failed = [], []
    for key, entry in found.items():
        first, largest = entry["first"], entry.get("largest_batch")
        passes = (
            {1: ", one pass", 2: ", two passes"}[first["passes"]]
            if first["model"].startswith("ssast")
            else ""
        )
        provider = PROVIDER_NAMES.get(first["provider"], first["provider"])
        line = [first["model"] + passes, provider, first["dtype"], first["mode"], str(first["tokens"])]
        base = plain.get(key[:2] + key[3:])
        line += [
            "—" if largest is None else f"{largest:.0f}",
            f"{largest / base:.2f}" if largest is not None and base and first["provider"] != "plain" else "—",
            *(
                f"{entry[name] / 1e6:.0f}" if name in entry else "—"
                for name in ("largest_peak", "bytes_per_clip")
            ),
        ]
        lines.append(line)
        if largest is None:
            failed.append(f"- {line[0]}, {provider}, {first['dtype']}: {entry.get('error', 'not finished')}")
    sections = [
        "# Benchmark: the largest batch",
        environment(records[0]),
        *(f"**{w}**" for w in warnings(records)),
    ]
    if budget is not None:
        sections.append(
            f"The largest batch whose step takes at most {budget / 1e9:.2f} GB: the peak of a fresh process above what "
            "its imports take. *MB per clip*: how much the peak grew between the two largest batches that fit."
        )
    sections.append(markdown(header, lines) if lines else "No row was measured.")
    if failed:
        sections += ["Rows without numbers:", "\n".join(failed)]
    return "\n\n".join(sections) + "\n"


_COLORS = ("#1b6ca8", "#d08c3f", "#3f8f5b", "#9b4f96", "#b5382f", "#5b6770", "#c2a21c", "#2fa4a4", "#7a5230")


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plot(rows: Sequence[Row], path: Path, title: str, unit: str, panels) -> None:
    """A horizontal bar chart; `panels` are (title, value of a row, (below, above) of a row or None)."""
    good = [row for row in rows if row.error is None]
    figure = _figure(6 * len(panels) + 3, 1.5 + 0.34 * max(1, len(good)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (subtitle, value, error) in zip(axes, panels, strict=True):
        values = [value(row) for row in good]
        whiskers = list(zip(*map(error, good), strict=True)) if error and good else None
        colors = [{"ours": "#1b6ca8", "plain": "#b0b7bf"}.get(row.provider, "#d08c3f") for row in good]
        axis.barh(range(len(good)), values, xerr=whiskers, color=colors, error_kw={"lw": 1, "capsize": 2})
        axis.set(xlabel=unit, title=subtitle)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(good)), [f"{row.name}  {row.computed_by}  {row.dtype}" for row in good])
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def series(rows: Sequence[Row], along: str) -> dict[tuple, list[Row]]:
    """Rows that differ in their tokens ("tokens") or the share of masked ones ("mask ratio") alone, by what they share.

    Along the tokens, the share is the model's own or the same; of rows that were measured more than once the first.
    """
    found: dict[tuple, dict] = {}
    for row in rows:
        if row.error is not None or (along == "mask ratio" and row.mode == "embeddings"):
            continue
        other = row.frames if along == "mask ratio" else row.mask_ratio
        key = (row.mode, row.dtype, row.name, row.provider, row.batch, other)
        found.setdefault(key, {}).setdefault(_abscissa(row, along), row)
    return {key: [at[x] for x in sorted(at)] for key, at in found.items() if len(at) > 1}


def _abscissa(row: Row, along: str) -> float:
    return row.tokens if along == "tokens" else 1 - row.kept / row.tokens


def _plot_series(lines: dict[tuple, list[Row]], path: Path, along: str) -> None:
    """Throughput and memory along an axis: a row of panels for each mode and dtype, the FLOP model dashed.

    The model's curve goes through the first measured point: clips per second in inverse proportion to the FLOPs.
    """
    panels = list(dict.fromkeys(key[:2] for key in lines))
    figure = _figure(15, 1 + 4.5 * len(panels))
    axes = figure.subplots(len(panels), 3, squeeze=False)
    names = list(dict.fromkeys(key[2:4] for key in lines))
    for (mode, dtype), (speed, saved, peak) in zip(panels, axes, strict=True):
        for key, rows in lines.items():
            if key[:2] != (mode, dtype):
                continue
            color = _COLORS[names.index(key[2:4]) % len(_COLORS)]
            x = [_abscissa(row, along) for row in rows]
            label = f"{key[2]}, {rows[0].computed_by}, {plural(key[4], 'clip')}"
            style = {"color": color, "marker": {"plain": "s"}.get(key[3], "o"), "ms": 4, "label": label}
            rates = [row.rate for row in rows]
            spreads = [
                [row.rate - row.batch / row.spread[1], row.batch / row.spread[0] - row.rate] for row in rows
            ]
            speed.errorbar(x, rates, yerr=list(zip(*spreads, strict=True)), capsize=2, lw=1.5, **style)
            first = rows[0].metrics["flops"]
            speed.plot(
                x, [rates[0] * first / row.metrics["flops"] for row in rows], color=color, ls="--", lw=1
            )
            for axis, metric in ((saved, "saved"), (peak, "peak")):
                if all(metric in row.metrics for row in rows):
                    axis.plot(x, [row.metrics[metric] / 1e6 for row in rows], lw=1.5, **style)
        speed.set(title=f"{mode}, {dtype}: clips per second (dashed: FLOP model)", yscale="log")
        saved.set(title="MB saved for the backward pass")
        peak.set(title="MB at the peak of a fresh process")
        for axis in (speed, saved, peak):
            axis.set_xlabel("tokens" if along == "tokens" else "share of masked tokens")
            axis.spines[["top", "right"]].set_visible(False)
        speed.legend(fontsize=6)
    figure.savefig(path, dpi=110)


def write(csv: Path, out: Path) -> str:
    """Write report.md and its plots into `out`; return the report's text.

    throughput.png and memory.png show the first group of each mode and the groups measured where it was; lengths.png
    and mask_ratios.png exist where several were measured.

    Raises:
        ValueError: the CSV is not a benchmark record, or is empty.
    """
    records = results.read(csv)
    report, rows = text(records), collect(records)
    if any(record["metric"] == "largest_batch" for record in records):
        (out / "report.md").write_text(report)
        return report
    first = rows[0] if rows else None
    base = [
        row for row in rows if (row.mode, row.batch, row.frames) == (first.mode, first.batch, first.frames)
    ]
    base = list({(r.name, r.provider, r.dtype): r for r in reversed(base)}.values())[::-1]

    def whiskers(row):
        low, high = row.spread
        return row.rate - row.batch / high, row.batch / low - row.rate

    title = f"median, {brackets(max((len(row.seconds) for row in base), default=0))}"
    mode = _TITLES.get(first.mode, first.mode).split(":")[0].lower() if first else ""
    _plot(
        base,
        out / "throughput.png",
        f"Throughput: {mode}",
        "clips per second",
        [(title, lambda row: row.rate, whiskers)],
    )
    memory = [("peak of a fresh process", lambda row: row.metrics["peak"] / 1e6, None)]
    if first and first.mode == "training":
        memory.insert(0, ("saved for the backward pass", lambda row: row.metrics["saved"] / 1e6, None))
    _plot(base, out / "memory.png", f"Memory: {mode}", "MB", memory)
    plots = ["throughput", "memory"]
    for along, name in (("tokens", "lengths"), ("mask ratio", "mask_ratios")):
        (out / f"{name}.png").unlink(missing_ok=True)
        if lines := series(rows, along):
            _plot_series(lines, out / f"{name}.png", along)
            plots.append(name)
    shown = "\n\n".join(f"![{name.replace('_', ' ')}]({name}.png)" for name in plots)
    (out / "report.md").write_text(f"{report}\n{shown}\n")
    return report
