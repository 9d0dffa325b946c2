"""The second stage of deterministic sums: partial sums, one a program, added up in a fixed order."""

from __future__ import annotations

from torch import Tensor

from audiomae_kernels._triton import device_of, tl, triton

PROGRAMS = 8  # of a loss a multiprocessor: each adds up its share of the tiles and writes one partial sum


@triton.jit(do_not_specialize=["rows"])
def sum_partials_kernel(
    partials_ptr,  # (rows, columns) float32, contiguous
    out_ptr,  # (columns,)
    rows,
    columns,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    o_column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    m_column = (o_column < columns)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for i_row in range(0, rows, BLOCK_ROWS):
        o_row = i_row + tl.arange(0, BLOCK_ROWS)
        p_partials = partials_ptr + o_row.to(tl.int64)[:, None] * columns + o_column[None, :]
        total += tl.load(p_partials, mask=(o_row < rows)[:, None] & m_column, other=0.0)
    tl.store(
        out_ptr + o_column, (tl.sum(total, 0) * scale).to(out_ptr.dtype.element_ty), mask=o_column < columns
    )


def sum_partials(partials: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """``out = scale * partials.sum(0)``, (rows, ...) -> (...), both contiguous; returns `out`."""
    rows, columns = partials.shape[0], out.numel()
    if columns == 0:
        return out
    block_rows = 1024 if columns == 1 else min(triton.next_power_of_2(rows), 128)
    block_columns = min(triton.next_power_of_2(columns), 4096 // block_rows)
    with device_of(partials):
        sum_partials_kernel[(triton.cdiv(columns, block_columns),)](
            partials,
            out,
            rows,
            columns,
            scale,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=4,
        )
    return out
