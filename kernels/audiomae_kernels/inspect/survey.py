"""Compiles the launches for targets, dtypes and alignments, several at a time."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing

import torch

from audiomae_kernels.inspect import binaries
from audiomae_kernels.inspect.launches import run
from audiomae_kernels.inspect.lint import load_launches
from audiomae_kernels.inspect.rehearsal import rehearse
from audiomae_kernels.inspect.targets import TARGETS


def compile_rows(job: tuple[str, bool, str, str, bool]) -> list[dict]:
    """One row for each binary of the launches: (module of launches, quick, target, dtype, aligned)."""
    module, quick, name, dtype, aligned = job
    torch.set_num_threads(1)
    target, rows = TARGETS[name], []
    for launch in load_launches(module, quick):
        with rehearse(target) as recorded:
            run(launch, getattr(torch, dtype), aligned, clips=2)
        variants: dict[str, list[str]] = {}
        for one in recorded:
            hashes = variants.setdefault(one.kernel, [])
            if one.hash in hashes:
                continue
            hashes.append(one.hash)
            binary = binaries.read(one, target)
            rows.append(
                {
                    "launch": launch.name,
                    "function": one.kernel,
                    "kernel": one.kernel + (f" ({len(hashes)})" if len(hashes) > 1 else ""),
                    "target": name,
                    "dtype": dtype,
                    "aligned": aligned,
                    "warps": one.num_warps,
                    "occupancy": target.occupancy(binary.registers, binary.shared, one.num_warps),
                    **binary.as_dict(),
                }
            )
    return rows


def compile_all(module: str, quick: bool, jobs: list[tuple[str, str, bool]], processes: int) -> list[dict]:
    arguments = [(module, quick, *job) for job in jobs]
    if processes == 1:
        return list(itertools.chain.from_iterable(map(compile_rows, arguments)))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(itertools.chain.from_iterable(pool.map(compile_rows, arguments)))
