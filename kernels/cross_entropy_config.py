"""Block sizes of cross entropy."""

import functools

from .config import (
    COLUMN_TILE,
    LOGITS_TILE,
    Target,
    TileConfig,
    choose_height,
    choose_warps,
    choose_width,
)


@functools.cache
def cross_entropy_forward_config(cols: int, target: Target) -> TileConfig:
    """The configuration of cross entropy's forward: a program loops over tiles of its rows."""
    block_n = min(choose_width(cols), LOGITS_TILE)
    block_m = choose_height(block_n)
    return TileConfig(block_m, block_n, choose_warps(block_m * block_n // 2, target))


@functools.cache
def cross_entropy_backward_config(cols: int, target: Target) -> TileConfig:
    """The configuration of cross entropy's backward, which is element-wise."""
    block_n = min(choose_width(cols), COLUMN_TILE)
    block_m = choose_height(block_n, COLUMN_TILE)
    # Twice the elements of other kernels a thread, for the numbers that it reads of each row.
    return TileConfig(block_m, block_n, choose_warps(block_m * block_n // 2, target))
