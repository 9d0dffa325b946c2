"""The `models` level: steps of whole models, every provider checked before it is timed."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from audiomae.words import plural

from . import device as devices
from . import report, results, roofline, timing
from .data import spectrograms
from .memory import peak_bytes, saved_bytes
from .providers import (
    Step,
    build,
    build_reference,
    copy_weights,
    figure,
    make_optimizer,
    optimizer_bytes,
    share_weights,
)
from .registry import (
    DEFAULT_MODELS,
    DEFAULT_PROVIDERS,
    FULL_GROUPS,
    MODES,
    Case,
    Point,
    cases,
    full_points,
    quick_points,
)
from .start import UsageError, open_run, reported
from .timing import Progress, ProviderError

# Relative tolerances of (loss, norm of all gradients, mean embedding) against the fp32 baseline. A bf16 value is off
# by up to 2^-8; the loss averages over 10^5 of them, gradients pass through every layer, and embeddings through the
# 24 additions of an encoder's residual stream: sqrt(24) roundings of a random walk.
TOLERANCES = {"fp32": (1e-4, 1e-3, 1e-4), "bf16": (1e-2, 5e-2, 3e-2)}

QUICK_SECONDS = 225  # of the four minutes; the rest is for the start and the report
QUICK_ROUNDS, QUICK_BATCHES = 5, (8, 4, 2, 1)
FULL_ROUNDS, FULL_BATCH = 10, 8

# For choosing the batch size only: a step takes about this many times its floor, a fresh process this many
# seconds, and every case runs this many steps at least (memory, check, three rounds).
_OVER_FLOOR, _PROCESS_SECONDS, _STEPS = 1.6, 3.0, 5


@dataclass(frozen=True)
class Options:
    """What the command line asked for; None leaves the choice to the preset."""

    out: Path
    models: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    providers: tuple[str, ...] = DEFAULT_PROVIDERS
    modes: tuple[str, ...] | None = None
    frames: tuple[int, ...] | None = None
    mask_ratios: tuple[float, ...] | None = None
    batches: tuple[int, ...] | None = None
    full: bool = False
    rounds: int | None = None
    device: str | None = None
    overrides: dict | None = None

    def configuration(self) -> str:
        """What has to be the same for a full run to go on from an earlier one's record, as JSON."""
        chosen = {key: value for key, value in asdict(self).items() if key not in ("out", "full", "device")}
        return json.dumps(chosen, sort_keys=True)


@dataclass(frozen=True)
class Group:
    """Rows that are interleaved with each other.

    Attributes:
        optional: left out by a quick run that has no time for it.
    """

    number: int
    point: Point
    rows: tuple[Case, ...]
    optional: bool = False


def plan(options: Options, device: torch.device) -> list[Group]:
    """All groups of the run, in order."""
    axes = (options.modes, options.frames, options.mask_ratios, options.batches)
    if options.full:
        sets = (options.models,) if options.models else tuple(g for g in FULL_GROUPS if g)
        work = [(models, point, False) for point in full_points(*axes) for models in sets]
    else:
        models = options.models or DEFAULT_MODELS
        batch = FULL_BATCH
        if hurried(options, device) and not options.batches:
            batch = choose_batch(options, device)
        work = [(models, point, False) for point in quick_points(batch, *axes)]
        if not any(axes) and options.rounds is None:
            work += [(models, Point(batch, mode=mode), True) for mode in MODES[1:]]
    groups = []
    for models, point, optional in work:
        if rows := cases(models, options.dtypes, point, options.providers, options.overrides):
            groups.append(Group(len(groups), point, tuple(rows), optional))
    return groups


def hurried(options: Options, device: torch.device) -> bool:
    """Whether the run has to keep to the quick preset's time."""
    return not options.full and device.type == "cpu"


def _shapes(rows: Sequence[Case]) -> list[tuple]:
    """Distinct ((rows, inputs, outputs), dtype) of all linear layers."""
    return sorted(
        {((case.batch * m, k, n), case.dtype) for case in rows for m, k, n in case.least().linears},
        key=lambda shape: (shape[1], shape[0]),
    )


