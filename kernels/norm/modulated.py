r"""LayerNorm and RMSNorm, modulated by sample, as diffusion transformers have them (adaLN).

With n of forward.py, for the rows of each sample b:

    y       = n * (1 + scale_b) + shift_b
    g       = dy * (1 + scale_b)
    dx      = rstd * (g - [mean(g) if centered] - n * mean(g * n))
    dscale_b = sum over the sample's rows of dy * n
    dshift_b = sum over the sample's rows of dy

x and y are (B, tokens, cols), scale and shift (B, cols) with rows at any distance, as slices of a
wider product have them. Tiles, statistics and sums are float32, or float64 for float64 tensors; y
is rounded once. A program of the backward walks tiles of one sample and writes one partial row of
each sum; the rows are added in a fixed order.

Rows too wide for the registers, which no such model has, go sample by sample through the kernels of
forward.py and backward.py.
"""

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible
from ..config import WIDEST_BACKWARD_ROW, cdiv, choose_width, find_target
from ..launch import common_divisor, empty_rows, flatten_rows, launchable, prepare_rows
from ..row_tiles import Blocks, load_tile, place_tile, store_tile
from ..structures import Rows, make_rows, restore_rows
from .backward import norm_backward
from .backward_tiles import Saved, Sums, load_normalized, store_partials
from .config import norm_backward_config, norm_forward_config
from .forward import norm_forward
from .forward_tiles import Norm, normalize_rows, scale_and_shift


@triton.jit
def skip_rows(rows, first):
    """The rows from one on."""
    return Rows(rows.pointer + first * rows.stride, rows.stride)


@triton.jit
def locate_statistics(row, NORM: tl.constexpr):
    """Where a row's statistics begin."""
    return 2 * row if NORM.centered else row


