"""Check every provider of every case, then time the providers of a case side by side."""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from audiomae.words import plural

from .. import device as devices
from .. import results, roofline, timing
from ..budget import Errors, draws_needed, evaluate, in_float64
from ..memory import saved_bytes
from ..registry import DTYPES
from ..start import UsageError, open_run, reported
from ..timing import Progress, ProviderError
from . import providers, report
from .cases import MODES, PARAMETERS, Case, Work, cases

QUICK_SECONDS = 225  # of the four minutes; a case that would start later is left out, and the report says so
QUICK_BATCHES, FULL_BATCHES = (8,), (1, 8, 32)
LEAST_ROUNDS = 5
# (rounds, seconds): a case ends with the first that is reached, but not before LEAST_ROUNDS.
QUICK_ROUNDS, FULL_ROUNDS = (40, 4.0), (100, 20.0)
COPY = "copy"


@dataclass(frozen=True)
class Options:
    """What the command line asked for; None leaves the choice to the preset."""

    ops: tuple[str, ...]
    providers: tuple[str, ...]
    out: Path
    dtypes: tuple[str, ...] | None = None
    full: bool = False
    batches: tuple[int, ...] | None = None
    rounds: int | None = None
    device: str | None = None


def _cotangent(output: Tensor, seed: int) -> Tensor:
    """Random, like `output`; of a loss, 1."""
    if output.dim() == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(seed)
    return torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)


class Inputs:
    """Copies of a case's inputs, more than the caches hold, used in turn by all providers.

    So a call finds its inputs in memory and not in a cache, as an op does in the training step of a model.
    Parameters, which every layer has its own small set of, are shared.
    """

    def __init__(self, case: Case, device: torch.device, output: Tensor):
        tensors = case.tensors(0, device)
        activations = [name for name, x in tensors.items() if x is not None and name not in PARAMETERS]
        cotangent = _cotangent(output, seed=0)
        size = sum(tensors[name].nbytes for name in activations) + cotangent.nbytes
        self.sets = []
        for i in range(copies(size, device)):
            fresh = {name: tensors[name].clone() for name in activations} if i else {}
            leaves = {
                name: x if x is None else x.detach().requires_grad_(name in case.shape.wrt)
                for name, x in (tensors | fresh).items()
            }
            self.sets.append((leaves, cotangent.clone()))
        self._turn = itertools.cycle(self.sets)

    def __next__(self) -> tuple[dict[str, Tensor | None], Tensor]:
        return next(self._turn)


