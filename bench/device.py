"""Where the benchmark runs, and in what surroundings."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import torch


class DeviceError(RuntimeError):
    """The device that was asked for, or that is there, cannot be used; the message says why."""


def gpu_is_present() -> bool:
    """Whether the machine shows a GPU that PyTorch should use. One hidden by the user does not count."""
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if os.environ.get(variable) in ("", "-1"):
            return False
    # Integrated AMD graphics have /dev/kfd too, so it counts for a ROCm build only.
    nodes = ["/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1"] + ["/dev/kfd"] * (torch.version.hip is not None)
    return any(Path(node).exists() for node in nodes)


def _why_unusable() -> str | None:
    """None if a matrix product runs on the GPU, else the reason why not."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs only"
    try:
        x = torch.ones(16, 16, device="cuda")
        (x @ x).sum().item()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return None


def select(name: str | None) -> torch.device:
    """The device for `name` ("cpu", "cuda" or None for the GPU if there is one).

    Raises:
        DeviceError: a GPU was asked for or is present, and does not work. It never becomes a CPU run.
    """
    if name == "cpu" or (name is None and not gpu_is_present() and not torch.cuda.is_available()):
        return torch.device("cpu")
    if reason := _why_unusable():
        subject = "A GPU was asked for" if name else "This machine has a GPU"
        raise DeviceError(
            f"{subject}, but PyTorch cannot use it: {reason}. Repair the driver or install a matching torch "
            "build; to measure the CPU instead, say so with --device cpu."
        )
    return torch.device("cuda")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated there; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache: of a GPU its L2, of a CPU all instances that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    levels: dict[int, dict[str, int]] = {}
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    for cpu in cpus:
        for cache in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                level, size, shared = (
                    (cache / f).read_text().strip() for f in ("level", "size", "shared_cpu_list")
                )
                levels.setdefault(int(level), {})[shared] = int(size.removesuffix("K")) * 1024
            except (OSError, ValueError):
                continue
    return sum(levels[max(levels)].values()) if levels else 32 * 2**20


def others_running(samples: int = 10) -> float | None:
    """Processes that compete for the cores now, on average over half a second; None where it does not show."""
    counts = []
    for _ in range(samples):
        try:
            counts.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)
        except (OSError, IndexError, ValueError):
            return None
        time.sleep(0.05)
    return sum(counts) / samples


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, "-dirty" if it was changed since, or "" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    command += ["--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment(device: torch.device) -> dict[str, str | int]:
    """The columns that are the same in every row of a run."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "device": device.type,
        "device_name": name,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
    }
