"""Compiles the launches for targets, dtypes and alignments, several at a time."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Iterable, Iterator

import torch

from audiomae_kernels.inspect import binaries
from audiomae_kernels.inspect.launches import run
from audiomae_kernels.inspect.lint import load_launches
from audiomae_kernels.inspect.rehearsal import rehearse
from audiomae_kernels.inspect.targets import TARGETS


def compile_rows(job: tuple[str, str, str, str, bool]) -> list[dict]:
    """One row for each binary of a launch: (module of launches, launch, target, dtype, aligned)."""
    module, launch_name, name, dtype, aligned = job
    torch.set_num_threads(1)
    (launch,) = (launch for launch in load_launches(module) if launch.name == launch_name)
    target, rows, hashes = TARGETS[name], [], {}
    with rehearse(target) as recorded:
        run(launch, getattr(torch, dtype), aligned, clips=2)
    for one in recorded:
        variants = hashes.setdefault(one.kernel, [])
        if one.hash in variants:
            continue
        variants.append(one.hash)
        binary = binaries.read(one, target)
        rows.append(
            {
                "launch": launch.name,
                "function": one.kernel,
                "kernel": one.kernel + (f" ({len(variants)})" if len(variants) > 1 else ""),
                "target": name,
                "dtype": dtype,
                "aligned": aligned,
                "warps": one.num_warps,
                "occupancy": target.occupancy(binary.registers, binary.shared, one.num_warps),
                **binary.as_dict(),
            }
        )
    return rows


def compile_all(
    module: str, jobs: Iterable[tuple[str, str, str, bool]], processes: int
) -> Iterator[list[dict]]:
    """`compile_rows` of each (launch, target, dtype, aligned), in order, as they become ready."""
    arguments = [(module, *job) for job in jobs]
    if processes == 1:
        yield from map(compile_rows, arguments)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(compile_rows, arguments)
