"""The `models` level: training steps of whole models, every provider checked before it is timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from . import device as devices
from . import report, results, roofline, timing
from .data import spectrograms
from .memory import peak_bytes, saved_bytes
from .providers import Step, build, copy_weights, make_optimizer, share_weights
from .registry import Case, cases
from .start import open_run, reported
from .timing import ProviderError

# Relative tolerances of (loss, norm of all gradients) against the fp32 baseline. A bf16 value is off by up to
# 2^-8; the loss averages over 10^5 of them, gradients pass through every layer.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (1e-2, 5e-2)}

QUICK_SECONDS = 225  # of the four minutes; the rest is for the start and the report
QUICK_ROUNDS, QUICK_BATCHES = 5, (8, 4, 2, 1)
FULL_ROUNDS, FULL_BATCH = 10, 8

# For choosing the batch size only: a step takes about this many times its floor, a fresh process this many
# seconds, and every case runs this many steps at least (memory, check, three rounds).
_OVER_FLOOR, _PROCESS_SECONDS, _STEPS = 1.6, 3.0, 5


@dataclass(frozen=True)
class Options:
    """What the command line asked for; None leaves the choice to the preset."""

    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    out: Path
    full: bool = False
    batch: int | None = None
    rounds: int | None = None
    frames: int = 1024
    device: str | None = None
    overrides: dict | None = None


def _shapes(rows: Sequence[Case]) -> list[tuple]:
    """Distinct ((rows, inputs, outputs), dtype) of all linear layers."""
    return sorted(
        {((case.batch * m, k, n), case.dtype) for case in rows for m, k, n in case.cost().linears},
        key=lambda shape: (shape[1], shape[0]),
    )


def choose_batch(options: Options, device: torch.device) -> int:
    """The largest quick batch size whose run should fit into the time, from two short measurements."""
    copy = roofline.copy_ceiling(device, megabytes=64, repeats=2)
    rates = {
        dtype: roofline.matmul_ceilings((512, 768, 3072), dtype, device, repeats=2)["forward"]
        for dtype in options.dtypes
    }
    for batch in QUICK_BATCHES:
        rows = cases(options.models, options.dtypes, batch, options.frames, options.overrides)
        steps = sum(3 * batch * case.cost().flops / rates[case.dtype] for case in rows)
        steps += sum(roofline.OPTIMIZER_BYTES * 1e8 / copy for _ in rows)
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
        return roofline.floor_seconds(case.cost(), case.batch, parameters, rates, best, self.copy)


def measure_memory(rows, device, spectrogram, progress) -> tuple[dict[Case, int], dict[Case, str]]:
    """Peaks of fresh processes, and the errors of those that failed."""
    peaks, errors = {}, {}
    for case in rows:
        try:
            peaks[case] = peak_bytes(case, device.type, torch.get_num_threads(), spectrogram)
            progress(f"{case.label}: peak of a fresh process {peaks[case] / 1e6:,.0f} MB")
        except (MemoryError, RuntimeError) as error:
            errors[case] = str(error)
            progress(f"{case.label}: {error}")
    return peaks, errors


def require_memory(rows: Sequence[Case], peaks: dict[Case, int], device: torch.device) -> None:
    """Refuse to go on where the models, all resident for the interleaving, would not fit.

    Raises:
        DeviceError: with what is needed and what is free.
    """
    free = devices.free_memory(device)
    resident = {}
    for case in rows:
        with torch.device("meta"):  # weights and both moments; gradients live within a step
            resident[case.weights] = 12 * sum(p.numel() for p in build(case).parameters())
    needed = sum(resident.values()) + max((peaks[case] for case in rows if case in peaks), default=0)
    if free is not None and needed > free:
        raise devices.DeviceError(
            f"interleaving {len(rows)} rows keeps all models in memory and needs about {needed / 1e9:.1f} GB, but "
            f"{free / 1e9:.1f} GB are free. Choose fewer models with --models, or a smaller --batch-size."
        )


def prepare(rows: Sequence[Case], device, spectrogram) -> tuple[dict[Case, Step], dict[Case, str]]:
    """Steps of all rows, and the errors of those that cannot be built.

    Rows of one model have equal weights; rows of one model and provider have the very same ones.
    """
    ours, owners, built, steps, errors = {}, {}, {}, {}, {}
    for case in sorted(rows, key=lambda case: case.provider != "ours"):  # the baselines copy ours
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
                    optimizer = make_optimizer(model)
                    owners[case.weights] = model, optimizer
                built[case.build] = model, optimizer
                if case.provider == "ours":
                    ours.setdefault(case.model, model)
            model, optimizer = built[case.build]
            steps[case] = Step(case, model, spectrogram, optimizer)
        except timing.FAILURES as error:
            errors[case] = timing.describe(error)
            timing.release()
    return {case: steps[case] for case in rows if case in steps}, errors


def probe(step: Step) -> tuple[float, float, int]:
    """One forward and backward pass: loss, norm of all gradients, bytes saved for the backward pass."""
    try:
        saved, loss = saved_bytes(step.forward, step.model.parameters())
        loss.backward()
        gradients = [p.grad for p in step.model.parameters() if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).double().norm()
        return loss.item(), norm.item(), saved
    finally:
        step.optimizer.zero_grad(set_to_none=True)


def compare(name: str, value: float, expected: float, rtol: float) -> None:
    """Raise ProviderError unless the value agrees with the reference's (NaN never does)."""
    if not abs(value - expected) <= rtol * abs(expected):
        raise ProviderError(f"wrong {name}: {value:.6g}, but the reference has {expected:.6g}")