@launchable
@triton.jit(do_not_specialize=["tokens"])
def modulated_norm_forward_kernel(
    x_view: Rows,
    scale_view: Rows,
    shift_view: Rows,
    y_ptr,
    statistics_ptr,
    tokens,
    cols,
    eps,
    NORM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a tile of BLOCK_M whole rows of one sample."""
    cols = divisible(cols, BLOCKS.divisor)
    blocks = tl.cdiv(tokens, BLOCKS.block_m)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCKS.block_m
    row = sample * tokens + first + tl.arange(0, BLOCKS.block_m)
    tile = place_tile(row, 0, (sample + 1) * tokens, cols, BLOCKS.block_n)
    x = restore_rows(x_view, BLOCKS.divisor)
    scale = restore_rows(scale_view, BLOCKS.divisor)
    shift = restore_rows(shift_view, BLOCKS.divisor)
    y = scale_and_shift(
        normalize_rows(load_tile(x, tile), tile, cols, eps, statistics_ptr, NORM),
        scale.pointer + sample * scale.stride,
        shift.pointer + sample * shift.stride,
        tile,
        x.pointer.dtype.element_ty,
        NORM,
    )
    store_tile(Rows(y_ptr, cols), tile, y)


@launchable
@triton.jit(do_not_specialize=["tokens", "splits"])
def modulated_norm_backward_kernel(
    dy_view: Rows,
    x_view: Rows,
    scale_view: Rows,
    statistics_ptr,
    dx_ptr,
    partials_ptr,
    tokens,
    splits,
    cols,
    NORM: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`splits` programs a sample, each walking every splits-th tile of BLOCK_M of its rows."""
    ACC: tl.constexpr = accumulator_dtype(x_view.pointer)
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    cols = divisible(cols, BLOCKS.divisor)
    sample = (tl.program_id(0) // splits).to(tl.int64)
    first = sample * tokens
    dy_rows = skip_rows(restore_rows(dy_view, BLOCKS.divisor), first)
    x = skip_rows(restore_rows(x_view, BLOCKS.divisor), first)
    dx_rows = skip_rows(Rows(dx_ptr, cols), first)
    saved = Saved(dy_rows, x, statistics_ptr + locate_statistics(first, NORM))
    offs_n = tl.arange(0, BLOCK_N)
    scale = restore_rows(scale_view, BLOCKS.divisor)
    scale_ptr = scale.pointer + sample * scale.stride
    factor = 1.0 + tl.load(scale_ptr + offs_n, offs_n < cols, other=0.0).to(ACC)[None, :]
    dscale = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    dshift = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for block in range(tl.program_id(0) % splits, tl.cdiv(tokens, BLOCK_M), splits):
        row = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # of the sample's
        tile = place_tile(row, 0, tokens, cols, BLOCK_N)
        n, dy, rstd = load_normalized(saved, tile, NORM)
        if SUMS.weight:
            dscale = tl.fma(dy, n, dscale)
        if SUMS.bias:
            dshift += dy
        dy *= factor
        dx = tl.fma(-n, (tl.sum(dy * n, 1) / cols)[:, None], dy)
        if NORM.centered:
            dx -= (tl.sum(dy, 1) / cols)[:, None]
        store_tile(dx_rows, tile, dx * rstd[:, None])
    store_partials(dscale, dshift, partials_ptr, tl.program_id(0), offs_n, cols, SUMS)


def modulated_norm_forward(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, centered: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward: (y, statistics), of x (B, tokens, cols)."""
    samples, tokens, cols = x.shape
    if choose_width(cols) > WIDEST_BACKWARD_ROW and x.numel() > 0:
        parts = [
            norm_forward(
                a, None, b, c, None, eps, 1.0, 0.0, x.dtype, x.dtype, bool(centered), "float32"
            )
            for a, b, c in zip(x, scale, shift, strict=True)
        ]
        return torch.stack([y for y, *_ in parts]), torch.stack([s for *_, s in parts])
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    statistics = x.new_empty((samples, tokens, 2 if centered else 1), dtype=dtype)
    rows, stride_xm, y = prepare_rows(x, cols, x.dtype)
    if x.numel() == 0:
        return y, statistics
    scale, stride_scale = flatten_rows(scale, cols)
    shift, stride_shift = flatten_rows(shift, cols)
    config = norm_forward_config(cols, find_target(x))
    divisor = common_divisor(cols, stride_xm, stride_scale, stride_shift)
    modulated_norm_forward_kernel.launch(
        (samples * cdiv(tokens, config.block_m),),
        num_warps=config.num_warps,
        x_view=make_rows(rows, stride_xm),
        scale_view=make_rows(scale, stride_scale),
        shift_view=make_rows(shift, stride_shift),
        y_ptr=y,
        statistics_ptr=statistics,
        tokens=tokens,
        cols=cols,
        eps=eps,
        NORM=Norm(bool(centered), 1.0, "float32"),
        BLOCKS=Blocks(config.block_m, config.block_n, divisor),
    )
    return y, statistics


def modulated_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    statistics: torch.Tensor,
    scale_dtype: torch.dtype | None,
    shift_dtype: torch.dtype | None,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch the backward: (dx, dscale, dshift), the sums None where no dtype is given for them."""
    samples, tokens, cols = x.shape
    if x.numel() == 0:
        dscale = None if scale_dtype is None else scale.new_zeros(scale.shape, dtype=scale_dtype)
        dshift = None if shift_dtype is None else scale.new_zeros(scale.shape, dtype=shift_dtype)
        return empty_rows(x, x.dtype), dscale, dshift
    if choose_width(cols) > WIDEST_BACKWARD_ROW:
        options = (1.0, 0.0, x.dtype, None, scale_dtype, shift_dtype, centered)
        given = zip(dy, x, scale, statistics, strict=True)
        parts = [norm_backward(a, None, b, c, s, None, *options) for a, b, c, s in given]
        dxs, _, dscales, dshifts = zip(*parts, strict=True)
        return (
            torch.stack(dxs),
            None if scale_dtype is None else torch.stack(dscales),
            None if shift_dtype is None else torch.stack(dshifts),
        )
    rows, stride_xm, dx = prepare_rows(x, cols, x.dtype)
    dy, stride_dym = flatten_rows(dy, cols)
    scale, stride_scale = flatten_rows(scale, cols)
    config = norm_backward_config(cols, find_target(x))
    splits = min(cdiv(tokens, config.block_m), cdiv(config.most_programs, samples))
    sums = Sums(scale_dtype is not None, shift_dtype is not None)
    summed = int(sums.weight) + int(sums.bias)
    partials = None
    if summed:
        partials = statistics.new_empty((samples, splits, summed, cols))
    modulated_norm_backward_kernel.launch(
        (samples * splits,),
        num_warps=config.num_warps,
        dy_view=make_rows(dy, stride_dym),
        x_view=make_rows(rows, stride_xm),
        scale_view=make_rows(scale, stride_scale),
        statistics_ptr=statistics,
        dx_ptr=dx,
        partials_ptr=partials,
        tokens=tokens,
        splits=splits,
        cols=cols,
        NORM=Norm(centered, 1.0),
        SUMS=sums,
        BLOCKS=Blocks(
            config.block_m,
            config.block_n,
            common_divisor(cols, stride_xm, stride_dym, stride_scale),
        ),
    )
    if partials is None:
        return dx, None, None
    # Two sums, for no output may be a part of another's memory.
    dscale = None if scale_dtype is None else partials[:, :, 0].sum(1).to(scale_dtype)
    dshift = None if shift_dtype is None else partials[:, :, -1].sum(1).to(shift_dtype)
    return dx, dscale, dshift