def copies(size: int, device: torch.device) -> int:
    """How many copies of `size` bytes are more than twice the last-level cache; a thousand at most."""
    return min(2 + 2 * devices.cache_bytes(device) // max(size, 1), 1000)


class Passes:
    """A provider on `Inputs`: forward, in training or without gradients, and backward."""

    def __init__(self, function: Callable[..., Tensor], inputs: Inputs, wrt: Sequence[str]):
        self.function, self.inputs, self.wrt = function, inputs, wrt
        self.backward = self._backward if wrt else None

    def forward(self) -> Tensor:
        self._tensors, self._cotangent = next(self.inputs)
        with torch.set_grad_enabled(bool(self.wrt)):
            return self.function(**self._tensors)

    def _backward(self, output: Tensor):
        return torch.autograd.grad(output, [self._tensors[name] for name in self.wrt], self._cotangent)


class Copy:
    """The floor's yardstick: copies that move as many bytes as the passes must, from and to buffers out of cache."""

    def __init__(self, passes: Sequence[Work], device: torch.device):
        self._pairs = []
        for work in passes:
            size = int(work.bytes // 8)  # float32 values, each read and written
            pairs = [
                (torch.ones(size, device=device), torch.ones(size, device=device))
                for _ in range(copies(8 * size, device))
            ]
            self._pairs.append(itertools.cycle(pairs))
        self.backward = self._backward if len(passes) > 1 else None

    def _copy(self, i: int) -> Tensor:
        source, target = next(self._pairs[i])
        return target.copy_(source)

    def forward(self) -> Tensor:
        return self._copy(0)

    def _backward(self, output: Tensor) -> Tensor:
        return self._copy(1)


@contextmanager
def quiet_compilers() -> Iterator[None]:
    """Leaves out what torch.compile says of itself: a CUDA toolkit without a GPU, its own deprecated calls."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def fresh_compile_caches() -> Iterator[None]:
    """Everything is compiled in this run, so that its seconds do not depend on earlier ones."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        with mock.patch.dict(os.environ, caches):
            yield


def check(
    case: Case,
    functions: dict[str, providers.Function],
    device: torch.device,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict, dict, Tensor]:
    """Hold every provider to the error budget; those that draw other random numbers, without dropout.

    Args:
        functions: by provider; those that fail are taken out.

    Returns:
        provider -> seconds of its first call (forward and backward, compilation included), provider -> what
        was wrong, and an output of the reference.

    Raises:
        ProviderError: the reference itself cannot run here.
    """
    others = {name: functions.pop(name) for name in list(functions) if providers.draws_its_own(name, case)}
    if others:
        still = case.without_dropout()
        found = check(still, {name: providers.build(name, still, device) for name in others}, device)
        seconds, wrong, output = check(case, functions, device)
        functions |= {name: function for name, function in others.items() if name not in found[1]}
        return seconds | found[0], wrong | found[1], output
    eager_function = case.reference(upcast=False)
    errors: dict[str, Errors] = {}
    seconds: dict[str, float] = {}
    wrong: dict[str, str] = {}
    needed = {"output": 1, **{f"grad of {name}": 1 for name in case.shape.wrt}}
    seed = 0
    while seed < max(needed.values()):
        tensors = case.tensors(seed, device)
        # One draw judges a large result; small ones (a loss, a number per head) ask for more.
        gradients = [name for name in case.shape.wrt if seed < needed[f"grad of {name}"]]
        try:
            output = evaluate(eager_function, tensors)["output"]
            cotangent = _cotangent(output, seed)
            judge = partial(evaluate, tensors=tensors, cotangent=cotangent)
            differentiate = {"wrt": case.shape.wrt, "gradients": gradients}
            exact = judge(case.reference(upcast=True), tensors=in_float64(tensors), **differentiate)
            if seed == 0:
                values = max(x.numel() for x in (*tensors.values(), output) if x is not None)
                eager, errors = Errors(values), {name: Errors(values) for name in functions}
                needed = {name: draws_needed(result) for name, result in exact.items()}
            eager.add(judge(eager_function, **differentiate), exact)
        except timing.FAILURES as error:
            raise ProviderError(f"the reference could not run: {timing.describe(error)}") from error
        for name, function in list(functions.items()):
            forward_only = bool(providers.without_backward(name, case, device))
            if seed == 0 and name in providers.COMPILED:
                progress(f"  compiling {name} ...")
            try:
                start = time.perf_counter()
                found = judge(function, **({} if forward_only else differentiate))
                _wait(device)
                seconds.setdefault(name, time.perf_counter() - start)
                errors[name].add(found, exact)
            except Exception as error:  # whatever other people's kernels raise costs a row, not the run
                wrong[name] = timing.describe(error)
                del functions[name]
                timing.release()
        seed += 1
    for name in list(functions):
        if over := errors[name].over_budget(eager):
            wrong[name] = f"wrong {over}"
            del functions[name]
    return seconds, wrong, output


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_memory(passes: Passes, device: torch.device) -> dict[str, int]:
    """Bytes "saved" for the backward pass, activations given to the op included; on a GPU the "peak" they add too."""
    found = {}
    if passes.backward is not None:
        tensors, _ = passes.inputs.sets[0]
        parameters = [tensors[name] for name in PARAMETERS if tensors.get(name) is not None]
        # An op alone checkpoints nothing.
        found["saved"], _ = saved_bytes(passes.forward, parameters, watch=False)
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = passes.forward()
        if passes.backward is not None:
            passes.backward(output)
        found["peak"] = torch.cuda.max_memory_allocated(device) - before
    return found


def measure_case(
    case: Case,
    names: Sequence[str],
    device: torch.device,
    measure: Callable,
    limits: tuple[int, float],
    write: results.Writer,
    progress: Progress,
) -> None:
    """All rows of a case. A provider that fails, at any stage, leaves a row with its error.

    Args:
        limits: (rounds, seconds), see `QUICK_ROUNDS`.
    """

    def fail(name, reason, **columns):
        write.add("error", None, note=reason, **case.columns(), provider=name, **columns)

    progress(f"{case.label}: check")
    functions = {}
    for name in names:
        try:
            functions[name] = providers.build(name, case, device)
        except providers.Unable as unable:
            fail(name, str(unable))
        except Exception as error:
            fail(name, timing.describe(error))
    try:
        first_call, wrong, output = check(case, functions, device, progress)
        inputs = Inputs(case, device, output)
        work = case.work(inputs.sets[0][0])
        variants: dict[str, Passes | Copy] = {COPY: Copy([work[m] for m in MODES[:2] if m in work], device)}
    except timing.FAILURES as error:
        for name in functions:
            fail(name, timing.describe(error))
        timing.release()
        return
    for name, reason in wrong.items():
        fail(name, reason)
        progress(f"  {name}: {reason}")
    for mode, (moved, flops) in work.items():
        write.add("bytes", moved, "bytes", **case.columns(), mode=mode)
        write.add("flops", flops, "FLOP", **case.columns(), mode=mode)
    for name, function in functions.items():
        reason = providers.without_backward(name, case, device)
        passes = Passes(function, inputs, () if reason else case.shape.wrt)
        try:
            memory = measure_memory(passes, device)
        except timing.FAILURES as error:
            fail(name, timing.describe(error))
            timing.release()
            continue
        if reason and case.shape.wrt:
            fail(name, reason, mode="backward")
        variants[name] = passes
        write.add("first_call", first_call[name], "s", **case.columns(), provider=name)
        for metric, value in memory.items():
            write.add(metric, value, "bytes", **case.columns(), provider=name)

    rounds, seconds = limits
    begin = time.perf_counter()
    for sample in timing.interleave(
        variants,
        rounds,
        measure,
        lambda done: done < LEAST_ROUNDS or time.perf_counter() - begin < seconds,
    ):
        columns = {**case.columns(), "provider": sample.variant, "round": sample.round}
        if sample.error is not None:
            write.add("error", None, note=sample.error, **columns)
            continue
        if (launches := sample.result) is not None:
            write.add("host", launches.host, "s", **columns)
            write.add("cover", launches.cover, "s", **columns)
            write.add("late", launches.late, **columns)
        parts = list(sample.seconds)
        for mode, value in zip(MODES, [*parts, sum(parts)] if len(parts) > 1 else parts, strict=False):
            write.add("seconds", value, "s", mode=mode, **columns)
    progress(f"  {plural(len(variants) - 1, 'provider')}, {plural(sample.round + 1, 'round')}")


def measure_ceilings(dtypes: Sequence[str], device: torch.device, write: results.Writer) -> None:
    """The rate of a large matrix product in each dtype, and of a memory copy."""
    size = 4096 if device.type == "cuda" else 1024
    for dtype in dtypes:
        for kind, rate in roofline.matmul_ceilings((size,) * 3, dtype, device).items():
            write.add("matmul_ceiling", rate, "FLOP/s", dtype=dtype, part=f"{size}x{size}x{size} {kind}")
    write.add("copy_ceiling", roofline.copy_ceiling(device), "bytes/s")


def serviceable(
    todo: Sequence[Case], chosen: Sequence[str], device: torch.device
) -> dict[Case, tuple[str, ...]]:
    """The cases that some of the chosen providers are for, with these providers.

    Raises:
        UsageError: not one of them can run a single case here; it says why.
    """
    served = {case: tuple(name for name in providers.serving(case.op) if name in chosen) for case in todo}
    served = {case: names for case, names in served.items() if names}
    reasons = {}
    for name in chosen:
        own = [case for case, names in served.items() if name in names]
        unable = [_why_unable(name, case, device) for case in own]
        if not all(unable):
            return served
        reasons[name] = (
            unable[0] if unable else f"It serves {' and '.join(providers.PROVIDERS[name][1])} only."
        )
    why = " ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UsageError(f"None of the chosen providers can run any of the chosen cases here. {why}")


def _why_unable(name: str, case: Case, device: torch.device) -> str:
    try:
        providers.build(name, case, device)
    except providers.Unable as unable:
        return str(unable)
    except Exception:  # a failure, which its row will show
        pass
    return ""


def run(options: Options, started: float) -> Path:
    """Measure; write measurements.csv, report.md and kernels.png into `options.out`; return the CSV's path.

    Args:
        started: `time.perf_counter()` at the program's start: from there the quick preset keeps its time.

    Raises:
        DeviceError: a GPU is present but unusable.
        UsageError: no provider serves any case, or `options.out` cannot be written to.
        Interrupted: by Ctrl-C; the report holds what was measured.
    """
    start = open_run("kernels", options, started)
    device, progress = start.device, start.progress
    dtypes = options.dtypes or tuple(DTYPES)[: 2 if device.type == "cpu" else 3]
    batches = options.batches or (FULL_BATCHES if options.full else QUICK_BATCHES)
    limits = FULL_ROUNDS if options.full else QUICK_ROUNDS
    if options.rounds:
        limits = options.rounds, float("inf")
    todo = serviceable(cases(options.ops, dtypes, batches, quick=not options.full), options.providers, device)
    progress(f"{plural(len(todo), 'case')} of {', '.join(dict.fromkeys(case.op for case in todo))}")
    if "fp16" in dtypes and device.type == "cpu":
        progress("fp16 is slow on most CPUs: expect its cases to take several times as long as those of fp32")
    measure = timing.measure_passes_cpu if device.type == "cpu" else timing.PassesOnCUDA(device)

    with (
        reported(start, report.write, " and kernels.png"),
        results.Writer(start.path, start.common, results.KERNEL_COLUMNS) as write,
        fresh_compile_caches(),
        quiet_compilers(),
    ):
        write.add("others_running", start.others)
        write.add("cases", len(todo))
        progress("ceilings: a large matrix product of each dtype, memory copy")
        measure_ceilings(dtypes, device, write)
        for case, names in todo.items():
            if not options.full and device.type == "cpu" and progress.elapsed > QUICK_SECONDS:
                for name in names:
                    note = "not measured: the quick preset's time was spent; choose --ops, or take --full"
                    write.add("error", None, note=note, **case.columns(), provider=name)
                continue
            measure_case(case, names, device, measure, limits, write, progress)
            torch.compiler.reset()  # each case is compiled for its own shapes
            timing.release()
        measure_ceilings(dtypes, device, write)
    return start.path
