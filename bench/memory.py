"""Two figures: what autograd keeps for the backward pass, and the peak of a fresh process."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from pathlib import Path

import torch

from .registry import Case


def saved_bytes(forward, parameters) -> tuple[int, torch.Tensor]:
    """Bytes of the distinct storages that `forward()` saves for its backward pass, parameters excluded.

    Returns:
        (bytes, the result of forward), the graph still alive.
    """
    own = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return sum(seen.values()), result


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


def _peak_of_step(case: Case, device: str, threads: int, spectrogram, connection) -> None:
    from .providers import Step, allocate, make_optimizer

    try:
        torch.set_num_threads(threads)
        before = _status("VmRSS") or _max_rss()
        model = allocate(case, device)
        step = Step(case, model, spectrogram.to(device), make_optimizer(model))
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


def peak_bytes(case: Case, device: str, threads: int, spectrogram: torch.Tensor) -> int:
    """Peak memory of one training step in a process of its own: weights, optimizer state, activations.

    On a CPU the resident set's peak during the step, above what it was before the model was built; on a GPU
    the peak of PyTorch's allocator.

    Raises:
        MemoryError: the process was killed or ran out of memory.
        RuntimeError: the step failed, with its reason.
    """
    context = _context()
    receive, send = context.Pipe(duplex=False)
    process = context.Process(
        target=_peak_of_step, args=(case, device, threads, spectrogram, send), daemon=True
    )
    process.start()
    send.close()
    try:
        state, value = receive.recv()
    except EOFError:
        process.join()
        if process.exitcode == -9:
            raise MemoryError("killed, out of memory") from None
        raise RuntimeError(f"the process ended with exit status {process.exitcode}") from None
    finally:
        receive.close()
    process.join()
    if state == "error":
        raise MemoryError(value) if value == "out of memory" else RuntimeError(value)
    return value
