r"""LayerNorm and RMSNorm, backward: the gradients of `norm_forward`'s inputs.

With the names of forward.py and g = dy * (weight + weight_offset), for each row:

    dh      = rstd * (g - [mean(g) if centered] - n * mean(g * n)) + dhidden
    dx      = dropout(dh),  dresidual = dh
    dweight = sum over rows of dy * n
    dbias   = sum over rows of dy

dhidden is the gradient that h itself receives as the second output of the fused addition. n is
computed anew from h, mean and rstd; tiles and sums are float32 (float64 for float64 tensors).

Rows up to 8192 columns take one launch: a fixed number of programs walk the rows, keep the sums of
dweight and dbias in registers and write one partial row each. Wider rows take two: input gradients
row by row in column tiles, and the sums by column tiles. A last small kernel adds the partial rows
in a fixed order, so that gradients are the same bit for bit every time.
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
    Allocate,
    allocator,
    common_divisor,
    dropout_scalars,
    empty_rows,
    flatten_rows,
    launchable,
    prepare_rows,
)
from ..row_tiles import Blocks, Dropout, Tile, load_tile, place_tile
from ..structures import Rows
from .backward_tiles import (
    Gradients,
    Layout,
    Saved,
    Sums,
    divide_layout,
    load_normalized,
    store_input_gradients,
    store_partials,
)
from .backward_wide import norm_backward_weight_kernel, norm_backward_wide_kernel
from .config import NormBackwardConfig, norm_backward_config
from .forward_tiles import Norm

# The tile of partial rows that one step of the last summation adds.
SUM_BLOCK_M = 32
SUM_BLOCK_N = 64


@launchable
@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    dy_ptr,
    dhidden_ptr,
    hidden_ptr,
    weight_ptr,
    statistics_ptr,
    seed_ptr,
    dx_ptr,
    dresidual_ptr,
    partials_ptr,
    rows,
    layout,
    dropout,
    NORM: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A fixed number of programs, each walking every num_programs-th tile of BLOCK_M whole rows.

    Each writes the sums over its own rows of dweight, dbias or both, see `store_partials`.
    """
    ACC: tl.constexpr = accumulator_dtype(hidden_ptr)
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    layout = divide_layout(layout, BLOCKS.divisor)
    cols = layout.cols
    saved = Saved(
        Rows(dy_ptr, layout.stride_dy), Rows(hidden_ptr, layout.stride_hidden), statistics_ptr
    )
    gradients = Gradients(
        Rows(dhidden_ptr, layout.stride_dhidden),
        Rows(dx_ptr, cols),
        Rows(dresidual_ptr, cols),
        seed_ptr,
        dropout,
    )
    program = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs_n, offs_n < cols, other=0.0).to(ACC)[None, :]
        weight += NORM.weight_offset
    dweight = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), ACC)

    for block in range(program, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # (BLOCK_M,)
        tile = place_tile(row, 0, rows, cols, BLOCK_N)
        n, dy, rstd = load_normalized(saved, tile, NORM)
        if SUMS.weight:
            dweight = tl.fma(dy, n, dweight)
        if SUMS.bias:
            dbias += dy
        if weight_ptr is not None:
            dy *= weight
        dhidden = tl.fma(-n, (tl.sum(dy * n, 1) / cols)[:, None], dy)
        if NORM.centered:
            dhidden -= (tl.sum(dy, 1) / cols)[:, None]
        store_input_gradients(dhidden * rstd[:, None], gradients, tile)

    store_partials(dweight, dbias, partials_ptr, program, offs_n, cols, SUMS)


@triton.jit
def sum_partial_rows(partials, count, sum_ptr, offs_n, cols, BLOCK_M: tl.constexpr):
    """Sum `count` rows of partials at the columns offs_n, in a fixed order."""
    BLOCK_N: tl.constexpr = offs_n.shape[0]
    mask_n = offs_n < cols
    total = tl.zeros((BLOCK_M, BLOCK_N), partials.pointer.dtype.element_ty)
    for first in range(0, count, BLOCK_M):
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        total += load_tile(partials, Tile(row, 0, offs_n, row < count, mask_n))
    tl.store(sum_ptr + offs_n, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask_n)


@launchable
@triton.jit(do_not_specialize=["partials"])
def norm_backward_sum_kernel(
    partials_ptr,
    dweight_ptr,
    dbias_ptr,
    partials,
    cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dweight and dbias from partial rows, see `store_partials`, one column tile a program."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    stride = cols if dweight_ptr is None or dbias_ptr is None else 2 * cols
    if dweight_ptr is not None:
        rows = Rows(partials_ptr, stride)
        sum_partial_rows(rows, partials, dweight_ptr, offs_n, cols, BLOCK_M)
        partials_ptr += cols
    if dbias_ptr is not None:
        rows = Rows(partials_ptr, stride)
        sum_partial_rows(rows, partials, dbias_ptr, offs_n, cols, BLOCK_M)


def norm_backward(
    dy: torch.Tensor,
    dhidden: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    statistics: torch.Tensor,
    seed: torch.Tensor | None,
    weight_offset: float,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Launch the backward: (dx, dresidual, dweight, dbias), each in the dtype that is given for it.

    A gradient whose dtype is None is not computed.
    """
    cols = hidden.shape[-1]
    dresidual = None if residual_dtype is None else empty_rows(hidden, residual_dtype)
    hidden, stride_hm, dx = prepare_rows(hidden, cols, x_dtype)
    elements = hidden.numel()
    if elements == 0:
        dweight = None if weight_dtype is None else hidden.new_zeros(cols, dtype=weight_dtype)
        dbias = None if bias_dtype is None else hidden.new_zeros(cols, dtype=bias_dtype)
        return dx, dresidual, dweight, dbias

    if weight is not None:
        weight = weight.contiguous()
    dy, stride_dym = flatten_rows(dy, cols)
    stride_dhm = 0
    if dhidden is not None:
        dhidden, stride_dhm = flatten_rows(dhidden, cols)
    dtype = statistics.dtype
    config, row_tile, inputs, weights, sums, empty = _bound_launches(
        cols,
        stride_dym,
        stride_dhm,
        stride_hm,
        weight_offset,
        dropout_p,
        dtype,
        x_dtype,
        residual_dtype,
        weight_dtype,
        bias_dtype,
        centered,
        hidden.device,
    )
    rows = elements // cols
    programs = min(cdiv(rows, row_tile), config.most_programs)
    dweight = None if weight_dtype is None else empty((cols,), (1,), weight_dtype)
    dbias = None if bias_dtype is None else empty((cols,), (1,), bias_dtype)
    summed = (dweight is not None) + (dbias is not None)
    partials = empty((programs, summed, cols), (summed * cols, cols, 1), dtype) if summed else None

    inputs(
        (programs if config.whole_row else rows, 1, 1),
        dy_ptr=dy,
        dhidden_ptr=dhidden,
        hidden_ptr=hidden,
        weight_ptr=weight,
        statistics_ptr=statistics,
        seed_ptr=seed,
        dx_ptr=dx,
        dresidual_ptr=dresidual,
        rows=rows,
        **({"partials_ptr": partials} if config.whole_row else {}),
    )
    if partials is not None and not config.whole_row:
        weights(
            (programs, cdiv(cols, config.weight_block_n)),
            dy_ptr=dy,
            hidden_ptr=hidden,
            statistics_ptr=statistics,
            partials_ptr=partials,
            rows=rows,
        )
    if partials is not None:
        sums(
            (cdiv(cols, SUM_BLOCK_N), 1, 1),
            partials_ptr=partials,
            dweight_ptr=dweight,
            dbias_ptr=dbias,
            partials=programs,
        )
    return dx, dresidual, dweight, dbias


class _Launches(NamedTuple):
    """The configuration, and the launches bound to all that a model repeats."""

    config: NormBackwardConfig
    row_tile: int
    """How many rows at a time are added to the partial sums."""
    inputs: Callable[..., None]
    weights: Callable[..., None]
    """Of wide rows alone: in the others' place the first kernel does it."""
    sums: Callable[..., None]
    empty: Allocate


@functools.lru_cache(MOST_BOUND)
def _bound_launches(
    cols: int,
    stride_dym: int,
    stride_dhm: int,
    stride_hm: int,
    weight_offset: float,
    dropout_p: float,
    statistics_dtype: torch.dtype,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    centered: bool,
    device: torch.device,
) -> _Launches:
    """Several dtypes are arguments only because those of fresh tensors have to follow from them."""
    config = norm_backward_config(cols, device_target(device.index))
    divisor = common_divisor(cols, stride_dym, stride_dhm, stride_hm)
    layout = Layout(stride_dym, stride_dhm, stride_hm, cols)
    norm = Norm(centered, weight_offset)
    sums = Sums(weight_dtype is not None, bias_dtype is not None)
    kernel = norm_backward_kernel if config.whole_row else norm_backward_wide_kernel
    return _Launches(
        config,
        config.block_m if config.whole_row else config.weight_block_m,
        kernel.bind(
            config.num_warps,
            fresh=("dx_ptr", "dresidual_ptr", "partials_ptr"),
            layout=layout,
            dropout=Dropout(*dropout_scalars(dropout_p)),
            NORM=norm,
            BLOCKS=Blocks(config.block_m, config.block_n, divisor),
            **({"SUMS": sums} if config.whole_row else {}),
        ),
        norm_backward_weight_kernel.bind(
            num_warps=4,
            fresh=("partials_ptr",),
            layout=layout,
            NORM=norm,
            SUMS=sums,
            BLOCKS=Blocks(config.weight_block_m, config.weight_block_n, divisor),
        ),
        norm_backward_sum_kernel.bind(
            num_warps=4,
            fresh=("partials_ptr", "dweight_ptr", "dbias_ptr"),
            cols=cols,
            BLOCK_M=SUM_BLOCK_M,
            BLOCK_N=SUM_BLOCK_N,
        ),
        allocator(device),
    )
