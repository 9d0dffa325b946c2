"""A stand-in for Triton's driver: launches compile for the target, are recorded, and do nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.backends.driver import DriverBase

from audiomae_kernels import _triton
from audiomae_kernels.inspect.targets import TARGETS, Target


@dataclass
class Recorded:
    """One launch: the kernel's name, its grid, and the binary with the files that Triton made on the way."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    shared: int  # bytes
    pointers: dict[int, str]  # position among the binary's parameters -> name of a pointer argument
    files: dict[str, Path] = field(repr=False)  # by suffix: ttgir, llir, ptx, cubin or amdgcn, hsaco
    hash: str = field(repr=False)


class RehearsalDriver(DriverBase):
    """The driver of a GPU that is not there."""

    def __init__(self, target: Target):
        super().__init__()
        self.target = target
        self.launches: list[Recorded] = []
        self.files: dict[str, dict[str, Path]] = {}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": target.shared_per_block},
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    @classmethod
    def is_active(cls):
        return False

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("A rehearsed kernel has no C++ launcher.")

    def get_current_target(self):
        return self.target.gpu

    def get_active_torch_device(self):
        raise NotImplementedError("A rehearsal has no device.")

    def get_benchmarker(self):
        raise NotImplementedError("A rehearsed launch takes no time: there is nothing to measure.")

    def get_current_device(self):
        return list(TARGETS).index(self.target.name)  # Triton caches kernels by device: one for each target

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, src, metadata):
        types = [(name, ty) for name, ty in src.signature.items() if ty != "constexpr"]
        pointers = {i: name for i, (name, ty) in enumerate(types) if ty.startswith("*")}

        def launch(x, y, z, *_):
            if min(x, y, z) < 1:
                raise ValueError(f"{metadata.name} was launched on an empty grid, {(x, y, z)}.")
            if y > 65535 or z > 65535:
                raise ValueError(f"{metadata.name}: a grid's y and z end at 65535, this is {(x, y, z)}.")
            self.launches.append(
                Recorded(
                    metadata.name,
                    (x, y, z),
                    metadata.num_warps,
                    metadata.shared,
                    pointers,
                    self.files[metadata.hash],
                    metadata.hash,
                )
            )

        return launch

    def compiled(self, *, metadata, metadata_group, **_):
        """Triton's compilation listener, called for what it takes from its cache too."""
        paths = {Path(path).suffix[1:]: Path(path) for path in metadata_group.values()}
        self.files[metadata["hash"]] = paths


_drivers: dict[str, RehearsalDriver] = {}


@contextlib.contextmanager
def rehearse(target: Target) -> Iterator[list[Recorded]]:
    """Launches in here, with CPU tensors, compile for `target` and are appended to the list.

    Raises:
        RuntimeError: Triton interprets in this process (``TRITON_INTERPRET=1``), so that nothing compiles.
    """
    if _triton.interpreting():
        raise RuntimeError("Nothing compiles under TRITON_INTERPRET=1: rehearse launches without it.")
    driver = _drivers.setdefault(target.name, RehearsalDriver(target))
    driver.launches = []
    listener = triton.knobs.compilation.listener
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    triton.knobs.compilation.listener = driver.compiled
    try:
        with _triton.allow_cpu():
            yield driver.launches
    finally:
        triton.knobs.compilation.listener = listener
        triton.runtime.driver._active = before
