"""The cases and providers of ``python -m bench kernels`` under pytest-benchmark: ``make test-bench``.

Its name keeps it out of ``make test``. Quick cases at batch 8 on the GPU, or on the CPU where there is none; choose
with ``ARGS="-k 'window_attention and native'"``. A provider that is wrong fails, one that cannot run is skipped with
its reason. For floors, ratios and memory see the suite itself.
"""

from functools import lru_cache

import pytest
import torch

from bench import device as devices
from bench.kernels import cases, providers, run

pytestmark = pytest.mark.no_poison
CASES = cases.cases(cases.OPS, ("fp32", "bf16"), (8,), quick=True)
ROUNDS = 20


def parameters():
    for case in CASES:
        for name in providers.serving(case.op):
            for mode in cases.MODES if case.shape.wrt else cases.MODES[:1]:
                shape = case.shape.name.replace(", ", "-").replace(" ", "-")
                yield pytest.param(case, name, mode, id=f"{case.op}-{shape}-{case.dtype}-{name}-{mode}")


@lru_cache(maxsize=1)  # the modes of a provider follow one another
def prepare(case, name):
    """(passes, seconds of the first call, why it cannot run, what is wrong)."""
    torch.compiler.reset()
    device = devices.select(None)
    try:
        functions = {name: providers.build(name, case, device)}
    except providers.Unable as unable:
        return None, None, str(unable), ""
    seconds, wrong, output = run.check(case, dict(functions), device)
    if wrong:
        return None, None, "", wrong[name]
    wrt = () if providers.without_backward(name, case, device) else case.shape.wrt
    return run.Passes(functions[name], run.Inputs(case, device, output), wrt), seconds[name], "", ""


def synchronized(function):
    def waiting(*arguments):
        result = function(*arguments)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result

    return waiting


@pytest.mark.parametrize(("case", "name", "mode"), parameters())
def test_kernel(benchmark, case, name, mode):
    passes, first_call, unable, wrong = prepare(case, name)
    if unable:
        pytest.skip(unable)
    assert not wrong
    if passes.backward is None and mode != "forward":
        pytest.skip(providers.without_backward(name, case, devices.select(None)))
    functions = {
        "forward": lambda: passes.forward(),
        "backward": passes.backward,
        "forward+backward": lambda: passes.backward(passes.forward()),
    }
    setup = (lambda: ((synchronized(passes.forward)(),), {})) if mode == "backward" else None
    work = case.work(passes.inputs.sets[0][0])[mode]
    benchmark.group = f"{case.label} | {mode}"
    benchmark.pedantic(synchronized(functions[mode]), setup=setup, rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info["first_call_seconds"] = first_call
    benchmark.extra_info["bytes"] = work.bytes
    if benchmark.stats:
        benchmark.extra_info["gb_per_s"] = work.bytes / benchmark.stats["median"] / 1e9
