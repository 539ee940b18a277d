r"""RMSNorm with a gate, by groups of columns, forward.

A row has C columns in groups of G, each of which is normalized by itself. For each group of a row,
with a = activation(gate):

    h    = x * a  if gate_first, else x
    rstd = 1 / sqrt(mean(h^2) + eps)
    n    = h * rstd
    y    = n * weight  if gate_first, else n * weight * a

x, gate and y are (..., C), weight is (C,), rstd is (..., C / G). The inputs and rstd are saved for
the backward, which is in gated_backward.py. Tiles and sums are float32, or float64 for float64
tensors. `casting` says where the forward rounds before y, so that it gives the bits of the models
that define it:

    float32   nowhere: Falcon-H1, Kimi Linear
    llama     n to x's dtype; and n * weight to the dtype that PyTorch gives that product, before a
              multiplies it: Mamba 2, Qwen3-Next

A group that fits the registers is read once. Of wider ones a kernel of its own computes rstd first,
and the same kernel then takes them in column tiles.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype
from ..config import cdiv, device_target
from ..launch import MOST_BOUND, common_divisor, flatten_rows, launchable, prepare_rows
from ..row_tiles import Blocks, place_tile, store_tile
from ..structures import Rows
from .config import REDUCED_TILE, REDUCING_WARPS, gated_norm_forward_config
from .gated_tiles import (
    GatedNorm,
    Layout,
    find_group,
    load_gated,
    load_hidden,
    load_weight,
    place_program,
)


@launchable
@triton.jit(do_not_specialize=["rows"])
def gated_norm_forward_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    eps,
    layout,
    NORM: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of a group: all its columns, if WHOLE, and the rstd."""
    X_DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    ACC: tl.constexpr = accumulator_dtype(x_ptr)
    place = place_program(layout, BLOCKS)
    group = find_group(x_ptr, gate_ptr, weight_ptr, rstd_ptr, layout, place.group, BLOCKS)
    row = place.block.to(tl.int64) * BLOCKS.block_m + tl.arange(0, BLOCKS.block_m)  # (BLOCK_M,)
    tile = place_tile(row, place.first_col, rows, group.cols, BLOCKS.block_n)
    gated = load_gated(group, tile, NORM)
    rstd_places = group.rstd_ptr + row * layout.groups
    if WHOLE:
        rstd = tl.rsqrt(tl.sum(gated.hidden * gated.hidden, 1) / group.cols + eps)
        tl.store(rstd_places, rstd, tile.mask_m)
    else:
        rstd = tl.load(rstd_places, tile.mask_m, other=0.0)
    y = gated.hidden * rstd[:, None]
    if NORM.casting == "llama":
        y = y.to(X_DTYPE).to(ACC)
    if weight_ptr is not None:
        y *= load_weight(group, tile, ACC)
        if NORM.casting == "llama" and weight_ptr.dtype.element_ty == X_DTYPE:
            # Before the last product, which rounds once more; without a gate there it is that one.
            y = y if NORM.gate_first else y.to(X_DTYPE).to(ACC)
    if not NORM.gate_first:
        y *= gated.activated
    store_tile(Rows(y_ptr + group.first, layout.groups * group.cols), tile, y)


@launchable
@triton.jit(do_not_specialize=["rows"])
def gated_norm_statistics_kernel(
    x_ptr,
    gate_ptr,
    rstd_ptr,
    rows,
    eps,
    layout,
    NORM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The rstd of one group of one row (BLOCK_M = 1), in column tiles."""
    ACC: tl.constexpr = accumulator_dtype(x_ptr)
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    program = tl.program_id(0).to(tl.int64)
    number = program % layout.groups
    row = program // layout.groups + tl.arange(0, BLOCK_M)  # (1,)
    group = find_group(x_ptr, gate_ptr, None, rstd_ptr, layout, number, BLOCKS)
    squares = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first_col in range(0, group.cols, BLOCK_N):
        tile = place_tile(row, first_col, rows, group.cols, BLOCK_N)
        hidden = load_hidden(group, tile, NORM)
        squares = tl.fma(hidden, hidden, squares)
    rstd = tl.rsqrt(tl.sum(squares, 1) / group.cols + eps)
    tl.store(group.rstd_ptr + row * layout.groups, rstd)


def gated_norm_forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
    eps: float,
    gate_first: bool,
    activation: str,
    casting: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward: (y, rstd)."""
    *leading, cols = x.shape
    groups = cdiv(cols, max(group_size, 1))
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    rstd = x.new_empty((*leading, groups), dtype=dtype)
    rows_x, stride_xm, y = prepare_rows(x, cols, out_dtype)
    if x.numel() == 0:
        return y, rstd
    gate, stride_gm = flatten_rows(gate, cols)
    rows = x.numel() // cols
    launch = _bound_launches(
        group_size,
        groups,
        stride_xm,
        stride_gm,
        out_dtype,
        GatedNorm(gate_first, activation, casting),
        x.device,
    )
    if launch.statistics is not None:
        launch.statistics(
            (rows * groups, 1, 1), x_ptr=rows_x, gate_ptr=gate, rstd_ptr=rstd, rows=rows, eps=eps
        )
    launch.output(
        (cdiv(rows, launch.block_m) * groups * launch.column_tiles, 1, 1),
        x_ptr=rows_x,
        gate_ptr=gate,
        weight_ptr=None if weight is None else weight.contiguous(),
        y_ptr=y,
        rstd_ptr=rstd,
        rows=rows,
        eps=eps,
    )
    return y, rstd


class _Launches(NamedTuple):
    """The launches bound to all that a model repeats, and how the second is cut."""

    statistics: Callable[..., None] | None
    """Of wide groups alone: of others the second launch computes them."""
    output: Callable[..., None]
    block_m: int
    column_tiles: int


@functools.lru_cache(MOST_BOUND)
def _bound_launches(
    group_size: int,
    groups: int,
    stride_xm: int,
    stride_gm: int,
    out_dtype: torch.dtype,
    norm: GatedNorm,
    device: torch.device,
) -> _Launches:
    """out_dtype is an argument only because that of y, which is fresh, has to follow from it."""
    config = gated_norm_forward_config(group_size, device_target(device.index))
    divisor = common_divisor(group_size, stride_xm, stride_gm)
    layout = Layout(stride_xm, stride_gm, 0, group_size, groups)
    statistics = None
    if not config.whole_row:
        statistics = gated_norm_statistics_kernel.bind(
            REDUCING_WARPS,
            fresh=("rstd_ptr",),
            layout=layout,
            NORM=norm,
            BLOCKS=Blocks(1, REDUCED_TILE, divisor),
        )
    output = gated_norm_forward_kernel.bind(
        config.num_warps,
        fresh=("y_ptr", "rstd_ptr"),
        layout=layout,
        NORM=norm,
        WHOLE=config.whole_row,
        BLOCKS=Blocks(config.block_m, config.block_n, divisor),
    )
    return _Launches(statistics, output, config.block_m, cdiv(group_size, config.block_n))
