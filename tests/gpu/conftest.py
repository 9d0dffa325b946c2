"""The tests of this folder want a GPU. ``--device cpu`` rehearses them without one.

A rehearsal runs their bodies on CPU tensors, where streams, graphs and waits are nothing: it shows that a
test holds together, and nothing of a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from audiomae_kernels import _triton

from bench.device import gpu_is_present

HERE = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse the GPU's tests"
    )


def device_type(config) -> str:
    # Without this folder on the command line pytest reads this file too late for the option to exist.
    return config.getoption("--device", default="cuda")


def pytest_collection_modifyitems(config, items):
    if device_type(config) == "cpu" or torch.cuda.is_available() or gpu_is_present():
        return  # a GPU that is present and unusable must fail, not hide
    skip = pytest.mark.skip(reason="there is no GPU; `pytest tests/gpu --device cpu` rehearses it")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device(pytestconfig) -> torch.device:
    # With its index, so that it equals the device of a tensor on it.
    return torch.device("cuda", 0) if device_type(pytestconfig) == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")
def on_gpu(device) -> bool:
    return device.type == "cuda"


@pytest.fixture
def gpu(device, on_gpu) -> torch.device:
    """For tests of which a rehearsal has nothing to run."""
    if not on_gpu:
        pytest.skip("this needs a GPU")
    return device


@pytest.fixture(scope="session")
def impl(on_gpu) -> str | None:
    """The implementation under test."""
    return "triton" if on_gpu else None


@pytest.fixture(autouse=True)
def few_threads(on_gpu):
    """In a rehearsal: waking a second thread for tiny tensors costs more than it saves."""
    threads = torch.get_num_threads()
    if not on_gpu:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def wait(device, on_gpu) -> Callable[[], None]:
    """Waits until the device has done all that was asked of it; asynchronous errors surface here."""
    return partial(torch.cuda.synchronize, device) if on_gpu else lambda: None


@pytest.fixture
def no_waiting(on_gpu):
    """A context in which PyTorch raises if the host waits for the device."""

    @contextlib.contextmanager
    def no_waiting():
        if not on_gpu:
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return no_waiting


@pytest.fixture
def side_stream(device, on_gpu):
    """A context: a stream of its own, which waits for what was asked of the current one before."""

    @contextlib.contextmanager
    def side_stream():
        if not on_gpu:
            yield None
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield stream

    return side_stream


@pytest.fixture
def captured(device, on_gpu, side_stream, wait):
    """``captured(step)``: the step, warmed up and captured as a graph; (what it returns, replay)."""

    def captured(step: Callable):
        with side_stream():
            for _ in range(3):  # compiles the kernels, makes the optimizer's state
                step()
        wait()
        if not on_gpu:
            static = step()

            def run_again():
                for into, value in zip(static, step(), strict=True):
                    into.detach().copy_(value.detach())

            return static, run_again
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = step()
        return static, graph.replay

    return captured


@pytest.fixture
def compilations(on_gpu):
    """A list that grows by the name of each kernel that Triton makes a binary for, or takes from its cache.

    In a rehearsal the kernels compile for sm_90 and do not run; without Triton the test is skipped.
    """
    if not _triton.available():
        pytest.skip(_triton.why_not())
    from audiomae_kernels.inspect.rehearsal import rehearse
    from audiomae_kernels.inspect.targets import TARGETS

    names, runtime = [], _triton.triton.knobs.runtime
    before = runtime.jit_post_compile_hook
    runtime.jit_post_compile_hook = lambda *, fn, **_: names.append(fn.name)
    with contextlib.nullcontext() if on_gpu else rehearse(TARGETS["sm_90"]):
        yield names
    runtime.jit_post_compile_hook = before
