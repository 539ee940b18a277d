r"""LayerNorm and RMSNorm, forward, with the residual addition and dropout before them.

One family of kernels serves both: LayerNorm centres a row first (`centered`), RMSNorm does not.
For each row, with d = dropout and mean = mean(h) if centered, else 0:

    h    = d(x) + residual                  (h = x without a residual)
    rstd = 1 / sqrt(mean((h - mean)^2) + eps)
    n    = (h - mean) * rstd
    y    = n * (weight + weight_offset) + bias

x, residual, h and y are (..., cols), each of its own dtype; weight and bias are (cols,); statistics
are (..., 2), mean and rstd side by side, or (..., 1), rstd alone unless centered. h (rounded to the
dtype it is stored in) and statistics are saved for the backward. Tiles, statistics and sums are
float32, or float64 for float64 tensors. `casting` says where the forward rounds, so that it gives
the bits of the models that define it:

    float32   nowhere before the output: torch.nn.RMSNorm; Gemma, with weight_offset = 1
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

from ..common import divisible
from ..config import cdiv, device_target
from ..launch import (
    MOST_BOUND,
    Allocate,
    allocator,
    common_divisor,
    contiguous_strides,
    dropout_scalars,
    empty_rows,
    flatten_rows,
    launchable,
    prepare_rows,
)
from ..row_tiles import Blocks, Dropout, place_tile, store_tile
from ..structures import Rows
from .config import norm_forward_config
from .forward_tiles import (
    Addends,
    Layout,
    Norm,
    hidden_dtype,
    load_hidden,
    normalize_rows,
    scale_and_shift,
)
from .forward_wide import norm_forward_wide_kernel


@launchable
@triton.jit(do_not_specialize=["rows"])
def norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    hidden_ptr,
    statistics_ptr,
    rows,
    eps,
    layout,
    dropout,
    NORM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a tile of BLOCK_M whole rows."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    cols = divisible(layout.cols, BLOCKS.divisor)
    x = Rows(x_ptr, divisible(layout.stride_x, BLOCKS.divisor))
    residual = Rows(residual_ptr, divisible(layout.stride_residual, BLOCKS.divisor))
    addends = Addends(x, residual, Rows(hidden_ptr, cols), seed_ptr, dropout)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    tile = place_tile(row, 0, rows, cols, BLOCKS.block_n)
    y = scale_and_shift(
        normalize_rows(load_hidden(addends, tile), tile, cols, eps, statistics_ptr, NORM),
        weight_ptr,
        bias_ptr,
        tile,
        hidden_dtype(x_ptr, hidden_ptr),
        NORM,
    )
    store_tile(Rows(y_ptr, cols), tile, y)


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
    out_dtype: torch.dtype,
    centered: bool,
    casting: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Launch the forward: (y, h, statistics), h only with a residual."""
    *leading, cols = x.shape
    dtype = x.dtype
    statistics_shape = (*leading, 2 if centered else 1)
    statistics_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    rows_x, stride_xm, y = prepare_rows(x, cols, out_dtype)
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
        residual, stride_rm = flatten_rows(residual, cols)
    launch, block_m, empty = _bound_launch(
        cols,
        stride_xm,
        stride_rm,
        weight_offset,
        dropout_p,
        hidden_dtype,
        out_dtype,
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
    out_dtype: torch.dtype,
    centered: bool,
    casting: str,
    device: torch.device,
) -> tuple[Callable[..., None], int, Allocate]:
    """The launch of the kernel that fits, with all that a model repeats, its rows of a tile, and
    what allocates on the device."""
    config = norm_forward_config(cols, device_target(device.index))
    divisor = common_divisor(cols, stride_xm, stride_rm)
    kernel = norm_forward_kernel if config.whole_row else norm_forward_wide_kernel
    launch = kernel.bind(
        config.num_warps,
        # hidden_dtype and out_dtype are arguments for the sake of this.
        fresh=("y_ptr", "hidden_ptr", "statistics_ptr"),
        layout=Layout(stride_xm, stride_rm, cols),
        dropout=Dropout(*dropout_scalars(dropout_p)),
        NORM=Norm(centered, weight_offset, casting),
        BLOCKS=Blocks(config.block_m, config.block_n, divisor),
    )
    return launch, config.block_m, allocator(device)
