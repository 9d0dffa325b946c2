"""Tiny recordings, good ones and damaged ones."""

import os
import struct
from pathlib import Path

import numpy as np
import soundfile


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def write(path: Path, samples: int = 16000, rate: int = 16000, seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(samples, seed), rate, **options)
    return path


def folder(parent: Path, count: int, samples: int = 8000, suffix: str = "wav") -> Path:
    """`count` recordings of different noise."""
    for i in range(count):
        write(parent / f"clip{i:03d}.{suffix}", samples, seed=i)
    return parent


def ten_hours(path: Path) -> Path:
    """A second of noise at 8 kHz, then silence: a file with a hole, which takes no room."""
    write(path, 8000, 8000, subtype="PCM_16")
    size = 10 * 3600 * 8000 * 2
    with path.open("r+b") as file:
        file.truncate(44 + size)
        file.seek(4)
        file.write(struct.pack("<I", 36 + size))
        file.seek(40)
        file.write(struct.pack("<I", size))
    return path


#: Kinds of damage, and what the error says of each.
DAMAGE = {
    "empty": "the file is empty",
    "header": "cannot be decoded",
    "data_wav": "cut short",
    "data_flac": "cannot be decoded|cut short",
    "data_mp3": "cut short|none could be decoded|cannot be decoded",
    "extension": "cannot be decoded",
    "nan": "NaN",
    "overflow": "samples up to 1e\\+25, where 1 is full scale",
    "zero_hertz": "cannot be decoded: its header states no sample rate",
    "one_sample": "fewer than one frame",
    "unreadable": "Permission denied|Input/output error",
    "missing": "no such file",
    "folder": "is a folder",
}


def damaged(kind: str, path: Path) -> Path:
    """A file (its suffix may change) that cannot be used."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "header":
        path.write_bytes(write(path).read_bytes()[:20])
    elif kind.startswith("data_"):
        path = write(path.with_suffix("." + kind[5:]), 40000)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "extension":
        path.write_text("this is not audio " * 100)
    elif kind == "nan":
        soundfile.write(path, np.full(16000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")
    elif kind == "overflow":  # floats with a flipped bit
        samples = noise(16000)
        samples[::100] = 1e25
        soundfile.write(path, samples, 16000, subtype="FLOAT")
    elif kind == "zero_hertz":
        content = write(path).read_bytes()
        path.write_bytes(content[:24] + struct.pack("<I", 0) + content[28:])
    elif kind == "one_sample":
        write(path, 1)
    elif kind == "unreadable":
        if os.geteuid():
            write(path).chmod(0)
        else:  # permissions do not hold root back; its own memory at address 0 does
            path.symlink_to("/proc/self/mem")
    elif kind == "folder":
        path.mkdir()
    return path