def choose_batch(options: Options, device: torch.device) -> int:
    """The largest quick batch size whose run should fit into the time, from two short measurements."""
    copy = roofline.copy_ceiling(device, megabytes=64, repeats=2)
    rates = {
        dtype: roofline.matmul_ceilings((512, 768, 3072), dtype, device, repeats=2)["forward"]
        for dtype in options.dtypes
    }
    axes = (options.modes, options.frames, options.mask_ratios, None)
    for batch in QUICK_BATCHES:
        points = quick_points(batch, *axes)
        models = options.models or DEFAULT_MODELS
        rows = [
            row
            for p in points
            for row in cases(models, options.dtypes, p, options.providers, options.overrides)
        ]
        steps = sum(row.times_forward * batch * row.cost().flops / rates[row.dtype] for row in rows)
        steps += sum(roofline.OPTIMIZER_BYTES * 1e8 / copy for row in rows if row.mode == "training")
        if _STEPS * _OVER_FLOOR * steps + _PROCESS_SECONDS * len(rows) < 0.85 * QUICK_SECONDS:
            return batch
    return QUICK_BATCHES[-1]


class Ceilings:
    """The highest rates seen in this run; every single measurement goes into the CSV."""

    def __init__(self):
        self.matmul: dict[str, dict[tuple, float]] = {}  # dtype -> (rows, inputs, outputs, kind) -> FLOP/s
        self.copy = 0.0

    def measure(self, rows: Sequence[Case], device: torch.device, write: results.Writer) -> None:
        for shape, dtype in _shapes(rows):
            rates = self.matmul.setdefault(dtype, {})
            for kind, rate in roofline.matmul_ceilings(shape, dtype, device).items():
                rates[(*shape, kind)] = max(rate, rates.get((*shape, kind), 0.0))
                part = "x".join(map(str, shape)) + f" {kind}"
                write.add("matmul_ceiling", rate, "FLOP/s", dtype=dtype, part=part)
        copy = roofline.copy_ceiling(device)
        write.add("copy_ceiling", copy, "bytes/s")
        self.copy = max(self.copy, copy)

    def floor(self, case: Case, parameters: int) -> float:
        rates = self.matmul[case.dtype]
        best = max(rates.values())
        training = case.mode == "training"
        return roofline.floor_seconds(case.least(), case.batch, parameters, rates, best, self.copy, training)


def measure_memory(rows, device, spectrogram, progress) -> tuple[dict[Case, int], dict[Case, str]]:
    """Peaks of fresh processes, which may not take more than is free, and the errors of those that failed."""
    peaks, errors = {}, {}
    for case in rows:
        try:
            budget = devices.free_memory(device)
            peaks[case] = peak_bytes(case, device.type, torch.get_num_threads(), spectrogram, budget)
            progress(f"{case.label}: peak of a fresh process {peaks[case] / 1e6:,.0f} MB")
        except (MemoryError, RuntimeError) as error:
            errors[case] = str(error)
            progress(f"{case.label}: {error}")
    return peaks, errors


def too_large(rows: Sequence[Case], peaks: dict[Case, int], device: torch.device) -> dict[Case, str]:
    """Rows that would not fit beside the group's models, all resident for the interleaving: what is needed."""
    free = devices.free_memory(device)
    resident = {}
    for case in rows:
        with torch.device("meta"):  # weights, in training both moments; gradients live within a step
            count = sum(p.numel() for p in build(case).parameters())
        resident[case.weights] = (12 if case.mode == "training" else 4) * count
    needed = {case: sum(resident.values()) + peaks.get(case, 0) for case in rows}
    return {
        case: f"does not fit: {size / 1e9:.1f} GB with the {len(rows)} interleaved rows' models resident, "
        f"but {free / 1e9:.1f} GB are free"
        for case, size in needed.items()
        if free is not None and size > free
    }


def require_memory(rows: Sequence[Case], peaks: dict[Case, int], device: torch.device) -> None:
    """Refuse to go on where a row would not fit.

    Raises:
        DeviceError: with what is needed and what is free.
    """
    if large := too_large(rows, peaks, device):
        case, error = max(large.items(), key=lambda item: peaks.get(item[0], 0))
        raise devices.DeviceError(
            f"{case.label} {error}. Choose fewer models with --models, or a smaller --batch-size."
        )


def prepare(rows: Sequence[Case], device, spectrogram) -> tuple[dict[Case, Step], dict[Case, str]]:
    """Steps of all rows, and the errors of those that cannot be built.

    Rows of one model have equal weights; rows that compute it with the same code have the very same ones.
    """
    ours, owners, built, steps, errors = {}, {}, {}, {}, {}
    order = ("ours", "compiled", "plain")  # the baselines copy ours
    for case in sorted(rows, key=lambda case: order.index(case.provider)):
        try:
            if case.build not in built:
                model = build(case)
                if owner := owners.get(case.weights):
                    share_weights(model, owner[0])
                    model, optimizer = model.to(device), owner[1]
                else:
                    if case.provider == "plain" and case.model in ours:
                        copy_weights(ours[case.model], model)
                    model = model.to(device)
                    optimizer = make_optimizer(model) if case.mode == "training" else None
                    owners[case.weights] = model, optimizer
                built[case.build] = model, optimizer
                if case.provider != "plain":
                    ours.setdefault(case.model, model)
            model, optimizer = built[case.build]
            steps[case] = Step(case, model, spectrogram, optimizer)
        except timing.FAILURES as error:
            errors[case] = timing.describe(error)
            timing.release()
    return {case: steps[case] for case in rows if case in steps}, errors