def check(steps: dict[Case, Step], progress) -> tuple[dict[Case, tuple[float, int]], dict[Case, str]]:
    """Hold every row against the fp32 baseline with the same weights and the same mask.

    Returns:
        case -> (the reference's loss, bytes saved for the backward pass), and case -> what was wrong.
    """
    references, good, errors = {}, {}, {}
    for case, step in steps.items():
        try:
            result = None
            if case.model not in references:
                reference = _reference(case, steps)
                probed = probe(reference)
                references[case.model] = probed[:2]
                result = probed if reference.case == case else None
            loss, norm, saved = result or probe(step)
            loss_rtol, norm_rtol = TOLERANCES[case.dtype]
            compare("loss", loss, references[case.model][0], loss_rtol)
            compare("gradient norm", norm, references[case.model][1], norm_rtol)
        except timing.FAILURES as error:
            errors[case] = timing.describe(error)
            timing.release()
            progress(f"{case.label}: {errors[case]}")
        else:
            good[case] = (references[case.model][0], saved)
            progress(
                f"{case.label}: loss {loss:.6g} is right, {saved / 1e6:,.0f} MB saved for the backward pass"
            )
    return good, errors


def _reference(case: Case, steps: dict[Case, Step]) -> Step:
    """The model's baseline in fp32. SSAST's two passes have the loss of one: the same mask serves both."""
    for other, step in steps.items():
        if other.model == case.model and other.provider == "plain":
            return Step(replace(other, dtype="fp32"), step.model, step.spectrogram, step.optimizer)
    raise ProviderError("the baseline could not run, so there is nothing to check the result against")


def measure_time(variants: dict[Case, Step], losses, rounds, measure, another, write, progress) -> None:
    """Interleaved rounds; the loss of every timed step is compared with the reference's.

    Args:
        losses: case -> the reference's loss.
        another: number of finished rounds -> whether there is time for one more.
    """
    done = -1
    for sample in timing.interleave(variants, rounds, measure, another):
        if sample.round != done:
            done = sample.round
            progress(f"round {done + 1} of {rounds}")
        case, error = sample.variant, sample.error
        if error is None:
            try:
                compare("loss", sample.result.item(), losses[case], TOLERANCES[case.dtype][0])
            except ProviderError as wrong:
                error = timing.describe(wrong)
        columns = {**case.columns(), "round": sample.round}
        if error is None:
            write.add("seconds", sample.seconds, "s", **columns)
            write.add("loss", sample.result.item(), **columns)
        else:
            write.add("error", None, note=error, **columns)
            progress(f"{case.label}: {error}")


