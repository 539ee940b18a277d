"""Block sizes of the norms."""

import functools
from dataclasses import dataclass

from ..config import (
    COLUMN_TILE,
    MOST_THREADS,
    WIDEST_BACKWARD_ROW,
    WIDEST_FORWARD_ROW,
    RowConfig,
    Target,
    cdiv,
    choose_warps,
    choose_width,
    cut_whole_rows,
)


@dataclass(frozen=True)
class NormBackwardConfig(RowConfig):
    """How a norm's backward is cut: input gradients in tiles of (block_m, block_n) elements."""

    most_programs: int
    """How many programs at most share the rows and write partial sums of the weight's gradient."""
    weight_block_m: int = 0
    """Rows of a tile where the weight's gradient has a kernel of its own (not whole_row)."""
    weight_block_n: int = 0


# The widest groups of columns that the gated norms hold in registers, where the gate and what comes
# of it lie beside each row.
WIDEST_GATED_FORWARD = 8192
WIDEST_GATED_BACKWARD = 4096

# Tiles of wider groups, in which a gated norm's output or gradients are computed.
GATED_TILE = (4, 512)
# Columns that a program takes in one step to compute one number of a wider group, and its warps.
REDUCED_TILE = 4096
REDUCING_WARPS = 16


@functools.cache
def norm_forward_config(cols: int, target: Target) -> RowConfig:
    """The configuration of a norm's forward: a function of the row's width and the device."""
    if choose_width(cols) > WIDEST_FORWARD_ROW:
        return RowConfig(1, COLUMN_TILE, choose_warps(COLUMN_TILE, target), whole_row=False)
    return cut_whole_rows(cols, target)


@functools.cache
def norm_backward_config(cols: int, target: Target) -> NormBackwardConfig:
    """The configuration of a norm's backward.

    Tiles depend on the row's width and the device. The number of programs decides nothing but the
    order in which the gradients of weight and bias are summed.
    """
    if choose_width(cols) > WIDEST_BACKWARD_ROW:
        weight_block_n = 512
        return NormBackwardConfig(
            block_m=1,
            block_n=COLUMN_TILE,
            num_warps=choose_warps(COLUMN_TILE, target),
            whole_row=False,
            # Enough programs in all to give every multiprocessor several.
            most_programs=max(1, 8 * target.multiprocessors * weight_block_n // cols),
            weight_block_m=4,
            weight_block_n=weight_block_n,
        )
    rows = cut_whole_rows(cols, target)
    # As many programs as are resident at once: more would only make more partial sums.
    resident = max(1, MOST_THREADS // (rows.num_warps * target.warp_size))
    return NormBackwardConfig(**vars(rows), most_programs=resident * target.multiprocessors)


@functools.cache
def gated_norm_forward_config(cols: int, target: Target) -> RowConfig:
    """The configuration of a gated norm's forward on groups of so many columns."""
    if choose_width(cols) <= WIDEST_GATED_FORWARD:
        return cut_whole_rows(cols, target)
    block_m, block_n = GATED_TILE
    warps = choose_warps(block_m * block_n, target)
    return RowConfig(block_m, block_n, warps, whole_row=False)


@functools.cache
def gated_norm_backward_config(cols: int, groups: int, target: Target) -> NormBackwardConfig:
    """The configuration of a gated norm's backward; `most_programs` are for one tile of columns."""
    if choose_width(cols) <= WIDEST_GATED_BACKWARD:
        rows = cut_whole_rows(cols, target)
    else:
        block_m, block_n = GATED_TILE
        warps = choose_warps(block_m * block_n, target)
        rows = RowConfig(block_m, block_n, warps, whole_row=False)
    resident = MOST_THREADS // (rows.num_warps * target.warp_size) * target.multiprocessors
    column_tiles = groups * cdiv(cols, rows.block_n)
    return NormBackwardConfig(**vars(rows), most_programs=max(1, resident // column_tiles))
