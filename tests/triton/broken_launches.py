"""Kernels that the lint must refuse, each for one reason, and one that it must pass."""

import torch
from audiomae_kernels._triton import device_of, tl, triton
from audiomae_kernels.inspect.launches import Launch

ROWS, WIDTH = 16, 512


@triton.jit
def fine_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + o, tl.load(x_ptr + o))


@triton.jit
def spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Holds all of x in the registers of one warp."""
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + o)
    tl.store(out_ptr + o, b_x - tl.max(b_x, 0))


@triton.jit
def atomic_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + o, tl.load(x_ptr + o))
    tl.atomic_add(out_ptr, 1.0)


@triton.jit
def tf32_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    b_x = tl.load(x_ptr + o)
    tl.store(out_ptr + o, tl.dot(b_x, b_x, input_precision="tf32"))


@triton.jit
def scalar_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Neighbouring threads and values are three apart."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + o, tl.load(x_ptr + o * 3))


@triton.jit
def narrow_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    o = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(out_ptr + o, tl.load(x_ptr + o))


@triton.jit
def twice_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Each program reads its neighbour's block as well."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    neighbour = (tl.program_id(0).to(tl.int64) ^ 1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + o, tl.load(x_ptr + o) + tl.load(x_ptr + neighbour))


@triton.jit
def scalar_dot_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """A product of matrices without the instruction for it."""
    o = tl.arange(0, BLOCK)
    tl.store(out_ptr + o, tl.load(x_ptr + o) * tl.load(x_ptr + o))


def _launch(name, flops=0, block=WIDTH, grid=ROWS, arguments=(), dtype=None, num_warps=1):
    kernel = globals()[f"{name}_kernel"]

    def call(tensor, clips):
        x = tensor(clips, ROWS * WIDTH * 3, **({} if dtype is None else {"dtype": dtype})).detach()
        out = torch.empty_like(x)
        with device_of(x):
            kernel[(grid * clips,)](x, out, *arguments, BLOCK=block, num_warps=num_warps)

    streams = {f"{name}_kernel": {"x": ROWS * WIDTH, "out": ROWS * WIDTH}}
    return Launch(name, call, streams, {f"{name}_kernel": flops} if flops else {})


LAUNCHES = (
    _launch("fine"),
    _launch("spilling", block=1 << 14, grid=1, dtype=torch.float32),
    _launch("atomic", dtype=torch.float32),
    _launch("tf32"),
    _launch("scalar"),
    _launch("narrow", arguments=(WIDTH,)),
    _launch("twice"),
    _launch("scalar_dot", flops=1),
)
