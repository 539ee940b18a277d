r"""LayerNorm and RMSNorm, forward, with the residual addition and dropout before them.

One family of kernels serves both: LayerNorm centres a row first (CENTERED), RMSNorm does not.
For each row, with d = dropout and mean = mean(h) if CENTERED else 0:

    h    = d(x) + residual                  (h = x without a residual)
    rstd = 1 / sqrt(mean((h - mean)^2) + eps)
    n    = (h - mean) * rstd
    y    = n * (weight + WEIGHT_OFFSET) + bias

x, residual, h and y are (..., cols); weight and bias are (cols,); statistics are (..., 2), mean and
rstd side by side, or (..., 1), rstd alone unless CENTERED. h (rounded to the dtype it is stored in)
and statistics are saved for the backward. Tiles, statistics and sums are float32, or float64 for
float64 tensors. CASTING says where the forward rounds, so that it gives the bits of the models that
define it:

    float32   nowhere before the output: torch.nn.RMSNorm; Gemma, with WEIGHT_OFFSET = 1
    llama     n is rounded to h's dtype before the weight
    t5        n is rounded to the weight's dtype before the weight, if that is a 16-bit dtype

A row that fits the registers is read once. A wider one is read in column tiles, twice: the second
read comes from the L2 cache.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible, dropout_keep
from ..config import cdiv, device_target, norm_forward_config
from ..launch import (
    MOST_BOUND,
    Allocate,
    allocator,
    common_divisor,
    contiguous_strides,
    dropout_scalars,
    empty_rows,
    launchable,
    rows_and_empty,
    rows_of,
)


@triton.constexpr_function
def hidden_dtype(x_ptr, hidden_ptr):
    """The dtype of h: that of x where there is no residual."""
    return x_ptr.dtype.element_ty if hidden_ptr is None else hidden_ptr.dtype.element_ty


@triton.jit
def hidden_tile(
    x_ptr,
    residual_ptr,
    seed_ptr,
    hidden_ptr,
    stride_xm,
    stride_rm,
    row,
    first_col,
    rows,
    cols,
    dropout_threshold,
    dropout_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of h = dropout(x) + residual, stored and rounded if hidden_ptr is given."""
    ACC: tl.constexpr = accumulator_dtype(x_ptr)
    offs_n = first_col + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (offs_n < cols)[None, :]  # (BLOCK_M, BLOCK_N)
    hidden = tl.load(x_ptr + (row * stride_xm)[:, None] + offs_n[None, :], mask, other=0.0).to(ACC)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        keep = dropout_keep(seed, row, first_col, dropout_threshold, BLOCK_M, BLOCK_N)
        hidden = tl.where(keep, hidden * dropout_scale, 0.0)
    if residual_ptr is not None:
        residual_offsets = (row * stride_rm)[:, None] + offs_n[None, :]
        hidden += tl.load(residual_ptr + residual_offsets, mask, other=0.0).to(ACC)
    if hidden_ptr is not None:
        rounded = hidden.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + (row * cols)[:, None] + offs_n[None, :], rounded, mask)
        # The backward sees the rounded h, so the statistics have to be those of the rounded h.
        hidden = rounded.to(ACC)
    return hidden


@triton.jit
def affine(
    normalized,
    weight_ptr,
    bias_ptr,
    offs_n,
    mask_n,
    HIDDEN_DTYPE: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    CASTING: tl.constexpr,
):
    """y = n * (weight + WEIGHT_OFFSET) + bias for a tile of rows, rounding n as CASTING says."""
    ACC: tl.constexpr = normalized.dtype
    if CASTING == "llama":
        normalized = normalized.to(HIDDEN_DTYPE).to(ACC)
    if weight_ptr is not None:
        if CASTING == "t5" and weight_ptr.dtype.element_ty.primitive_bitwidth == 16:
            normalized = normalized.to(weight_ptr.dtype.element_ty).to(ACC)
        weight = tl.load(weight_ptr + offs_n, mask_n, other=0.0).to(ACC) + WEIGHT_OFFSET
        normalized *= weight[None, :]
    if bias_ptr is not None:
        normalized += tl.load(bias_ptr + offs_n, mask_n, other=0.0).to(ACC)[None, :]
    return normalized


@triton.jit
def rstd_place(row, CENTERED: tl.constexpr):
    """Where a row's rstd stands in statistics; its mean stands before it."""
    return 2 * row + 1 if CENTERED else row