@dataclass(frozen=True)
class Probe:
    """What one step computes and holds.

    Attributes:
        value: see `providers.figure`.
        norm: of all gradients, in training.
        embedding: (B, D) fp32, the mean over the tokens, whose order is the provider's own.
        saved, gradients: bytes kept for the backward pass, and of the gradients.
    """

    value: float
    norm: float | None = None
    embedding: torch.Tensor | None = None
    saved: int = 0
    gradients: int = 0


def probe(step: Step) -> Probe:
    """Run a step without its optimizer."""
    if step.case.mode != "training":
        result = step()
        embedding = result.float().mean(dim=1).cpu() if result.ndim else None
        return Probe(figure(result), embedding=embedding)
    try:
        watch = step.case.provider != "compiled"
        saved, loss = saved_bytes(step.forward, step.model.parameters(), watch)
        loss.backward()
        gradients = [p.grad for p in step.model.parameters() if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).double().norm()
        return Probe(loss.item(), norm.item(), None, saved, sum(gradient.nbytes for gradient in gradients))
    finally:
        step.model.zero_grad(set_to_none=True)


def compare(name: str, value: float, expected: float, rtol: float) -> None:
    """Raise ProviderError unless the value agrees with the reference's (NaN never does)."""
    if not abs(value - expected) <= rtol * abs(expected):
        raise ProviderError(f"wrong {name}: {value:.6g}, but the reference has {expected:.6g}")


def judge(found: Probe, expected: Probe, dtype: str) -> None:
    """Raise ProviderError where a result is not the reference's."""
    loss, gradients, embeddings = TOLERANCES[dtype]
    if expected.embedding is not None:
        distance = (found.embedding - expected.embedding).norm() / expected.embedding.norm()
        if not distance <= embeddings:
            raise ProviderError(f"wrong embeddings: off by {distance:.2g} of their norm")
        return
    compare("loss", found.value, expected.value, loss)
    if expected.norm is not None:
        compare("gradient norm", found.norm, expected.norm, gradients)


def check(
    steps: dict[Case, Step], progress, requested: Sequence[Case] = ()
) -> tuple[dict[Case, tuple[Probe, Probe]], dict[Case, str]]:
    """Hold every row against the fp32 baseline with the same weights and the same mask.

    Args:
        requested: all rows; where the baseline is among them and could not run, nothing can be checked.

    Returns:
        case -> (the reference's results, its own), and case -> what was wrong.
    """
    references, good, errors = {}, {}, {}
    for case, step in steps.items():
        try:
            result = None
            if case.model not in references:
                reference = _reference(case, steps, requested)
                references[case.model] = probe(reference)
                same = reference.model is step.model and reference.case == case
                result = references[case.model] if same else None
            result = result or probe(step)
            judge(result, references[case.model], case.dtype)
        except timing.FAILURES as error:
            errors[case] = timing.describe(error)
            timing.release()
            progress(f"{case.label}: {errors[case]}")
        else:
            good[case] = references[case.model], result
            kept = f", {result.saved / 1e6:,.0f} MB saved for the backward pass" if result.saved else ""
            what = "loss" if result.embedding is None else "embeddings, root mean square"
            progress(f"{case.label}: {what} {result.value:.6g} is right{kept}")
    return good, errors


def _reference(case: Case, steps: dict[Case, Step], requested: Sequence[Case]) -> Step:
    """The model's baseline in fp32; where bench/plain has none, our model on the ops' references.

    SSAST's two passes have the loss of one: the same mask serves both.
    """
    for other, step in steps.items():
        if other.model == case.model and other.provider == "plain":
            return replace(step, case=replace(other, dtype="fp32"))
    if any(other.model == case.model and other.provider == "plain" for other in requested):
        raise ProviderError("the baseline could not run, so there is nothing to check the result against")
    step = steps[case]
    if not case.has_baseline:
        fp32 = replace(case, provider="ours", dtype="fp32")
        return replace(step, case=fp32, model=build_reference(case, step.model))
    plain = replace(case, provider="plain", dtype="fp32")
    model = build(plain)
    copy_weights(step.model, model)
    return replace(step, case=plain, model=model.to(step.spectrogram.device))


