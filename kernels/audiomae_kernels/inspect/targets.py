"""GPUs whose binaries are inspected, and those whose times are predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """One architecture and what bounds the blocks on one of its multiprocessors (compute units)."""

    name: str
    gpu: GPUTarget
    shared_per_block: int  # bytes that a block may ask for
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int
    shared_reserved: int = 1024  # bytes of the system in each block
    registers_per_sm: int = 65536

    @property
    def is_amd(self) -> bool:
        return self.gpu.backend == "hip"

    def occupancy(self, registers: int, shared: int, num_warps: int) -> float:
        """Resident warps over the most that fit, from registers a thread, shared bytes and warps a block."""
        if self.is_amd:  # 512 vector registers a lane in each of 4 SIMDs, in steps of 8
            warps = 4 * min(512 // _round_up(max(registers, 1), 8), self.warps_per_sm // 4)
            blocks = min(warps // num_warps, self.blocks_per_sm)
            if shared:
                blocks = min(blocks, self.shared_per_sm // shared)
            return blocks * num_warps / self.warps_per_sm
        per_warp = _round_up(max(registers, 1) * 32, 256)
        blocks = min(
            self.registers_per_sm // per_warp // num_warps,
            self.shared_per_sm // _round_up(shared + self.shared_reserved, 128),
            self.warps_per_sm // num_warps,
            self.blocks_per_sm,
        )
        return blocks * num_warps / self.warps_per_sm


def _round_up(value: int, step: int) -> int:
    return math.ceil(value / step) * step


def _cuda(arch: int, per_block: int, per_sm: int, warps: int, blocks: int) -> Target:
    return Target(f"sm_{arch}", GPUTarget("cuda", arch, 32), per_block << 10, per_sm << 10, warps, blocks)


# CUDA C++ Programming Guide, technical specifications per compute capability; AMD CDNA 3 ISA guide.
TARGETS = {
    target.name: target
    for target in (
        _cuda(80, 163, 164, 64, 32),
        _cuda(86, 99, 100, 48, 16),
        _cuda(89, 99, 100, 48, 24),
        _cuda(90, 227, 228, 64, 32),
        _cuda(100, 227, 228, 64, 32),
        _cuda(120, 99, 100, 48, 24),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 32, 32, shared_reserved=0),
    )
}


@dataclass(frozen=True)
class Machine:
    """Data-sheet peaks: bytes per second, and dense FLOP/s of matrix products by dtype."""

    name: str
    bandwidth: float
    half: float  # bf16 and fp16, tensor cores
    single: float  # fp32, IEEE

    def predicted_seconds(self, bytes_moved: float, flops: float, dtype: str) -> float:
        """The larger of the times for bytes and FLOPs at peak rates: a floor, not a measurement."""
        peak = self.single if dtype == "float32" else self.half
        return max(bytes_moved / self.bandwidth, flops / peak)


MACHINES = (
    Machine("A100", 2.039e12, 312e12, 19.5e12),
    Machine("H100", 3.35e12, 989e12, 67e12),
    Machine("B200", 8.0e12, 2250e12, 75e12),
)
