r"""RMSNorm with a gate, by groups of columns, backward.

With the names of gated_forward.py and e = dy if gate_first, else dy * a, for each group of a row:

    dh      = rstd * (e * weight - n * mean(e * weight * n))
    dweight = sum over rows of e * n
    dx      = dh * a  if gate_first, else dh
    dgate   = dh * x * a'  if gate_first, else dy * n * weight * a'

a and n are computed anew from x, gate and rstd; tiles and sums are float32 (float64 for float64
tensors). A fixed number of programs for each tile of columns walk the rows, keep the sum of dweight
in registers and write one partial row each, which `norm_backward_sum_kernel` adds up in a fixed
order. Of groups that do not fit the registers a kernel of its own computes the mean first.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype
from ..config import cdiv, device_target
from ..launch import (
    MOST_BOUND,
    common_divisor,
    empty_rows,
    flatten_rows,
    launchable,
    prepare_rows,
)
from ..row_tiles import Blocks, load_tile, place_tile, store_tile
from ..structures import Rows
from .backward import SUM_BLOCK_M, SUM_BLOCK_N, norm_backward_sum_kernel
from .config import (
    REDUCED_TILE,
    REDUCING_WARPS,
    NormBackwardConfig,
    gated_norm_backward_config,
)
from .gated_tiles import (
    GatedNorm,
    Layout,
    find_group,
    load_gated,
    load_weight,
    place_program,
)


@launchable
@triton.jit(do_not_specialize=["rows", "programs"])
def gated_norm_backward_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    rstd_ptr,
    mean_ptr,
    dy_ptr,
    dx_ptr,
    dgate_ptr,
    partials_ptr,
    rows,
    programs,
    layout,
    NORM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A tile of columns has `programs` programs, which walk its tiles of BLOCK_M rows in turns.

    Without mean_ptr the columns of a tile are a whole group. With partials_ptr (programs, C) each
    writes the sum over its own rows of dweight there.
    """
    ACC: tl.constexpr = accumulator_dtype(x_ptr)
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    place = place_program(layout, BLOCKS)
    group = find_group(x_ptr, gate_ptr, weight_ptr, rstd_ptr, layout, place.group, BLOCKS)
    cols = group.cols
    stride = layout.groups * cols
    dy_rows = Rows(dy_ptr + group.first, layout.stride_dy // BLOCKS.divisor * BLOCKS.divisor)
    offs_n = place.first_col + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for block in range(place.block, tl.cdiv(rows, BLOCK_M), programs):
        row = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # (BLOCK_M,)
        tile = place_tile(row, place.first_col, rows, cols, BLOCK_N)
        gated = load_gated(group, tile, NORM)
        rstd = tl.load(group.rstd_ptr + row * layout.groups, tile.mask_m, other=0.0)[:, None]
        n = gated.hidden * rstd
        dy = load_tile(dy_rows, tile)
        to_normalized = dy if NORM.gate_first else dy * gated.activated
        if partials_ptr is not None:
            dweight = tl.fma(to_normalized, n, dweight)
        weighted = n
        if weight_ptr is not None:
            # Read again for each tile of rows, from the cache: kept, it would take registers.
            weight = load_weight(group, tile, ACC)
            to_normalized *= weight
            weighted *= weight
        if mean_ptr is None:
            mean = tl.sum(to_normalized * n, 1) / cols
        else:
            mean_places = mean_ptr + place.group + row * layout.groups
            mean = tl.load(mean_places, tile.mask_m, other=0.0)
        dhidden = tl.fma(-n, mean[:, None], to_normalized) * rstd
        if NORM.gate_first:
            dx = dhidden * gated.activated
            dgate = dhidden * gated.x * gated.slope
        else:
            dx = dhidden
            dgate = dy * weighted * gated.slope
        store_tile(Rows(dx_ptr + group.first, stride), tile, dx)
        store_tile(Rows(dgate_ptr + group.first, stride), tile, dgate)
    if partials_ptr is not None:
        partials = partials_ptr + place.block.to(tl.int64) * stride + group.first + offs_n
        tl.store(partials, tl.sum(dweight, 0), offs_n < cols)


@launchable
@triton.jit(do_not_specialize=["rows"])
def gated_norm_mean_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    rstd_ptr,
    mean_ptr,
    dy_ptr,
    rows,
    layout,
    NORM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """mean(e * weight * n) of one group of one row (BLOCK_M = 1), in column tiles."""
    ACC: tl.constexpr = accumulator_dtype(x_ptr)
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    program = tl.program_id(0).to(tl.int64)
    number = program % layout.groups
    row = program // layout.groups + tl.arange(0, BLOCK_M)  # (1,)
    group = find_group(x_ptr, gate_ptr, weight_ptr, rstd_ptr, layout, number, BLOCKS)
    dy_rows = Rows(dy_ptr + group.first, layout.stride_dy // BLOCKS.divisor * BLOCKS.divisor)
    rstd = tl.load(group.rstd_ptr + row * layout.groups)[:, None]
    products = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first_col in range(0, group.cols, BLOCK_N):
        tile = place_tile(row, first_col, rows, group.cols, BLOCK_N)
        gated = load_gated(group, tile, NORM)
        to_normalized = load_tile(dy_rows, tile)
        if not NORM.gate_first:
            to_normalized *= gated.activated
        if weight_ptr is not None:
            to_normalized *= load_weight(group, tile, ACC)
        products = tl.fma(to_normalized, gated.hidden * rstd, products)
    tl.store(mean_ptr + number + row * layout.groups, tl.sum(products, 1) / group.cols)


def gated_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    group_size: int,
    weight_dtype: torch.dtype | None,
    gate_first: bool,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch the backward: (dx, dgate, dweight), the last not computed if weight_dtype is None."""
    cols = x.shape[-1]
    groups = rstd.shape[-1]
    dgate = empty_rows(gate, gate.dtype)
    rows_x, stride_xm, dx = prepare_rows(x, cols, x.dtype)
    if x.numel() == 0:
        dweight = None if weight_dtype is None else x.new_zeros(cols, dtype=weight_dtype)
        return dx, dgate, dweight
    gate, stride_gm = flatten_rows(gate, cols)
    dy, stride_dym = flatten_rows(dy, cols)
    rstd = rstd.contiguous()
    if weight is not None:
        weight = weight.contiguous()
    rows = x.numel() // cols
    bound = _bound_launches(
        group_size,
        groups,
        stride_xm,
        stride_gm,
        stride_dym,
        weight_dtype,
        GatedNorm(gate_first, activation),
        x.device,
    )
    given = {
        "x_ptr": rows_x,
        "gate_ptr": gate,
        "weight_ptr": weight,
        "rstd_ptr": rstd,
        "dy_ptr": dy,
        "rows": rows,
    }
    mean = None
    if bound.mean is not None:
        mean = torch.empty_like(rstd)
        bound.mean((rows * groups, 1, 1), mean_ptr=mean, **given)
    programs = min(cdiv(rows, bound.config.block_m), bound.config.most_programs)
    dweight = partials = None
    if weight_dtype is not None:
        dweight = x.new_empty(cols, dtype=weight_dtype)
        partials = x.new_empty((programs, cols), dtype=rstd.dtype)
    bound.inputs(
        (programs * groups * cdiv(group_size, bound.config.block_n), 1, 1),
        mean_ptr=mean,
        dx_ptr=dx,
        dgate_ptr=dgate,
        partials_ptr=partials,
        programs=programs,
        **given,
    )
    if partials is not None:
        bound.sums(
            (cdiv(cols, SUM_BLOCK_N), 1, 1),
            partials_ptr=partials,
            dweight_ptr=dweight,
            dbias_ptr=None,
            partials=programs,
        )
    return dx, dgate, dweight


class _Launches(NamedTuple):
    """The configuration, and the launches bound to all that a model repeats."""

    config: NormBackwardConfig
    mean: Callable[..., None] | None
    """Of wide groups alone: in the others' place the next one does it."""
    inputs: Callable[..., None]
    sums: Callable[..., None]


@functools.lru_cache(MOST_BOUND)
def _bound_launches(
    group_size: int,
    groups: int,
    stride_xm: int,
    stride_gm: int,
    stride_dym: int,
    weight_dtype: torch.dtype | None,
    norm: GatedNorm,
    device: torch.device,
) -> _Launches:
    """weight_dtype is an argument only because dtypes of fresh tensors have to follow from it."""
    config = gated_norm_backward_config(group_size, groups, device_target(device.index))
    divisor = common_divisor(group_size, stride_xm, stride_gm, stride_dym)
    layout = Layout(stride_xm, stride_gm, stride_dym, group_size, groups)
    mean = None
    if not config.whole_row:
        mean = gated_norm_mean_kernel.bind(
            REDUCING_WARPS,
            fresh=("mean_ptr",),
            layout=layout,
            NORM=norm,
            BLOCKS=Blocks(1, REDUCED_TILE, divisor),
        )
    inputs = gated_norm_backward_kernel.bind(
        config.num_warps,
        fresh=("mean_ptr", "dx_ptr", "dgate_ptr", "partials_ptr"),
        layout=layout,
        NORM=norm,
        BLOCKS=Blocks(config.block_m, config.block_n, divisor),
    )
    sums = norm_backward_sum_kernel.bind(
        num_warps=4,
        fresh=("partials_ptr", "dweight_ptr", "dbias_ptr"),
        cols=group_size * groups,
        BLOCK_M=SUM_BLOCK_M,
        BLOCK_N=SUM_BLOCK_N,
    )
    return _Launches(config, mean, inputs, sums)