def run(options: Options, started: float) -> Path:
    """Measure; write measurements.csv, report.md and the plots into `options.out`; return the CSV's path.

    Args:
        started: `time.perf_counter()` at the program's start: from there the quick preset keeps its time.

    Raises:
        DeviceError: a GPU is present but unusable, or the models do not fit into memory.
        UsageError: `options.out` cannot be written to.
        Interrupted: by Ctrl-C; the report holds what was measured.
    """
    start = open_run("models", options, started)
    device, progress = start.device, start.progress
    hurried = not options.full and device.type == "cpu"
    batch = options.batch or (choose_batch(options, device) if hurried else FULL_BATCH)
    rounds = options.rounds or (FULL_ROUNDS if options.full else QUICK_ROUNDS)
    rows = cases(options.models, options.dtypes, batch, options.frames, options.overrides)
    progress(f"{timing.plural(len(rows), 'row')}, {timing.plural(batch, 'clip')} of {options.frames} frames")

    with (
        reported(start, report.write, ", throughput.png and memory.png"),
        results.Writer(start.path, start.common) as write,
    ):
        write.add("others_running", start.others)
        spectrogram = spectrograms(batch, options.frames)
        progress("ceilings: matrix products of the models' shapes, memory copy")
        begin = progress.elapsed
        ceilings = Ceilings()
        ceilings.measure(rows, device, write)
        ceiling_seconds = progress.elapsed - begin

        progress("memory: one fresh process for each row")
        peaks, errors = measure_memory(rows, device, spectrogram, progress)

        progress("check: every row against the fp32 baseline with the same weights and mask")
        require_memory(rows, peaks, device)
        spectrogram = spectrogram.to(device)
        steps, failed = prepare([case for case in rows if case not in errors], device, spectrogram)
        begin = progress.elapsed
        good, wrong = check(steps, progress)
        round_seconds = progress.elapsed - begin
        parameters = {
            case: sum(p.numel() for p in steps[case].model.parameters() if p.requires_grad) for case in good
        }
        for case, error in {**errors, **failed, **wrong}.items():
            write.add("error", None, note=error, **case.columns())
        for case, (loss, saved) in good.items():
            add = partial(write.add, **case.columns())
            add("saved", saved, "bytes")
            add("peak", peaks[case], "bytes")
            add("flops", 3 * case.cost().flops, "FLOP/clip")
            add("parameters", parameters[case])
            add("reference_loss", loss)

        end = QUICK_SECONDS - ceiling_seconds if hurried and options.rounds is None else math.inf
        if end < math.inf:
            rounds = max(1, min(rounds, int((end - progress.elapsed) / round_seconds)))
        progress.total = progress.elapsed + rounds * round_seconds + ceiling_seconds
        progress(
            f"timing: up to {timing.plural(rounds, 'interleaved round')} of {timing.plural(len(good), 'row')}"
        )
        begin = progress.elapsed

        def another(done: int) -> bool:
            return progress.elapsed + (progress.elapsed - begin) / done <= end

        try:
            measure_time(
                {case: steps[case] for case in good},
                {case: loss for case, (loss, _) in good.items()},
                rounds,
                timing.measure_cuda if device.type == "cuda" else timing.measure_cpu,
                another,
                write,
                progress,
            )
            if progress.elapsed <= end:
                progress("ceilings once more: the machine may have changed its speed")
                ceilings.measure(rows, device, write)
        finally:
            for case in good:
                write.add("floor", ceilings.floor(case, parameters[case]), "s", **case.columns())
    return start.path