@triton.jit
def without_correction(variance, correction):
    """The variance about the mean from that about the estimate of the mean.

    A variance that has overflowed stays infinite, and its row becomes zero as in PyTorch; the
    difference of two infinities would be NaN.
    """
    return tl.where(variance < float("inf"), variance - correction * correction, variance)


@launchable
@triton.jit(do_not_specialize=["rows"])
def norm_forward_kernel(
    # tensors
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    hidden_ptr,
    statistics_ptr,
    # strides and sizes
    stride_xm,
    stride_rm,
    rows,
    cols,
    # scalars
    eps,
    dropout_threshold,
    dropout_scale,
    # flags
    CENTERED: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    CASTING: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a tile of BLOCK_M whole rows."""
    stride_xm = divisible(stride_xm, DIVISOR)
    stride_rm = divisible(stride_rm, DIVISOR)
    cols = divisible(cols, DIVISOR)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = row < rows
    mask_n = offs_n < cols
    hidden = hidden_tile(
        x_ptr,
        residual_ptr,
        seed_ptr,
        hidden_ptr,
        stride_xm,
        stride_rm,
        row,
        0,
        rows,
        cols,
        dropout_threshold,
        dropout_scale,
        BLOCK_M,
        BLOCK_N,
    )
    if CENTERED:
        # A float32 sum of numbers far from zero is off by more than a mean may be: what is left
        # after subtracting the first estimate corrects it.
        estimate = tl.sum(hidden, 1) / cols  # (BLOCK_M,)
        hidden = tl.where(mask_n[None, :], hidden - estimate[:, None], 0.0)
        correction = tl.sum(hidden, 1) / cols
        variance = without_correction(tl.sum(hidden * hidden, 1) / cols, correction)
        hidden -= correction[:, None]
        tl.store(statistics_ptr + 2 * row, estimate + correction, mask_m)
    else:
        variance = tl.sum(hidden * hidden, 1) / cols
    rstd = tl.rsqrt(variance + eps)
    tl.store(statistics_ptr + rstd_place(row, CENTERED), rstd, mask_m)
    y = affine(
        hidden * rstd[:, None],
        weight_ptr,
        bias_ptr,
        offs_n,
        mask_n,
        hidden_dtype(x_ptr, hidden_ptr),
        WEIGHT_OFFSET,
        CASTING,
    )
    tl.store(
        y_ptr + (row * cols)[:, None] + offs_n[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask_m[:, None] & mask_n[None, :],
    )


@launchable
@triton.jit(do_not_specialize=["rows"])
def norm_forward_wide_kernel(
    # tensors
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    hidden_ptr,
    statistics_ptr,
    # strides and sizes
    stride_xm,
    stride_rm,
    rows,
    cols,
    # scalars
    eps,
    dropout_threshold,
    dropout_scale,
    # flags
    CENTERED: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    CASTING: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a row (BLOCK_M = 1), in column tiles: statistics first, then the output."""
    stride_xm = divisible(stride_xm, DIVISOR)
    stride_rm = divisible(stride_rm, DIVISOR)
    cols = divisible(cols, DIVISOR)
    ACC: tl.constexpr = accumulator_dtype(x_ptr)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)  # (1,)
    # Welford's mean and sum of squares of each lane's own elements, merged after the loop: sums
    # over the whole row would lose the digits that they cancel.
    lane_mean = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    lane_squares = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first_col in range(0, cols, BLOCK_N):
        hidden = hidden_tile(
            x_ptr,
            residual_ptr,
            seed_ptr,
            hidden_ptr,
            stride_xm,
            stride_rm,
            row,
            first_col,
            rows,
            cols,
            dropout_threshold,
            dropout_scale,
            BLOCK_M,
            BLOCK_N,
        )
        if CENTERED:
            mask_n = first_col + tl.arange(0, BLOCK_N) < cols
            delta = tl.where(mask_n[None, :], hidden - lane_mean, 0.0)
            lane_mean += delta / (first_col // BLOCK_N + 1)
            lane_squares += delta * (hidden - lane_mean)
        else:
            lane_squares += hidden * hidden
    estimate = tl.zeros((BLOCK_M,), ACC)
    correction = tl.zeros((BLOCK_M,), ACC)
    variance = tl.sum(lane_squares, 1) / cols
    if CENTERED:
        lane_count = ((cols - tl.arange(0, BLOCK_N) + BLOCK_N - 1) // BLOCK_N)[None, :]
        estimate = tl.sum(lane_mean, 1) / BLOCK_N
        lane_mean -= estimate[:, None]
        correction = tl.sum(lane_mean * lane_count, 1) / cols
        variance += tl.sum(lane_mean * lane_mean * lane_count, 1) / cols
        variance = without_correction(variance, correction)
        tl.store(statistics_ptr + 2 * row, estimate + correction)
    rstd = tl.rsqrt(variance + eps)
    tl.store(statistics_ptr + rstd_place(row, CENTERED), rstd)

    # The second pass may read an element of h that another thread of this program has written.
    tl.debug_barrier()
    for first_col in range(0, cols, BLOCK_N):
        offs_n = first_col + tl.arange(0, BLOCK_N)
        mask_n = offs_n < cols
        if hidden_ptr is not None:
            hidden_offsets = (row * cols)[:, None] + offs_n[None, :]
            hidden = tl.load(hidden_ptr + hidden_offsets, mask_n[None, :], other=0.0).to(ACC)
        else:
            x_offsets = (row * stride_xm)[:, None] + offs_n[None, :]
            hidden = tl.load(x_ptr + x_offsets, mask_n[None, :], other=0.0).to(ACC)
        y = affine(
            (hidden - estimate[:, None] - correction[:, None]) * rstd[:, None],
            weight_ptr,
            bias_ptr,
            offs_n,
            mask_n,
            hidden_dtype(x_ptr, hidden_ptr),
            WEIGHT_OFFSET,
            CASTING,
        )
        y_offsets = (row * cols)[:, None] + offs_n[None, :]
        tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask_n[None, :])


def norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    dropout_p: float,
    hidden_dtype: torch.dtype,
    centered: bool,
    casting: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Launch the forward: (y, h, statistics), h only with a residual."""
    *leading, cols = x.shape
    dtype = x.dtype
    statistics_shape = (*leading, 2 if centered else 1)
    statistics_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    rows_x, stride_xm, y = rows_and_empty(x, cols, dtype)
    hidden = None if residual is None else empty_rows(x, hidden_dtype)
    elements = x.numel()
    if elements == 0:
        return y, hidden, x.new_empty(statistics_shape, dtype=statistics_dtype)

    if weight is not None:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    stride_rm = 0
    if residual is not None:
        residual, stride_rm = rows_of(residual, cols)
    launch, block_m, empty = _bound_launch(
        cols,
        stride_xm,
        stride_rm,
        weight_offset,
        dropout_p,
        hidden_dtype,
        centered,
        casting,
        x.device,
    )
    statistics = empty(statistics_shape, contiguous_strides(statistics_shape), statistics_dtype)
    rows = elements // cols
    launch(
        (cdiv(rows, block_m), 1, 1),
        x_ptr=rows_x,
        residual_ptr=residual,
        weight_ptr=weight,
        bias_ptr=bias,
        seed_ptr=seed,
        y_ptr=y,
        hidden_ptr=hidden,
        statistics_ptr=statistics,
        rows=rows,
        eps=eps,
    )
    return y, hidden, statistics


@functools.lru_cache(MOST_BOUND)
def _bound_launch(
    cols: int,
    stride_xm: int,
    stride_rm: int,
    weight_offset: float,
    dropout_p: float,
    hidden_dtype: torch.dtype,
    centered: bool,
    casting: str,
    device: torch.device,
) -> tuple[Callable[..., None], int, Allocate]:
    """The launch of the kernel that fits, with all that a model repeats, its rows of a tile, and
    what allocates on the device."""
    config = norm_forward_config(cols, device_target(device.index))
    dropout_threshold, dropout_scale = dropout_scalars(dropout_p)
    kernel = norm_forward_kernel if config.whole_row else norm_forward_wide_kernel
    launch = kernel.bind(
        config.num_warps,
        # hidden_dtype is an argument for the sake of this.
        fresh=("y_ptr", "hidden_ptr", "statistics_ptr"),
        stride_xm=stride_xm,
        stride_rm=stride_rm,
        cols=cols,
        dropout_threshold=dropout_threshold,
        dropout_scale=dropout_scale,
        CENTERED=centered,
        WEIGHT_OFFSET=weight_offset,
        CASTING=casting,
        DIVISOR=common_divisor(cols, stride_xm, stride_rm),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )
    return launch, config.block_m, allocator(device)
