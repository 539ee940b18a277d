r"""LayerNorm and RMSNorm, backward: the gradients of `norm_forward`'s inputs.

With the names of norm_forward.py and g = dy * (weight + WEIGHT_OFFSET), for each row:

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

from ..common import accumulator_dtype, divisible
from ..config import NormBackwardConfig, cdiv, device_target, norm_backward_config
from ..launch import (
    MOST_BOUND,
    Allocate,
    allocator,
    common_divisor,
    dropout_scalars,
    empty_rows,
    launchable,
    rows_and_empty,
    rows_of,
)
from .backward_tiles import normalized_and_gradient, store_input_gradients, store_partials
from .backward_wide import norm_backward_weight_kernel, norm_backward_wide_kernel

# The tile of partial rows that one step of the last summation adds.
SUM_BLOCK_M = 32
SUM_BLOCK_N = 64


@launchable
@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    # tensors
    dy_ptr,
    dhidden_ptr,
    hidden_ptr,
    weight_ptr,
    statistics_ptr,
    seed_ptr,
    dx_ptr,
    dresidual_ptr,
    partials_ptr,
    # strides and sizes
    stride_dym,
    stride_dhm,
    stride_hm,
    rows,
    cols,
    # scalars
    dropout_threshold,
    dropout_scale,
    # flags
    CENTERED: tl.constexpr,
    SUM_WEIGHT: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A fixed number of programs, each walking every num_programs-th tile of BLOCK_M whole rows.

    Each writes the sums over its own rows of dweight, dbias or both, see `store_partials`.
    """
    stride_dym = divisible(stride_dym, DIVISOR)
    stride_dhm = divisible(stride_dhm, DIVISOR)
    stride_hm = divisible(stride_hm, DIVISOR)
    cols = divisible(cols, DIVISOR)
    ACC: tl.constexpr = accumulator_dtype(hidden_ptr)
    program = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < cols
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs_n, mask_n, other=0.0).to(ACC)[None, :] + WEIGHT_OFFSET
    dweight = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), ACC)

    for tile in range(program, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # (BLOCK_M,)
        normalized, dy, rstd = normalized_and_gradient(
            dy_ptr,
            hidden_ptr,
            statistics_ptr,
            stride_dym,
            stride_hm,
            row,
            offs_n,
            rows,
            cols,
            CENTERED,
        )
        if SUM_WEIGHT:
            dweight += dy * normalized
        if SUM_BIAS:
            dbias += dy
        if weight_ptr is not None:
            dy *= weight
        dhidden = dy - normalized * (tl.sum(dy * normalized, 1) / cols)[:, None]
        if CENTERED:
            dhidden -= (tl.sum(dy, 1) / cols)[:, None]
        store_input_gradients(
            dhidden * rstd[:, None],
            seed_ptr,
            dhidden_ptr,
            dx_ptr,
            dresidual_ptr,
            stride_dhm,
            row,
            0,
            rows,
            cols,
            dropout_threshold,
            dropout_scale,
            BLOCK_M,
            BLOCK_N,
        )

    store_partials(dweight, dbias, partials_ptr, program, offs_n, cols, SUM_WEIGHT, SUM_BIAS)


@triton.jit
def sum_partial_rows(
    partials_ptr,
    sum_ptr,
    stride,
    partials,
    cols,
    offs_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum as many rows as there are partials at the columns offs_n, in a fixed order."""
    mask_n = offs_n < cols
    total = tl.zeros((BLOCK_M, BLOCK_N), partials_ptr.dtype.element_ty)
    for first in range(0, partials, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask = (offs_m < partials)[:, None] & mask_n[None, :]
        offsets = (offs_m.to(tl.int64) * stride)[:, None] + offs_n[None, :]
        total += tl.load(partials_ptr + offsets, mask, other=0.0)
    tl.store(sum_ptr + offs_n, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask_n)


@launchable
@triton.jit(do_not_specialize=["partials"])
def norm_backward_sum_kernel(
    # tensors
    partials_ptr,
    dweight_ptr,
    dbias_ptr,
    # sizes
    partials,
    cols,
    # blocks
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dweight and dbias from partial rows, see `store_partials`, one column tile a program."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    stride = cols if dweight_ptr is None or dbias_ptr is None else 2 * cols
    if dweight_ptr is not None:
        sum_partial_rows(
            partials_ptr, dweight_ptr, stride, partials, cols, offs_n, BLOCK_M, BLOCK_N
        )
        partials_ptr += cols
    if dbias_ptr is not None:
        sum_partial_rows(partials_ptr, dbias_ptr, stride, partials, cols, offs_n, BLOCK_M, BLOCK_N)


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
    hidden, stride_hm, dx = rows_and_empty(hidden, cols, x_dtype)
    elements = hidden.numel()
    if elements == 0:
        dweight = None if weight_dtype is None else hidden.new_zeros(cols, dtype=weight_dtype)
        dbias = None if bias_dtype is None else hidden.new_zeros(cols, dtype=bias_dtype)
        return dx, dresidual, dweight, dbias

    if weight is not None:
        weight = weight.contiguous()
    dy, stride_dym = rows_of(dy, cols)
    stride_dhm = 0
    if dhidden is not None:
        dhidden, stride_dhm = rows_of(dhidden, cols)
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

    if config.whole_row:
        inputs(
            (programs, 1, 1),
            dy_ptr=dy,
            dhidden_ptr=dhidden,
            hidden_ptr=hidden,
            weight_ptr=weight,
            statistics_ptr=statistics,
            seed_ptr=seed,
            dx_ptr=dx,
            dresidual_ptr=dresidual,
            partials_ptr=partials,
            rows=rows,
        )
    else:
        inputs(
            (rows,),
            dy_ptr=dy,
            dhidden_ptr=dhidden,
            hidden_ptr=hidden,
            weight_ptr=weight,
            statistics_ptr=statistics,
            seed_ptr=seed,
            dx_ptr=dx,
            dresidual_ptr=dresidual,
            rows=rows,
        )
        if partials is not None:
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
    summed = {"SUM_WEIGHT": weight_dtype is not None, "SUM_BIAS": bias_dtype is not None}
    dropout_threshold, dropout_scale = dropout_scalars(dropout_p)
    kernel = norm_backward_kernel if config.whole_row else norm_backward_wide_kernel
    return _Launches(
        config,
        config.block_m if config.whole_row else config.weight_block_m,
        kernel.bind(
            config.num_warps,
            fresh=("dx_ptr", "dresidual_ptr", "partials_ptr"),
            stride_dym=stride_dym,
            stride_dhm=stride_dhm,
            stride_hm=stride_hm,
            cols=cols,
            dropout_threshold=dropout_threshold,
            dropout_scale=dropout_scale,
            CENTERED=centered,
            WEIGHT_OFFSET=weight_offset,
            DIVISOR=divisor,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            **(summed if config.whole_row else {}),
        ),
        norm_backward_weight_kernel.bind(
            num_warps=4,
            fresh=("partials_ptr",),
            stride_dym=stride_dym,
            stride_hm=stride_hm,
            cols=cols,
            CENTERED=centered,
            **summed,
            DIVISOR=divisor,
            BLOCK_M=config.weight_block_m,
            BLOCK_N=config.weight_block_n,
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
