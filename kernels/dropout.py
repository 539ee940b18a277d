"""Dropout: y = x * keep / (1 - p), and the mask alone.

x is taken as rows of its last dimension; whether element (row, column) is kept depends on the seed
and on that place (`dropout_keep`), so the backward, dx = dropout(dy) with the same seed, needs no
stored mask, and a mask written out for inspection is the one that was applied.
"""

import torch
import triton
import triton.language as tl

from .common import divisible, dropout_keep
from .config import cdiv, find_target
from .elementwise import elementwise_config, load_rows, place_program
from .launch import common_divisor, dropout_scalars, empty_rows, flatten_rows, launchable
from .structures import Rows, make_rows


@launchable
@triton.jit(do_not_specialize=["rows"])
def dropout_kernel(
    seed_ptr,
    x_view: Rows,
    y_ptr,
    rows,
    cols,
    dropout_threshold,
    dropout_scale,
    DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N). Without x_view it writes the mask itself."""
    cols = divisible(cols, DIVISOR)
    row, first_col = place_program(cols, BLOCK_M, BLOCK_N)
    offs_n = first_col + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (offs_n < cols)[None, :]
    seed = tl.load(seed_ptr)
    keep = dropout_keep(seed, row, first_col, dropout_threshold, BLOCK_M, BLOCK_N)
    y_offsets = (row * cols)[:, None] + offs_n[None, :]
    if x_view is None:
        tl.store(y_ptr + y_offsets, keep, mask)
    else:
        x = load_rows(x_view, row, offs_n, mask, DIVISOR)
        if x.dtype.primitive_bitwidth == 16:
            x = x.to(tl.float32)
        y = tl.where(keep, x * dropout_scale, 0.0)
        tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask)


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
    dropout_threshold, dropout_scale = dropout_scalars(p)
    config = elementwise_config(cols, find_target(seed))
    dropout_kernel.launch(
        (cdiv(rows, config.block_m) * cdiv(cols, config.block_n),),
        seed_ptr=seed,
        x_view=None if x is None else make_rows(x, stride_xm),
        y_ptr=y,
        rows=rows,
        cols=cols,
        dropout_threshold=dropout_threshold,
        dropout_scale=dropout_scale,
        DIVISOR=common_divisor(cols, stride_xm),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )
