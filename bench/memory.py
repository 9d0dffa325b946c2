"""What autograd keeps for the backward pass, and the peak of a fresh process, with or without a limit."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .registry import Case

# A limited process may map so much more than its budget: stacks of threads, and what allocators round up.
_SLACK = 256 * 2**20


class _Storages(TorchDispatchMode):
    """Remembers every storage that an operator makes, without keeping it alive."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def alive(self) -> dict[int, int]:
        return {key: size for key, (reference, size) in self.seen.items() if not reference.expired()}


def saved_bytes(forward, parameters, watch: bool = True) -> tuple[int, torch.Tensor]:
    """Bytes of the distinct storages that `forward()` keeps for its backward pass, parameters excluded.

    Counted is what autograd has saved, an input of the step included, and whatever else the operators made
    and something but the result still holds when `forward` has returned, such as the inputs of checkpointed segments.

    Args:
        watch: look at the operators too. Compiled code does not run while something does, and checkpoints nothing.

    Returns:
        (bytes, the result of forward), the graph still alive.
    """
    own = {p.untyped_storage()._cdata for p in parameters}
    storages, saved = _Storages(), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        storages if watch else nullcontext(),
    ):
        result = forward()
    own |= {t.untyped_storage()._cdata for t in pytree.tree_leaves(result)} - saved.keys()
    kept = {**saved, **storages.alive()}
    return sum(size for key, size in kept.items() if key not in own), result


def _status(field: str) -> int | None:
    """Bytes in a field of /proc/self/status, None where there is no such file."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _max_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _limit(budget: int, device: str) -> None:
    """Make allocations fail beyond so many bytes from now on, in this process alone."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / torch.cuda.mem_get_info()[1]))
    elif mapped := _status("VmData"):
        resource.setrlimit(resource.RLIMIT_DATA, (mapped + budget + _SLACK,) * 2)


def _peak_of_step(case: Case, device: str, threads: int, spectrogram, budget, connection) -> None:
    from .providers import Step, allocate, make_optimizer

    try:
        torch.set_num_threads(threads)
        before = _status("VmRSS") or _max_rss()
        if budget is not None:
            _limit(budget, device)
        model = allocate(case, device)
        optimizer = make_optimizer(model) if case.mode == "training" else None
        if isinstance(spectrogram, int):
            spectrogram = torch.randn(case.batch, spectrogram, case.config().mel_bins)
        step = Step(case, model, spectrogram.to(device), optimizer)
        if case.provider == "compiled":  # compiling is not what is measured
            step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = torch.cuda.max_memory_allocated()
        else:
            if os.access("/proc/self/clear_refs", os.W_OK):  # building is not what is measured
                Path("/proc/self/clear_refs").write_text("5")
            step()
            peak = (_status("VmHWM") or _max_rss()) - before
        connection.send(("ok", peak))
    except Exception as error:
        from .timing import describe

        connection.send(("error", describe(error)))


def _context():
    # A fork server has imported everything and computed nothing: a process starts in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.providers"])
    return context


def peak_bytes(
    case: Case, device: str, threads: int, spectrogram: torch.Tensor | int, budget: int | None = None
) -> int:
    """Peak memory of one step in a process of its own: weights, and in training gradients and optimizer state.

    On a CPU the resident set's peak during the step, above what it was before the model was built; on a GPU
    the peak of PyTorch's allocator.

    Args:
        spectrogram: (B, T, F), or T alone for noise that the process makes itself.
        budget: bytes that the process may allocate (None: no limit). What needs more fails there and harms nobody else.

    Raises:
        MemoryError: the process was killed or ran out of memory.
        RuntimeError: the step failed, with its reason.
    """
    context = _context()
    receive, send = context.Pipe(duplex=False)
    process = context.Process(
        target=_peak_of_step, args=(case, device, threads, spectrogram, budget, send), daemon=True
    )
    process.start()
    send.close()
    try:
        state, value = receive.recv()
    except EOFError:
        process.join()
        if process.exitcode == -9:
            raise MemoryError("killed, out of memory") from None
        if budget is not None and process.exitcode == -6:  # C++ that could not allocate
            raise MemoryError("ended at its limit of memory") from None
        raise RuntimeError(f"the process ended with exit status {process.exitcode}") from None
    finally:
        receive.close()
    process.join()
    if state == "error":
        raise MemoryError(value) if value == "out of memory" else RuntimeError(value)
    return value