def measure_time(variants: dict[Case, Step], expected, rounds, measure, another, write, progress) -> None:
    """Interleaved rounds; the result of every timed step is compared with the reference's.

    Args:
        expected: case -> `providers.figure` of the reference's result.
        another: number of finished rounds -> whether there is time for one more.
    """
    done = -1
    for sample in timing.interleave(variants, rounds, measure, another):
        if sample.round != done:
            done = sample.round
            progress(f"round {done + 1} of {rounds}")
        case, error = sample.variant, sample.error
        if error is None:
            value = figure(sample.result)
            try:
                compare("result", value, expected[case], TOLERANCES[case.dtype][0])
            except ProviderError as wrong:
                error = timing.describe(wrong)
        columns = {**case.columns(), "round": sample.round}
        if error is None:
            write.add("seconds", sample.seconds, "s", **columns)
            write.add("loss" if case.mode != "embeddings" else "rms", value, **columns)
        else:
            write.add("error", None, note=error, **columns)
            progress(f"{case.label}: {error}")


def measure_group(
    group: Group,
    device: torch.device,
    ceilings: Ceilings,
    write: results.Writer,
    progress: Progress,
    rounds: int,
    end: float,
    refuse: bool,
) -> tuple[float, float]:
    """Ceilings, memory, check and times of one group, into the CSV.

    Args:
        rounds: the most there are.
        end: on the clock of `progress`, when the group has to be done.
        refuse: raise a DeviceError where a row does not fit into memory; otherwise the row alone has no numbers.

    Returns:
        Seconds until the timing, and of a round.
    """
    rows, point, entered = group.rows, group.point, progress.elapsed
    spectrogram = spectrograms(point.batch, point.frames)
    progress("ceilings: matrix products of the models' shapes, memory copy")
    begin = progress.elapsed
    ceilings.measure(rows, device, write)
    ceiling_seconds = progress.elapsed - begin

    progress("memory: one fresh process for each row")
    peaks, errors = measure_memory(rows, device, spectrogram, progress)

    progress("check: every row against the fp32 baseline with the same weights and mask")
    if refuse:
        require_memory(rows, peaks, device)
    errors |= too_large(rows, peaks, device)
    spectrogram = spectrogram.to(device)
    steps, failed = prepare([case for case in rows if case not in errors], device, spectrogram)
    begin = progress.elapsed
    good, wrong = check(steps, progress, rows)
    round_seconds = progress.elapsed - begin
    parameters = {
        case: sum(p.numel() for p in steps[case].model.parameters() if p.requires_grad) for case in good
    }
    for case, error in {**errors, **failed, **wrong}.items():
        write.add("error", None, note=error, **case.columns())
    for case, (reference, found) in good.items():
        model, optimizer = steps[case].model, steps[case].optimizer
        add = partial(write.add, **case.columns())
        add("peak", peaks[case], "bytes")
        add("weights", sum(p.nbytes for p in model.parameters()), "bytes")
        if case.mode == "training":
            add("saved", found.saved, "bytes")
            add("gradients", found.gradients, "bytes")
            add("optimizer", optimizer_bytes(optimizer), "bytes")
            add("recomputed", None, note=case.recomputed)
        add("flops", case.times_forward * case.cost().flops, "FLOP/clip")
        add("parameters", parameters[case])
        add("reference", reference.value, note="plain" if case.has_baseline else "reference ops")

    if end < math.inf:
        left = end - ceiling_seconds - progress.elapsed
        rounds = max(1, min(rounds, int(left / round_seconds))) if round_seconds else rounds
    progress.total = progress.elapsed + rounds * round_seconds + ceiling_seconds
    progress(f"timing: up to {plural(rounds, 'interleaved round')} of {plural(len(good), 'row')}")
    begin = progress.elapsed

    def another(done: int) -> bool:
        return progress.elapsed + (progress.elapsed - begin) / done <= end - ceiling_seconds

    try:
        measure_time(
            {case: steps[case] for case in good},
            {case: reference.value for case, (reference, _) in good.items()},
            rounds,
            timing.measure_cuda if device.type == "cuda" else timing.measure_cpu,
            another,
            write,
            progress,
        )
        if progress.elapsed <= end - ceiling_seconds:
            progress("ceilings once more: the machine may have changed its speed")
            ceilings.measure(rows, device, write)
    finally:
        for case in good:
            write.add("floor", ceilings.floor(case, parameters[case]), "s", **case.columns())
    return begin - entered, round_seconds


