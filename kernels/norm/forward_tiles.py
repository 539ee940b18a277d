"""What the norms' forward kernels do with one tile: reading h, and the output from a normalized h.

The names are those of forward.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..row_tiles import drop, load_tile, store_tile


class Norm(NamedTuple):
    """Which norm it is, as a constexpr."""

    centered: bool
    weight_offset: float
    casting: str | None = None
    """Where the forward rounds, which the backward is not told."""


class Layout(NamedTuple):
    """How the forward's rows lie in memory."""

    stride_x: Any
    stride_residual: Any
    cols: Any


class Addends(NamedTuple):
    """What h is the sum of, and the rows in which it is kept if there is a residual."""

    x: Any
    residual: Any
    hidden: Any
    seed_ptr: Any
    dropout: Any


@triton.constexpr_function
def hidden_dtype(x_ptr, hidden_ptr):
    """The dtype of h: that of x where there is no residual."""
    return x_ptr.dtype.element_ty if hidden_ptr is None else hidden_ptr.dtype.element_ty


@triton.jit
def load_hidden(addends, tile):
    """A tile of h = dropout(x) + residual, stored and rounded if it is to be kept."""
    hidden = load_tile(addends.x, tile)
    if addends.seed_ptr is not None:
        hidden = drop(hidden, tile, addends.seed_ptr, addends.dropout)
    if addends.residual.pointer is not None:
        hidden += load_tile(addends.residual, tile)
    if addends.hidden.pointer is not None:
        rounded = hidden.to(addends.hidden.pointer.dtype.element_ty)
        store_tile(addends.hidden, tile, rounded)
        # The backward sees the rounded h, so the statistics have to be those of the rounded h.
        hidden = rounded.to(hidden.dtype)
    return hidden


@triton.jit
def scale_and_shift(
    normalized, weight_ptr, bias_ptr, tile, HIDDEN_DTYPE: tl.constexpr, NORM: tl.constexpr
):
    """A tile of y = n * (weight + weight_offset) + bias, where n is rounded as `casting` says."""
    ACC: tl.constexpr = normalized.dtype
    if NORM.casting == "llama":
        normalized = normalized.to(HIDDEN_DTYPE).to(ACC)
    if weight_ptr is not None:
        if NORM.casting == "t5" and weight_ptr.dtype.element_ty.primitive_bitwidth == 16:
            normalized = normalized.to(weight_ptr.dtype.element_ty).to(ACC)
        weight = tl.load(weight_ptr + tile.offs_n, tile.mask_n, other=0.0).to(ACC)
        normalized *= (weight + NORM.weight_offset)[None, :]
    if bias_ptr is not None:
        normalized += tl.load(bias_ptr + tile.offs_n, tile.mask_n, other=0.0).to(ACC)[None, :]
    return normalized


@triton.jit
def locate_rstd(row, NORM: tl.constexpr):
    """Where a row's rstd stands in statistics; its mean stands before it."""
    return 2 * row + 1 if NORM.centered else row


@triton.jit
def normalize_rows(hidden, tile, cols, eps, statistics_ptr, NORM: tl.constexpr):
    """A tile of whole rows, normalized; their statistics are stored."""
    if NORM.centered:
        # A float32 sum of numbers far from zero is off by more than a mean may be: what is left
        # after subtracting the first estimate corrects it.
        estimate = tl.sum(hidden, 1) / cols  # (BLOCK_M,)
        hidden = tl.where(tile.mask_n[None, :], hidden - estimate[:, None], 0.0)
        correction = tl.sum(hidden, 1) / cols
        variance = correct_variance(tl.sum(hidden * hidden, 1) / cols, correction)
        hidden -= correction[:, None]
        tl.store(statistics_ptr + 2 * tile.row, estimate + correction, tile.mask_m)
    else:
        variance = tl.sum(hidden * hidden, 1) / cols
    rstd = tl.rsqrt(variance + eps)
    tl.store(statistics_ptr + locate_rstd(tile.row, NORM), rstd, tile.mask_m)
    return hidden * rstd[:, None]


@triton.jit
def correct_variance(variance, correction):
    """The variance about the mean from that about the estimate of the mean.

    A variance that has overflowed stays infinite, and its row becomes zero as in PyTorch; the
    difference of two infinities would be NaN.
    """
    return tl.where(variance < float("inf"), variance - correction * correction, variance)
