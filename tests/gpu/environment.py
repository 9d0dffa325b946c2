"""Writes what a GPU's results depend on as JSON, or says why there are none to be had.

python tests/gpu/environment.py [--rehearse] FILE
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import device as devices

NO_GPU = (
    "No CUDA or ROCm GPU was found: the environment is installed, but nothing was measured and nothing rehearsed; "
    "`make gpu ARGS=--rehearse` goes through the steps on the CPU."
)
PACKAGES = ("torch", "triton", "numpy", "torchaudio", "xformers", "flash-attn")


def driver() -> str:
    """The version of the GPU's driver, as far as the system tells it."""
    if smi := shutil.which("nvidia-smi"):
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.split("\n")[0].strip()
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        if Path(file).is_file():
            return Path(file).read_text().split("\n")[0].strip()
    return "unknown"


def sanitizers(backend: str) -> dict[str, str]:
    """The sanitizers, each with the reason why it does not run here, or ""."""
    nvidia_only = "" if backend == "cuda" else "it is for NVIDIA GPUs"
    no_triton = "" if importlib.util.find_spec("triton") else "there is no Triton"
    reasons = {"overflow": no_triton, "consan": no_triton or nvidia_only, "gsan": no_triton or nvidia_only}
    if not reasons["consan"]:
        from triton import knobs

        if not hasattr(knobs.compilation, "instrumentation_mode"):
            reasons["consan"] = reasons["gsan"] = "this Triton has none"
        elif not importlib.util.find_spec("triton.experimental.gsan"):
            reasons["gsan"] = "this Triton has none"
        elif not any(map(shutil.which, ("c++", "g++", "clang++"))):
            reasons["gsan"] = "it needs a C++ compiler"
    found = shutil.which("compute-sanitizer")
    missing = "" if found else "compute-sanitizer is not on PATH: it comes with the CUDA toolkit"
    return reasons | dict.fromkeys(("memcheck", "racecheck"), nvidia_only or missing)


def why_no_table(target: str) -> str:
    """Why `audiomae_kernels.inspect` does not compile for the GPU, or ""."""
    if not importlib.util.find_spec("triton"):
        return "there is no Triton"
    from audiomae_kernels.inspect.targets import TARGETS

    return "" if target in TARGETS else f"it is made for {', '.join(TARGETS)}, not for {target}"


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware(device: torch.device) -> dict:
    """Of the GPU; of a rehearsal, what stands in for it."""
    if device.type == "cpu":
        return {"device": "rehearsal", "backend": "cpu", "target": "sm_90", "driver": "none", "gpus": []}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    hip = torch.version.hip is not None
    target = gpus[0].gcnArchName.split(":")[0] if hip else f"sm_{gpus[0].major}{gpus[0].minor}"
    return {
        "device": gpus[0].name,
        "backend": "hip" if hip else "cuda",
        "target": target,
        "driver": driver(),
        "gpus": [
            {"name": gpu.name, "bytes": gpu.total_memory, "multiprocessors": gpu.multi_processor_count}
            for gpu in gpus
        ],
    }


def environment(device: torch.device) -> dict:
    commit, found = devices.commit(), hardware(device)
    return {
        **found,
        "commit": commit.removesuffix("-dirty"),
        "dirty": commit.endswith("-dirty"),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "python": sys.version.split()[0],
        "system": " ".join(os.uname()[i] for i in (0, 2, 4)),
        "cpu": devices.cpu_name(),
        "versions": {package: version_of(package) for package in PACKAGES},
        "sanitizers": sanitizers(found["backend"]),
        "why_no_table": why_no_table(found["target"]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="the CPU stands in for a GPU")
    args = parser.parse_args(argv)
    try:
        device = devices.select("cpu" if args.rehearse else None)
    except devices.DeviceError as error:
        print(error)
        return 1
    if device.type == "cpu" and not args.rehearse:
        print(NO_GPU)
        return 1
    found = environment(device)
    args.file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['device']} ({found['target']}), driver {found['driver']}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
