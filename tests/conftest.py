"""Every test: a fixed seed, and uninitialised memory that is NaN."""

import functools
import random

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "no_poison: leave torch.empty alone (for tests that trace: torch.compile, torch.export)"
    )


@pytest.fixture(autouse=True)
def fixed_seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For tiny tensors: waking a second thread costs more than it saves, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_empty(request, monkeypatch):
    """`torch.empty` and its kin return NaN, so that an element which nobody wrote shows."""
    if request.node.get_closest_marker("no_poison"):
        yield
        return
    # torch.device() as a context remembers which functions make tensors, and must not remember these.
    _device_constructors.cache_clear()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield
    _device_constructors.cache_clear()


def _poisoned(allocate):
    @functools.wraps(allocate)
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return poisoned


# -- the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """kind -> a published file of that kind."""
    from cli_cases import KINDS, state_dict

    folder = tmp_path_factory.mktemp("checkpoints")
    files = {kind: folder / f"{kind}.pth" for kind in KINDS}
    for kind, path in files.items():
        torch.save({"model": state_dict(kind), "epoch": 3}, path)
    return files


@pytest.fixture
def run(capsys):
    """Runs a command; returns its exit status, output and error output."""
    from audiomae.cli import main

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse, on --help and on a wrong command line
            status = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "\x1b" not in err
        return status, out, err

    return run


@pytest.fixture
def refused(run):
    """Runs a command that must fail with one sentence about its cause; returns the sentence."""

    def refused(*arguments, status=1):
        found, _, err = run(*arguments)
        assert found == status
        assert err.startswith(f"audiomae {arguments[0]}: ") and err.count("\n") == 1 and len(err) < 400, err
        return err

    return refused
