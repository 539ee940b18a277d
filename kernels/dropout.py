"""Dropout: y = x * keep / (1 - p), and the mask alone.

x is taken as rows of its last dimension; whether element (row, column) is kept depends on the seed
and on that place (`dropout_keep`), so the backward, dx = dropout(dy) with the same seed, needs no
stored mask, and a mask written out for inspection is the one that was applied.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .common import divisible
from .config import cdiv, device_target
from .elementwise import elementwise_config, place_program
from .launch import (
    MOST_BOUND,
    common_divisor,
    dropout_scalars,
    empty_rows,
    flatten_rows,
    launchable,
)
from .row_tiles import Blocks, Dropout, choose_kept, drop, load_tile, store_tile
from .structures import Rows, make_rows, restore_rows


@launchable
@triton.jit(do_not_specialize=["rows"])
def dropout_kernel(seed_ptr, x_view: Rows, y_ptr, rows, cols, dropout, BLOCKS: tl.constexpr):
    """One program a tile (BLOCK_M, BLOCK_N). Without x_view it writes the mask itself."""
    cols = divisible(cols, BLOCKS.divisor)
    tile = place_program(rows, cols, BLOCKS)
    if x_view is None:
        y = choose_kept(tile, seed_ptr, dropout)
    else:
        x = load_tile(restore_rows(x_view, BLOCKS.divisor), tile)
        y = drop(x, tile, seed_ptr, dropout)
    store_tile(Rows(y_ptr, cols), tile, y)


def dropout_forward(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Launch dropout of x (..., cols); the backward is the same launch on dy."""
    y = empty_rows(x, x.dtype)
    if x.numel() > 0:
        x, stride_xm = flatten_rows(x, x.shape[-1])
        _launch(x, seed, y, stride_xm, p)
    return y


def dropout_mask_forward(seed: torch.Tensor, shape: list[int], p: float) -> torch.Tensor:
    """Launch the mask that dropout with this seed applies to a tensor of `shape`: True is kept."""
    keep = torch.empty(shape, dtype=torch.bool, device=seed.device)
    if keep.numel() > 0:
        _launch(None, seed, keep, 0, p)
    return keep


def _launch(
    x: torch.Tensor | None, seed: torch.Tensor, y: torch.Tensor, stride_xm: int, p: float
) -> None:
    cols = y.shape[-1]
    rows = y.numel() // cols
    launch, block_m, block_n = _bind(cols, stride_xm, p, seed.device)
    launch(
        (cdiv(rows, block_m) * cdiv(cols, block_n), 1, 1),
        seed_ptr=seed,
        x_view=None if x is None else make_rows(x, stride_xm),
        y_ptr=y,
        rows=rows,
    )


@functools.lru_cache(MOST_BOUND)
def _bind(
    cols: int, stride_xm: int, p: float, device: torch.device
) -> tuple[Callable[..., None], int, int]:
    """The launch with all that a model repeats, and the rows and columns of its tiles."""
    config = elementwise_config(cols, device_target(device.index))
    launch = dropout_kernel.bind(
        config.num_warps,
        fresh=("y_ptr",),
        cols=cols,
        dropout=Dropout(*dropout_scalars(p)),
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(cols, stride_xm)),
    )
    return launch, config.block_m, config.block_n