_SAME = (
    "preset",
    "level",
    "device",
    "device_name",
    "cpu",
    "cores",
    "threads",
    "torch",
    "python",
    "system",
    "commit",
)
_SAME_WORDS = {"device_name": "machine", "commit": "commit", "torch": "torch"}


def earlier_record(options: Options, path: Path, common: dict) -> list[dict[str, str]]:
    """Lines of the finished groups of an earlier full run that this one goes on from, in the CSV's text.

    Raises:
        UsageError: the record there is of something else, and took long to make.
    """
    try:
        lines = results.lines(path) if path.exists() else []
    except ValueError as error:
        raise UsageError(f"{error} Choose another --out, or delete the file.") from None
    if not lines or lines[0]["preset"] != "full":
        return []  # a quick run's record is replaced, as a quick run replaces it
    way_out = "Choose another --out, or delete that file to start anew."
    if not options.full:
        raise UsageError(
            f"{path} is the record of a --full run, which a quick run does not replace. {way_out}"
        )
    for name in _SAME:
        if lines[0][name] != str(common[name]):
            raise UsageError(
                f"{path} cannot be gone on from: its {_SAME_WORDS.get(name, name)} is {lines[0][name] or 'unknown'}, "
                f"and now it is {common[name] or 'unknown'}. {way_out}"
            )
    before = next((line["note"] for line in lines if line["metric"] == "configuration"), "")
    if before != options.configuration():
        old, new = (json.loads(text or "{}") for text in (before, options.configuration()))
        different = [key for key in new if old.get(key) != new[key]]
        raise UsageError(
            f"{path} cannot be gone on from: it was measured with other {' and '.join(different)}. {way_out}"
        )
    finished = {line["group"] for line in lines if line["metric"] == "finished"}
    return [
        line
        for line in lines
        if line["group"] in finished or (not line["group"] and line["metric"] != "interrupted")
    ]


def run(options: Options, started: float) -> Path:
    """Measure; write measurements.csv, report.md and the plots into `options.out`; return the CSV's path.

    A full run goes on from the record of an earlier one of the same machine, commit and configuration: groups of rows
    that it finished stay as they are.

    Args:
        started: `time.perf_counter()` at the program's start: from there the quick preset keeps its time.

    Raises:
        DeviceError: a GPU is present but unusable, or the models do not fit into memory.
        UsageError: `options.out` cannot be written to, or holds a full run's record of something else.
        Interrupted: by Ctrl-C; the report holds what was measured.
    """
    start = open_run("models", options, started)
    device, progress = start.device, start.progress
    kept = earlier_record(options, start.path, start.common)
    finished = {int(line["group"]) for line in kept if line["metric"] == "finished"}
    groups = plan(options, device)
    rounds = options.rounds or (FULL_ROUNDS if options.full else QUICK_ROUNDS)
    limited = hurried(options, device) and options.rounds is None
    if finished:
        progress(f"going on: {len(finished)} of {plural(len(groups), 'group')} were finished before")

    with (
        reported(start, report.write, " and plots"),
        results.Writer(start.path, start.common, kept=kept) as write,
    ):
        write.add("others_running", start.others)
        if options.full and not kept:
            write.add("configuration", None, note=options.configuration())
        ceilings = Ceilings()
        spent, needed = 0, None
        asked = sum(not group.optional for group in groups)
        for group in groups:
            if group.number in finished:
                continue
            write.common = {**start.common, "group": group.number}
            point, end = group.point, math.inf
            if limited:
                if group.optional and progress.elapsed + needed > QUICK_SECONDS:
                    progress(f"{point.mode} left out: there is no time for it")
                    write.add("left_out", None, note=point.mode)
                    continue
                share = max(1, asked - spent)
                end = progress.elapsed + (QUICK_SECONDS - progress.elapsed) / share
            progress(
                f"{_describe(group)}: {plural(len(group.rows), 'row')}"
                + (f", group {group.number + 1} of {len(groups)}" if len(groups) > 1 else "")
            )
            setup, one_round = measure_group(
                group, device, ceilings, write, progress, rounds, end, not options.full
            )
            needed = setup + one_round  # three rounds of forward passes take as long as one of whole steps
            spent += 1
            write.add("finished", None)
            gc.collect()
            timing.release()
        write.common = start.common
    return start.path


def _describe(group: Group) -> str:
    point = group.point
    ratio = f", mask ratio {point.mask_ratio}" if point.mask_ratio is not None else ""
    return f"{point.mode}, {plural(point.batch, 'clip')} of {point.frames} frames{ratio}"
