"""What the norms' backward kernels do with one tile: reading n and dy, storing the results.

The names are those of backward.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common import divisible
from ..row_tiles import drop, load_tile, store_tile
from .forward_tiles import locate_rstd


class Layout(NamedTuple):
    """How the backward's rows lie in memory; those of all outputs are contiguous."""

    stride_dy: Any
    stride_dhidden: Any
    stride_hidden: Any
    cols: Any


class Sums(NamedTuple):
    """Which gradients that are sums over rows are wanted, as a constexpr."""

    weight: bool
    bias: bool


class Saved(NamedTuple):
    """What n and dy are read from."""

    dy: Any
    hidden: Any
    statistics_ptr: Any


class Gradients(NamedTuple):
    """Where h's gradient comes from besides y, and where it goes to."""

    dhidden: Any
    dx: Any
    dresidual: Any
    seed_ptr: Any
    dropout: Any


class NormalizedTile(NamedTuple):
    """Tiles of n and of dy, and the rows' rstd."""

    n: Any
    dy: Any
    rstd: Any


@triton.jit
def divide_layout(layout, DIVISOR: tl.constexpr):
    """The layout, in a form that shows the compiler that DIVISOR divides it."""
    return Layout(
        divisible(layout.stride_dy, DIVISOR),
        divisible(layout.stride_dhidden, DIVISOR),
        divisible(layout.stride_hidden, DIVISOR),
        divisible(layout.cols, DIVISOR),
    )


@triton.jit
def load_normalized(saved, tile, NORM: tl.constexpr):
    """Read a tile of h and one of dy, and normalize h by the statistics of its rows."""
    dy = load_tile(saved.dy, tile)
    hidden = load_tile(saved.hidden, tile)
    statistics_ptr = saved.statistics_ptr
    rstd = tl.load(statistics_ptr + locate_rstd(tile.row, NORM), tile.mask_m, other=0.0)
    if NORM.centered:
        hidden -= tl.load(statistics_ptr + 2 * tile.row, tile.mask_m, other=0.0)[:, None]
    return NormalizedTile(hidden * rstd[:, None], dy, rstd)


@triton.jit
def store_input_gradients(dhidden, gradients, tile):
    """Add the gradient that h's own users send, and store dresidual and dx = dropout(dh)."""
    if gradients.dhidden.pointer is not None:
        dhidden += load_tile(gradients.dhidden, tile)
    if gradients.dresidual.pointer is not None:
        store_tile(gradients.dresidual, tile, dhidden)
    if gradients.seed_ptr is not None:
        dhidden = drop(dhidden, tile, gradients.seed_ptr, gradients.dropout)
    store_tile(gradients.dx, tile, dhidden)


@triton.jit
def store_partials(dweight, dbias, partials_ptr, program, offs_n, cols, SUMS: tl.constexpr):
    """Sum the tiles over their rows and store that as a program's partial rows.

    partials are (programs, sums, cols): of the two sums those that are wanted, dweight's first.
    """
    sums: tl.constexpr = SUMS.weight + SUMS.bias
    partial = program.to(tl.int64) * sums * cols + offs_n
    if SUMS.weight:
        tl.store(partials_ptr + partial, tl.sum(dweight, 0), offs_n < cols)
    if SUMS.bias:
        tl.store(partials_ptr + partial + SUMS.weight * cols, tl.sum(dbias, 0), offs_n < cols)
