r"""What the backward of linear does before its products: dpre and the gradient of the bias.

With y = activation(pre) + residual and dy,

    dpre = dy * activation'(pre),  dbias = sum over rows of dpre

dy, dpre and what was saved are (..., cols). For activations whose slope the output tells, the
output is what was saved (FROM_OUTPUT), for the others pre:

    relu        1 where y > 0, else 0          sigmoid  y (1 - y)
    leaky_relu  1 where y > 0, else 0.01       tanh     (1 - y) (1 + y)

Each program takes ROWS rows of some columns and writes one partial row of the bias's gradient in
float32 (float64 for float64), summed from unrounded dpre. Which rows go together depends on nothing
but ROWS, so the sum is the same on every device.
"""

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible
from ..config import cdiv
from ..launch import common_divisor, empty_rows, flatten_rows, launchable
from ..row_tiles import Blocks, load_tile, place_tile, store_tile
from ..structures import Rows, make_rows, restore_rows
from .epilogue import LEAKY_SLOPE, value_and_slope

ROWS = 128


@triton.jit
def gradient_before(dy, saved, ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr):
    """dpre of a tile, from pre or, FROM_OUTPUT, from the activation's value."""
    if ACTIVATION == "relu":
        # Zero also where dy is infinite; NaN lets dy through, as in torch.
        return tl.where(saved <= 0.0, 0.0, dy)
    elif ACTIVATION == "relu_squared":
        return tl.where(saved <= 0.0, 0.0, 2.0 * saved * dy)
    elif ACTIVATION == "leaky_relu":
        return tl.where(saved > 0.0, dy, dy * LEAKY_SLOPE)
    elif FROM_OUTPUT and ACTIVATION == "sigmoid":
        return dy * saved * (1.0 - saved)
    elif FROM_OUTPUT:
        tl.static_assert(ACTIVATION == "tanh")
        return dy * (1.0 - saved) * (1.0 + saved)
    else:
        return dy * value_and_slope(saved, ACTIVATION)[1]


@launchable
@triton.jit(do_not_specialize=["rows"])
def linear_backward_kernel(
    dy_view: Rows,
    saved_view: Rows,
    dpre_ptr,
    sums_ptr,
    rows,
    cols,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program ROWS rows, tile (BLOCK_M, BLOCK_N) after tile, of BLOCK_N columns."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    cols = divisible(cols, BLOCKS.divisor)
    column_tiles = tl.cdiv(cols, BLOCK_N)
    program = tl.program_id(0)
    part = (program // column_tiles).to(tl.int64)
    first_col = program % column_tiles * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), accumulator_dtype(dy_view.pointer))
    for first in range(0, ROWS, BLOCK_M):
        row = part * ROWS + first + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
        tile = place_tile(row, first_col, rows, cols, BLOCK_N)
        dpre = load_tile(restore_rows(dy_view, BLOCKS.divisor), tile)
        if saved_view is not None:
            saved = load_tile(restore_rows(saved_view, BLOCKS.divisor), tile)
            dpre = gradient_before(dpre, saved, ACTIVATION, FROM_OUTPUT)
        if dpre_ptr is not None:
            store_tile(Rows(dpre_ptr, cols), tile, dpre)
        total += dpre
    if sums_ptr is not None:
        offs_n = first_col + tl.arange(0, BLOCK_N)
        tl.store(sums_ptr + part * cols + offs_n, tl.sum(total, 0), offs_n < cols)


def linear_backward(
    dy: torch.Tensor,
    saved: torch.Tensor | None,
    dpre_dtype: torch.dtype,
    with_bias: int,
    from_output: int,
    activation: str | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Launch what comes before the products: (dpre, dbias in the dtype of dpre's accumulation).

    dpre is None where it would be dy, without an activation; dbias is None unless `with_bias`.
    """
    cols = dy.shape[-1]
    computed = torch.float64 if dy.dtype is torch.float64 else torch.float32
    is_dy = activation is None and dy.dtype is dpre_dtype
    dpre = None if is_dy else empty_rows(dy, dpre_dtype)
    if is_dy and not with_bias:
        return None, None
    if dy.numel() == 0:
        return dpre, torch.zeros(cols, dtype=computed, device=dy.device) if with_bias else None
    rows = dy.numel() // cols
    dy, stride_dym = flatten_rows(dy, cols)
    divisor = common_divisor(cols, stride_dym)
    saved_view = None
    if saved is not None:
        saved, stride_sm = flatten_rows(saved, cols)
        divisor = common_divisor(divisor, stride_sm)
        saved_view = make_rows(saved, stride_sm)
    parts = cdiv(rows, ROWS)
    sums = None
    if with_bias:
        sums = torch.empty(parts, cols, dtype=computed, device=dy.device)
    block_n = max(16, min(256, triton.next_power_of_2(cols)))
    linear_backward_kernel.launch(
        (parts * cdiv(cols, block_n),),
        dy_view=make_rows(dy, stride_dym),
        saved_view=saved_view,
        dpre_ptr=dpre,
        sums_ptr=sums,
        rows=rows,
        cols=cols,
        ACTIVATION=activation,
        FROM_OUTPUT=bool(from_output),
        ROWS=ROWS,
        BLOCKS=Blocks(2048 // block_n, block_n, divisor),
        num_warps=4,
    )
    return dpre, None if sums is None else sums.sum(0)
