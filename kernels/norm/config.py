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
