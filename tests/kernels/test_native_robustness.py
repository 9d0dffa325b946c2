"""The native CPU library where processes fork, threads meet and CPUs are old."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import audiomae_kernels as ak
import pytest
import torch
from audiomae_kernels import _native
from budget import evaluate
from kernel_cases import (
    attention_case,
    fbank_case,
    info_nce_case,
    patch_case,
    unshuffle_case,
    window_attention_case,
)
from torch.utils.data import Dataset

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.why_not() or "loaded")

TESTS = Path(__file__).parents[1]
# Large enough for several threads to have work.
CASES = (
    window_attention_case("large", (32, 8), (4, 4), (2, 0), B=2, H=5, d=32),
    patch_case("patch_gather", "large", 256, 128, (16, 16), B=3, K=90),
    unshuffle_case("large", 5, 20, 100, 96),
    patch_case("masked_mse", "large", 256, 128, (16, 16), B=3, K=90),
    info_nce_case("large", 3, 90, 70),
    attention_case("large", B=2, L=90, H=5, d=32, dropout=0.1),
    fbank_case("large", 3, 20000),
)


def inputs():
    dtypes = {"fbank": (torch.float32,)}
    return [
        (case, case.tensors(dtype))
        for case in CASES
        for dtype in dtypes.get(case.op, (torch.float32, torch.bfloat16))
    ]


def results(given, impl="native"):
    """(case, results by name) for each of `given`; outputs and every gradient."""
    return [(case, evaluate(case.call(impl), tensors, case.wrt())) for case, tensors in given]


def differing(actual, expected):
    """The results that are not the same to the bit."""
    return [
        f"{name} of {case.op} in {value.dtype}"
        for (case, values), (_, others) in zip(actual, expected, strict=True)
        for name, value in values.items()
        if not torch.equal(value, others[name])
    ]


class InWorkers(Dataset):
    """Computes everything where it is asked for an item, which is what differs from what the parent got."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return 1

    def __getitem__(self, i):
        given = inputs()
        expected = [(case, values) for (case, _), values in zip(given, self.values, strict=True)]
        return os.getpid(), differing(results(given), expected)


def in_process(code, **environment):
    """Runs `code` in a process of its own, which has four minutes."""
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS.parent / "kernels", TESTS, TESTS / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", f"from test_native_robustness import *\n{code}"],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_every_op_is_tried():
    assert {case.op for case in CASES} == {*ak.FRONT_END, *ak.OPS}


def test_the_number_of_threads_changes_no_bit():
    given, runs = inputs(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        runs.append(results(given))
    assert not differing(runs[1], runs[0]) and not differing(runs[2], runs[0])


def test_python_threads_at_once():
    """Four threads, each calling every op with the inputs of all, start together."""
    given = inputs()
    expected, runs = results(given), []
    barrier = threading.Barrier(4)

    def work():
        barrier.wait()
        for _ in range(3):
            runs.append(results(given))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(runs) == 12
    assert not [name for run in runs for name in differing(run, expected)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork.")
def test_fork_after_use():
    """A child of a process with one thread may start more; one of a process with several takes a single one.

    Threads do not live on in a child, and GNU OpenMP waits for them: all of PyTorch's CPU operations do.
    """
    in_process("""
torch.set_num_threads(1)
given = inputs()
for in_parent, in_child in (1, 2), (2, 1):
    torch.set_num_threads(in_parent)
    expected = results(given)
    if not (child := os.fork()):
        different = ["nothing computed"]
        try:
            torch.set_num_threads(in_child)
            different = differing(results(given), expected)
            print(*different, flush=True)
        finally:
            os._exit(len(different))
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert not differing(results(given), expected)
""")


def test_workers_of_a_data_loader():
    in_process("""
from torch.utils.data import DataLoader

torch.set_num_threads(2)
data = InWorkers([values for _, values in results(inputs())])
for context in "fork", "spawn":
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=context)
    for process, different in loader:
        assert process != os.getpid() and not different, (context, different)
""")


def test_a_cpu_without_vector_extensions():
    """Import, every op and a training step in the tier that needs nothing."""
    out = in_process(
        """
import audiomae
from audiomae_kernels import _native
print([name for name, chosen, _ in _native.cpu_tiers() if chosen])
given = inputs()
for (case, actual), (_, expected) in zip(results(given), results(given, "reference")):
    if case.op == "fbank":
        continue  # weak bins lose more digits; test_fbank judges them
    for name, value in actual.items():
        rtol = 20 * torch.finfo(value.dtype).eps
        atol = rtol * float(expected[name].abs().max())
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=f"{name} of {case.op}")
model = audiomae.create_model("audiomae_base", width=32, heads=2, depth=1, decoder_width=32, decoder_depth=2)
model(torch.randn(1, 1024, 128)).loss.backward()
assert all(p.grad.isfinite().all() for p in model.parameters())
""",
        AUDIOMAE_CPU_TIER="portable",
    )
    assert out.strip() == "['portable']"
