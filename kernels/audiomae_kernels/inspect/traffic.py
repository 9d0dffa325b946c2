"""Bytes that the programs of a kernel move, counted by running it in Triton's interpreter.

A program's traffic with an operand is the 32-byte sectors that it touches, each once, however often it reads
them: no cache is modelled. Programs do read some again. In window_attention's backward the second loop over the
C > 1 chunks of a long head asks for q, k and do once more, so that up to 10 bytes are asked for where 7 are
counted; info_nce goes through x and y in pieces, x once for each block of y. How much of that L1 or L2 still
holds, a GPU has to tell.

``python -m audiomae_kernels.inspect.traffic`` prints the count, a line of JSON for each launch and dtype, and
needs ``TRITON_INTERPRET=1``; `measure` runs it in a process of its own.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

SECTOR = 32  # bytes
CLIPS = 1


def measure(
    dtypes: Sequence[str],
    launches: str,
    quick: bool = False,
    progress: Callable[[str, str], None] = lambda launch, dtype: None,
) -> dict[str, dict]:
    """``"launch | kernel | dtype"`` -> {"programs": ..., "operands": {name: bytes of a clip}}.

    `progress` is called after each launch and dtype.

    Raises:
        RuntimeError: the interpreter fails, as Triton 3.6's does at many loops with NumPy 2.4.
    """
    command = [sys.executable, "-m", "audiomae_kernels.inspect.traffic", launches, str(int(quick)), *dtypes]
    report = {}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        for line in process.stdout:
            launch, dtype, counted = json.loads(line)
            report |= counted
            progress(launch, dtype)
        if process.wait():
            errors.seek(0)
            reason = errors.read().strip().rpartition("\n")[2] or f"exit status {process.returncode}"
            raise RuntimeError(
                f"Triton's interpreter failed ({reason}); `TRITON_INTERPRET=1 python {' '.join(command[1:])}` "
                "shows where."
            )
    return report


class Counter:
    """Hooks into the interpreter; `kernels` collects sectors by kernel and operand."""

    def __init__(self):
        from triton.runtime import interpreter

        self.kernels: dict[str, dict] = {}
        self._interpreter = interpreter
        self._extents: dict[str, tuple[int, int]] = {}
        self._touched: dict[str, list[np.ndarray]] = defaultdict(list)
        self._hook(interpreter.GridExecutor, "__call__", self._on_launch)
        self._hook(interpreter.InterpreterBuilder, "set_grid_idx", self._on_program)
        self._hook(interpreter.InterpreterBuilder, "create_masked_load", self._on_load)
        self._hook(interpreter.InterpreterBuilder, "create_masked_store", self._on_store)

    @staticmethod
    def _hook(owner, name, before):
        original = getattr(owner, name)

        def hooked(this, *args, **kwargs):
            after = before(this, *args, **kwargs)
            result = original(this, *args, **kwargs)
            if after is not None:
                after()
            return result

        setattr(owner, name, hooked)

    def _on_launch(self, executor, *args, **kwargs):
        named = inspect.getcallargs(
            executor.fn, *args, **{k: v for k, v in kwargs.items() if k in executor.arg_names}
        )
        self._extents = {
            name.removesuffix("_ptr"): _extent(value)
            for name, value in named.items()
            if isinstance(value, torch.Tensor) and value.numel()
        }
        grid = executor.grid(named) if callable(executor.grid) else executor.grid
        entry = self.kernels.setdefault(
            executor.fn.__name__, {"programs": 0, "launches": 0, "sectors": defaultdict(int)}
        )
        entry["programs"] += int(np.prod(grid))
        entry["launches"] += 1
        self._entry = entry
        return self._flush

    def _on_program(self, builder, *_):
        self._flush()

    def _on_load(self, builder, pointers, mask, *_):
        self._access(pointers.data[mask.data.astype(bool)])

    def _on_store(self, builder, pointers, value, mask, *_):
        self._access(pointers.data[mask.data.astype(bool)])

    def _access(self, addresses: np.ndarray):
        if addresses.size:
            first = int(addresses[0])
            for name, (start, end) in self._extents.items():
                if start <= first < end:
                    self._touched[name].append(np.unique(addresses // SECTOR))
                    break

    def _flush(self):
        for name, parts in self._touched.items():
            self._entry["sectors"][name] += np.unique(np.concatenate(parts)).size
        self._touched.clear()


def _extent(x: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def main(launches: str, quick: str, *dtypes: str) -> None:
    from audiomae_kernels.inspect.launches import run
    from audiomae_kernels.inspect.lint import load_launches

    np.seterr(all="ignore")  # all inputs are zeros, norms and variances too
    counter = Counter()
    for launch in load_launches(launches, quick == "1"):
        for dtype in dtypes:
            counter.kernels = {}
            run(launch, getattr(torch, dtype), True, CLIPS)
            counted = {}
            for kernel, entry in counter.kernels.items():
                clips = CLIPS * entry["launches"]
                counted[f"{launch.name} | {kernel} | {dtype}"] = {
                    "programs": entry["programs"] / clips,
                    "operands": {name: n * SECTOR / clips for name, n in entry["sectors"].items()},
                }
            print(json.dumps([launch.name, dtype, counted]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
